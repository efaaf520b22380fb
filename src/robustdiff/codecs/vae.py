r"""Latents of a variational autoencoder (Kingma & Welling, 2013, arXiv 1312.6114).

This implements the first stage of Rombach et al. (2022), "High-Resolution Image Synthesis with Latent Diffusion
Models", arXiv 2112.10752. With z the posterior's mean or a sample, m the VAE's ``shift_factor`` (or ``latents_mean``;
by default 0) and s its ``scaling_factor`` (divided by ``latents_std``), the latents are

    (z − m) · s,

which have about unit variance. The network is diffusers' ``AutoencoderKL``. It always computes in float32, also under
autocast: the activations of many VAEs overflow in float16.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from pydantic import Field
from torch import Tensor

from robustdiff.codecs.codec import CODECS, Codec, CodecSection, Shape
from robustdiff.errors import InputError, first_line, printable
from robustdiff.loading import Components, check_depth, component, load_network, shown
from robustdiff.section import Text
from robustdiff.weights import update_digest

__all__ = [
    "VAE",
    "Posterior",
    "VAESection",
    "check_latent_channels",
    "check_unshifted",
    "load_vae",
    "pipeline_vae",
]

PRETRAINED = files("robustdiff.codecs") / "pretrained"
"""The folder of the VAEs shipped with the package."""

Posterior = Literal["mean", "sample"]

_PIXELS_AT_ONCE = 2**21  # 32 images of 256×256: enough to occupy a GPU, and within its memory
_TENSORS_OF_A_BLOCK = 8


class VAE(Codec):
    """A codec that encodes images as scaled latents of an ``AutoencoderKL``.

    Args:
        network: The autoencoder. It is put into eval mode and float32, and its parameters do not require gradients.
        posterior: The encoding of an image: the "mean" of the posterior, or a new "sample" of it at each call.

    Raises:
        InputError: If the shift or scale of its latents is not finite, or the scale is not positive.
    """

    def __init__(self, network: AutoencoderKL, posterior: Posterior = "sample") -> None:
        self.network = network.eval().float().requires_grad_(False)
        self.posterior: Posterior = posterior
        self.random = posterior == "sample"
        self.section = VAESection(posterior=posterior)
        config = network.config
        channels = config.latent_channels
        std = _per_channel(config, "latents_std", [1.0] * channels, positive=True)
        if config.latents_mean is not None:
            mean = _per_channel(config, "latents_mean", [], positive=False)
        else:
            mean = [_number(config, "shift_factor", positive=False)] * channels
        self._mean = torch.tensor(mean)[:, None, None]
        self._scale = _number(config, "scaling_factor", positive=True) / torch.tensor(std)[:, None, None]

    @property
    def components(self) -> dict[str, Any]:
        return {"vae": self.network}

    @property
    def shifted(self) -> bool:
        """True if latents are shifted, or scaled per channel, which some pipelines of diffusers do not support."""
        return bool((self._mean != 0).any()) or self.network.config.latents_std is not None

    @property
    def factor(self) -> int:
        """The downsampling factor, in pixels per latent on a side."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    def encoded_shape(self, images: Shape) -> Shape:
        config, (channels, height, width) = self.network.config, images
        if channels != config.in_channels:
            wanted = config.in_channels
            remedy = f"set data.channels={wanted}" if wanted in (1, 3) else "choose another VAE"
            raise InputError(f"the VAE takes images of {wanted} channels and the data has {channels}: {remedy}")
        if height % self.factor or width % self.factor:
            raise InputError(
                f"the VAE takes sides that are multiples of {self.factor}, the data has {height}×{width}: "
                "set data.size to such a number"
            )
        return config.latent_channels, height // self.factor, width // self.factor

    def decoded_shape(self, latents: Shape) -> Shape:
        return self.network.config.out_channels, latents[1] * self.factor, latents[2] * self.factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        self.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            parts = []
            for part in images.float().split(self._at_once(images.shape[2] * images.shape[3])):
                posterior = self.network.encode(part).latent_dist
                mean = (posterior.mean - self._mean) * self._scale
                std = [posterior.std * self._scale] if self.random else []
                parts.append(torch.cat([mean, *std], dim=1))
        return torch.cat(parts)

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        if not self.random:
            return moments
        mean, std = moments.chunk(2, dim=1)
        return mean + std * (torch.randn_like(mean) if noise is None else noise)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.draw(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self.to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float() / self._scale + self._mean
            pixels = latents.shape[2] * latents.shape[3] * self.factor**2
            return torch.cat([self.network.decode(part).sample for part in z.split(self._at_once(pixels))])

    def _at_once(self, pixels: int) -> int:
        return max(1, _PIXELS_AT_ONCE // pixels)

    def to(self, device: torch.device | str) -> VAE:
        self.network.to(device)
        self._mean, self._scale = self._mean.to(device), self._scale.to(device)
        return self

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)

    @cached_property
    def _digest(self) -> str:
        config = {name: value for name, value in self.network.config.items() if not name.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            update_digest(digest, value)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return a hash of the weights and the settings, including the posterior."""
        return f"vae {self.posterior} {self._digest}"


def _number(config: Mapping[str, Any], name: str, positive: bool) -> float:
    value = config[name]
    if value is None and not positive:
        return 0.0
    if type(value) not in (int, float) or not math.isfinite(value) or (positive and value <= 0):
        raise InputError(f"the VAE's {name} is {shown(value)}, not a {'positive' if positive else 'finite'} number")
    return float(value)


def _per_channel(config: Mapping[str, Any], name: str, default: list[float], positive: bool) -> list[float]:
    value = config[name]
    if value is None:
        return default
    if not (
        isinstance(value, list | tuple)
        and len(value) == config["latent_channels"]
        and all(type(v) in (int, float) and math.isfinite(v) and (v > 0 or not positive) for v in value)
    ):
        kind = "positive" if positive else "finite"
        raise InputError(f"the VAE's {name} is not {config['latent_channels']} {kind} numbers, one for each channel")
    return [float(v) for v in value]


def pipeline_vae(folder: Path, components: Components) -> VAE:
    """Load the VAE of a pipeline folder as a codec.

    Args:
        folder: The pipeline folder.
        components: The components of the pipeline, by name.

    Raises:
        InputError: If it is missing, of another class than AutoencoderKL, or cannot be read.
    """
    if components.get("vae") != ("diffusers", "AutoencoderKL"):
        kind = shown(components.get("vae"))
        raise InputError(
            f"{folder / 'model_index.json'}: vae is {kind}, and only AutoencoderKL of diffusers is supported"
        )
    return VAE(load_vae(component(folder, "vae")))


def check_unshifted(codec: Any, path: str | Path, *, per_channel: bool = False) -> None:
    """Check that a VAE does not shift latents, for pipelines that do not.

    Args:
        codec: The VAE.
        path: The name of the model in messages.
        per_channel: Whether the pipeline knows a mean and a scale of each channel, so that one shift alone is refused.

    Raises:
        InputError: If it does.
    """
    if codec.network.config.shift_factor if per_channel else codec.shifted:
        raise InputError(f"{path}: the pipeline does not shift latents, and its VAE has a shift: give another VAE")


def check_latent_channels(codec: VAE, channels: int, index: Path) -> None:
    """Check that a VAE encodes images as the number of channels that the transformer of a pipeline takes.

    Args:
        codec: The VAE.
        channels: The number of channels of the transformer's input.
        index: The ``model_index.json`` of the pipeline, for messages.

    Raises:
        InputError: If it does not.
    """
    own = codec.encoded_shape(codec.decoded_shape((channels, 1, 1)))[0]  # of images like those that it decodes
    if own != channels:
        raise InputError(
            f"{index}: the transformer takes {channels} channels and the VAE encodes as {own}: give the two that "
            "belong together"
        )


def load_vae(path: str | Path) -> AutoencoderKL:
    """Load an ``AutoencoderKL`` in float32 on the CPU, without running code that the files name.

    Args:
        path: A folder with ``config.json`` and weights, a pipeline folder with ``vae/`` or ``codec/``, a run, or the
            name of a shipped VAE, such as "fashion-16-vae".

    Raises:
        InputError: If the VAE is missing, is of another class, or its configuration and weights do not fit.
    """
    return load_network(_folder(path), AutoencoderKL, prepare=_prepare, check=_check)


def _prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Check the size of a VAE before it is created."""
    blocks, layers = config.get("block_out_channels"), config.get("layers_per_block", 1)
    levels = len(blocks) if isinstance(blocks, list) else 1
    if isinstance(layers, int):
        total = levels * layers * _TENSORS_OF_A_BLOCK
        check_depth(total, tensors, f"{levels} levels of layers_per_block={layers}", path)
    sides = config.get("sample_size", 32)
    sides = sides if isinstance(sides, list) else [sides]
    if not (sides and all(type(side) is int and side > 0 for side in sides)):
        raise InputError(f"{path}: sample_size={shown(config['sample_size'])} is no size of images: correct it")


def _check(network: AutoencoderKL, path: Path) -> None:
    """Call a VAE on the meta device and check the shapes of its outputs."""
    config = network.config
    side = 2 ** len(config.block_out_channels)
    shapes = (1, config.latent_channels, 2, 2), (1, config.out_channels, side, side)
    try:
        with torch.device("meta"), torch.no_grad():
            mean = network.encode(torch.empty(1, config.in_channels, side, side)).latent_dist.mean
            found = tuple(mean.shape), tuple(network.decode(mean).sample.shape)
        if found != shapes or not mean.numel():
            raise ValueError(f"latents and images are {found} instead of {shapes}")
    except Exception as error:  # the network can be created from the configuration, but not called
        raise InputError(f"{path}: the VAE cannot be called ({first_line(error)}): correct it") from None


def _folder(path: str | Path) -> Path:
    given = Path(path)
    within = [given / model / part for part in ("vae", "codec") for model in ("", "model")]
    for candidate in (*within, given, Path(str(PRETRAINED / str(path)))):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(
        f"no VAE at {printable(path)}: give a folder with config.json and weights, a pipeline folder with vae/, or a "
        f"shipped one ({_shipped()})"
    )


def _shipped() -> str:
    return ", ".join(sorted(entry.name for entry in PRETRAINED.iterdir() if entry.is_dir()))


@CODECS.register("vae")
class VAESection(CodecSection):
    """The section ``codec`` of a recipe for the latents of a VAE."""

    name: Literal["vae"] = "vae"
    path: Text | None = Field(
        None, description="folder of a VAE or of a pipeline, or name of a shipped VAE; by default the checkpoint's"
    )
    posterior: Posterior = Field("sample", description="encoding of an image: mean or sample of the posterior")
    cache: bool = Field(False, description="compute the latents of the dataset once, and cache them on disk")

    @property
    def caches(self) -> bool:
        return self.cache

    def build(self, own: Codec | None) -> VAE:
        if own is not None and "vae" not in own.components:
            raise InputError("codec=vae does not suit a model of pixels: leave codec out")
        if self.path is not None:
            return VAE(load_vae(self.path), self.posterior)
        if own is None:
            raise InputError(
                f"codec=vae needs codec.path for a new network: a folder with a VAE, or a shipped one ({_shipped()})"
            )
        return VAE(own.components["vae"], self.posterior)

    def load(self, folder: Path) -> VAE:
        return VAE(load_network(folder, AutoencoderKL, prepare=_prepare, check=_check), self.posterior)
