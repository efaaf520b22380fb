"""A pretrained model: a network with its process, parameterisation, codec and condition."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustdiff.backbones.backbone import BACKBONES, Backbone
from robustdiff.backbones.frozen import FrozenWeights
from robustdiff.backbones.hub import download, is_hub_name
from robustdiff.backbones.kinds.kind import ModelKind, kind_of
from robustdiff.backbones.lora import (
    RECORD,
    WEIGHTS,
    Adapter,
    LoraSection,
    adapter_of,
    disabled,
    inject,
    merge,
    read_adapter,
    read_weights_into,
    save_adapter,
)
from robustdiff.codecs.codec import Codec, Shape, load_codec, save_codec
from robustdiff.codecs.pixels import Pixels
from robustdiff.conditions.condition import Condition
from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.loading import Components, load_scheduler, quietly, read_index
from robustdiff.objectives.preconditioning import Denoise
from robustdiff.process import DiffusionProcess, Prediction
from robustdiff.samplers.sample import suited
from robustdiff.weights import update_digest

__all__ = ["PRETRAINED", "Model", "is_model_folder", "load_model"]

PRETRAINED = files("robustdiff.backbones") / "pretrained"
"""The folder of the models shipped with the package."""

# Components of unsupported pipelines, by a part of their name, with their meaning.
_OTHERS = {
    "text_encoder": "the model is conditioned on text",
    "vqvae": "the model works on a VQ-VAE's latents, not on pixels",
    "vae": "the model works on a VAE's latents, not on pixels",
    "image_encoder": "the model is conditioned on images",
    "transformer": "the model is a transformer",
}


class Model:
    """A network with its process, parameterisation, codec, condition and samplers.

    A model is called as ``model(x, t, **condition)`` with points x (B, C, H, W) and times t (B,) of :attr:`process`.
    It returns a prediction in the parameterisation :attr:`prediction`, with shape (B, C, H, W) or, with a learned
    variance, (B, 2C, H, W).

    Args:
        backbone: The network and its family.
        scheduler: The diffusers scheduler, which defines the process and the parameterisation.
        codec: The codec between images and the network's space; pixels by default.
        process: The process, if it is not the scheduler's.
        prediction: The parameterisation, if it is not the scheduler's.
        path: The name of the model in messages.

    Attributes:
        adapter: The description of the network's LoRA; None if it has none.
        frozen: The types in which the weights of the network are held; None for float32.
    """

    adapter: Adapter | None = None
    frozen: FrozenWeights | None = None

    def __init__(
        self,
        backbone: Backbone,
        scheduler: Any = None,
        codec: Codec | None = None,
        *,
        process: DiffusionProcess | None = None,
        prediction: Prediction | None = None,
        path: str = "model",
    ) -> None:
        self.backbone = backbone
        self.scheduler = scheduler
        self.codec = Pixels() if codec is None else codec
        self.path = path
        if scheduler is not None:
            backbone.check_scheduler(scheduler, path)
        self._process, self._prediction = process, prediction

    @classmethod
    def of(cls, network: nn.Module, scheduler: Any, **settings: Any) -> Model:
        """Return the model of a diffusers network, such as a ``UNet2DModel``; the other arguments are the model's.

        Raises:
            InputError: If no family of networks has this class.
        """
        for family in BACKBONES.values():
            if type(network) in family.classes.values():
                return cls(family(network), scheduler, **settings)
        raise InputError(f"{type(network).__name__} is not supported: use one of {_supported()}")

    @property
    def network(self) -> Any:
        """The network to train."""
        return self.backbone.network

    @cached_property
    def process(self) -> DiffusionProcess:
        """The process that defines the model's times."""
        return self.kind.process() if self._process is None else self._process

    @cached_property
    def prediction(self) -> Prediction:
        """The parameterisation of the network's output."""
        return self.kind.objective().prediction if self._prediction is None else self._prediction

    @property
    def condition(self) -> Condition:
        """The condition of the network."""
        return self.backbone.condition()

    @cached_property
    def kind(self) -> ModelKind:
        """The kind of the model, which its scheduler tells."""
        return kind_of(self.scheduler)(self.scheduler, self.backbone)

    @property
    def samplers(self) -> tuple[str, ...]:
        """The names of the samplers that suit the model, the default first."""
        names = suited(self.process)
        if self.scheduler is None:
            return names
        return tuple(sorted(names, key=lambda name: name != self.kind.sampler))

    @cached_property
    def sampling(self) -> Mapping[str, Any]:
        """The scheduler's settings of sampling, as arguments of :func:`robustdiff.sample`."""
        return {} if self.scheduler is None else self.kind.sampling()

    @property
    def shape(self) -> Shape:
        """The shape (C, H, W) of the network's input.

        Raises:
            InputError: If the network's configuration has no size.
        """
        size = self.backbone.size
        if size is None:
            raise InputError(
                f"the model {self.path} does not say the size of its images (sample_size): give --size PIXELS"
            )
        return self.backbone.channels, *size

    @property
    def image_shape(self) -> Shape:
        """The shape (C, H, W) of the images.

        Raises:
            InputError: If the network's configuration has no size.
        """
        return self.codec.decoded_shape(self.shape)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        device: torch.device = self.network.device
        return device

    def to(self, device: torch.device | str) -> Model:
        """Move the network, the codec and the condition to a device, and return the model."""
        self.network.to(device)
        self.codec.to(device)
        self.condition.to(device)
        return self

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Any:
        return self._call(x, t, **condition)

    @cached_property
    def _call(self) -> Callable[..., Any]:
        network = self.backbone.bind(self.network)
        return network if self.scheduler is None else self.kind.model(network)

    def embed_guidance(self, scale: float, like: Tensor) -> dict[str, Tensor] | None:
        """Return the arguments by which the network takes a scale of guidance (:meth:`Backbone.embed_guidance`)."""
        return self.backbone.embed_guidance(scale, like)

    def denoiser(self, network: Callable[..., Any] | None = None) -> Denoise:
        """Return the model, or a wrapper ``network`` of its network, as a denoiser D(x, σ) ↦ x̂_0, such as a teacher.

        Raises:
            InputError: If the model is a consistency model or a flow-matching model.
        """
        return self.kind.denoiser(self.backbone.bind(self.network if network is None else network))

    def check_shape(self, shape: Shape, path: str | None = None) -> None:
        """Check that the network takes images of a shape; a network without a size gets theirs.

        Args:
            shape: The shape (C, H, W) in pixels.
            path: The name of the model in messages; by default the model's own.

        Raises:
            InputError: If the network does not take such images.
        """
        size = self.backbone.size
        self.backbone.check_shape(shape, self.codec, self.path if path is None else path)
        if self.backbone.size != size:  # a dynamic shift depends on it
            self.__dict__.pop("process", None)
            self.__dict__.pop("sampling", None)

    def check_data(self, dataset: ImageDataset) -> None:
        """Check that the network fits the images, classes and captions of a dataset.

        A network without a size gets that of the images.

        Raises:
            InputError: If the network does not fit the dataset.
        """
        self.check_shape(dataset.shape)
        self.condition.check(dataset.num_classes, dataset.captioned, self.path)

    def add_lora(self, lora: LoraSection, seed: int, fingerprint: str | None = None) -> None:
        """Freeze the network, and add an adapter to it that changes nothing yet.

        Args:
            lora: The settings.
            seed: The seed of the adapter's random matrices.
            fingerprint: The fingerprint of the network's weights in float32, if they are held in another type.

        Raises:
            InputError: If peft is not installed, or the settings do not suit the network.
        """
        base = Path(self.path)
        self.adapter = Adapter(
            base=str(base.resolve()) if base.exists() else self.path,
            fingerprint=self.fingerprint() if fingerprint is None else fingerprint,
            lora=inject(self.network, lora, self.path, seed),
            scheduler=type(self.scheduler).__name__,
            size=self.backbone.size,
            classes=self.condition.classes,
            guidance=self.backbone.guidance,
            guidance_range=self.backbone.guidance_range,
        )

    @contextmanager
    def base(self) -> Iterator[None]:
        """Turn the adapter, if there is one, off within the block: the network is then its base."""
        with disabled(self.network) if self.adapter is not None else nullcontext():
            yield

    def merge(self) -> None:
        """Add the adapter, if there is one, to the weights of the network, to train or save it whole.

        Raises:
            InputError: If the weights are not in float32.
        """
        if self.adapter is not None:
            self._check_whole("merged")
            merge(self.network)
            self.adapter = None

    def _check_whole(self, done: str) -> None:
        if self.frozen is not None:
            raise InputError(
                f"the weights of {self.path} are held in fewer bits than float32, and rounded ones are not {done}: "
                "load the model without frozen, or with half=False"
            )

    def fingerprint(self) -> str:
        """Return the sha256 of the network's weights in float32, on any device, in any memory format and however held.

        That of a LoRA is of its base's fingerprint and the adapter's weights.
        """
        if self.adapter is None and self.frozen is not None:
            return self.frozen.fingerprint
        state, digest = self.network.state_dict(), hashlib.sha256()
        if self.adapter is not None:
            digest.update(self.adapter.fingerprint.encode())
            state = adapter_of(state)
        for value in state.values():
            update_digest(digest, value)
        return digest.hexdigest()

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a diffusers pipeline folder, or with an adapter a folder of the adapter alone. The write is not atomic.

        Args:
            state: The parameters to save by name, in any memory format; by default the network's own.

        Raises:
            InputError: If the folder could not hold the codec, or the weights are not in float32.
        """
        if self.adapter is None:
            self._check_whole("saved")
        self.backbone.check_codec(self.codec, self.path)
        with quietly():
            self._save(folder, self.network.state_dict() if state is None else state)

    def _save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        if self.adapter is not None:
            scheduler = self.backbone.pipeline(self.network, self.scheduler, self.codec, self.condition).scheduler
            adapter = self.adapter.model_copy(update={"scheduler": type(scheduler).__name__})
            save_adapter(folder, adapter, self.backbone.part, adapter_of(state))
            scheduler.save_pretrained(folder / "scheduler")
            return
        with torch.device("meta"):
            network = type(self.network).from_config(self.network.config)
        network.load_state_dict({name: value.cpu().contiguous() for name, value in state.items()}, assign=True)
        network = self.backbone.stored(network)
        pipeline = self.backbone.pipeline(network, self.scheduler, self.codec, self.condition)
        pipeline.save_pretrained(folder, safe_serialization=True)
        if not (self.codec.identity or self.backbone.stores):
            save_codec(self.codec, folder)


def load_model(path: str | Path, size: int | None = None, frozen: FrozenWeights | None = None) -> Model:
    """Load the model of a run, of a diffusers pipeline folder, shipped with the package, or of the Hugging Face Hub.

    The run of a LoRA gives its base model with the adapter. Weights of any type are loaded in float32, because training
    needs it, unless ``frozen`` is given; the networks are in eval mode, on the CPU.

    Args:
        path: The run, the folder, the name of the shipped model, or the name "owner/name" of a pipeline of the Hub,
            which is downloaded to its cache.
        size: The side of the images in pixels, if the network's configuration has none or another one is wanted.
        frozen: The types in which the weights of the network, or those of a LoRA's base, are held, if they are not
            trained.

    Raises:
        InputError: If the model is missing, unreadable or not supported, or its weights do not fit the network or are
            not finite; or the base model of a LoRA is missing or has other weights.
    """
    folder = _model_folder(path)
    if not (folder / "model_index.json").is_file():
        return _adapted(folder, str(path), size, frozen)
    components = read_index(folder)
    family = _family(folder, components)
    saved = None if family.stores else load_codec(folder)
    # With a codec beside the pipeline, the size of the network's input is not that of the images.
    backbone, codec = family.load(folder, components, size if saved is None else None, frozen)
    if saved is not None:
        codec = saved
        backbone.check_codec(codec, str(path))
        if size is not None:
            _take_size(backbone, codec, size)
    if frozen is not None:
        frozen.check(str(path))
    model = Model(backbone, backbone.corrected(load_scheduler(folder, components)), codec, path=str(path))
    model.frozen = frozen
    return model


def _take_size(backbone: Backbone, codec: Codec, size: int) -> None:
    """Set the size of a network's input to that of the latents of square images."""
    channels = codec.decoded_shape((backbone.channels, backbone.multiple, backbone.multiple))[0]
    _, height, width = codec.encoded_shape((channels, size, size))
    if height % backbone.multiple or width % backbone.multiple:
        multiple = backbone.multiple * size // height
        raise InputError(f"size {size} is not for this model: give a multiple of {multiple} pixels")
    backbone.take_size(height, width)


