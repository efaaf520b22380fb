"""Checkpoints that are whole or absent.

A checkpoint is the folder ``checkpoints/step-00001200``: what ``accelerator.save_state`` writes (parameters, optimiser,
gradient scaler, random states), the moving average, ``state.json``, and ``manifest.json`` with the SHA-256 of each of
the others. It is written under a temporary name, flushed, and renamed; a folder under its final name whose hashes do
not agree was damaged later, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from robustdiff.files import atomic_folder
from robustdiff.training.ema import EMA

__all__ = ["damage", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under their final names, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _ema_file(accelerator: Accelerator) -> str:
    # FSDP's processes hold different shards; elsewhere they all hold the same average.
    sharded = accelerator.distributed_type == DistributedType.FSDP
    return f"ema_{accelerator.process_index if sharded else 0}.safetensors"


def save_checkpoint(
    folder: Path, step: int, accelerator: Accelerator, ema: EMA | None, state: dict[str, Any], keep: int
) -> Path:
    """Write ``folder/step-<step>`` atomically, then remove all but the newest ``keep``. Called by every process.

    Arguments:
        folder: The run's ``checkpoints`` folder, which exists.
        step: The optimiser updates made.
        accelerator: Whose state is saved.
        ema: The moving average, if there is one.
        state: What else the run has to know, as JSON.
        keep: How many checkpoints to keep, ≥ 1.

    Raises:
        OSError: If the disk is full or cannot be written; nothing is left behind.
    """
    path = folder / f"step-{step:08d}"
    # The other processes write into the folder that the main process makes, names and renames.
    other = nullcontext(path.with_name(f".{path.name}.tmp"))
    with atomic_folder(path) if accelerator.is_main_process else other as temporary:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary), safe_serialization=True)
        if ema is not None and (accelerator.is_main_process or not _ema_file(accelerator).endswith("_0.safetensors")):
            save_file(ema.state_dict(), temporary / _ema_file(accelerator))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / "state.json").write_text(json.dumps(state))
            hashes = {str(f.relative_to(temporary)): _hash(f) for f in sorted(temporary.rglob("*")) if f.is_file()}
            (temporary / "manifest.json").write_text(json.dumps(hashes, indent=1))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    try:
        hashes = json.loads((path / "manifest.json").read_text())
        for name, expected in hashes.items():
            if _hash(path / name) != expected:
                return f"{name} does not have the contents it was written with"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; damaged ones are passed over with a warning."""
    for path in reversed(_checkpoints(folder)):
        if (reason := damage(path)) is None:
            return path
        logger.warning("checkpoint %s is passed over: %s", path, reason)
    return None


def load_checkpoint(path: Path, accelerator: Accelerator, ema: EMA | None) -> dict[str, Any]:
    """Put a checkpoint back into the accelerator's objects and the average; returns the run's state."""
    accelerator.load_state(str(path))
    if ema is not None:
        ema.load_state_dict(load_file(path / _ema_file(accelerator)))
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state
