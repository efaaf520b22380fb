"""Three real processes, whose values the main one collects: forked from one that runs this file and imports once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from robustdiff import cli
from robustdiff.distributed import PATIENCE, from_main, make_accelerator, of_others
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.training import run

TINY = {"data": "digits", "model": {"channels": [8], "groups": 4, "layers": 1}, "steps": 4, "batch_size": 6}


def join() -> None:
    """Make the group of processes as the command `train` makes it."""
    train, run.train = run.train, lambda *arguments, **settings: None
    sys.argv = ["robustdiff", "train", "digits", "--cpu"]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == cli.INTERRUPTED
    run.train = train
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


class Signalled:
    """The progress of a run, which a signal reaches before its first update."""

    def begin(self, description: str, total: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def advance(self, amount: float, note: str = "") -> None:
        pass


def stop(folder: Path) -> None:
    """Stop a run, long before its next line of metrics, by a signal that one of its processes receives."""
    recipe = Recipe.model_validate({**TINY, "adversary": "none", "log_every": 1000, "output": str(folder)})
    one = make_accelerator(cpu=True).process_index == 1
    assert run.train(recipe, cpu=True, **({"progress": Signalled()} if one else {})) is None
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    result = run.train(recipe, resume=True, cpu=True)
    assert result is not None
    assert result["steps"] == 4


def test_processes_wait_for_long_stop_together_and_send_values_in_their_order(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_one_process_has_no_others():
    accelerator = make_accelerator(cpu=True)
    assert list(of_others(1, accelerator)) == []
    assert from_main(2) == 2
    assert accelerator.init_handler.timeout == PATIENCE


def fork(rank: int, output: Path) -> int:
    """Begin a process of the group, and return its id."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        join()
        stop(output)
        collect()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(output: Path) -> None:
    """Run three processes, which read their places from the environment as torchrun sets it; one failure ends all."""
    load_recipe("digits")  # imports the kinds of all things
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes}
    processes = {fork(rank, output) for rank in range(3)}
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status:
            for other in processes:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
