"""Samplers by name, one step rule in each file, with all of their randomness from outside if wanted."""

from __future__ import annotations

from robustdiff.samplers.sample import sample
from robustdiff.samplers.sampler import SAMPLERS

__all__ = ["SAMPLERS", "sample"]
