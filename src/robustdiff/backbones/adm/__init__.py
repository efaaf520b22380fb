"""guided-diffusion (ADM) checkpoints as diffusers UNets, and back, bit for bit.

ADM is the UNet of Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv 2105.05233.
Its checkpoints are state dicts without a description: the flags of the training command say what the network
is. :func:`load_adm` turns such a file and its flags into a `UNet2DModel` with the same outputs;
:func:`save_adm` writes the same file again.

Super-resolution UNets (`SuperResModel`) and classifiers (`EncoderUNetModel`) are other networks and refused.
"""

from robustdiff.backbones.adm.backbone import Adm
from robustdiff.backbones.adm.checkpoint import build_adm, load_adm, save_adm
from robustdiff.backbones.adm.flags import PRESETS, AdmFlags
from robustdiff.backbones.adm.network import AdmUNet2DModel

__all__ = ["PRESETS", "Adm", "AdmFlags", "AdmUNet2DModel", "build_adm", "load_adm", "save_adm"]
