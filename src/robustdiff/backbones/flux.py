r"""Text-conditional ``FluxTransformer2DModel`` of diffusers on latents (FluxPipeline: FLUX.1 dev and schnell).

Flux (Black Forest Labs, 2024) is a flow-matching model: x_t = (1 − σ) x_0 + σ ε, and the network predicts ε − x_0 at
the time σ ∈ [0, 1]. Each token of the network holds 2×2 latents, those in the rows 2i, 2i + 1 and columns 2j, 2j + 1
of every channel, and has the position (0, i, j); tokens of text have the position 0.

The network is called with T5's embeddings of a caption (``encoder_hidden_states``) and CLIP's pooled embedding
(``pooled_projections``).

FLUX.1 dev is distilled from classifier-free guidance, and takes its scale as an argument (``guidance_embeds`` in the
configuration). The scale is 3.5 by default, as in diffusers' pipeline and training scripts. It is a setting of training
(``model.guidance``) and of sampling (``--guidance``), with one evaluation in each step. That of training is stored as
``_guidance`` in the network's configuration, or with an adapter, and is then the default of sampling. Networks without
it are guided as other models are, with two evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from robustdiff.backbones.backbone import BACKBONES
from robustdiff.backbones.mmdit import LARGEST_SIZE, MMDiT, caption, check_config
from robustdiff.conditions.clip_t5 import FluxText, load_flux_text
from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError
from robustdiff.loading import Components, check_forward, shown
from robustdiff.samplers.guidance import check_guidance

__all__ = ["Flux", "pack", "unpack"]


@BACKBONES.register("flux")
class Flux(MMDiT):
    """A pretrained ``FluxTransformer2DModel`` on latents. The arguments are those of :class:`MMDiT`."""

    kind = "FluxPipeline"
    linear_levels = True
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {
        ("diffusers", "FluxTransformer2DModel"): FluxTransformer2DModel
    }
    others: ClassVar[frozenset[str]] = frozenset({"vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"})

    def __init__(self, network: Any, text: Condition | None = None, factor: int = 8) -> None:
        super().__init__(network, text, factor)
        self.guidance = network.config.get("_guidance", 3.5) if network.config.guidance_embeds else None

    @staticmethod
    def _prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
        check_config(config, path, tensors, ("num_layers", "num_single_layers"))
        scale = config.get("_guidance", 3.5)
        if not (type(scale) in (int, float) and scale >= 0 and math.isfinite(scale)):
            raise InputError(f"{path}: _guidance={shown(scale)} is no scale of guidance: save the model again")

    @staticmethod
    def _check(network: Any, path: Path) -> None:
        channels = network.config.in_channels
        if channels % 4:
            raise InputError(f"{path}: in_channels={channels} is no number of channels of 2×2 latents: correct it")
        with torch.device("meta"):
            guidance = torch.ones(1) if network.config.guidance_embeds else None
            positions = {"txt_ids": torch.zeros(2, 3), "img_ids": torch.zeros(4, 3)}
        arguments = {**caption(network.config), **positions, "guidance": guidance}
        check_forward(lambda x, t: network(x, timestep=t, **arguments), (4, channels), path)

    @staticmethod
    def _load_text(folder: Path, components: Components, config: Any) -> FluxText:
        return load_flux_text(folder, config.joint_attention_dim, config.pooled_projection_dim)

    def take_guidance(self, scale: float) -> None:
        if self.guidance is None:
            super().take_guidance(scale)
        self.guidance = scale
        self.network.register_to_config(_guidance=scale)

    def embed_guidance(self, scale: float, like: Tensor) -> dict[str, Tensor] | None:
        if self.guidance is None:
            return None
        check_guidance(scale)
        return {"guidance": like.new_full((len(like),), scale, dtype=torch.float32)}

    def bind(self, network: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, **condition: Any) -> Tensor:
            if self.guidance is not None and "guidance" not in condition:
                condition |= self.embed_guidance(self.guidance, x) or {}
            out = network(
                pack(x),
                timestep=t / 1000,
                encoder_hidden_states=encoder_hidden_states,
                txt_ids=x.new_zeros(encoder_hidden_states.shape[1], 3, dtype=torch.float32),
                img_ids=_positions(x),
                **condition,
            ).sample
            return unpack(out, x.shape[2], x.shape[3])

        return call

    @property
    def channels(self) -> int:
        """The number of channels of the latents."""
        return int(self.network.config.in_channels // 4)

    @property
    def default_size(self) -> int:
        return 128  # as in diffusers' pipeline

    @property
    def largest_size(self) -> int:
        return LARGEST_SIZE

    @property
    def multiple(self) -> int:
        """The side of the latents in one token."""
        return 2


def pack(x: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H/2 · W/2, 4C) of 2×2 latents each.

    Raises:
        InputError: If a side is odd.
    """
    batch, channels, height, width = x.shape
    if height % 2 or width % 2:
        raise InputError(f"Flux takes latents of even height and width, not {height}×{width}: choose another size")
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (B, H/2 · W/2, 4C) as latents (B, C, H, W): the inverse of :func:`pack`."""
    x = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def _positions(x: Tensor) -> Tensor:
    """Return the positions (H/2 · W/2, 3) of the tokens of latents (B, C, H, W)."""
    rows, columns = (torch.arange(side // 2, device=x.device, dtype=torch.float32) for side in x.shape[2:])
    i, j = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(i), i, j], dim=-1).flatten(0, 1)
