r"""Text-conditional ``SD3Transformer2DModel`` of diffusers on latents (StableDiffusion3Pipeline: SD 3 and 3.5).

It is the multimodal diffusion transformer of Esser et al., "Scaling Rectified Flow Transformers for High-Resolution
Image Synthesis", ICML 2024, arXiv 2403.03206, a flow-matching model: x_t = (1 − σ) x_0 + σ ε, and the network predicts
ε − x_0 at the time T σ. It is called with the token embeddings of a caption (``encoder_hidden_states``) and a pooled
embedding (``pooled_projections``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from robustdiff.backbones.backbone import BACKBONES
from robustdiff.backbones.mmdit import MMDiT, caption, check_config
from robustdiff.conditions.clip_t5 import StableDiffusion3Text, load_sd3_text
from robustdiff.loading import Components, check_forward

__all__ = ["StableDiffusion3"]


@BACKBONES.register("sd3")
class StableDiffusion3(MMDiT):
    """A pretrained ``SD3Transformer2DModel`` on latents. The arguments are those of :class:`MMDiT`."""

    kind = "StableDiffusion3Pipeline"
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {
        ("diffusers", "SD3Transformer2DModel"): SD3Transformer2DModel
    }
    others: ClassVar[frozenset[str]] = frozenset(
        {"vae", *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))}
    )

    @staticmethod
    def _prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
        check_config(config, path, tensors, ("num_layers",), ("sample_size", "patch_size", "pos_embed_max_size"))

    @staticmethod
    def _check(network: Any, path: Path) -> None:
        config = network.config
        shape = config.in_channels, config.patch_size, config.patch_size
        check_forward(lambda x, t: network(x, timestep=t, **caption(config)), shape, path)

    @staticmethod
    def _load_text(folder: Path, components: Components, config: Any) -> StableDiffusion3Text:
        return load_sd3_text(folder, components, config.joint_attention_dim, config.pooled_projection_dim)

    def bind(self, network: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, t: Tensor, **condition: Any) -> Any:
            return network(x, timestep=t, **condition)

        return call

    @property
    def default_size(self) -> int:
        return int(self.network.config.sample_size)

    @property
    def largest_size(self) -> int:
        return int(self.network.config.pos_embed_max_size * self.network.config.patch_size)

    @property
    def multiple(self) -> int:
        """The side of the network's patches."""
        return int(self.network.config.patch_size)
