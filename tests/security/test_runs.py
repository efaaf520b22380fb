"""What a stranger's run folder, checkpoint or recipe may hold does no harm: each test carries the attack."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PARAMETER = "conv_in.weight"
SMALL = ["model.channels=[8,16]", "model.groups=4", "batch_size=8", "checkpoint_every=2", "log_every=2", "threads=1"]


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def call(robustdiff, output, *more, steps=4):
    assignments = [*SMALL, f"steps={steps}", "ema=0.9", f"output={output}"]
    return robustdiff("train", "digits", "--cpu", *more, *(x for a in assignments for x in ("--set", a)))


def assert_refused(outcome, *words, code=2):
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("robustdiff: "), outcome.err
    for word in words:
        assert word in last, last


def contents(folder):
    """All that is in a folder, links not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, of which tests take copies."""
    from robustdiff.recipe import load_recipe
    from robustdiff.training.trainer import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    train(load_recipe("digits", [*SMALL, "steps=4", "ema=0.9", f"output={folder}"]), cpu=True)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """The run as a kill left it after its last checkpoint, whose output is a folder of this test."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    (folder / "result.json").unlink()
    return folder


@pytest.fixture
def victim(tmp_path):
    """A file of the user's outside of the run."""
    path = tmp_path / "of the user"
    path.write_text("precious")
    return path


def checkpoint(run):
    return run / "checkpoints/step-00000004"


def seal(folder):
    """Give a checkpoint the manifest that its files deserve, as an attacker can."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(json.dumps(hashes))


def change(path, **tensors):
    """Replace tensors of a file; None removes one."""
    now = {name: value.clone() for name, value in load_file(path).items()} | tensors
    save_file({name: value for name, value in now.items() if value is not None}, path)
    seal(path.parent)


# -- row 1: tensors of a checkpoint ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["optimizer", "model", "ema"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.zeros(1), "has the shape (1,) instead of"),
        (lambda p: torch.zeros(1 << 20), "has the shape (1048576,) instead of"),
        (lambda p: p.flatten(), "has the shape"),
        (lambda p: p.double(), "has the type torch.float64 instead of torch.float32"),
        (lambda p: p.to(torch.float8_e4m3fn), "has the type torch.float8_e4m3fn"),
        (lambda p: torch.full_like(p, float("nan")), "has a number that is not finite"),
        (lambda p: torch.full_like(p, float("inf")), "has a number that is not finite"),
        (lambda p: None, "is missing"),
    ],
    ids=["small", "large", "flat", "double", "float8", "nan", "inf", "missing"],
)
def test_tensors_of_another_kind_reach_no_optimiser(robustdiff, run, part, make, message):
    name = f"{PARAMETER}/exp_avg" if part == "optimizer" else PARAMETER
    path = checkpoint(run) / f"{part}.safetensors"
    change(path, **{name: make(load_file(path)[name])})
    assert_refused(call(robustdiff, run, "--resume", steps=6), path.name, name, message)


@pytest.mark.parametrize(
    ("moment", "value", "message"),
    [
        ("step", torch.tensor(-1.0), "step is -1, of 4 updates"),
        ("step", torch.tensor(1.5), "step is 1.5, of 4 updates"),
        ("step", torch.tensor(1e30), "step is 1e+30, of 4 updates"),
        ("step", torch.zeros(2), "has the shape (2,)"),
        ("exp_avg_sq", None, "has a negative number"),
        ("max_exp_avg_sq", torch.zeros(3), "is not in the recipe's network"),
    ],
)
def test_moments_that_no_optimiser_makes(robustdiff, run, moment, value, message):
    path, name = checkpoint(run) / "optimizer.safetensors", f"{PARAMETER}/{moment}"
    change(path, **{name: -torch.ones_like(load_file(path)[name]) if value is None else value})
    assert_refused(call(robustdiff, run, "--resume", steps=6), name, message)


def test_an_optimiser_of_pickles_is_not_read(robustdiff, run, tmp_path):
    """Sparse, meta and expanded tensors, hyper-parameters and code could only come in such files."""
    folder, touched = checkpoint(run), tmp_path / "touched"
    for name in ("optimizer.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(touched)))
    torch.save({"state": {}, "param_groups": [{"lr": 1e9, "params": []}]}, folder / "optimizer.bin")
    assert call(robustdiff, run, "--resume", steps=6).code == 0  # what the manifest does not name is not opened
    shutil.rmtree(run / "checkpoints/step-00000006")
    (run / "result.json").unlink()
    seal(folder)
    outcome = call(robustdiff, run, "--resume", steps=6)
    assert_refused(outcome, "no checkpoint in", "is whole")
    assert "which no checkpoint of this version has" in outcome.err
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("optimizer.safetensors", lambda path: path.write_bytes(pickle.dumps(Payload("touched")))),
        ("optimizer.safetensors", lambda path: path.write_bytes(b"\xff" * 8 + b"{")),
        ("model.safetensors", lambda path: path.write_bytes(b"")),
        ("random-000.safetensors", lambda path: save_file({"cpu": torch.zeros(5056, dtype=torch.uint8)}, path)),
        ("random-000.safetensors", lambda path: save_file({"cpu": torch.zeros(10, dtype=torch.uint8)}, path)),
        ("random-000.safetensors", lambda path: save_file({"xpu": torch.zeros(10, dtype=torch.uint8)}, path)),
        ("random-000.safetensors", lambda path: path.write_bytes(b"\x08" + bytes(7) + b"[[[[[[[[")),
        ("state.json", lambda path: path.write_text("{")),
        ("state.json", lambda path: path.write_text("[" * 100_000)),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_bytes(b"\xff\x00")),
    ],
)
def test_damaged_files_under_a_manifest_that_agrees(robustdiff, run, name, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(checkpoint(run) / name)
    seal(checkpoint(run))
    assert_refused(call(robustdiff, run, "--resume", steps=6), name)
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 6}, "step 6 is not that of its folder"),
        ({"step": True}, "step"),
        ({"batch": 10**30}, "4 updates are not those of"),
        ({"batch": -1}, "batch"),
        ({"batch": 3}, "4 updates are not those of 3 batches"),
        ({"skipped": "\x1b[2J"}, "skipped"),
        ({"\x1b[2J": 0}, "\\x1b[2J"),
        ({"objective": {"losses": [1]}}, "objective.losses"),
        ({"scaler": {"scale": 1.0, "growth_tracker": 0}}, "the scale of the loss"),
        ({"scaler": {"scale": 0.0, "growth_tracker": 0}}, "scaler.scale"),
        ({"processes": 10**9}, "processes"),
        ({"processes": 2}, "random-001.safetensors is missing"),
    ],
)
def test_a_state_that_no_run_writes(robustdiff, run, fields, message):
    path = checkpoint(run) / "state.json"
    passes = 3
    state = json.loads(path.read_text())
    assert (state["step"], state["batch"]) in ((4, 4), (3, 1), (4, 1)) or state["step"] % passes == 0
    path.write_text(json.dumps(state | fields))
    seal(path.parent)
    outcome = call(robustdiff, run, "--resume", steps=6)
    assert_refused(outcome, message)
    assert "\x1b[2J" not in outcome.err