def _adapted(folder: Path, path: str, size: int | None, frozen: FrozenWeights | None) -> Model:
    """Load a base model, and the adapter in a folder."""
    adapter = read_adapter(folder)
    where = f"correct base in {folder / RECORD} if it has moved"
    try:
        base = _model_folder(adapter.base, fetch=False)
    except InputError as error:
        raise InputError(f"{path} is a LoRA of {adapter.base}, which is not there ({error}): {where}") from None
    if not (base / "model_index.json").is_file():
        raise InputError(f"{path} is a LoRA of {adapter.base}, which is a LoRA itself: {where}")
    model = load_model(base, size, frozen)
    if model.fingerprint() != adapter.fingerprint:
        raise InputError(f"{path} is a LoRA of other weights than {adapter.base} has now: restore them, or {where}")
    backbone = model.backbone
    if size is None and adapter.size is not None and adapter.size != backbone.size:
        backbone.take_size(*adapter.size)
    backbone.note_classes(adapter.classes)
    if adapter.guidance is not None:
        backbone.take_guidance(adapter.guidance)
    if adapter.guidance_range is not None and (width := backbone.guidance_embedding) is not None:
        backbone = backbone.with_guidance_embedding(width, adapter.guidance_range)
    inject(backbone.network, adapter.lora, path)
    read_weights_into(backbone.network, backbone.part, folder / WEIGHTS)
    backbone.network.eval()
    scheduler = backbone.corrected(load_scheduler(folder, {"scheduler": ("diffusers", adapter.scheduler)}))
    adapted = Model(backbone, scheduler, model.codec, path=path)
    adapted.adapter, adapted.frozen = adapter, frozen
    return adapted


