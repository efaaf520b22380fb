"""Three real processes, whose values the main one collects. Each of them runs this file."""

from __future__ import annotations

import subprocess
import sys

import torch
import torch.distributed as dist

from robustdiff import cli
from robustdiff.distributed import PATIENCE, from_main, make_accelerator, of_others
from robustdiff.training import run


def join() -> None:
    """Make the group of processes as the command `train` makes it."""
    run.train = lambda *arguments, **settings: None
    sys.argv = ["robustdiff", "train", "digits", "--cpu"]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == cli.INTERRUPTED
    group = dist.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE


def collect() -> None:
    accelerator = make_accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 3
    for repeat in range(2):
        received = list(of_others({"rank": rank, "values": torch.full((1000,), rank + repeat)}, accelerator))
        assert [value["rank"] for value in received] == ([1, 2] if rank == 0 else [])
        assert all(value["values"].eq(value["rank"] + repeat).all() for value in received)
    assert from_main(f"of {rank}") == "of 0"
    dist.destroy_process_group()


def test_processes_wait_for_long_and_values_come_in_their_order():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", __file__]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_one_process_has_no_others():
    accelerator = make_accelerator(cpu=True)
    assert list(of_others(1, accelerator)) == []
    assert from_main(2) == 2
    assert accelerator.init_handler.timeout == PATIENCE


if __name__ == "__main__":
    join()
    collect()
