"""Tiny text-to-image pipelines of diffusers with random weights, made without any download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

T5_WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁blue", "▁shoe", "▁shirt", "s", "h", "o", "e"]
CLIP_WORDS = ["a</w>", "red</w>", "blue</w>", "shoe</w>", "shirt</w>", "<|startoftext|>", "<|endoftext|>"]


def tiny_t5(width: int = 16) -> tuple[Any, Any]:
    """Return a T5 tokenizer of a few words, and a random encoder."""
    import transformers

    config = transformers.T5Config(
        vocab_size=len(T5_WORDS),
        d_model=width,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    words = [(word, -float(i > 2)) for i, word in enumerate(T5_WORDS)]
    return transformers.T5Tokenizer(vocab=words, extra_ids=0), transformers.T5EncoderModel(config)


def tiny_clip(width: int = 8, projection: int | None = None) -> tuple[Any, Any]:
    """Return a CLIP tokenizer of a few words, and a random text encoder, with a projection if its width is given."""
    import transformers

    letters = sorted({letter for word in CLIP_WORDS[:-2] for letter in word.removesuffix("</w>")})
    words = [*letters, *(f"{letter}</w>" for letter in letters), *CLIP_WORDS]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(words))}, merges=[])
    tokenizer.model_max_length = 12
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        projection_dim=projection or 8,
    )
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return tokenizer, kind(config)


def shifted_vae(channels: int = 4) -> AutoencoderKL:
    """Return a random VAE of factor 2, without a quantised layer and with a shift, as those of SD 3 and Flux."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=8,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_sd3_pipeline(folder: Path, t5: bool = True, scheduler: Any = None, **changes: Any) -> Path:
    """Save a StableDiffusion3Pipeline for images of 8×8 pixels.

    Arguments:
        folder: The folder, which is created.
        t5: Whether the pipeline has the third text encoder.
        scheduler: The scheduler; by default that of SD 3.
        changes: Other arguments of the transformer.
    """
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 14,
        "pos_embed_max_size": 4,
    }
    tokenizer, encoder = tiny_clip(8, 6)
    tokenizer_2, encoder_2 = tiny_clip(12, 8)
    tokenizer_3, encoder_3 = tiny_t5(24) if t5 else (None, None)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**arguments, **changes}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if scheduler is None else scheduler,
        vae=shifted_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)
    return folder


def make_flux_pipeline(folder: Path, dev: bool = True, scheduler: Any = None, **changes: Any) -> Path:
    """Save a FluxPipeline for images of any size that is a multiple of 4 pixels.

    Arguments:
        folder: The folder, which is created.
        dev: Whether the network takes a scale of guidance, as FLUX.1 dev does, and times are shifted dynamically.
        scheduler: The scheduler; by default that of FLUX.1 dev or schnell.
        changes: Other arguments of the transformer.
    """
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": dev,
    }
    tokenizer, encoder = tiny_clip(8)
    tokenizer_2, encoder_2 = tiny_t5(24)
    of_dev = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 4, "max_image_seq_len": 64}
    FluxPipeline(
        transformer=FluxTransformer2DModel(**{**arguments, **changes}),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**(of_dev if dev else {"shift": 1.0})),
        vae=shifted_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)
    return folder
