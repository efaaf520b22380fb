"""Checkpoints that are written atomically and read without running code.

A checkpoint is a folder such as ``checkpoints/step-00001200``. It holds safetensors files (the parameters and buffers
of the network and of a target network, or their adapters alone, the optimiser's moments, the moving average, torch's
random states), ``state.json``, and ``manifest.json`` with the SHA-256 of each other file. It is written under a
temporary name, flushed, and renamed.

If the hashes of a checkpoint do not agree with its files, it is damaged, and the one before it is used. A whole
checkpoint is read only if its files hold exactly the names, shapes and types of the run's own tensors, into which the
values are copied. The settings of the optimiser come from the recipe alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustdiff.distributed import from_main
from robustdiff.errors import InputError, first_line, first_mistake, printable
from robustdiff.files import atomic_folder, open_regular, read_json

__all__ = [
    "Scale",
    "State",
    "check_moments",
    "check_objective",
    "damage",
    "load_checkpoint",
    "newest_checkpoint",
    "remove_before",
    "save_checkpoint",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")
_DEVICES = ("cuda", "mps", "xpu", "npu", "hpu", "mlu", "musa", "sdaa")  # of accelerate, with generators of their own
_FILE = re.compile(r"state\.json|(?:model|target|optimizer|ema|random)(?:-\d+)?\.safetensors")


class Scale(BaseModel):
    """The scale of the loss in fp16, and the number of updates since the scale last changed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    scale: float = Field(gt=0, le=torch.finfo(torch.float32).max)
    growth_tracker: NonNegativeInt


class State(BaseModel):
    """The state of a run besides its tensors, stored as ``state.json``.

    Attributes:
        step: The number of optimiser updates made.
        batch: The number of batches completed.
        skipped: The number of ascents that were skipped (see :class:`robustdiff.perturbation.Adversary`), in all
            processes.
        skipped_updates: The number of updates that were left out because their gradient overflowed.
        objective: The state of the objective, numbers and lists of numbers.
        scaler: The scale of the loss in fp16; None in other precisions.
        processes: The number of processes that wrote the checkpoint.
        base: The fingerprint of the base model, of which the checkpoint has the adapter; None without an adapter.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    step: PositiveInt
    batch: NonNegativeInt
    skipped: NonNegativeInt
    skipped_updates: NonNegativeInt
    objective: dict[str, Any]
    scaler: Scale | None
    processes: int = Field(ge=1, le=10_000)
    base: str | None = Field(None, max_length=64)


def _hash(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under their final names, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _file(part: str, accelerator: Accelerator) -> str:
    """Return the name of the file of this process's tensors, which under FSDP are a shard in a file of its own."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    return f"{part}-{accelerator.process_index:03d}.safetensors" if sharded else f"{part}.safetensors"


def _random_file(process: int) -> str:
    return f"random-{process:03d}.safetensors"


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process has, or the tensor if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators, of the CPU and of the device that this process uses."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


