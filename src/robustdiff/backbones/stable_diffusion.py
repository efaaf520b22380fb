"""Text-conditional ``UNet2DConditionModel`` of diffusers on latents: Stable Diffusion 1, 2 and XL.

Stable Diffusion is the UNet of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR
2022, arXiv 2112.10752. Stable Diffusion XL (Podell et al., 2023, arXiv 2307.01952) also takes the embedding of the
whole caption and six numbers: the original height and width of the image, the top and left of the crop, and the height
and width of the crop. Latent consistency models (Luo et al., 2023, arXiv 2310.04378) also take an embedding of the
guidance scale, ``timestep_cond``. The range of scales that such a network was trained at is stored as
``_guidance_range`` in its configuration, and it is called with the middle of it where no scale is given. (diffusers
preserves fields that begin with an underscore, and ignores them.)

The safety checker of a pipeline is neither applied nor saved again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from robustdiff.backbones.backbone import BACKBONES
from robustdiff.backbones.captioned import Captioned
from robustdiff.codecs.codec import Codec
from robustdiff.codecs.vae import VAE, check_unshifted, pipeline_vae
from robustdiff.conditions.clip import ClipText, TwoClipTexts, load_clip, load_two_clips
from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError, printable
from robustdiff.loading import (
    Components,
    Place,
    check_depth,
    check_forward,
    component,
    load_network,
    read_config,
    shown,
)
from robustdiff.objectives.latent_consistency import embed_guidance
from robustdiff.samplers.guidance import check_guidance

__all__ = ["StableDiffusion"]

logger = logging.getLogger(__name__)

_SD, _XL, _LCM = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"

_GUIDANCE = 8.5  # the default scale of LatentConsistencyModelPipeline, if the range of training is not known

_LARGEST_SIZE = 2**11  # in latents: 16384 pixels with a VAE of factor 8


@BACKBONES.register("stable_diffusion")
class StableDiffusion(Captioned):
    """A pretrained ``UNet2DConditionModel`` on latents.

    Args:
        network, text, factor: As of :class:`Captioned`.
        pipeline: The class name of the pipeline that the model is saved as.
    """

    part = "unet"
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {
        ("diffusers", "UNet2DConditionModel"): UNet2DConditionModel
    }
    others: ClassVar[frozenset[str]] = frozenset(
        {"vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt"}
        | {"safety_checker", "feature_extractor", "requires_safety_checker"}
    )

    def __init__(
        self,
        network: Any,
        text: Condition | None = None,
        factor: int = 8,
        pipeline: str = _SD,
    ) -> None:
        super().__init__(network, text, factor)
        self.kind, self._warned = pipeline, False

    @classmethod
    def load(
        cls, folder: Path, components: Components, size: int | None, place: Place | None = None
    ) -> tuple[StableDiffusion, Codec]:
        index = folder / "model_index.json"
        config = read_config(index)
        kind = config.get("_class_name")
        if kind not in (_SD, _XL, _LCM):
            raise InputError(
                f"{index}: pipelines of UNet2DConditionModel are supported if they are {_SD}, {_XL} or {_LCM}"
            )
        if kind == _XL:
            text: ClipText | TwoClipTexts = load_two_clips(
                folder, bool(config.get("force_zeros_for_empty_prompt", True))
            )
        else:
            text = load_clip(folder)
        codec = pipeline_vae(folder, components)
        check_unshifted(codec, index, per_channel=kind == _XL)

        def prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
            _check_depth(config, tensors, path)
            config["sample_size"] = _latent_size(config.get("sample_size"), size, codec, path)

        def check(network: UNet2DConditionModel, path: Path) -> None:
            _check(network, path, codec, text, kind)

        network = load_network(
            component(folder, cls.part), UNet2DConditionModel, prepare=prepare, check=check, place=place
        )
        if "safety_checker" in components:
            logger.warning("%s: the safety checker is neither applied nor saved again", printable(folder))
        return cls(network, text, codec.factor, kind), codec

    def corrected(self, scheduler: Any) -> Any:
        """Return a scheduler as ``StableDiffusionPipeline`` uses it, with ``steps_offset`` 1 and without clipping."""
        wanted = {"steps_offset": 1, "clip_sample": False} if self.kind == _SD else {}
        changes = {name: value for name, value in wanted.items() if scheduler.config.get(name, value) != value}
        return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler

    def pipeline(self, network: nn.Module, scheduler: Any, codec: Codec, condition: Condition) -> Any:
        parts = {**condition.components, "vae": codec.components["vae"], "unet": network}
        parts["scheduler"] = self.corrected(scheduler)
        if self.kind == _XL:
            parts |= {**condition.pipeline_settings, "add_watermarker": False}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        # Imported here, since it imports image processors of transformers, which warn of a missing torchvision.
        return getattr(import_module("diffusers"), self.kind)(**parts)

    def check_codec(self, codec: Codec, path: str) -> None:
        super().check_codec(codec, path)
        check_unshifted(codec, path, per_channel=self.kind == _XL)

    def bind(self, network: Callable[..., Any]) -> Callable[..., Any]:
        config = self.network.config

        def call(
            x: Tensor, t: Tensor, *, text_embeds: Tensor | None = None, geometry: Tensor | None = None, **condition: Any
        ) -> Any:
            if condition.get("timestep_cond") is not None and config.time_cond_proj_dim is None:
                raise InputError("this network takes no embedding of the guidance scale (time_cond_proj_dim)")
            if "timestep_cond" not in condition:
                scale = _GUIDANCE if self.guidance_range is None else sum(self.guidance_range) / 2
                condition |= self.embed_guidance(scale, x) or {}
            if text_embeds is None:
                return network(x, timestep=t, **condition)
            # Filled on the device: a copy from the host could not be recorded in a CUDA graph.
            sides = (x.new_full((len(x), 1), self.factor * side, dtype=torch.float32) for side in x.shape[2:])
            target = torch.cat(list(sides), dim=1)
            if geometry is None:
                geometry = torch.cat([target, torch.zeros_like(target)], dim=1)
            added = {"text_embeds": text_embeds, "time_ids": torch.cat([geometry.to(target), target], dim=1)}
            return network(x, timestep=t, added_cond_kwargs=added, **condition)

        return call

    @property
    def guidance_embedding(self) -> int | None:
        width: int | None = self.network.config.time_cond_proj_dim
        return width

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        given = self.network.config.get("_guidance_range")
        return None if given is None or self.guidance_embedding is None else (given[0], given[1])

    def embed_guidance(self, scale: float, like: Tensor) -> dict[str, Tensor] | None:
        if self.guidance_embedding is None:
            return None
        check_guidance(scale)
        low, high = self.guidance_range or (0.0, math.inf)
        if not low <= scale <= high and not self._warned:
            self._warned = True
            logger.warning(
                "guidance %g is outside of the range that the network was trained at, %g to %g", scale, low, high
            )
        w = torch.full((len(like),), scale - 1, dtype=torch.float32, device=like.device)
        return {"timestep_cond": embed_guidance(w, self.guidance_embedding).to(like.dtype)}

    def with_guidance_embedding(self, width: int, scales: tuple[float, float] | None = None) -> StableDiffusion:
        """Return the backbone of a network that also takes an embedding of the guidance scale, ``timestep_cond``.

        The weights of the embedding are zero, so that the network at first computes what this one does.
        """
        network, own = self.network, self.network.config.time_cond_proj_dim
        if own == width:
            if scales is not None:
                network.register_to_config(_guidance_range=scales)
            return self
        if own is not None:
            raise InputError(
                f"the network takes an embedding of the guidance scale of {own} numbers, and {width} are asked for"
            )
        with torch.device("meta"):
            wider = UNet2DConditionModel.from_config(network.config, time_cond_proj_dim=width)
        state = {name: value.clone() for name, value in network.state_dict().items()}
        for name, value in wider.state_dict().items():
            if name not in state:
                state[name] = torch.zeros(value.shape, device=network.device)
        wider.load_state_dict(state, assign=True)
        if scales is not None:
            wider.register_to_config(_guidance_range=scales)
        return StableDiffusion(wider.train(network.training), self.text, self.factor, _XL if self.kind == _XL else _LCM)


def _check_depth(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Check the number of layers of a network before they are created."""
    blocks, total = config.get("down_block_types"), 1
    total *= max(len(blocks), 1) if isinstance(blocks, list) else 1
    for name in ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        total *= max([1, *_integers(config.get(name))])
    check_depth(total, tensors, "its numbers of layers", path)


