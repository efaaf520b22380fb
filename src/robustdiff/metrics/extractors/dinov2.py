r"""The embeddings of DINOv2 (Oquab et al., 2023, arXiv 2304.07193) as features, for the Fréchet distance FD-DINOv2.

People's judgement of images agrees with distances in this space better than with those in Inception's (Stein et al.,
NeurIPS 2023, arXiv 2306.04675), whose evaluation this module follows with the network ViT-L/14: images are resized to
224 × 224 by Pillow's bicubic filter, and the feature is the class token after the last normalisation.

The network was trained with positions on a grid of 37 × 37 patches, of images of 518 × 518. As in its authors' code, a
grid of n × n takes them by bicubic interpolation with the scale (n + 0.1)/37. (transformers uses n/37, which moves
positions by up to a tenth of a patch.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from robustdiff.encoders import check_model_type, load_encoder, transformers_class
from robustdiff.errors import InputError, printable
from robustdiff.metrics.extractors.extractor import EXTRACTORS, FeatureExtractor, fingerprint_of, in_colour

__all__ = ["DinoExtractor", "interpolate_positions"]

_SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@EXTRACTORS.register("dinov2")
class DinoExtractor(FeatureExtractor):
    """An extractor of the class token of a DINOv2.

    Args:
        folder: The folder of a ``Dinov2Model`` of transformers, such as a copy of facebook/dinov2-large. Nothing is
            fetched from the network.

    Raises:
        InputError: If transformers is not installed, or the folder is not given, is not a DINOv2 or lacks a part.
    """

    def __init__(self, folder: str | Path | None) -> None:
        super().__init__()
        if folder is None:
            raise InputError("extractor dinov2 needs the folder of a DINOv2 model: give dinov2=FOLDER")
        folder = Path(folder)
        check_model_type(folder, "dinov2", "DINOv2")
        self.name = f"dinov2={folder.name}"
        self.network = load_encoder(
            folder, transformers_class("Dinov2Model", "DINOv2"), "model of DINOv2", torch.float32
        )
        config = self.network.config
        if _SIDE % config.patch_size:
            raise InputError(f"{printable(folder)}: patches of {config.patch_size} pixels do not fill {_SIDE}: take 14")
        self.dim = int(config.hidden_size)
        self.fingerprint = fingerprint_of(self.network.state_dict())
        embeddings = self.network.embeddings
        positions = interpolate_positions(embeddings.position_embeddings.data, _SIDE // config.patch_size)
        # The network has one position for each patch then, and interpolates nothing.
        embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = _prepared(in_colour(self.name, images)).to(self.network.device)
        with torch.autocast(pixels.device.type, enabled=False):
            features: Tensor = self.network(pixel_values=pixels).pooler_output
        return features


def interpolate_positions(positions: Tensor, side: int) -> Tensor:
    """Return the positions of a grid of n × n patches, with shape (1, 1 + n², D).

    Args:
        positions: The positions of the class token and of the patches of the trained grid, with shape (1, 1 + N², D).
        side: n.
    """
    trained = round((positions.shape[1] - 1) ** 0.5)
    if side == trained:
        return positions
    grid = positions[:, 1:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, scale_factor=(side + 0.1) / trained, mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _prepared(images: Tensor) -> Tensor:
    """Return the input of the network, float32 (B, 3, 224, 224), for images uint8 (B, 3, H, W)."""
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    resized = [Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC) for image in arrays]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (pixels.to(torch.float32) / 255 - mean) / std
