"""Weights read from untrusted files, without running code that a file names.

A file is in the format of safetensors or ``torch.save``. Reading is followed by three steps for both formats:

- The state dict is looked up in a training script's dict, with preference for the moving average.
- Prefixes of wrappers such as ``DistributedDataParallel`` and ``torch.compile`` are stripped from names.
- Each tensor is checked to be dense, in float16, bfloat16, float32 or float64, and finite.
"""

from __future__ import annotations

import logging
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from robustdiff.errors import InputError

__all__ = [
    "DTYPES",
    "FLOATS",
    "check_weights",
    "digest_state",
    "read_file",
    "read_state",
    "read_weights",
    "strip_prefixes",
    "update_digest",
]

_log = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The allowed types of weights."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The types of products by precision; those of two bytes are types of autocast."""

_LONGEST_NAME = 100
_DAMAGED = (
    "is not a checkpoint that PyTorch can read: it is damaged, truncated, or holds other than tensors; download it "
    "again, or save the network's state_dict()"
)
_LEGACY_PICKLES = 4  # the number of pickles before the tensors in a file older than the zip format

# Keys of training scripts for the moving average and for the trained weights; the first key that is present is used.
_AVERAGES = (
    *("ema", "model_ema", "ema_model", "net_ema", "ema_net", "unet_ema", "ema_unet", "params_ema", "ema_params"),
    *("ema_state_dict", "state_dict_ema", "model_ema_state_dict", "ema_model_state_dict", "ema_weights"),
    *("shadow", "shadow_params", "averaged_model"),
)
_WEIGHTS = (
    *("state_dict", "model_state_dict", "net_state_dict", "unet_state_dict", "model_state", "model", "net", "network"),
    *("unet", "params", "weights", "module", "state"),
)

# Parts that wrappers add to names: anywhere in the name, for a wrapped part of the network, or before all names.
_INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BEFORE = ("module.", "model.", "net.", "unet.", "ema_model.", "diffusion_model.")


def update_digest(digest: Any, value: Tensor) -> None:
    """Add the bytes of a tensor to a hash; they depend neither on its device nor on its memory format."""
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def digest_state(digest: Any, state: Mapping[str, Tensor]) -> None:
    """Add the names, types, shapes and bytes of tensors to a hash, in the order of their names."""
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        update_digest(digest, value)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights in a file by name, in the file's order and types.

    The tensors may be memory-mapped: copy them before the file is changed or removed.

    Raises:
        InputError: The file is missing, it does not hold a network's weights, or a weight is not a dense, finite
            floating-point tensor.
    """
    return check_weights(strip_prefixes(read_state(path), path), path)


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors in a file, or in the dict of a training script, by their names in the file.

    Raises:
        InputError: The file is missing or unreadable, or it holds no dict of tensors by name.
    """
    return _open(read_file(path), path)


def read_file(path: str | os.PathLike[str]) -> Any:
    """Load a file of safetensors or ``torch.save`` that holds only tensors and plain containers.

    Raises:
        InputError: The file is missing or damaged, or it holds other pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        kind = " is a folder" if path.is_dir() else " is a link that leads nowhere" if path.is_symlink() else ""
        raise InputError(f"no such file: {path}{kind}")
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise InputError(f"{path} is not a checkpoint that PyTorch can read: it is empty; download or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a pointer of Git LFS and not the weights themselves: run git lfs pull")
    if path.suffix == ".safetensors" or head[8:9] == b"{":  # 8 bytes with the length of the header, then JSON
        return _read_safetensors(path)
    return _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except Exception:  # safetensors raises its own error, and torch another for an unknown type
        raise InputError(f"{path} is damaged, truncated, or no safetensors file: download or save it again") from None


def _read_pickle(path: Path) -> Any:
    _check_zip(path)
    _check_names(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # for a malformed file, the unpickler may raise any error
        if (found := re.search(r"GLOBAL ([\w.]+)", str(error)[:1000])) is not None:
            raise InputError(
                f"{path} is not a checkpoint that PyTorch can read without running code: it holds {found[1]}, not only "
                "tensors; where it was made, save the network's state_dict() alone"
            ) from None
        raise InputError(f"{path} {_DAMAGED}") from None


def _check_zip(path: Path) -> None:
    """Refuse compressed members, which ``torch.save`` never writes: a small file could fill the memory."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            expanded = [m.filename for m in archive.infolist() if m.compress_type or m.compress_size != m.file_size]
    except Exception:  # not a zip file, or a damaged one: torch.load reports it
        return
    if expanded:
        raise InputError(f"{path} has compressed members, as {expanded[0][:100]!r}: save it by torch.save as it is")


