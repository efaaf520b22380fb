"""Classifiers as feature extractors for small images, to which Inception, made for photographs, is not suited.

Those for `digits`, `fashion-16` and `fashion-mnist` come with this package (`scripts/train_extractors.py` makes them).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from robustdiff.data.dataset import to_unit
from robustdiff.errors import InputError, first_line, printable
from robustdiff.files import atomic_write
from robustdiff.metrics.extractors.extractor import EXTRACTORS, FeatureExtractor, check_images, fingerprint_of
from robustdiff.weights import FLOATS

__all__ = ["SHIPPED", "Classifier", "ClassifierExtractor"]

SHIPPED = ("digits", "fashion-16", "fashion-mnist")
"""The names of the classifiers that come with this package, which are those of the datasets that they are for."""


class Classifier(nn.Module):
    """A convolutional classifier.

    The layers are [3×3 convolution, SiLU, 2×2 max pooling]* → linear, SiLU (the features) → linear.

    There is no batch normalisation, so that a feature depends on its own image only. The activation is SiLU, since a
    ReLU unit that is never active would make the covariance of the features singular.

    Args:
        channels: The number of channels C of the images, 1 or 3.
        size: The height and width of the images, at least 2^len(widths).
        widths: The number of channels after each stage.
        dim: D, the number of features.
        num_classes: The number of logits.
    """

    def __init__(self, channels: int, size: int, widths: Sequence[int], dim: int, num_classes: int) -> None:
        super().__init__()
        self.architecture = {"channels": channels, "size": size, "widths": list(widths)}
        self.architecture |= {"dim": dim, "num_classes": num_classes}
        stages: list[nn.Module] = []
        for width_in, width in zip([channels, *widths], widths, strict=False):
            stages += [nn.Conv2d(width_in, width, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*stages)
        side = size >> len(widths)
        self.embed = nn.Linear(widths[-1] * side * side, dim)
        self.head = nn.Linear(dim, num_classes)
        for layer in [*self.stages, self.embed]:
            if isinstance(layer, nn.Conv2d | nn.Linear):  # He's: torch's default fades without normalisation
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        """Return the features (B, D) of images float32 (B, C, H, W) in [−1, 1]."""
        return nn.functional.silu(self.embed(self.stages(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images float32 (B, C, H, W) in [−1, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def save(self, path: str | os.PathLike[str], **metadata: str) -> None:
        """Write the weights as safetensors, with the architecture and other metadata as JSON in the file's metadata."""
        # One key, because safetensors writes several keys in an order that is not reproducible.
        record = json.dumps({"architecture": self.architecture, **metadata})
        weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(weights, {"classifier": record}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Load a classifier that `save` wrote.

        Raises:
            InputError: If the file is missing or malformed.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; give the weights that scripts/train_extractors.py wrote")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
            architecture = json.loads(metadata["classifier"])["architecture"]
            numbers = [*architecture["widths"], *(v for k, v in architecture.items() if k != "widths")]
            if len(numbers) > 100 or not all(type(n) is int and 0 < n <= 2**20 for n in numbers):
                raise ValueError("an architecture of numbers that are not from 1 to a million")
            with torch.device("meta"):  # allocates no memory for an architecture that the file does not hold
                classifier = cls(**architecture)
            expected = {key: value.shape for key, value in classifier.state_dict().items()}
            if {key: value.shape for key, value in weights.items()} != expected:
                raise ValueError("tensors of other names or shapes than its architecture has")
            if wrong := [key for key, value in weights.items() if value.dtype not in FLOATS]:
                raise ValueError(f"{wrong[0]} is {weights[wrong[0]].dtype}")
            copies = {key: value.to(torch.float32, copy=True) for key, value in weights.items()}
            classifier.load_state_dict(copies, assign=True)
        except Exception as error:  # safetensors, JSON and torch raise errors of many kinds
            message = printable(first_line(error))
            raise InputError(
                f"{path}: not weights of a classifier ({message}); give a file that Classifier.save wrote"
            ) from error
        return classifier


class ClassifierExtractor(FeatureExtractor):
    """An extractor of the features of a trained `Classifier`."""

    def __init__(self, name: str, classifier: Classifier) -> None:
        super().__init__()
        self.name = name
        self.classifier = classifier.requires_grad_(False).eval()
        self.dim = classifier.embed.out_features
        self.fingerprint = fingerprint_of(classifier.state_dict())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        check_images(self.name, images)
        channels, size = self.classifier.architecture["channels"], self.classifier.architecture["size"]
        if tuple(images.shape[1:]) != (channels, size, size):
            raise InputError(
                f"extractor {self.name}: made for images {channels}×{size}×{size}, got "
                f"{'×'.join(map(str, images.shape[1:]))}; choose features made for this size (inception takes any)"
            )
        images = images.to(self.classifier.embed.weight.device)
        with torch.autocast(images.device.type, enabled=False):
            return self.classifier.features(to_unit(images))


@EXTRACTORS.register("classifier")
def _of_file(path: str | None) -> ClassifierExtractor:
    if path is None:
        raise InputError("extractor classifier needs its file: give classifier=FILE.safetensors")
    return ClassifierExtractor(path, Classifier.load(path))


def _shipped(name: str, path: str | None) -> ClassifierExtractor:
    if path is not None:
        raise InputError(f"extractor {name} takes no weights; to use your own file give its path as the features")
    with as_file(files("robustdiff.metrics") / "weights" / f"{name}.safetensors") as file:
        return ClassifierExtractor(name, Classifier.load(file))


for _name in SHIPPED:
    EXTRACTORS.register(_name)(partial(_shipped, _name))
