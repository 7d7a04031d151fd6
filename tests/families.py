"""Tiny pipelines of each family of text-to-image models, random weights, as folders that `from_pretrained` opens."""
import copy

import diffusers as df
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers import T5Tokenizer

WIDTH = 8 # of a text encoder
TOKENS = 77


def t5_tokenizer(limit=512):
    "A tokenizer of T5's kind that knows letters."
    special = [(piece, 0.) for piece in ("<pad>", "</s>", "<unk>", "▁")]
    letters = [(c, -3.) for c in "abcdefghijklmnopqrstuvwxyz.,"]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=limit)


def t5(tokenizer):
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH * 2, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def clip_text(kind, tokenizer):
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1)
    config = CLIPTextConfig(hidden_size=WIDTH, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3,
                            projection_dim=WIDTH, vocab_size=len(tokenizer), max_position_embeddings=TOKENS, **ids)
    return kind(config)


def autoencoder(channels=4, **config):
    return df.AutoencoderKL(latent_channels=channels, block_out_channels=(4, 4), norm_num_groups=1, sample_size=16,
                            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                            **config)


def unet(**config):
    common = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
                  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH)
    return df.UNet2DConditionModel(**common | config)


def diffusion(**config): return dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)


def stable_diffusion(tokenizer, prediction="epsilon"):
    "Stable Diffusion 1 (epsilon) and 2 (v_prediction)."
    scheduler = df.DDIMScheduler(**diffusion(prediction_type=prediction, clip_sample=False, steps_offset=1))
    text = clip_text(CLIPTextModel, tokenizer)
    return df.StableDiffusionPipeline(autoencoder(), text, tokenizer, unet(), scheduler, None, None,
                                      requires_safety_checker=False)


def consistency(tokenizer):
    "A latent consistency model, which takes the guidance scale as an input."
    text = clip_text(CLIPTextModel, tokenizer)
    scheduler = df.LCMScheduler(**diffusion(original_inference_steps=50, clip_sample=False))
    return df.LatentConsistencyModelPipeline(autoencoder(), text, tokenizer, unet(time_cond_proj_dim=16), scheduler,
                                             None, None, requires_safety_checker=False)


def xl(tokenizer, scheduler=None):
    "Stable Diffusion XL: two text encoders."
    one = clip_text(CLIPTextModel, tokenizer)
    two = clip_text(CLIPTextModelWithProjection, tokenizer)
    network = unet(cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
                   projection_class_embeddings_input_dim=6 * 8 + WIDTH)
    scheduler = scheduler or df.EulerDiscreteScheduler(**diffusion(steps_offset=1, timestep_spacing="leading"))
    return df.StableDiffusionXLPipeline(autoencoder(), one, two, tokenizer, copy.deepcopy(tokenizer), network,
                                        scheduler, add_watermarker=False)


def turbo(tokenizer):
    "SDXL Turbo: few steps, no guidance."
    return xl(tokenizer, df.EulerAncestralDiscreteScheduler(**diffusion(timestep_spacing="trailing")))


def lightning(tokenizer):
    "SDXL Lightning: few steps, no guidance."
    return xl(tokenizer, df.EulerDiscreteScheduler(**diffusion(timestep_spacing="trailing")))


def three(tokenizer):
    "Stable Diffusion 3: three text encoders, flow matching."
    network = df.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH)
    one, two = (clip_text(CLIPTextModelWithProjection, tokenizer) for _ in range(2))
    third = t5_tokenizer()
    return df.StableDiffusion3Pipeline(network, df.FlowMatchEulerDiscreteScheduler(shift=3.), autoencoder(
        shift_factor=0.0609, scaling_factor=1.5305), one, tokenizer, two, copy.deepcopy(tokenizer), t5(third), third)


def flux(tokenizer, guided=True):
    "FLUX.1: dev takes the guidance scale as an input, schnell takes none."
    network = df.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=guided)
    second = t5_tokenizer()
    scheduler = df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided, shift=3. if guided else 1.)
    return df.FluxPipeline(scheduler, autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
                           clip_text(CLIPTextModel, tokenizer), tokenizer, t5(second), second, network)


def schnell(tokenizer): return flux(tokenizer, guided=False)


def velocity(tokenizer): return stable_diffusion(tokenizer, "v_prediction")


SD, VELOCITY, LCM = "Stable Diffusion 1, 2 base, Turbo", "Stable Diffusion 2", "LCM"
XL, SD3 = "SDXL, SDXL Turbo, SDXL Lightning", "Stable Diffusion 3, 3.5"
DEV, SCHNELL = "FLUX.1 dev", "FLUX.1 schnell"
TINY = { # name -> how to build one, its row of the table, fields of a spec that fit it
    "sd": (stable_diffusion, SD, dict(guidance=3.5, steps=4, scheduler="DDIM")),
    "sd-turbo": (stable_diffusion, SD, dict(guidance=0, steps=2, scheduler="default")),
    "sd-v": (velocity, VELOCITY, dict(guidance=3.5, steps=4, scheduler="DDIM")),
    "lcm": (consistency, LCM, dict(guidance=8, steps=4, scheduler="default")),
    "xl": (xl, XL, dict(guidance=5, steps=4, scheduler="default")),
    "xl-turbo": (turbo, XL, dict(guidance=0, steps=2, scheduler="default")),
    "xl-lightning": (lightning, XL, dict(guidance=1, steps=4, scheduler="default")),
    "sd3": (three, SD3, dict(guidance=4.5, steps=4, scheduler="default")),
    "flux-dev": (flux, DEV, dict(guidance=3.5, steps=4, scheduler="default")),
    "flux-schnell": (schnell, SCHNELL, dict(guidance=0, steps=4, scheduler="default"))}


def save(name, folder, tokenizer):
    "A tiny pipeline as a folder."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = TINY[name][0](tokenizer)
        pipe.save_pretrained(folder)
    return folder
