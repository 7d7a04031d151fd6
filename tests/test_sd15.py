"""A pipeline of Stable Diffusion 1.5's true shape, with random weights, through generation and style inversion."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bridgexfer.artefacts import spec_hash
from bridgexfer.study.benchmarks import write_sd15
from bridgexfer.images import as_images
from bridgexfer.generation import synthesis_spec
from bridgexfer.models import load_pipeline, load_token
from bridgexfer.style_inversion import inversion_spec, invert, token_words
from bridgexfer.synthetic_sets import SyntheticSet, generate

pytestmark = pytest.mark.slow # some minutes and 8 GiB of memory


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    "The folder layout of the hub, safetensors alone, with the safety checker named but not there."
    torch.manual_seed(0)
    return write_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def pipe(sd15): return load_pipeline(str(sd15), "bfloat16")


def test_it_has_the_published_size_and_no_safety_checker(pipe):
    def size(network): return sum(p.numel() for p in network.parameters())
    published = {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863} # counted on the published weights
    assert {name: size(getattr(pipe, name)) for name in published} == published
    assert pipe.safety_checker is None and pipe.unet.dtype == torch.bfloat16


def test_generation_for_a_step(sd15, pipe, tmp_path):
    spec = synthesis_spec(str(sd15), ("cat",), steps=1, size=512, stored_size=256, format="jpeg", precision="bfloat16",
                          batch=1, shard=1)
    made = generate(spec, tmp_path, 1, pipe=pipe, progress=False)
    image = made.images(1).pixels[0]
    assert image.shape == (256, 256, 3) and image.std() > 0 and not SyntheticSet(made.folder).verify()
    assert "256 pixels, jpeg" in (made.folder/"README.md").read_text(encoding="utf-8")


def test_style_inversion_for_a_step(sd15, pipe, tmp_path):
    rng = np.random.default_rng(0)
    images = as_images(rng.integers(256, size=(1, 512, 512, 3)), [0], ("cat",))
    before = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    spec = inversion_spec(str(sd15), images, "pets", "style", steps=1, lr=5e-3, batch=1, init="photo", size=512)
    folder = invert(spec, images, tmp_path, pipe=pipe, label=None)
    word, = token_words(spec)
    vector = load_file(folder/"learned_embeds.safetensors")[word]
    assert vector.shape[-1] == 768 and torch.isfinite(vector).all() and folder.name == spec_hash(spec)
    [table] = [v for k, v in before.items() if k.endswith("embeddings.token_embedding.weight")]
    start = table[pipe.tokenizer.convert_tokens_to_ids("photo</w>")]
    assert not torch.equal(vector.flatten().float(), start.float()) # a step was taken
    after = pipe.text_encoder.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()) # and nothing else has moved
    assert load_token(pipe, folder) == (word,) and word in pipe.tokenizer.get_vocab()
