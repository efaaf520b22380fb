"""Processes that work together, one for each GPU, as ``accelerate launch`` starts them.

The main process has the rank 0. One process alone is the main process, and has no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)

from robustdiff.errors import InputError

__all__ = ["agreement", "from_main", "make_accelerator", "of_others"]

PATIENCE = timedelta(hours=12)
"""The longest wait of a process for another one. NCCL's own, 10 minutes, ends a run while the main process reads a
large data set, or computes the features of its images."""


def make_accelerator(cpu: bool = False, **settings: Any) -> Accelerator:
    """Return an accelerator, whose processes wait long enough for each other.

    Compilation and accumulation are settings of a recipe. Those of ``accelerate config`` are not taken: the first would
    rename the weights, and the second would divide the loss again.

    Args:
        cpu: Use the CPU even if there is a GPU.
        settings: Further arguments of ``Accelerator``.

    Raises:
        InputError: If the processes were launched with DeepSpeed or Megatron-LM, or ``cpu`` is given and the process
            uses another device through accelerate already.
    """
    for name, flag in (("DeepSpeed", "DEEPSPEED"), ("Megatron-LM", "MEGATRON_LM")):
        if parse_flag_from_env(f"ACCELERATE_USE_{flag}"):
            raise InputError(f"the processes were launched with {name}: launch them with --multi_gpu or --use_fsdp")
    accelerator = Accelerator(
        cpu=cpu,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **settings,
    )
    if cpu and accelerator.device.type != "cpu":  # accelerate keeps the first device of a process
        raise InputError(
            f"this process uses {accelerator.device} through accelerate already: for the CPU, start another"
        )
    return accelerator


def from_main(value: Any) -> Any:
    """Return the main process's value in all processes. Values of others are ignored."""
    return broadcast_object_list([value])[0]


def of_others(value: Any, accelerator: Accelerator) -> Iterator[Any]:
    """Yield the values of the other processes in the main one, in the order of their ranks; elsewhere yield nothing.

    Every process must iterate to the end. Values are sent one after the other through the memory of the host (gloo).
    NCCL would hold those of all processes on every GPU, and moments of Inception's features take 671 MB each.
    """
    if accelerator.num_processes == 1:
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        if accelerator.is_main_process:
            for rank in range(1, accelerator.num_processes):
                received: list[Any] = [None]
                dist.recv_object_list(received, src=rank, group=group)
                yield received[0]
        else:
            dist.send_object_list([value], dst=0, group=group)
    finally:
        dist.destroy_process_group(group)


@contextmanager
def agreement(accelerator: Accelerator) -> Iterator[Callable[[bool], bool]]:
    """Give a function by which the processes agree whether one of them has raised its flag, for use within the block.

    Every process must call it equally often, with its flag. With several processes it returns what holds of the flags
    of the call before, so that none waits: they go through the memory of the host (gloo) while a GPU computes.
    """
    if accelerator.num_processes == 1:
        yield lambda flag: flag
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    before: tuple[torch.Tensor, Any] | None = None

    def agree(flag: bool) -> bool:
        nonlocal before
        raised = False
        if before is not None:
            flags, work = before
            work.wait()
            raised = bool(flags)
        flags = torch.tensor(float(flag))
        before = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group, async_op=True)
        return raised

    try:
        yield agree
    finally:
        dist.destroy_process_group(group)
