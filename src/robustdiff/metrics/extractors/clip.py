"""The image embeddings of a CLIP model as features for FID, KID, precision and recall.

For text-to-image models CLIP's embeddings describe content better than Inception's features (Jayasumana et al.,
"Rethinking FID", CVPR 2024, arXiv 2401.09603). Here they are the projected embeddings before normalisation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.metrics.clip_score import load_clip_pair, prepare
from robustdiff.metrics.extractors.extractor import EXTRACTORS, FeatureExtractor, check_images, fingerprint_of

__all__ = ["ClipExtractor"]


@EXTRACTORS.register("clip")
class ClipExtractor(FeatureExtractor):
    """An extractor of the image embeddings of a CLIP model.

    Args:
        folder: The folder of a ``CLIPModel`` of transformers, or the name of one that comes with this package.

    Raises:
        InputError: If transformers is not installed, or the folder is not given, is not a CLIP or lacks a part.
    """

    def __init__(self, folder: str | Path | None) -> None:
        super().__init__()
        if folder is None:
            raise InputError("extractor clip needs the folder of a CLIP model: give clip=FOLDER")
        self.name = f"clip={Path(folder).name}"
        self.network, _, self.processor = load_clip_pair(folder)
        self.dim = int(self.network.config.projection_dim)
        self.fingerprint = fingerprint_of(self.network.state_dict())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        check_images(self.name, images)
        pixels = prepare(self.processor, images).to(self.network.device)
        with torch.autocast(pixels.device.type, enabled=False):
            pooled = self.network.vision_model(pixel_values=pixels).pooler_output
            embeddings: Tensor = self.network.visual_projection(pooled)
        return embeddings
