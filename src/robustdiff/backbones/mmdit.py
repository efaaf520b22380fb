"""Pretrained multimodal diffusion transformers (MM-DiT) on latents, what Stable Diffusion 3 and Flux have in common.

Such networks take images of many sizes, and a pipeline folder names a default size only. The size of training is stored
as ``_sample_size`` in the network's configuration, in latents. (diffusers preserves fields that begin with an
underscore, and ignores them.)
"""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from robustdiff.backbones.captioned import Captioned
from robustdiff.backbones.kinds.kind import kind_of
from robustdiff.codecs.codec import Codec, Shape
from robustdiff.codecs.vae import VAE, check_latent_channels, pipeline_vae
from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError
from robustdiff.loading import Components, Place, check_depth, component, load_network, read_config, shown

__all__ = ["LARGEST_SIZE", "MMDiT", "caption", "check_config"]

_Own = TypeVar("_Own", bound="MMDiT")

LARGEST_SIZE = 2048
"""The largest side of latents: 16384 pixels with a VAE of factor 8."""


class MMDiT(Captioned):
    """The base class of pretrained flow-matching transformers, with the arguments of :class:`Captioned`.

    Attributes:
        kind: The name of the class of the pipelines in diffusers.
    """

    part = "transformer"
    kind: ClassVar[str]

    @classmethod
    def load(
        cls: type[_Own], folder: Path, components: Components, size: int | None, place: Place | None = None
    ) -> tuple[_Own, Codec]:
        index = folder / "model_index.json"
        kind = read_config(index).get("_class_name")
        if kind != cls.kind:
            raise InputError(f"{index} describes a {shown(kind)}, and with this transformer only a {cls.kind} is read")
        network: Any = load_network(
            component(folder, cls.part),
            cls.classes[components[cls.part]],
            prepare=cls._prepare,
            check=cls._check,
            place=place,
        )
        codec = _load_vae(folder, components, cls(network).channels)
        backbone = cls(network, cls._load_text(folder, components, network.config), codec.factor)
        if size is not None:
            backbone.take_size(*backbone._latents(size, size))
        return backbone, codec

    @staticmethod
    @abstractmethod
    def _prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
        """Check the size of a network before it is created."""

    @staticmethod
    @abstractmethod
    def _check(network: Any, path: Path) -> None:
        """Check that a network on the meta device takes noisy latents, a time and embeddings of a caption."""

    @staticmethod
    @abstractmethod
    def _load_text(folder: Path, components: Components, config: Any) -> Condition:
        """Load the text encoders, and check that the network takes their embeddings."""

    def pipeline(self, network: nn.Module, scheduler: Any, codec: Codec, condition: Condition) -> Any:
        # Imported here, since it imports image processors of transformers, which warn of a missing torchvision.
        kind = getattr(import_module("diffusers"), self.kind)
        parts = dict.fromkeys(self.others) | codec.components | condition.components
        return kind(transformer=network, scheduler=scheduler, **parts)

    def check_codec(self, codec: Codec, path: str) -> None:
        super().check_codec(codec, path)
        _check_vae(codec, path)

    def check_scheduler(self, scheduler: Any, path: str) -> None:
        if kind_of(scheduler).name != "flow":
            raise InputError(
                f"the model {path} is a flow-matching model, and {type(scheduler).__name__} is not a scheduler of flow "
                "matching: save the pipeline with FlowMatchEulerDiscreteScheduler; in a recipe, leave process out"
            )

    @property
    @abstractmethod
    def default_size(self) -> int:
        """The side of the latents if the size of training is not known."""

    @property
    @abstractmethod
    def largest_size(self) -> int:
        """The largest side of latents that the network takes."""

    @property
    def size(self) -> tuple[int, int]:
        size = self.network.config.get("_sample_size", self.default_size)
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def tokens(self) -> int:
        height, width = self.size
        return (height // self.multiple) * (width // self.multiple)

    def take_size(self, height: int, width: int) -> None:
        """Set the size of the network's input, in latents.

        Raises:
            InputError: If the network does not take that size.
        """
        if max(height, width) > self.largest_size:
            largest = self.largest_size * self.factor
            raise InputError(
                f"the model takes sides up to {largest} pixels, not {height * self.factor}×{width * self.factor}: "
                "choose a smaller size"
            )
        self.network.register_to_config(_sample_size=height if height == width else (height, width))

    def _latents(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the latents of images of a size in pixels."""
        multiple = self.factor * self.multiple
        if height % multiple or width % multiple or min(height, width) < 1:
            raise InputError(
                f"the model takes sides that are multiples of {multiple} pixels, not {height}×{width}: choose another "
                "size"
            )
        return height // self.factor, width // self.factor

    def check_shape(self, shape: Shape, codec: Codec, path: str) -> None:
        """Check that the network takes images of a shape (C, H, W) in pixels; if the size of training is not known, it
        becomes theirs.

        Raises:
            InputError: If the network does not take such images.
        """
        if "_sample_size" not in self.network.config:
            self.take_size(*self._latents(*shape[1:]))
        super().check_shape(shape, codec, path)


def check_config(
    config: dict[str, Any], path: Path, tensors: int, layers: tuple[str, ...], sides: tuple[str, ...] = ()
) -> None:
    """Check the numbers in the configuration of a transformer on which its memory and time of creation depend.

    Args:
        config: The configuration.
        path: Its file, for messages.
        tensors: The number of tensors in the weights.
        layers: The names of numbers of layers.
        sides: The names of numbers of latents or patches on a side.

    Raises:
        InputError: If there are more layers than tensors, or a side is not a number in [1, 2048].
    """
    total = sum(config[name] for name in layers if type(config.get(name)) is int)
    check_depth(total, tensors, f"{' and '.join(layers)} of {total} in all", path)
    size = config.get("_sample_size", 1)
    values = [(name, config.get(name, 1)) for name in sides]
    values += [("_sample_size", side) for side in (size if isinstance(size, list) and len(size) == 2 else [size])]
    for name, value in values:
        if not (type(value) is int and 1 <= value <= LARGEST_SIZE):
            raise InputError(f"{path}: {name}={shown(config[name])} is no number from 1 to {LARGEST_SIZE}: correct it")


def caption(config: Any) -> dict[str, Tensor]:
    """Return the embeddings of a caption, empty tensors on the meta device, that a transformer takes."""
    return {
        "encoder_hidden_states": torch.empty(1, 2, config.joint_attention_dim, device="meta"),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
    }


def _check_vae(codec: Any, path: str | Path) -> None:
    """Check that a VAE shifts latents by ``shift_factor``, as the pipeline does."""
    config = codec.network.config
    if config.shift_factor is None or config.latents_mean is not None or config.latents_std is not None:
        raise InputError(
            f"{path}: the pipeline shifts latents by one shift_factor, and its VAE has none, or numbers per channel: "
            "give another VAE"
        )


def _load_vae(folder: Path, components: Components, channels: int) -> VAE:
    """Load the VAE of a pipeline that shifts latents by ``shift_factor``."""
    index = folder / "model_index.json"
    codec = pipeline_vae(folder, components)
    _check_vae(codec, index)
    check_latent_channels(codec, channels, index)
    return codec
