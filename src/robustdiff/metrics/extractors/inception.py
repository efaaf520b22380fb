"""The Inception-v3 network by which papers report FID (Heusel et al., NeurIPS 2017, arXiv 1706.08500).

It is torch-fidelity's port of the original from TensorFlow (Obukhov et al., 2020), resizing and padding included.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError, first_line, installing
from robustdiff.metrics.extractors.extractor import EXTRACTORS, FeatureExtractor, fingerprint_of, in_colour
from robustdiff.weights import read_file

__all__ = ["INCEPTION_URL", "InceptionExtractor"]

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""The address of the weights of the original FID."""


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


@EXTRACTORS.register("inception")
class InceptionExtractor(FeatureExtractor):
    """An extractor of the 2048 pooled features of the Inception-v3 network of the original FID.

    Args:
        weights: The path of torch-fidelity's weight file, `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        InputError: If torch-fidelity is not installed, or the file is not given, missing or malformed.
    """

    def __init__(self, weights: str | os.PathLike[str] | None) -> None:
        super().__init__()
        if weights is None:
            raise InputError(f"extractor inception needs weights=FILE; download it from {INCEPTION_URL}")
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
        images = in_colour(self.name, images.to(self.network.fc.weight.device))
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.network(images)[0]
        return features
