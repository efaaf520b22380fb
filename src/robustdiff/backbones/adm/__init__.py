"""Bit-exact conversion between guided-diffusion (ADM) checkpoints and diffusers UNets.

ADM is the UNet of Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv 2105.05233.
Its checkpoints are state dicts without a configuration: the network is defined by the flags of the training command.
:func:`load_adm` converts a checkpoint and its flags into a `UNet2DModel` with the same outputs; :func:`save_adm`
converts it back into an identical checkpoint.

Super-resolution UNets (`SuperResModel`) and classifiers (`EncoderUNetModel`) are not supported.
"""

from robustdiff.backbones.adm.backbone import Adm
from robustdiff.backbones.adm.checkpoint import build_adm, load_adm, save_adm
from robustdiff.backbones.adm.flags import PRESETS, AdmFlags
from robustdiff.backbones.adm.network import AdmUNet2DModel

__all__ = ["PRESETS", "Adm", "AdmFlags", "AdmUNet2DModel", "build_adm", "load_adm", "save_adm"]