# -- writing --------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, state: State, accelerator: Accelerator, tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """Write ``folder/step-<step>`` atomically, then remove all but the newest ``keep`` checkpoints.

    Every process must call this function. The folder must exist and hold only files of the run. The tensors of each
    part ("model", "target", "optimizer", "ema") are given by name.

    Raises:
        OSError: If the disk is full or cannot be written; nothing is left behind.
    """
    path = folder / f"step-{state.step:08d}"
    main = accelerator.is_main_process
    # The other processes write into the folder that the main process makes, names and renames.
    with atomic_folder(path, replace=True) if main else nullcontext() as made:
        name = from_main(made.name if made is not None else None)
        temporary = folder / name
        for part, values in tensors.items():
            if main or accelerator.distributed_type == DistributedType.FSDP:
                # On the host first: copies on a GPU would need memory that the training may have filled.
                contiguous = {key: _local(value).cpu().contiguous() for key, value in values.items()}
                save_file(contiguous, temporary / _file(part, accelerator))
        save_file(_random_states(accelerator.device), temporary / _random_file(accelerator.process_index))
        accelerator.wait_for_everyone()
        if main:
            (temporary / "state.json").write_text(json.dumps(state.model_dump()), encoding="utf-8")
            hashes = {file.name: _hash(file) for file in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    accelerator.wait_for_everyone()
    if main:
        remove_before(path, keep)
    return path


def remove_before(checkpoint: Path, keep: int) -> None:
    """Remove the checkpoints before a whole one, so that ``keep`` remain with it. A killed run may have left more."""
    for old in [path for path in _checkpoints(checkpoint.parent) if path.name <= checkpoint.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)


# -- reading --------------------------------------------------------------------------------------------------


def damage(path: Path) -> str | None:
    """Return a description of a checkpoint's damage, or None if it is whole."""
    try:
        hashes = _manifest(path)
        for name, expected in hashes.items():
            if _hash(path / name) != expected:
                return f"{name} does not have the contents it was written with"
    except (InputError, OSError) as error:
        return f"it cannot be read ({error})"
    return None


def _manifest(path: Path) -> dict[str, str]:
    """Return the SHA-256 hashes of a checkpoint's files by file name. Names that no checkpoint has are refused."""
    hashes = read_json(path / "manifest.json", 2**20)
    if path.is_symlink() or not isinstance(hashes, dict) or "state.json" not in hashes:
        raise InputError("manifest.json names no checkpoint of this version")
    for name in hashes:
        if not _FILE.fullmatch(name):
            raise InputError(f"manifest.json names {printable(name)}, which no checkpoint of this version has")
    return hashes


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a folder, or None if the folder has no checkpoint.

    Raises:
        InputError: If all checkpoints are damaged.
    """
    first = None
    for path in reversed(_checkpoints(folder)):
        if (reason := damage(path)) is None:
            return path
        logger.warning("checkpoint %s is passed over: %s", printable(path), reason)
        first = first or f"{path.name}: {reason}"
    if first is not None:
        raise InputError(
            f"no checkpoint in {printable(folder)} is whole ({first}): restore one, or remove them to start again"
        )
    return None


def load_checkpoint(path: Path, accelerator: Accelerator, tensors: Mapping[str, Mapping[str, Tensor]]) -> State:
    """Copy a checkpoint into the run's tensors, restore the random states, and return the run's state.

    The checkpoint is a whole one. The tensors, as in :func:`save_checkpoint`, may be on any device and in any memory
    format. After an error, some of them may have been overwritten.

    Raises:
        InputError: If the checkpoint's files, or the names, shapes or types of its tensors, are not the run's, or a
            number is not finite.
    """
    try:
        state = State.model_validate(read_json(path / "state.json"))
    except ValidationError as error:
        raise _refusal(path / "state.json", first_mistake(error)) from None
    if f"step-{state.step:08d}" != path.name:
        raise _refusal(path / "state.json", f"step {state.step} is not that of its folder")
    sharded = accelerator.distributed_type == DistributedType.FSDP
    processes = state.processes
    if sharded and processes != accelerator.num_processes:
        raise InputError(f"{printable(path)} is of {processes} processes under FSDP: resume with as many")
    shards = [f"-{i:03d}" for i in range(processes)] if sharded else [""]
    expected = {f"{part}{shard}.safetensors" for part in tensors for shard in shards}
    expected |= {"state.json", *map(_random_file, range(processes))}
    if different := sorted(_manifest(path).keys() ^ expected):
        raise _refusal(path, f"{different[0]} is {'missing' if different[0] in expected else 'not of such a run'}")
    for part, values in tensors.items():
        file = path / _file(part, accelerator)
        with torch.no_grad():
            for name, value in _read(file, {name: _local(value) for name, value in values.items()}):
                _local(values[name]).copy_(value)
    if (state.scaler is None) != (accelerator.scaler is None):
        raise _refusal(path / "state.json", "the scale of the loss is not of such a run")
    if state.scaler is not None:
        scale = {"scale": state.scaler.scale, "_growth_tracker": state.scaler.growth_tracker}
        accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), **scale})
    _restore_random(path, accelerator, processes)
    return state


def _restore_random(path: Path, accelerator: Accelerator, processes: int) -> None:
    """Restore torch's random states that fit this type of device and number of processes."""
    now = _random_states(accelerator.device)
    if processes != accelerator.num_processes:
        logger.warning("%s is of %d processes: random numbers such as dropout's begin anew", printable(path), processes)
        return
    file = path / _random_file(accelerator.process_index)
    with _opened(file) as opened:
        saved = set(opened.keys())
    if saved != now.keys() and saved in ({"cpu"}, *({"cpu", kind} for kind in _DEVICES)):
        logger.warning("%s is of another device: random numbers such as dropout's begin anew", printable(path))
        return
    states = dict(_read(file, now))
    try:
        torch.set_rng_state(states["cpu"])
        if (kind := accelerator.device.type) != "cpu":
            torch.get_device_module(kind).set_rng_state(states[kind])
    except RuntimeError as error:
        raise _refusal(file, first_line(error)) from None


