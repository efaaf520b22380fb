"""The backbone for networks of class :class:`AdmUNet2DModel`."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from robustdiff.backbones.adm.network import AdmUNet2DModel
from robustdiff.backbones.backbone import BACKBONES
from robustdiff.backbones.unet2d import UNet2D

__all__ = ["Adm"]


@BACKBONES.register("adm")
class Adm(UNet2D):
    """An ``AdmUNet2DModel`` on pixels."""

    section = None
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {
        (library, "AdmUNet2DModel"): AdmUNet2DModel
        # the current module and the earlier ones
        for library in (AdmUNet2DModel.__module__, "robustdiff.backbones.adm", "robustdiff.models.adm")
    }
