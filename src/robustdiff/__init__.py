"""Adversarial training of diffusion and consistency models, and measurements of whether it helped.

Wang et al., "Improved Diffusion-based Generative Model with Better Adversarial Robustness", ICLR 2025,
arXiv 2502.17099.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustdiff.backbones.adm import load_adm, save_adm
    from robustdiff.backbones.model import load_model
    from robustdiff.objectives.consistency import ConsistencyObjective
    from robustdiff.objectives.denoising import DenoisingObjective
    from robustdiff.objectives.latent_consistency import LatentConsistencyObjective
    from robustdiff.perturbation import FreeAdversary, PGDAdversary, RandomAdversary
    from robustdiff.process import DiffusionProcess, absorb
    from robustdiff.samplers import sample

__version__ = "0.3.0"

# diffusers imports bitsandbytes if it is there, which on some CPUs warns of a package that is not needed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = [
    "ConsistencyObjective",
    "DenoisingObjective",
    "DiffusionProcess",
    "FreeAdversary",
    "LatentConsistencyObjective",
    "PGDAdversary",
    "RandomAdversary",
    "absorb",
    "load_adm",
    "load_model",
    "sample",
    "save_adm",
]

_HOME = {
    "ConsistencyObjective": "robustdiff.objectives.consistency",
    "DenoisingObjective": "robustdiff.objectives.denoising",
    "DiffusionProcess": "robustdiff.process",
    "FreeAdversary": "robustdiff.perturbation",
    "LatentConsistencyObjective": "robustdiff.objectives.latent_consistency",
    "PGDAdversary": "robustdiff.perturbation",
    "RandomAdversary": "robustdiff.perturbation",
    "absorb": "robustdiff.process",
    "load_adm": "robustdiff.backbones.adm",
    "load_model": "robustdiff.backbones.model",
    "sample": "robustdiff.samplers",
    "save_adm": "robustdiff.backbones.adm",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: diffusers takes seconds to import, and a plain training loop may not need it.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'robustdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
