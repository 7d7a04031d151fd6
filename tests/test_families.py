"""Each family of text-to-image models × what can be done with one: against diffusers' own calls, or the sentence."""
import re
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from bridgexfer.artefacts import read_json
from bridgexfer.generation import check_family, check_lengths, check_model, plan, sample, synthesis_spec, with_lora
from bridgexfer.images import as_images
from bridgexfer.lora import TARGETS, adapt, lora_spec
from bridgexfer.models import FAMILIES, OFFLOADS, family_of, find_family, find_weights, load_pipeline, load_token, place
from bridgexfer.models import ADAPTER, adaptable, adapted, adapter_weights, lora_files, runs_on, what_families_do
from bridgexfer.models import why_no_lora, why_not_adapted, why_not_inverted
from bridgexfer.style_inversion import denoising_loss, inversion_spec, invert, noise_schedule, noisy
from bridgexfer.synthetic_sets import SyntheticSet, generate, shard_path
from bridgexfer.user_prompts import user_prompts
from families import TINY, save

NAMES = ("one", "two")
SIZE = 16
BY_LOOP = [name for name in TINY if name.startswith("sd-") or name == "sd"]
BY_CALL = [name for name in TINY if name not in BY_LOOP]
TABLE = what_families_do()


def able(task, yes=True):
    "The tiny models whose row of the table says that they can do something, or that they cannot."
    return [name for name, (_, row, _) in TINY.items() if (not TABLE[row][task]) == yes]


def cells(task, names, works=True):
    "A test of a task on some tiny models; works: ● of the table, otherwise its –."
    def marked(test):
        test.cells = {(name, done, works) for name in names for done in task.split(", ")}
        return pytest.mark.parametrize("name", names)(test)
    return marked


class Tiny:
    "A tiny model of a family."
    def __init__(self, name, folder):
        self.folder, self.row, fields = str(folder), *TINY[name][1:]
        self.pipe = load_pipeline(self.folder)
        self.spec = synthesis_spec(self.folder, NAMES, size=SIZE, batch=4, shard=1, **fields)

    def draw(self, spec=None, **real):
        spec = spec or self.spec
        rows = plan(spec, 0, 1)
        return sample(self.pipe, [r.prompt for r in rows], [r.seed for r in rows], spec, **real)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, pipe):
    "A tiny model by its name."
    made = {}
    def open_one(name):
        if name not in made: made[name] = Tiny(name, save(name, tmp_path_factory.mktemp("tiny")/name, pipe.tokenizer))
        return made[name]
    return open_one


@pytest.fixture(scope="module")
def real():
    "Two real images of each class."
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    return as_images(pixels, np.array([0, 1, 0, 1]), NAMES)


def asked(spec):
    "A spec as arguments of a pipeline."
    rows = plan(spec, 0, 1)
    return dict(prompt=[r.prompt for r in rows], generator=[torch.Generator().manual_seed(r.seed) for r in rows],
                num_inference_steps=spec.steps, guidance_scale=spec.guidance, output_type="np")


def as_pixels(output): return (np.asarray(output.images) * 255).round().astype(np.uint8)


def drawn_by_diffusers(model, lora=None):
    "The images of a tiny model's spec by its pipeline's own call."
    pipe = load_pipeline(model.folder)
    if model.spec.scheduler == "DDIM": pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    if lora: pipe.load_lora_weights(str(lora))
    return as_pixels(pipe(**asked(model.spec), height=SIZE, width=SIZE))


def away(a, b): return np.abs(a.astype(int) - b).max() # of 255


# ---- which family

@pytest.mark.parametrize("name", TINY)
def test_a_family_is_told_from_a_pipeline_and_from_its_configuration(name, tiny):
    model = tiny(name)
    assert family_of(model.pipe) == find_family(model.folder) == FAMILIES[model.row]


def test_every_row_of_the_table_has_a_tiny_model(): assert {row for _, row, _ in TINY.values()} == set(FAMILIES)