def _opened(path: Path) -> Any:
    try:
        open_regular(path).close()
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _refusal(path, str(error)) from None


def _read(path: Path, expected: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file with their names, after checking names, shapes, types and finiteness."""
    with _opened(path) as file:
        if different := sorted(set(file.keys()) ^ expected.keys()):
            what = "is missing" if different[0] in expected else "is not in the recipe's network"
            raise _refusal(path, f"{printable(different[0])} {what}")
        for name, wanted in expected.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(wanted.shape):  # before it is read: it may be huge
                raise _refusal(path, f"{name} has the shape {shape} instead of {tuple(wanted.shape)}")
            try:
                value = file.get_tensor(name)
            except (SafetensorError, ValueError, AttributeError, KeyError) as error:
                raise _refusal(path, f"{name}: {error}") from None
            if value.dtype != wanted.dtype:
                raise _refusal(path, f"{name} has the type {value.dtype} instead of {wanted.dtype}")
            if not value.isfinite().all():
                raise _refusal(path, f"{name} has a number that is not finite")
            yield name, value


def check_moments(path: Path, moments: Mapping[str, Tensor], step: int) -> None:
    """Check the moments of AdamW: second moments, and the scales of quantised ones, are ≥ 0, and counts of updates are
    whole and at most the run's.

    Raises:
        InputError: If a moment or a count is out of its range.
    """
    for name, value in moments.items():
        if name.rpartition("/")[2] in ("exp_avg_sq", "state2", "absmax1", "absmax2") and bool(
            (_local(value) < 0).any()
        ):
            raise _refusal(path, f"optimizer: {name} has a negative number")
        if name.endswith("/step") and not (0 <= (count := float(value)) <= step and count == math.floor(count)):
            raise _refusal(path, f"optimizer: {name} is {count:g}, of {step} updates")


def check_objective(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that the saved state of an objective holds numbers ≥ 0, in lists as long as the run's.

    Raises:
        InputError: If the saved state has another form.
    """
    if different := sorted(saved.keys() ^ now.keys()):
        raise _refusal(path / "state.json", f"objective.{printable(different[0])} is not as the recipe's objective has")
    for name, value in now.items():
        if not _alike(saved[name], value):
            raise _refusal(path / "state.json", f"objective.{name} is not as the recipe's objective has it")


def _alike(saved: Any, now: Any) -> bool:
    if isinstance(now, list):
        return isinstance(saved, list) and len(saved) == len(now) and all(map(_alike, saved, now))
    return type(saved) is type(now) and bool(0 <= saved < (2**53 if isinstance(now, int) else 1e100))


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(
        f"{printable(path)} does not fit the recipe ({printable(reason)}): remove its checkpoint to go on from the one "
        "before, or choose another --set output=…"
    )
