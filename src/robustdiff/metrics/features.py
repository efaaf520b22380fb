r"""Feature extractors: the space in which sets of images are compared.

An extractor is a fixed map φ: {0, …, 255}^{C×H×W} → R^D, the activations of a classifier one layer before its logits.
FID, KID, precision and recall compare the distributions of φ(generated) and φ(real), so their values can be compared
only under the same φ. Each extractor has a fingerprint, the hash of its weights, which is part of the key of cached
reference statistics.

- `digits`, `fashion-16`, `fashion-mnist`: small convolutional classifiers that come with this package
  (`scripts/train_extractors.py` trains them), for small images, to which Inception, trained on 299 × 299 photographs,
  is not suited.
- `inception`: the network by which papers report FID (Heusel et al., NeurIPS 2017, arXiv 1706.08500), as torch-fidelity
  (Obukhov et al., 2020) ports it from TensorFlow, resizing and padding included.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import os
import sys
import types
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from robustdiff.data.dataset import to_unit
from robustdiff.errors import InputError, RunError, first_line, installing, printable
from robustdiff.files import atomic_write
from robustdiff.weights import FLOATS, digest_state, read_file

__all__ = [
    "EXTRACTORS",
    "INCEPTION_URL",
    "SHIPPED",
    "Classifier",
    "ClassifierExtractor",
    "FeatureExtractor",
    "InceptionExtractor",
    "check_images",
    "fingerprint_of",
    "load_extractor",
]

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SHIPPED = ("digits", "fashion-16", "fashion-mnist")
EXTRACTORS = (*SHIPPED, "inception")


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
            RunError: If a feature is not finite.
        """
        features: NDArray[np.float32] = self(images).cpu().numpy()
        # Precision and recall would be finite: a distance to NaN is not below any radius.
        if not np.isfinite(features).all():
            raise RunError(f"extractor {self.name}: features that are not finite; check its weights")
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


def _torch_fidelity_inception() -> Any:
    """Import torch-fidelity's Inception class, even if torchvision, which its other modules need, cannot be imported.

    If the package cannot be imported, this module alone is imported under an empty package object, which is removed
    again, so that a later `import torch_fidelity` is not affected.
    """
    module = "torch_fidelity.feature_extractor_inceptionv3"
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        raise InputError(
            f"extractor inception needs torch-fidelity: {installing('inception')}, or without torchvision: pip install "
            "--no-deps torch-fidelity"
        )
    try:
        return importlib.import_module(module).FeatureExtractorInceptionV3
    except (ImportError, RuntimeError, AttributeError):  # torchvision is missing, or built for another torch
        before = set(sys.modules)
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module(module).FeatureExtractorInceptionV3
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"extractor inception: torch-fidelity does not import here ({error}); try another version of it"
        ) from error
    finally:
        for key in [key for key in sys.modules if key.startswith("torch_fidelity") and key not in before]:
            del sys.modules[key]


class InceptionExtractor(FeatureExtractor):
    """An extractor of the 2048 pooled features of the Inception-v3 network of the original FID.

    Args:
        weights: The path of torch-fidelity's weight file, `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        InputError: If torch-fidelity is not installed, or the file is missing or malformed.
    """

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        self.name = "inception"
        self.dim = 2048
        network = _torch_fidelity_inception()
        path = Path(weights)
        if not path.is_file():
            raise InputError(f"{path}: no such file; download it from {INCEPTION_URL}")
        try:
            # torch-fidelity unpickles its file without restriction. Read the file here, tensors only,
            # and hand over a copy of what was read.
            state = read_file(path)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            self.network = network("inception", ["2048"], feature_extractor_weights_path=buffer)
        except Exception as error:  # torch-fidelity raises errors of many kinds for other weights
            message = first_line(error)
            raise InputError(f"{path}: not Inception weights ({message}); download {INCEPTION_URL}") from error
        self.fingerprint = fingerprint_of(self.network.state_dict())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        check_images(self.name, images)
        if images.shape[1] not in (1, 3):
            raise InputError(f"extractor inception: got {images.shape[1]} channels; give grey or RGB images")
        images = images.to(self.network.fc.weight.device).expand(-1, 3, -1, -1)
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.network(images)[0]
        return features


def load_extractor(
    name: str, *, weights: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Load a feature extractor, frozen and in evaluation mode, by its name.

    Args:
        name: One of `EXTRACTORS`, the path of a `.safetensors` file that `Classifier.save` wrote, or `clip=FOLDER` for
            the image embeddings of a CLIP model (:mod:`robustdiff.metrics.clip_features`).
        weights: The path of the weight file of `inception`; other extractors take none.
        device: The device of the extractor.

    Raises:
        InputError: If the name is unknown, or the weights are missing or malformed.
    """
    extractor: FeatureExtractor
    if name == "inception":
        if weights is None:
            raise InputError(f"extractor inception needs weights=FILE; download it from {INCEPTION_URL}")
        extractor = InceptionExtractor(weights)
    elif weights is not None:
        raise InputError(f"extractor {name} takes no weights; to use your own file give its path as the features")
    elif name.startswith("clip="):
        from robustdiff.metrics.clip_features import ClipExtractor  # metrics import this module

        extractor = ClipExtractor(name.removeprefix("clip="))
    elif name in SHIPPED:
        with as_file(files("robustdiff.metrics") / "weights" / f"{name}.safetensors") as path:
            extractor = ClassifierExtractor(name, Classifier.load(path))
    elif name.endswith(".safetensors"):
        extractor = ClassifierExtractor(name, Classifier.load(name))
    else:
        raise InputError(
            f"unknown extractor {name!r}; use one of: {', '.join(EXTRACTORS)}, a .safetensors file, or clip=FOLDER"
        )
    return extractor.to(device).eval()
