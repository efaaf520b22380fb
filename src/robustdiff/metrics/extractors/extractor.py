r"""Feature extractors: the space in which sets of images are compared.

An extractor is a fixed map φ: {0, …, 255}^{C×H×W} → R^D, such as the activations of a classifier one layer before its
logits. FID, KID, precision and recall compare the distributions of φ(generated) and φ(real), so their values can be
compared only under the same φ. Each extractor has a fingerprint, the hash of its weights, which is part of the key of
cached reference statistics.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustdiff.errors import InputError, NotFiniteError, printable
from robustdiff.registry import Registry
from robustdiff.weights import digest_state

__all__ = ["EXTRACTORS", "FeatureExtractor", "check_images", "fingerprint_of", "in_colour", "load_extractor"]


class FeatureExtractor(nn.Module):
    """A map from a batch of images to a batch of feature vectors.

    Attributes:
        name: The name, for messages and results.
        dim: D, the number of features.
        fingerprint: The sha256 of the weights, 64 hexadecimal digits.
    """

    name: str
    dim: int
    fingerprint: str

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the features, float32 (B, D), on the extractor's device. They need no gradient and ignore autocast.

        Args:
            images: uint8 (B, C, H, W), on any device.

        Raises:
            InputError: If the images are not uint8, or have a size or number of channels that the extractor does not
                take.
        """

    def extract(self, images: Tensor) -> NDArray[np.float32]:
        """Return the features as an array; arguments and errors are those of :meth:`forward`.

        Raises:
            NotFiniteError: If a feature is not finite.
        """
        features: NDArray[np.float32] = self(images).cpu().numpy()
        # Precision and recall would be finite: a distance to NaN is not below any radius.
        if not np.isfinite(features).all():
            raise NotFiniteError(f"extractor {self.name}: features that are not finite; check its weights")
        return features

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, dim={self.dim}, fingerprint={self.fingerprint[:12]!r})"


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 of weights by name."""
    digest = hashlib.sha256()
    digest_state(digest, weights)
    return digest.hexdigest()


def check_images(name: str, images: Tensor) -> None:
    """Check that images are uint8 (B, C, H, W), for the extractor of a name.

    Raises:
        InputError: If they are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(
            f"extractor {name}: got {images.dtype} of shape {tuple(images.shape)}; give uint8 (B, C, H, W)"
        )


def in_colour(name: str, images: Tensor) -> Tensor:
    """Return grey or RGB images as RGB, uint8 (B, 3, H, W), for the extractor of a name.

    Raises:
        InputError: If they are not uint8 (B, C, H, W) with C = 1 or 3.
    """
    check_images(name, images)
    if images.shape[1] not in (1, 3):
        raise InputError(f"extractor {name}: got {images.shape[1]} channels; give grey or RGB images")
    return images.expand(-1, 3, -1, -1)


EXTRACTORS: Registry[Callable[[str | None], FeatureExtractor]] = Registry(
    "feature extractor", "extractors", "metrics.extractors"
)
"""The functions that load an extractor, by name. Each takes VALUE of ``NAME=VALUE``, None without one, and raises
InputError if it cannot load an extractor by it."""


def load_extractor(
    name: str, *, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Load a feature extractor, frozen and in evaluation mode, by its name.

    Args:
        name: A name in :data:`EXTRACTORS`, alone or as ``NAME=VALUE`` with the file or folder of its weights, such as
            ``clip=FOLDER``; or the path of a ``.safetensors`` file of a
            :class:`~robustdiff.metrics.extractors.classifier.Classifier`.
        weights: VALUE, if it is not in ``name``.
        device: The device of the extractor.

    Raises:
        InputError: If the name is unknown, or the weights are missing or malformed.
    """
    kind, equals, value = ("classifier", "=", name) if name.endswith(".safetensors") else name.partition("=")
    if weights is not None:
        if equals:
            raise InputError(f"the features {printable(name)} name their weights, and weights={weights}: give one")
        value = os.fspath(weights)
    if kind not in EXTRACTORS:
        raise InputError(
            f"unknown extractor {printable(kind)!r}; use one of: {', '.join(EXTRACTORS)}, or a .safetensors file"
        )
    extractor = EXTRACTORS[kind](value or None)
    return extractor.to(device).eval().requires_grad_(False)
