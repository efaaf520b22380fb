"""Samplers by name, each with its step rule in one file; their random numbers may be given as arguments."""

from __future__ import annotations

from robustdiff.samplers.sample import sample
from robustdiff.samplers.sampler import SAMPLERS

__all__ = ["SAMPLERS", "sample"]
