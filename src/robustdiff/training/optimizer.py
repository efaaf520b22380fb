r"""The optimiser of a run, AdamW (Loshchilov & Hutter, 2019, arXiv 1711.05101), and its state as tensors by name.

The state of a parameter is made at once, as AdamW makes it at its first step, so that a checkpoint can be copied into
it. There are two kinds:

- ``adamw`` is torch's, fused: the moments ``exp_avg`` and ``exp_avg_sq`` in float32, 8 bytes for each parameter.
- ``adamw8bit`` is that of bitsandbytes (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022,
  arXiv 2110.02861): the moments ``state1`` and ``state2`` are indices in tables of 256 values, ``qmap1`` and ``qmap2``,
  scaled in each block of 256 by ``absmax1`` and ``absmax2``. Tensors of fewer than 4096 elements have them in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from robustdiff.errors import InputError, first_line, installing
from robustdiff.recipe import Recipe

__all__ = ["build_optimizer", "create_state", "set_counts", "state_tensors"]

_TABLES = ("qmap1", "qmap2")  # of bitsandbytes, shared by all parameters


def build_optimizer(recipe: Recipe, parameters: list[nn.Parameter], device: torch.device) -> Any:
    """Return the optimiser of a recipe.

    Args:
        parameters: The parameters to train.
        device: The device on which they will be.

    Raises:
        InputError: If bitsandbytes is needed and is not installed, or has no 8-bit optimiser for the device.
    """
    settings: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        # A fused AdamW is one kernel instead of one for each tensor and operation.
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        kind = import_module("bitsandbytes").optim.AdamW8bit
    except ImportError:
        raise InputError(f"optimizer=adamw8bit needs bitsandbytes: {installing('quantize')}") from None
    try:  # not every version has an 8-bit optimiser for every device
        probe = nn.Parameter(torch.zeros(4096, device=device))
        probe.grad = torch.zeros_like(probe)
        kind([probe]).step()
    except Exception as error:
        raise InputError(
            f"optimizer=adamw8bit: the installed bitsandbytes cannot step on {device.type} "
            f"({first_line(error)[:200]}): update it, or set optimizer=adamw"
        ) from None
    return kind(parameters, **settings)


def create_state(optimizer: Any) -> None:
    """Create the state that an optimiser of :func:`build_optimizer` makes at its first step."""
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if not isinstance(optimizer, AdamW):
                optimizer.init_state(group, parameter, number, index)
                continue
            counted_on = parameter.device if optimizer.defaults["fused"] else None
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=counted_on),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def state_tensors(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the state by the names of parameters and moments; a count that is a Python number as a new tensor."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        for moment, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[moment if moment in _TABLES else f"{name}/{moment}"] = value
            else:
                tensors[f"{name}/{moment}"] = torch.tensor(float(value), device=parameter.device)
    return tensors


def set_counts(optimizer: Any, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Set the counts that are Python numbers from the tensors of :func:`state_tensors`, into which they were loaded."""
    for name, parameter in trained.items():
        for moment, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor):
                optimizer.state[parameter][moment] = int(tensors[f"{name}/{moment}"])
