"""Samplers by name, over diffusers' schedulers, with all of their randomness from outside if wanted."""

from __future__ import annotations

from robustdiff.samplers.sample import SAMPLERS, sample

__all__ = ["SAMPLERS", "sample"]