def test_the_table():
    rows = {task: [row for row in TABLE if not TABLE[row][task]] for task in TABLE["LCM"]}
    learn = [rows.pop("invert"), rows.pop("learn a LoRA")]
    assert learn == [["Stable Diffusion 1, 2 base, Turbo", "Stable Diffusion 2"]] * 2
    assert rows == dict.fromkeys(("generate", "resume", "verify", "image-to-image", "draw with a LoRA"), list(FAMILIES))


def test_every_cell_of_the_table_is_tested():
    "As it is computed, for every tiny model of its row; a new family or task without tests is missed here."
    tests = [test for name, test in globals().items() if name.startswith("test_") and hasattr(test, "cells")]
    tested = set().union(*(test.cells for test in tests))
    wanted = {(name, task, not reason) for name, (_, row, _) in TINY.items() for task, reason in TABLE[row].items()}
    assert tested == wanted


def test_every_dash_is_a_sentence_of_its_own():
    for row, tasks in TABLE.items():
        reasons = [reason for reason in tasks.values() if reason]
        assert len(set(reasons)) == len(reasons)
        assert all(FAMILIES[row].pipeline in reason and reason.endswith(".") for reason in reasons)


# ---- generate

@cells("generate", TINY)
def test_images_are_those_of_diffusers(name, tiny):
    model = tiny(name)
    spec = model.spec
    theirs = drawn_by_diffusers(model)
    assert away(model.draw(), theirs) <= (0 if name in BY_CALL else 1)
    assert away(model.draw(replace(spec, batch=1)), theirs) <= 2 # rounding


@pytest.mark.parametrize("name", ["sd", "sd-v", "xl", "sd3"])
def test_without_guidance_0_and_1_are_the_same(name, tiny):
    model = tiny(name)
    none, one, some = (model.draw(replace(model.spec, guidance=w)) for w in (0, 1, 4))
    assert np.array_equal(none, one) and not np.array_equal(one, some)