def _integers(value: Any) -> list[int]:
    if isinstance(value, list):
        return [number for one in value for number in _integers(one)]
    return [value] if type(value) is int else []


def _latent_size(own: Any, size: int | None, codec: VAE, path: Path) -> Any:
    """Return the ``sample_size`` of a network: the requested size in pixels, or else that of its configuration."""
    if size is not None:
        if size % codec.factor or not 1 <= size // codec.factor <= _LARGEST_SIZE:
            raise InputError(f"size {size} is not for this model: give a multiple of {codec.factor} pixels")
        return size // codec.factor
    sides = own if isinstance(own, list) else [own, own]
    if own is not None and not (len(sides) == 2 and all(type(s) is int and 1 <= s <= _LARGEST_SIZE for s in sides)):
        raise InputError(f"{path}: sample_size={shown(own)} is no size of latents: correct it")
    return tuple(own) if isinstance(own, list) else own


def _check(network: UNet2DConditionModel, path: Path, codec: VAE, text: ClipText | TwoClipTexts, kind: str) -> None:
    """Check that a network on the meta device takes noisy latents, a time and the embeddings of the text encoders."""
    config = network.config
    channels = codec.network.config.latent_channels
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise InputError(
            f"{path}: {config.in_channels} channels in and {config.out_channels} out, and the VAE's latents have "
            f"{channels}: the model takes more than noisy latents (inpainting, super-resolution), which is not "
            "supported, or its VAE is another one"
        )
    if kind == _LCM and config.time_cond_proj_dim is None:
        raise InputError(
            f"{path}: the UNet of a {_LCM} takes an embedding of the guidance scale, and time_cond_proj_dim is null: "
            "correct it"
        )
    for name in ("encoder_hid_dim_type", "class_embed_type", "num_class_embeds"):
        if config[name] is not None:
            raise InputError(
                f"{path}: {name}={shown(config[name])}: networks that take more than captions are not supported"
            )
    scales = config.get("_guidance_range")
    if scales is not None and not (
        isinstance(scales, list)
        and len(scales) == 2
        and all(type(scale) in (int, float) and math.isfinite(scale) for scale in scales)
        and 0 <= scales[0] <= scales[1]
    ):
        raise InputError(
            f"{path}: _guidance_range={shown(scales)} is no range of scales of guidance: save the model again"
        )
    width = config.cross_attention_dim
    if any(one != text.width for one in (width if isinstance(width, list | tuple) else [width])):
        raise InputError(
            f"{path}: the UNet takes embeddings of {shown(width)} numbers (cross_attention_dim) and the text encoder "
            f"makes {text.width}: give the two that belong together"
        )
    pooled = getattr(text, "pooled_width", None)
    wanted = None if pooled is None else "text_time"
    if config.addition_embed_type != wanted:
        raise InputError(
            f"{path}: addition_embed_type={shown(config.addition_embed_type)} does not go with "
            f"{'one text encoder' if wanted is None else 'two text encoders'}: {shown(wanted)} does"
        )
    condition: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, 2, text.width, device="meta")}
    if pooled is not None:
        needed, there = pooled + 6 * (config.addition_time_embed_dim or 0), config.projection_class_embeddings_input_dim
        if needed != there:
            raise InputError(
                f"{path}: projection_class_embeddings_input_dim={shown(there)}, and the embedding of a caption and six "
                f"numbers for the size and the crop make {needed}: the model takes other numbers (a refiner), which is "
                "not supported, or its second text encoder is another one"
            )
        condition["text_embeds"] = torch.empty(1, pooled, device="meta")
    side = 2 ** len(config.block_out_channels)
    call = StableDiffusion(network, text, codec.factor).bind(network)
    check_forward(lambda x, t: call(x, t, **condition), (channels, side, side), path)
