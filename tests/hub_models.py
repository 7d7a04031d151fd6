"""Repositories in the layout that the hub really has, made from the shipped miniature and from random weights."""
import json

from bridgexfer.artefacts import PACKAGE
from hub import Repository

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD_COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
CLIP = "openai/clip-vit-base-patch32"
CLIP_MAIN = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268" # has no safetensors
CLIP_COMMIT = "c237dc49a33fc61debc9276459120b7eac67e7ef" # has them
RESNET = "timm/resnet18.tv_in1k"
RESNET_COMMIT = "bbd144b3e5565108aad885f145491d11bc6ce807"
UNUSED = b"fetched, though nothing opens it"

PROCESSOR = {"crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
             "size": 32, "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.5] * 3,
             "image_std": [0.5] * 3}
COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
              "safety_checker": "model"}


def shipped(kind):
    "The files of a shipped model."
    folder = PACKAGE/"weights"/kind
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def as_json(value): return json.dumps(value, indent=2).encode()


def twins(folder, stem):
    "Other forms of a component's weights."
    torch_stem = "pytorch_model" if stem == "model" else stem
    return {f"{folder}/{name}": UNUSED for name in (
        f"{torch_stem}.bin", f"{torch_stem}.fp16.bin", f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors")}


def stable_diffusion():
    "Stable Diffusion 1.5's file list, with the miniature's networks."
    used = shipped("pipeline")
    index = json.loads(used["model_index.json"])
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True,
              "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    used |= {"model_index.json": as_json(index), "feature_extractor/preprocessor_config.json": as_json(PROCESSOR)}
    unused = {name: UNUSED for name in (
        ".gitattributes", "README.md", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned-emaonly.ckpt",
        "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "v1-inference.yaml", "safety_checker/config.json",
        "safety_checker/model.safetensors")}
    for folder, stem in COMPONENTS.items(): unused |= twins(folder, stem)
    return used, Repository({SD_COMMIT: used | unused}, {"main": SD_COMMIT})


def clip():
    "CLIP's file list: `main` has no safetensors, a commit of a pull request has."
    used = shipped("clip") | {"preprocessor_config.json": as_json(PROCESSOR)}
    weights = used.pop("model.safetensors")
    others = {name: UNUSED for name in (
        ".gitattributes", "README.md", "flax_model.msgpack", "pytorch_model.bin", "tf_model.h5")}
    main, request = used | others, used | others | {"model.safetensors": weights}
    refs = {"main": CLIP_MAIN, "refs/pr/66": CLIP_COMMIT}
    return used | {"model.safetensors": weights}, Repository({CLIP_MAIN: main, CLIP_COMMIT: request}, refs)


def resnet18():
    "timm's file list, with random weights."
    import timm # not at the top: most tests of the hub do without
    import torch
    from safetensors.torch import save
    torch.manual_seed(0)
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    config = {"architecture": "resnet18", "num_classes": 1000, "num_features": 512}
    used = {"model.safetensors": save(state)}
    unused = {name: UNUSED for name in (".gitattributes", "README.md", "pytorch_model.bin")}
    return used, Repository({RESNET_COMMIT: used | unused | {"config.json": as_json(config)}}, {"main": RESNET_COMMIT})


def full_size():
    "Repository -> (the files of it that are opened, what the hub has of it), of the profiles `evening` and `paper`."
    return {SD: stable_diffusion(), CLIP: clip(), RESNET: resnet18()}