def _supported() -> str:
    names = {name for family in BACKBONES.values() for _, name in family.classes}
    return ", ".join(sorted(names))


def _family(folder: Path, components: Components) -> type[Backbone]:
    """Return the family of a pipeline."""
    for family in BACKBONES.values():
        if family.reads(components):
            return family
    path, supported = folder / "model_index.json", f"pipelines of {_supported()} are supported"
    known = {(family.part, kind) for family in BACKBONES.values() for kind in family.classes}
    parts = {part for part, _ in known}
    network = next((name for name in components if name in parts), None)
    if network is not None and (network, components[network]) not in known:
        library, kind = components[network]
        raise InputError(f"{path}: {network} is {kind} of {library}; {supported}")
    usual = {name for f in BACKBONES.values() if components.get(f.part) in f.classes for name in f.others}
    for allowed in (usual, set[str]()):  # what no family of the network has is named first
        for part, reason in _OTHERS.items():
            for name, (library, kind) in components.items():
                if name.startswith(part) and name not in {network, *allowed}:
                    raise InputError(f"{path}: {name} is {kind} of {library}: {reason}; {supported}")
    if network is None:
        raise InputError(f"{path} names no {' and no '.join(sorted(parts))}; {supported}")
    name = next((name for name in components if name not in {network, "scheduler", *usual}), network)
    library, kind = components[name]
    raise InputError(f"{path}: {name} is {kind} of {library}, which is not supported; {supported}")


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds a pipeline, which has a ``model_index.json``, or a LoRA with its record."""
    return any((folder / name).is_file() for name in ("model_index.json", RECORD))


def _model_folder(path: str | Path, fetch: bool = True) -> Path:
    """Return the folder of a run's model, of a pipeline, or of a shipped or hub model by name.

    Without ``fetch``, nothing is downloaded, and a hub model must be in the Hub's cache.
    """
    given = Path(path)
    for candidate in (given, given / "model", Path(str(PRETRAINED / str(path)))):
        if is_model_folder(candidate):
            return candidate
    shipped = ", ".join(sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())) if PRETRAINED.is_dir() else "none"
    if (given / "recipe.yaml").is_file():
        raise InputError(f"{path} is a run that is not finished: go on with it by robustdiff train … --resume")
    if given.is_file():
        raise InputError(
            f"{path} is a file: give a run or a folder with model_index.json (robustdiff convert makes one of a "
            "guided-diffusion checkpoint)"
        )
    for network in (given / "unet_ema", given / "unet", given):
        if (network / "config.json").is_file():
            raise InputError(
                f"{path} has a network but no model_index.json and no scheduler, which says the noise that it was "
                f"trained with; make a pipeline of it by DDPMPipeline(UNet2DModel.from_pretrained('{network}'), "
                "DDPMScheduler(…)).save_pretrained('FOLDER')"
            )
    if is_hub_name(path):
        return download(str(path), fetch)
    raise InputError(
        f"no model at {path}: give a run, a folder with model_index.json, a shipped model ({shipped}), or the name "
        "owner/name of a model of the Hugging Face Hub"
    )
