"""Checkpoints are whole or absent: kills, damage, full disks, rotation."""

import errno
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from robustdiff.errors import InputError
from robustdiff.training.checkpoint import _random_states, _restore_random, damage, newest_checkpoint
from robustdiff.training.run import train


def checkpoints(recipe):
    return sorted(path.name for path in (Path(recipe.output) / "checkpoints").iterdir())


def newest(folder):
    """The last checkpoint under its final name, or None."""
    return max((folder / "checkpoints").glob("step-*"), default=None)


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different


# -- kills: a run in a process of its own, forked from one that has imported everything -----------------------


@pytest.fixture(scope="module")
def processes():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["robustdiff.training.run", "sklearn.datasets", "diffusers"])
    return context


@pytest.fixture
def start(processes):
    started = []

    def start(recipe, resume=False):
        process = processes.Process(target=train, args=(recipe,), kwargs={"resume": resume, "cpu": True})
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the run ended early, with exit code {process.exitcode}"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def test_killed_at_random_moments_and_resumed_is_the_uninterrupted_run(tiny, outcome, start):
    fields = {"adversary": "free", "model": {"dropout": 0.2}, "steps": 90, "checkpoint_every": 4}
    whole, cut = tiny("whole", **fields), tiny("cut", **fields)
    train(whole, cpu=True)

    folder, delay = Path(cut.output), random.Random(0)
    kills = 0
    while not (folder / "result.json").exists() and kills < 5:
        before = newest(folder)
        process = start(cut, resume=True)
        # Once there is progress, so that the test ends; then anywhere, also amid the writing of a checkpoint.
        wait_for(lambda known=before: newest(folder) != known, process)
        process.join(delay.uniform(0, 0.1))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert damage(newest(folder)) is None  # an older one may have been half removed
    assert kills >= 3
    train(cut, resume=True, cpu=True)
    assert_same(outcome(cut), outcome(whole))
    assert not list(folder.rglob(".*.tmp"))
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, (Path(r.output) / "metrics.jsonl").open())]
        for r in (whole, cut)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well_and_the_run_can_go_on(tiny, outcome, start, number):
    fields = {"adversary": "free", "steps": 600}
    cut = tiny("cut", **fields)
    folder = Path(cut.output)
    process = start(cut)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    os.kill(process.pid, number)
    process.join(240)
    assert process.exitcode == 0
    (saved,) = checkpoints(cut)  # none was due: it is there because of the signal
    step = int(saved.removeprefix("step-"))
    assert 0 < step < cut.steps
    assert step % 3 == 0
    assert not (folder / "model").exists()
    assert not (folder / "result.json").exists()

    end = step + 6
    train(cut.model_copy(update={"steps": end}), resume=True, cpu=True)
    whole = tiny("whole", **{**fields, "steps": end})
    train(whole, cpu=True)
    assert_same(outcome(cut), outcome(whole))


def test_a_signal_within_train_returns_none(tiny, watch):
    recipe = tiny(steps=50)

    def stop_at_the_first(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(recipe, cpu=True, progress=watch(stop_at_the_first)) is None
    assert checkpoints(recipe) == ["step-00000002"]  # the flag is looked at after the next update
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# -- damage ---------------------------------------------------------------------------------------------------


def truncate(checkpoint):
    file = checkpoint / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(checkpoint):
    file = checkpoint / "model.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        flip_a_bit,
        lambda checkpoint: (checkpoint / "ema.safetensors").unlink(),
        lambda checkpoint: (checkpoint / "manifest.json").write_bytes(b"\xff\x00{"),
        lambda checkpoint: (checkpoint / "manifest.json").write_text("[1]"),
        lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    ],
    ids=["truncated", "bit", "missing file", "garbage manifest", "list manifest", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny, outcome, caplog, harm):
    recipe = tiny(steps=4, checkpoint_every=2, keep=3)
    train(recipe, cpu=True)
    expected = outcome(recipe)
    folder = Path(recipe.output)
    (folder / "result.json").unlink()  # as after a kill
    harm(folder / "checkpoints/step-00000004")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(folder / "checkpoints").name == "step-00000002"
    assert "step-00000004 is passed over" in caplog.text
    train(recipe, resume=True, cpu=True)
    assert_same(outcome(recipe), expected)
    assert damage(folder / "checkpoints/step-00000004") is None  # written anew