def without_weights(model, folder):
    "A copy of a model's folder that has its configuration alone."
    shutil.copytree(model.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return replace(model.spec, model=str(folder), weights=find_weights(str(folder)))


@pytest.mark.parametrize(("name", "fields", "said"), [
    ("flux-schnell", dict(guidance=3.5), "trained to do without guidance and ignores 3.5: set guidance = 0"),
    ("xl", dict(guidance=0.5), "StableDiffusionXLPipeline ignores a guidance of 0.5"),
    ("xl-turbo", dict(negative="blurred"), "Without guidance, at 0, a negative prompt has no effect"),
    ("flux-dev", dict(negative="blurred"), "This FluxPipeline takes no negative prompt: leave it out"),
    ("lcm", dict(negative="blurred"), "This LatentConsistencyModelPipeline takes no negative prompt"),
    ("sd3", dict(style="<a>", templates="style", token_hash="1"), "StableDiffusion3Pipeline .text encoders: 3.: take")])
def test_what_a_family_lacks_is_said_before_weights_are_opened(name, fields, said, tiny, tmp_path):
    model = tiny(name)
    negative = fields.get("negative")
    if negative: fields = dict(prompts=user_prompts(NAMES, ["a {}"], negative=negative))
    spec = replace(without_weights(model, tmp_path/"model"), **fields)
    with pytest.raises(ValueError, match=said): generate(spec, tmp_path/"sets", 1, progress=False)
    with pytest.raises(ValueError, match=said): generate(spec, tmp_path/"sets", 1, pipe=model.pipe, progress=False)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(("name", "fields", "said"), [
    ("sd3", dict(scheduler="DDPM"), "DDPM does not fit StableDiffusion3Pipeline.*choose default"),
    ("flux-dev", dict(size=18), "size is a multiple of 4 for this model, got 18"),
    ("sd3", dict(size=17), "size is a multiple of 2 for this model, got 17")])
def test_what_a_model_lacks_is_said_before_any_work(name, fields, said, tiny):
    model = tiny(name)
    with pytest.raises(ValueError, match=said): check_model(model.pipe, replace(model.spec, **fields))


def test_a_negative_prompt_leads_away(tiny):
    model = tiny("sd3")
    spec = replace(model.spec, prompts=user_prompts(NAMES, ["a {}"], negative="blurred"))
    theirs = load_pipeline(model.folder)(**asked(spec), height=SIZE, width=SIZE, negative_prompt=["blurred"] * 2)
    assert np.array_equal(model.draw(spec), as_pixels(theirs))
    plain = replace(model.spec, prompts=user_prompts(NAMES, ["a {}"]))
    assert not np.array_equal(model.draw(spec), model.draw(plain))


def test_a_third_encoder_reads_256_tokens(tiny):
    pipe = tiny("sd3").pipe
    check_lengths(pipe, ["a" * 200])
    with pytest.raises(ValueError, match="longer than the 256 tokens"): check_lengths(pipe, ["a " * 200])
    check_lengths(tiny("flux-dev").pipe, ["a " * 200]) # 512


# ---- resume, verify

def contents(folder): return {p.name: p.read_bytes() for p in folder.glob("shard-*.parquet")}


@cells("resume, verify", TINY)
def test_a_set_is_resumed_verified_and_repaired(name, tiny, tmp_path):
    model = tiny(name)
    how = dict(pipe=model.pipe, progress=False)
    made = generate(model.spec, tmp_path, 2, **how)
    whole = contents(made.folder)
    assert len(whole) == 2 and made.verify() == []
    shard_path(made.folder, 1).unlink()
    assert generate(model.spec, tmp_path, 2, **how).new == [1] and contents(made.folder) == whole
    shard_path(made.folder, 0).write_bytes(whole["shard-00000.parquet"][:-100])
    assert [file for file, _ in made.verify()] == ["shard-00000.parquet"]
    assert made.verify(repair=True, **how) and contents(made.folder) == whole
    assert SyntheticSet(made.folder).images(2).pixels.shape == (4, SIZE, SIZE, 3)


# ---- image to image

def started(model, real, strength): return replace(model.spec, init_images=real.digest, strength=strength)


@pytest.mark.parametrize("name", BY_CALL)
def test_images_from_images_are_those_of_diffusers(name, tiny, real):
    model = tiny(name)
    spec = started(model, real, 0.5)
    theirs = diffusers.AutoPipelineForImage2Image.from_pipe(load_pipeline(model.folder))
    theirs.set_progress_bar_config(disable=True)
    steps = dict(num_inference_steps=spec.steps // 2) if name == "lcm" else {} # the steps that are run
    size = dict(height=SIZE, width=SIZE) if name.startswith(("flux", "sd3")) else {}
    images = [Image.fromarray(pixels) for pixels in real.pixels[:2]]
    theirs = as_pixels(theirs(**asked(spec) | steps, **size, image=images, strength=0.5))
    assert np.array_equal(model.draw(spec, init_images=real.pixels[:2]), theirs)
    one = model.draw(replace(spec, batch=1), init_images=real.pixels[:2])
    assert away(one, theirs) <= 2


@pytest.mark.parametrize("name", ["xl", "sd3", "flux-dev"])
def test_as_many_steps_are_run_as_are_meant(name, tiny, real):
    "7 / 25 × 25 is more than 7 in floating point, of which families that subtract make 8 steps."
    model = tiny(name)
    network = getattr(model.pipe, "unet", None) or model.pipe.transformer
    calls = []
    hook = network.register_forward_pre_hook(lambda *_: calls.append(1))
    model.draw(replace(started(model, real, 0.28), steps=25), init_images=real.pixels[:2])
    hook.remove()
    assert len(calls) == 7


@cells("image-to-image", TINY)
def test_the_ends_of_real_guidance(name, tiny, real):
    model = tiny(name)
    def drawn(strength): return model.draw(started(model, real, strength), init_images=real.pixels[:2])
    assert np.array_equal(drawn(1), model.draw())
    with torch.inference_mode():
        x = torch.from_numpy(real.pixels[:2]).permute(0, 3, 1, 2) / 127.5 - 1
        copy = model.pipe.vae.decode(model.pipe.vae.encode(x).latent_dist.mean).sample
    copy = ((copy / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert away(drawn(0), copy) <= 1
    assert len({drawn(s).tobytes() for s in (0, 0.5, 1)}) == 3


@pytest.mark.parametrize("name", ["sd", "xl-turbo", "flux-dev"])
def test_a_set_from_images_is_resumed(name, tiny, real, tmp_path):
    model = tiny(name)
    spec = started(model, real, 0.5)
    how = dict(pipe=model.pipe, progress=False, init_images=real)
    made = generate(spec, tmp_path, 2, **how)
    whole = contents(made.folder)
    shard_path(made.folder, 0).unlink()
    assert generate(spec, tmp_path, 2, **how).new == [0] and contents(made.folder) == whole and made.verify() == []


def test_strengths_that_run_no_step_are_rejected(tiny, real):
    spec = started(tiny("xl-turbo"), real, 0.35)
    with pytest.raises(ValueError, match="2 steps at strength 0.35 run no step .*at least 3 steps"):
        check_model(tiny("xl-turbo").pipe, spec)


def test_a_pipeline_without_a_twin_says_so(tiny, real):
    family = FAMILIES["SDXL, SDXL Turbo, SDXL Lightning"]._replace(pipeline="SanaPipeline")
    with pytest.raises(ValueError, match="no pipeline beside SanaPipeline"):
        check_family(family, started(tiny("xl"), real, 0.5))


# ---- invert

def learning(model, real, **fields):
    return inversion_spec(model.folder, real, "tiny", size=SIZE, init="photo", steps=4, batch=2, **fields)


@cells("invert", able("invert"))
def test_a_token_is_learned_resumed_and_read(name, tiny, real, tmp_path):
    model = tiny(name)
    spec = learning(model, real)
    folder = invert(spec, real, tmp_path/"tokens", model=model.folder)
    again = invert(spec, real, tmp_path/"again", pipe=model.pipe)
    file = "learned_embeds.safetensors"
    assert (folder/file).read_bytes() == (again/file).read_bytes()
    control = invert(replace(spec, steps=0), real, tmp_path/"tokens", pipe=model.pipe)
    assert (folder/file).read_bytes() != (control/file).read_bytes()
    fresh = load_pipeline(model.folder)
    [token] = load_token(fresh, folder)
    styled = replace(model.spec, templates="style", style=token, token_hash="1", token_folder=str(folder))
    assert generate(styled, tmp_path/"sets", 1, pipe=fresh, progress=False).verify() == []


def test_velocity_is_what_its_model_is_compared_with(tiny, real):
    "z_t and v give z_0 and the noise back, whatever the timestep."
    pipe = tiny("sd-v").pipe
    schedule = noise_schedule(pipe)
    moments = torch.cat([torch.randn(3, 4, 8, 8), torch.full((3, 4, 8, 8), -60.)], 1) # no variance
    t = torch.tensor([0, 500, 999])
    z_t, v = noisy(pipe, schedule, moments, t, torch.Generator().manual_seed(0))
    share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    z = share.sqrt() * z_t - (1 - share).sqrt() * v
    assert torch.allclose(z, moments[:, :4] * pipe.vae.config.scaling_factor, atol=1e-5)
    _, eps = noisy(tiny("sd").pipe, noise_schedule(tiny("sd").pipe), moments, t, torch.Generator().manual_seed(0))
    assert torch.allclose(v, share.sqrt() * eps - (1 - share).sqrt() * z, atol=1e-5)


@cells("invert", able("invert", False), works=False)
def test_what_cannot_be_inverted_says_so_before_any_work(name, tiny, real, tmp_path, monkeypatch):
    model = tiny(name)
    spec = learning(model, real)
    monkeypatch.setattr("bridgexfer.style_inversion.encode", lambda *a: pytest.fail("images were encoded"))
    wanted = why_not_inverted(FAMILIES[model.row])
    assert FAMILIES[model.row].pipeline in wanted
    with pytest.raises(ValueError) as e: invert(spec, real, tmp_path, pipe=model.pipe)
    assert str(e.value) == wanted
    with pytest.raises(ValueError) as e: denoising_loss(model.pipe, real, ["a", "b"] * 2, np.zeros((4, 8, 8, 8)))
    assert str(e.value) == wanted
    lean = without_weights(model, tmp_path/"lean") # nothing is opened either
    with pytest.raises(ValueError) as e: invert(replace(spec, weights=lean.weights), real, tmp_path, model=lean.model)
    assert str(e.value) == wanted and not list(tmp_path.glob("moments*"))


@cells("learn a LoRA", able("learn a LoRA", False), works=False)
def test_what_cannot_be_adapted_says_so_before_any_work(name, tiny, real, tmp_path):
    model = tiny(name)
    spec = lora_spec(model.folder, real, "tiny", steps=2, size=SIZE)
    with pytest.raises(ValueError, match=re.escape(why_not_adapted(FAMILIES[model.row]))):
        adapt(spec, real, tmp_path, pipe=model.pipe)
    lean = without_weights(model, tmp_path/"lean") # nothing is opened either
    with pytest.raises(ValueError, match=re.escape(why_not_adapted(FAMILIES[model.row]))):
        adapt(replace(spec, weights=lean.weights), real, tmp_path, model=lean.model)
    assert not list(tmp_path.glob("moments*"))


def test_a_token_of_another_family_is_not_read(tiny, real, tmp_path):
    "The first encoder of SDXL has as wide an embedding as Stable Diffusion 1, and would take its tokens."
    folder = invert(learning(tiny("sd"), real), real, tmp_path, pipe=tiny("sd").pipe)
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline \(text encoders: 2\)"):
        load_token(tiny("xl").pipe, folder)


def test_an_unknown_prediction_is_rejected():
    family = FAMILIES["Stable Diffusion 2"]._replace(prediction="sample")
    assert "this model predicts sample" in why_not_inverted(family)
    assert "distilled" in why_not_inverted(family._replace(guidance="input"))


# ---- LoRA

def own_lora(model, folder):
    "A LoRA of a tiny model's network, of random numbers, as diffusers saves it."
    pipe = load_pipeline(model.folder)
    name, network = next((name, getattr(pipe, name)) for name in ("unet", "transformer") if hasattr(pipe, name))
    network.add_adapter(LoraConfig(r=2, target_modules=list(TARGETS["unet"])), ADAPTER)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter_weights(network).values(): p.copy_(torch.randn(p.shape, generator=rng) / 2)
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    pipe.save_lora_weights(str(folder), **{f"{name}_lora_layers": convert_state_dict_to_diffusers(state)})
    return folder


@cells("draw with a LoRA", TINY)
def test_images_with_a_lora_are_those_of_diffusers(name, tiny, tmp_path):
    "Resumed, too, and the model is as it was afterwards."
    model = tiny(name)
    lora = own_lora(model, tmp_path/"lora")
    spec = with_lora(model.spec, lora)
    how = dict(pipe=model.pipe, progress=False)
    made = generate(spec, tmp_path/"sets", 2, **how)
    whole = contents(made.folder)
    shard_path(made.folder, 1).unlink()
    assert generate(spec, tmp_path/"sets", 2, **how).new == [1]
    assert contents(made.folder) == whole and made.verify() == []
    assert not any(getattr(network, "peft_config", None) for network in adaptable(model.pipe))
    with adapted(model.pipe, lora_files(lora)[0]): ours = model.draw()
    assert away(ours, drawn_by_diffusers(model, lora)) <= (0 if name in BY_CALL else 1)
    assert not np.array_equal(ours, model.draw())


@cells("learn a LoRA", able("learn a LoRA"))
def test_a_lora_is_learned_and_opened_by_diffusers(name, tiny, real, tmp_path):
    model = tiny(name)
    spec = lora_spec(model.folder, real, "tiny", steps=3, lr=0.1, batch=2, rank=2, size=SIZE)
    folder = adapt(spec, real, tmp_path/"loras", model=model.folder)
    again = adapt(spec, real, tmp_path/"again", pipe=model.pipe)
    assert lora_files(folder)[0].read_bytes() == lora_files(again)[0].read_bytes()
    made = generate(with_lora(model.spec, folder), tmp_path/"sets", 1, pipe=model.pipe, progress=False)
    ours = made.images(1).pixels
    assert away(ours, drawn_by_diffusers(model, folder)) <= 2 # rounding
    assert made.verify() == [] and not np.array_equal(ours, model.draw())


def test_a_pipeline_without_loras_says_so(tiny, tmp_path):
    family = FAMILIES["SDXL, SDXL Turbo, SDXL Lightning"]._replace(pipeline="KandinskyPipeline")
    spec = with_lora(tiny("xl").spec, own_lora(tiny("xl"), tmp_path))
    assert why_no_lora(family).startswith("diffusers puts no LoRA into a KandinskyPipeline")
    with pytest.raises(ValueError, match="no LoRA into a KandinskyPipeline"): check_family(family, spec)
    check_family(FAMILIES["SDXL, SDXL Turbo, SDXL Lightning"], spec)


# ---- offloading

class Moved:
    "A pipeline that notes how it is placed."
    def __init__(self): self.calls = []
    def to(self, device): self.calls.append(("to", device))
    def enable_model_cpu_offload(self, device): self.calls.append(("model", device))
    def enable_sequential_cpu_offload(self, device): self.calls.append(("sequential", device))


@pytest.mark.parametrize(("device", "offload", "called"), [
    ("cpu", "none", "to"), ("cpu", "sequential", "to"), ("cuda", "none", "to"), ("cuda", "model", "model"),
    ("cuda:1", "sequential", "sequential")])
def test_a_pipeline_is_placed(device, offload, called):
    pipe = Moved()
    place(pipe, device, offload)
    assert pipe.calls == [(called, device)]


def test_offloading_changes_no_spec(tiny):
    spec = tiny("sd").spec
    from bridgexfer.artefacts import spec_hash
    assert {spec_hash(replace(spec, offload=o)) for o in OFFLOADS} == {spec_hash(spec)}
    with pytest.raises(ValueError, match="Unknown offload 'disk': choose none, model, sequential"):
        replace(spec, offload="disk")
    assert runs_on(tiny("sd").pipe) == torch.device("cpu")
    assert "offload" not in read_json(tiny("sd").folder + "/model_index.json")


# ---- a single file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = { # of two levels of one layer: part of diffusers' names -> of the authors'
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1", "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1",
       "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm",
       "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample",
       "upsamplers.0": "upsample", "down_blocks": "down", "up_blocks.0": "up.1", "up_blocks.1": "up.0",
       "resnets": "block"}


def renamed(key, names):
    for old, new in names.items(): key = key.replace(old, new) if f".{old}." in f".{key}." else key
    return key


def single_file(pipe, path):
    "The weights of a Stable Diffusion 1 as its authors named them."
    from safetensors.torch import save_file
    state = {}
    for key, value in pipe.unet.state_dict().items():
        place = next(old for old in UNET if key.startswith(f"{old}."))
        rest = renamed(key.removeprefix(place), RESNET if "resnets" in place else {})
        state["model.diffusion_model." + UNET[place] + rest] = value
    for key, value in pipe.vae.state_dict().items():
        state["first_stage_model." + renamed(key, VAE)] = value
    for key, value in pipe.text_encoder.state_dict().items():
        prefix = "" if key.startswith("text_model.") else "text_model."
        state[f"cond_stage_model.transformer.{prefix}{key}"] = value
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)


def test_a_single_file_is_the_same_model(tiny, tmp_path):
    model = tiny("sd")
    file = tmp_path/"tiny.safetensors"
    single_file(model.pipe, file)
    with pytest.raises(FileNotFoundError, match="has weights alone: put the configuration .* into the folder"):
        synthesis_spec(str(file), NAMES)
    without_weights(model, tmp_path/"tiny")
    spec = replace(model.spec, model=str(file), weights=find_weights(str(file)))
    assert find_family(str(file)) == find_family(model.folder) and len(spec.weights) == 16
    made = generate(spec, tmp_path/"sets", 1, progress=False)
    assert np.array_equal(made.images(1).pixels, model.draw())
    config = tmp_path/"tiny"/"scheduler"/"scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert find_weights(str(file)) != spec.weights # the configuration decides, too
