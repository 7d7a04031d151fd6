"""Backbones of timm: the head of any of them, weights of the full size, and what happens without a network."""
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from bridgexfer.backbones import ARCHS, backbone, create_backbone, input_config, model_name, reset_head, untrained
from bridgexfer.evaluation import features
from bridgexfer.images import as_images

# timm's own small models, of unlike build
TINY = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "test_byobnet")


@pytest.fixture
def on_disk(monkeypatch, tmp_path): # instead of the hub, weights that were never there
    asked = []
    def give(id, file, revision=None):
        asked.append((id, file))
        torch.manual_seed(7)
        model = timm.create_model(id.split("/")[-1], pretrained=False)
        save_file(model.state_dict(), path := tmp_path/file)
        return str(path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", give)
    return asked


def test_the_papers_architectures_have_a_stated_tag_that_timm_knows():
    for arch in ("resnet18", "resnet50", "vit_base", "vit_large"):
        b = backbone(arch)
        cfg = timm.get_pretrained_cfg(ARCHS[arch].timm_name)
        assert "." in b.timm_name and b.why and not b.shipped
        assert cfg.hf_hub_id and (cfg.num_classes, cfg.input_size[-1]) == (b.source_classes, b.size) == (1000, 224)
    assert backbone("vit_base").timm_name.split(".")[1] == backbone("vit_large").timm_name.split(".")[1] # one recipe


@pytest.mark.parametrize("arch", TINY)
def test_the_head_of_any_timm_model_is_found_and_exchanged(arch):
    model = untrained(arch, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    head = {id(p) for p in model.get_classifier().parameters()}
    kept = [k for k, p in model.named_parameters() if id(p) not in head]
    reset_head(model, 7, seed=0)
    after = model.state_dict()
    assert kept and all(torch.equal(before[k], after[k]) for k in kept) # nothing but the head changed
    assert model.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_weights_of_the_full_size_are_read_from_safetensors(on_disk):
    model = create_backbone("resnet18")
    assert on_disk == [("timm/resnet18.tv_in1k", "model.safetensors")]
    torch.manual_seed(7)
    there = timm.create_model("resnet18", pretrained=False).state_dict()
    assert all(torch.equal(v, there[k]) for k, v in model.state_dict().items()) and model.num_classes == 1000
    fresh = create_backbone("resnet18", 37, seed=1)
    assert fresh.num_classes == 37 and torch.equal(fresh.conv1.weight, model.conv1.weight)
    images = as_images(torch.randint(256, (3, 256, 256, 3)).numpy(), [0, 1, 0], ("a", "b"))
    assert features(fresh, images).shape == (3, 512)


def test_any_pretrained_timm_model_serves_as_backbone(on_disk):
    model = create_backbone("test_vit.r160_in1k", 3)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 3) and input_config(model).size == 160


@pytest.mark.parametrize("arch", [*ARCHS, "test_vit.r160_in1k", "vit_small_patch14_dinov2.lvd142m"])
def test_a_model_knows_its_input(arch):
    "What timm says of the weights, and ours of those that ship; a fresh head changes nothing of it."
    b = backbone(arch)
    cfg = timm.get_pretrained_cfg(b.timm_name)
    model = untrained(arch, 5)
    mean, std = ((0.5,) * 3, (0.5,) * 3) if b.shipped else (tuple(cfg.mean), tuple(cfg.std))
    assert input_config(model) == input_config(reset_head(model, 3, 0)) == (b.size, mean, std, b.seen)
    assert model_name(model) == (f"{b.timm_name}.{arch}" if b.shipped else f"{cfg.architecture}.{cfg.tag}")


def test_shipped_weights_claim_no_other_origin():
    for arch in (a for a, b in ARCHS.items() if b.shipped):
        cfg = create_backbone(arch).pretrained_cfg
        assert not {"url", "hf_hub_id", "license", "paper_ids"} & set(cfg) and cfg["num_classes"] == 37


def test_a_saved_model_opens_with_its_input(tmp_path):
    from timm.models import save_for_hf
    save_for_hf(create_backbone("mini_vit", 3), tmp_path/"saved", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}/saved", pretrained=True)
    assert input_config(again) == input_config(create_backbone("mini_vit")) and again.num_classes == 3


def test_a_model_that_was_trained_without_labels_has_no_source_head():
    arch = "vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(ValueError, match="no source head.*number of classes"): create_backbone(arch)


def test_without_the_hub_the_error_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = r"resnet18\.tv_in1k.*timm/resnet18\.tv_in1k.*cache .*HF_HUB_OFFLINE is set: unset it.*\.$"
    with pytest.raises(OSError, match=said) as e: create_backbone("resnet18")
    assert len(str(e.value).splitlines()) == 1 and e.value.__cause__ is None and e.value.__suppress_context__


def test_weights_as_pickle_alone_are_rejected(monkeypatch, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError
    asked = []
    def only_pickle(id, file, revision=None):
        asked.append(file)
        if not file.endswith(".bin"): raise LocalEntryNotFoundError(f"no {file}")
        torch.save({}, path := tmp_path/file)
        return str(path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", only_pickle)
    with pytest.raises(OSError, match="has no model.safetensors"): create_backbone("resnet18")
    assert asked == ["model.safetensors"]