def test_with_no_whole_checkpoint_the_run_starts_again_when_they_are_removed(tiny, outcome):
    recipe = tiny(steps=4)
    train(recipe, cpu=True)
    expected = outcome(recipe)
    (Path(recipe.output) / "result.json").unlink()
    truncate(Path(recipe.output) / "checkpoints/step-00000004")
    with pytest.raises(
        InputError,
        match=r"no checkpoint in .* is whole \(step-00000004: .*\): restore one, or remove them to start again",
    ):
        train(recipe, resume=True, cpu=True)
    shutil.rmtree(Path(recipe.output) / "checkpoints/step-00000004")
    train(recipe, resume=True, cpu=True)
    assert_same(outcome(recipe), expected)


def test_killed_between_the_last_checkpoint_and_the_result_only_exports(tiny, outcome):
    recipe = tiny(steps=4)
    result = train(recipe, cpu=True)
    expected = outcome(recipe)
    (Path(recipe.output) / "result.json").unlink()
    assert train(recipe, resume=True, cpu=True) == result
    assert_same(outcome(recipe), expected)


# -- rotation and full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tiny, keep):
    recipe = tiny(steps=5, checkpoint_every=1, keep=keep)
    train(recipe, cpu=True)
    assert checkpoints(recipe) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_what_a_kill_left_half_written_is_removed(tiny):
    recipe = tiny(steps=2)
    train(recipe, cpu=True)
    folder = Path(recipe.output)
    half = folder / "checkpoints/.step-00000002.0123456789ab.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (folder / ".recipe.yaml.0123456789ab.tmp").write_bytes(b"half")
    (folder / ".notes.tmp").write_bytes(b"of the user")
    train(recipe.model_copy(update={"steps": 3}), cpu=True, resume=True)
    assert [path.name for path in folder.rglob(".*.tmp")] == [".notes.tmp"]


def state_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# 100 kB is less than the parameters (a write of safetensors fails), 300 kB less than the optimiser's moments (torch's).
@pytest.mark.parametrize("limit", [100_000, 300_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half_written(tiny, outcome, limit):
    recipe = tiny(steps=2)
    train(recipe, cpu=True)
    before = state_of(Path(recipe.output) / "checkpoints")
    longer = recipe.model_copy(update={"steps": 4})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*step-00000004"):
            train(longer, resume=True, cpu=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state_of(Path(recipe.output) / "checkpoints") == before
    assert not list(Path(recipe.output).rglob(".*.tmp"))

    train(longer, resume=True, cpu=True)  # there is room again
    whole = tiny("whole", steps=4)
    train(whole, cpu=True)
    assert_same(outcome(longer), outcome(whole))


def test_a_flush_that_fails_is_an_oserror_too(tiny, monkeypatch):
    recipe = tiny(steps=2)
    train(recipe, cpu=True)
    before = state_of(Path(recipe.output) / "checkpoints")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        # From the first line of metrics on: the recipe is written before.
        patch.setattr("robustdiff.training.metrics_log.MetricsLog.flush", lambda self: patch.setattr(os, "fsync", full))
        with pytest.raises(OSError, match="No space left"):
            train(recipe.model_copy(update={"steps": 4}), resume=True, cpu=True)
    assert state_of(Path(recipe.output) / "checkpoints") == before
    assert not list(Path(recipe.output).rglob(".*.tmp"))


def test_the_generator_of_any_device_is_saved_and_restored(tmp_path, monkeypatch):
    """Restore the state of a Mac's GPU as of CUDA; a module stands for that of the device."""
    held = SimpleNamespace(state=torch.arange(4, dtype=torch.uint8))
    device = SimpleNamespace(
        get_rng_state=lambda: held.state, set_rng_state=lambda state: setattr(held, "state", state)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda of: device if torch.device(of).type == "mps" else None)
    mps = SimpleNamespace(device=torch.device("mps"), num_processes=1, process_index=0)
    save_file(_random_states(mps.device), tmp_path / "random-000.safetensors")
    held.state = torch.zeros(4, dtype=torch.uint8)
    before = torch.get_rng_state()
    torch.rand(1)
    _restore_random(tmp_path, mps, 1)
    assert held.state.tolist() == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)
