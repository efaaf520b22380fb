"""Text-conditional ``PixArtTransformer2DModel`` of diffusers on latents (PixArtAlphaPipeline, PixArtSigmaPipeline).

PixArt-α is the transformer of Chen et al., "PixArt-α: Fast Training of Diffusion Transformer for Photorealistic
Text-to-Image Synthesis", ICLR 2024, arXiv 2310.00426. Networks with ``use_additional_conditions`` also take the height
and width of the images in pixels, and their ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from robustdiff.backbones.backbone import BACKBONES
from robustdiff.backbones.captioned import Captioned
from robustdiff.backbones.dit import exported, load_transformer
from robustdiff.codecs.codec import Codec
from robustdiff.codecs.vae import check_unshifted
from robustdiff.conditions.condition import Condition
from robustdiff.conditions.t5 import T5Text, load_t5
from robustdiff.errors import InputError
from robustdiff.loading import Components, Place, check_forward, read_config

__all__ = ["PixArt"]

# The pipelines by name, with the number of tokens of a caption.
_PIPELINES = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


@BACKBONES.register("pixart")
class PixArt(Captioned):
    """A pretrained ``PixArtTransformer2DModel`` on latents.

    Args:
        network, text, factor: As of :class:`Captioned`.
        pipeline: The class name of the pipeline that the model is saved as.
    """

    part = "transformer"
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {
        ("diffusers", "PixArtTransformer2DModel"): PixArtTransformer2DModel,
        ("diffusers", "Transformer2DModel"): PixArtTransformer2DModel,  # before diffusers 0.29
    }
    others: ClassVar[frozenset[str]] = frozenset({"vae", "text_encoder", "tokenizer"})

    def __init__(
        self, network: Any, text: T5Text | None = None, factor: int = 8, pipeline: str = "PixArtAlphaPipeline"
    ) -> None:
        super().__init__(network, text, factor)
        self.kind = pipeline

    @classmethod
    def reads(cls, components: Components) -> bool:
        # Before diffusers 0.29, Transformer2DModel was also the class of DiT.
        return super().reads(components) and {"text_encoder", "tokenizer"} <= set(components)

    @classmethod
    def load(
        cls, folder: Path, components: Components, size: int | None, place: Place | None = None
    ) -> tuple[PixArt, Codec]:
        index = folder / "model_index.json"
        kind = read_config(index).get("_class_name")
        if kind not in _PIPELINES:
            raise InputError(f"{index}: pipelines of captions are read if they are {' or '.join(_PIPELINES)}")
        network, codec = load_transformer(folder, components, PixArtTransformer2DModel, _check, size, place)
        text = load_t5(folder, _PIPELINES[kind])
        width = text.encoder.config.d_model
        if width != _caption_width(network):
            raise InputError(
                f"{index}: the transformer takes embeddings of {_caption_width(network)} numbers and the text encoder "
                f"makes {width}: give the two that belong together"
            )
        return cls(network, text, codec.factor, kind), codec

    def pipeline(self, network: nn.Module, scheduler: Any, codec: Codec, condition: Condition) -> Any:
        parts = condition.components
        # Imported here, since it imports image processors of transformers, which warn of a missing torchvision.
        return getattr(import_module("diffusers"), self.kind)(
            tokenizer=parts["tokenizer"],
            text_encoder=parts["text_encoder"],
            vae=codec.components["vae"],
            transformer=network,
            scheduler=exported(scheduler),
        )

    def check_codec(self, codec: Codec, path: str) -> None:
        super().check_codec(codec, path)
        check_unshifted(codec, path)

    def bind(self, network: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, t: Tensor, **condition: Any) -> Any:
            added = None
            if self.network.use_additional_conditions:
                height, width = (self.factor * side for side in x.shape[2:])
                # Filled on the device: a copy from the host could not be recorded in a CUDA graph.
                sides = [x.new_full((len(x), 1), side) for side in (height, width)]
                added = {
                    "resolution": torch.cat(sides, dim=1),
                    "aspect_ratio": x.new_full((len(x), 1), height / width),
                }
            return network(x, timestep=t, added_cond_kwargs=added, **condition)

        return call

    @property
    def multiple(self) -> int:
        """The side of the network's patches."""
        return int(self.network.config.patch_size)


def _caption_width(network: PixArtTransformer2DModel) -> int:
    config = network.config
    return int(config.cross_attention_dim if config.caption_channels is None else config.caption_channels)


def _check(network: PixArtTransformer2DModel, path: Path) -> None:
    """Check that a network on the meta device takes noisy latents, a time and embeddings of a caption."""
    if network.config.cross_attention_dim is None:
        raise InputError(f"{path}: the transformer takes no captions (cross_attention_dim=null): correct it")
    condition: dict[str, Any] = {
        "encoder_hidden_states": torch.empty(1, 2, _caption_width(network), device="meta"),
        "encoder_attention_mask": torch.ones(1, 2, dtype=torch.long, device="meta"),
    }
    if network.use_additional_conditions:
        condition["added_cond_kwargs"] = {
            "resolution": torch.empty(1, 2, device="meta"),
            "aspect_ratio": torch.empty(1, 1, device="meta"),
        }
    config = network.config
    check_forward(
        lambda x, t: network(x, timestep=t, **condition),
        (config.in_channels, config.sample_size, config.sample_size),
        path,
        doubled=True,
    )