def _check_names(path: Path) -> None:
    """Refuse pickles with excessively long names, for which torch takes minutes to build its error message."""
    names: list[str] = []
    damaged = False
    try:
        with path.open("rb") as file:
            pickled: list[Any] = [file] * _LEGACY_PICKLES
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    pickled = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
            file.seek(0)
            for source in pickled:
                for code, argument, _ in pickletools.genops(source):
                    if code.name in ("GLOBAL", "INST"):
                        names.append(str(argument))
    except Exception:  # torch may parse a malformed pickle differently
        damaged = True
    if any(len(name) > _LONGEST_NAME for name in names):
        raise InputError(
            f"{path} is not a checkpoint that PyTorch can read: it has names of more than {_LONGEST_NAME} characters; "
            "download it again, or save the network's state_dict()"
        )
    if damaged:
        raise InputError(f"{path} {_DAMAGED}")


def _open(held: Any, path: str | os.PathLike[str], depth: int = 0) -> dict[str, Tensor]:
    """Return the state dict in the contents of a file, by the keys of training scripts."""
    if not isinstance(held, Mapping):
        raise InputError(
            f"{path} holds a {type(held).__name__}, not a dict of weights by name: save the network's state_dict()"
        )
    if "param_groups" in held:
        raise InputError(f"{path} holds the state of an optimiser, not a network's weights: give the network's file")
    if held and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()):
        return {name: value.detach() for name, value in held.items()}
    averages, weights = (
        [name for name in names if isinstance(held.get(name), Mapping | list | tuple) and len(held[name])]
        for names in (_AVERAGES, _WEIGHTS)
    )
    if not averages + weights or depth == 4:  # a dict may contain itself
        names = ", ".join(map(str, list(held)[:4])) + (", …" if len(held) > 4 else "")
        raise InputError(
            f"{path} holds no dict of weights by name, but {names or 'an empty dict'}: save the network's state_dict()"
        )
    name = (averages + weights)[0]
    if not isinstance(held[name], Mapping):
        raise InputError(
            f"{path} holds {name} as a list, whose tensors have no names: load it into the network where it was made, "
            "and save the network's state_dict()"
        )
    if averages and weights:
        _log.warning("%s holds %s and %s: read %s, the moving average", path, weights[0], name, name)
    return _open(held[name], path, depth + 1)


def strip_prefixes(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return weights by the names of the unwrapped network, without the prefixes of wrappers.

    Args:
        state: The weights by name. `n_averaged` of torch's ``AveragedModel`` is dropped.
        path: The file, for messages.

    Raises:
        InputError: A name occurs both with a prefix and without.
    """
    if all(name.startswith("module.") or name == "n_averaged" for name in state):
        state = {name: value for name, value in state.items() if name != "n_averaged"}
    stripped = {name: ".".join(part for part in name.split(".") if part not in _INSIDE) for name in state}
    while prefix := next((p for p in _BEFORE if stripped and all(n.startswith(p) for n in stripped.values())), ""):
        stripped = {name: short.removeprefix(prefix) for name, short in stripped.items()}
    taken: dict[str, str] = {}
    for name, short in stripped.items():
        if taken.setdefault(short, name) != name:
            raise InputError(f"{path} holds both {taken[short]} and {name}: save the network's state_dict() alone")
    return {stripped[name]: value for name, value in state.items()}


def check_weights(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Check that weights are dense tensors of finite floating-point numbers, and return them by name.

    Args:
        path: The file, for messages.
        dtype: The type of contiguous copies to return; None returns the weights themselves.

    Raises:
        InputError: A weight has another type or layout, is not finite, or would not be finite in `dtype`.
    """
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        kind = str(value.dtype).removeprefix("torch.")
        if value.layout is not torch.strided or value.dtype not in FLOATS or value.device.type != "cpu":
            what = kind if value.layout is torch.strided else "sparse"
            raise InputError(
                f"{path}: {name} is {what}, where weights are dense, in float16, bfloat16, float32 or float64: "
                "save the network's parameters in one of these types, and nothing else"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes() or any(
            step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)
        ):
            raise InputError(
                f"{path}: {name} is an expanded view of fewer numbers than its shape {tuple(value.shape)} has: "
                "save a copy of it (.clone())"
            )
        if dtype is not None:
            value = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not value.isfinite().all():
            raise InputError(
                f"{path}: {name} has values that are not finite{f' in {str(dtype)[6:]}' if dtype else ''}: the "
                "training that wrote it diverged, or the file is damaged; take an earlier checkpoint"
            )
        weights[name] = value
    return weights
