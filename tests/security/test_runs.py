"""What a stranger's run folder, checkpoint or recipe may hold does no harm: each test carries the attack."""

import hashlib
import json
import os
import pickle
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustdiff.errors import InputError
from robustdiff.recipe import Recipe
from robustdiff.training.run import _claim

PARAMETER = "conv_in.weight"
SMALL = ["model.channels=[8,16]", "model.groups=4", "batch_size=8", "checkpoint_every=2", "log_every=2", "threads=1"]


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def call(robustdiff, output, *more, steps=6):
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
    from robustdiff.training.run import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    train(load_recipe("digits", [*SMALL, "steps=6", "ema=0.9", f"output={folder}"]), cpu=True)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """The run as a kill left it after its last checkpoint, whose output is a folder of this test."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-00000003")
    return folder


@pytest.fixture
def victim(tmp_path):
    """A file of the user's outside of the run."""
    path = tmp_path / "of the user"
    path.write_text("precious")
    return path


def checkpoint(run):
    return run / "checkpoints/step-00000006"


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
    assert_refused(call(robustdiff, run, "--resume", steps=9), path.name, name, message)


@pytest.mark.parametrize(
    ("moment", "value", "message"),
    [
        ("step", torch.tensor(-1.0), "step is -1, of 6 updates"),
        ("step", torch.tensor(1.5), "step is 1.5, of 6 updates"),
        ("step", torch.tensor(1e30), "step is 1e+30, of 6 updates"),
        ("step", torch.zeros(2), "has the shape (2,)"),
        ("exp_avg_sq", None, "has a negative number"),
        ("max_exp_avg_sq", torch.zeros(3), "is not in the recipe's network"),
    ],
)
def test_moments_that_no_optimiser_makes(robustdiff, run, moment, value, message):
    path, name = checkpoint(run) / "optimizer.safetensors", f"{PARAMETER}/{moment}"
    change(path, **{name: -torch.ones_like(load_file(path)[name]) if value is None else value})
    assert_refused(call(robustdiff, run, "--resume", steps=9), name, message)


def test_an_optimiser_of_pickles_is_not_read(robustdiff, run, tmp_path):
    """Sparse, meta and expanded tensors, hyper-parameters and code could only come in such files."""
    folder, touched = checkpoint(run), tmp_path / "touched"
    for name in ("optimizer.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(touched)))
    torch.save({"state": {}, "param_groups": [{"lr": 1e9, "params": []}]}, folder / "optimizer.bin")
    assert call(robustdiff, run, "--resume", steps=9).code == 0  # what the manifest does not name is not opened
    shutil.rmtree(run / "checkpoints/step-00000009")
    (run / "result.json").unlink()
    seal(folder)
    outcome = call(robustdiff, run, "--resume", steps=9)
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
    assert_refused(call(robustdiff, run, "--resume", steps=9), name)
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 4}, "step 4 is not that of its folder"),
        ({"step": True}, "step"),
        ({"batch": 10**30}, "6 updates are not those of"),
        ({"batch": -1}, "batch"),
        ({"batch": 3}, "6 updates are not those of 3 batches"),
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
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | fields))
    seal(path.parent)
    outcome = call(robustdiff, run, "--resume", steps=9)
    assert_refused(outcome, message)
    assert "\x1b[2J" not in outcome.err


# -- row 8: output is a folder of the user's -------------------------------------------------------------------


def test_a_folder_of_the_users_is_not_written_into(robustdiff, tmp_path):
    folder = tmp_path / "work"
    for name in ("model/weights.bin", "checkpoints/step-00000001/a", ".notes.tmp/a", "photo.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    before = contents(folder)
    for more in ((), ("--resume",)):
        assert_refused(call(robustdiff, folder, *more), str(folder), "is not empty, and nothing in it says")
        assert contents(folder) == before
    # Also where it holds a recipe that the user wrote, or copied from a run.
    (folder / "recipe.yaml").write_text("data: digits\n")
    assert_refused(call(robustdiff, folder, "--resume"), "is not empty")
    assert contents(folder) == before | {"recipe.yaml": b"data: digits\n"}


def test_in_a_run_only_what_training_wrote_is_removed(robustdiff, run):
    kept = [".model.tmp", ".notes.0123456789ab.tmp", "checkpoints/.step-00000002.tmp", "checkpoints/step-1", "notes"]
    for name in kept:
        (run / name).mkdir()
        (run / name / "a").write_text("precious")
    gone = [".model.0123456789ab.tmp", "checkpoints/.step-00000002.0123456789ab.tmp"]
    for name in gone:
        (run / name).mkdir()
    assert call(robustdiff, run, "--resume", steps=9).code == 0
    assert all((run / name / "a").read_text() == "precious" for name in kept)
    assert not any((run / name).exists() for name in gone)


def test_outputs_that_are_no_folders_of_ours(robustdiff, tmp_path, victim, monkeypatch):
    assert_refused(call(robustdiff, victim), "is, or is in, a file")
    assert_refused(call(robustdiff, victim / "run"), "is, or is in, a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert_refused(call(robustdiff, tmp_path / "link"), "is a symbolic link")
    assert_refused(call(robustdiff, "/"), "is not empty")
    monkeypatch.chdir(tmp_path)
    assert_refused(call(robustdiff, "."), "is not empty")
    assert_refused(call(robustdiff, tmp_path / ("a" * 300)), "cannot be the name of a folder")
    assert_refused(call(robustdiff, "/".join(["a" * 200] * 30)), "cannot be the name of a folder")
    assert victim.read_text() == "precious"
    assert not list((tmp_path / "empty").iterdir())


def test_a_nul_in_output_is_one_line(robustdiff, tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text('data: digits\noutput: "runs/\\0x"\nmodel: {channels: [8, 16], groups: 4}\nsteps: 1\n')
    assert_refused(robustdiff("train", recipe, "--cpu"), "cannot be the name of a folder")


def test_a_run_is_not_begun_within_what_it_reads(robustdiff, finished, tmp_path):
    shutil.copytree(finished / "model", tmp_path / "pipeline")
    before = contents(tmp_path / "pipeline")
    more = ["--set", "model.name=pretrained", "--set", f"model.path={tmp_path / 'pipeline'}"]
    fields = [f"output={tmp_path / 'pipeline/unet/run'}", "steps=3", "batch_size=8"]
    outcome = robustdiff("train", "digits", "--cpu", *more, *(x for a in fields for x in ("--set", a)))
    assert_refused(outcome, "which is read")
    assert contents(tmp_path / "pipeline") == before


def test_a_run_is_not_begun_within_its_data(tmp_path):
    recipe = Recipe.model_validate({"data": f"hf:{tmp_path}", "output": str(tmp_path / "run")})
    with pytest.raises(InputError, match="which is read"), ExitStack() as lock:
        _claim(recipe, tmp_path / "run", False, None, lock)
    assert contents(tmp_path) == {}


# -- row 9 and links within a run ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml", "data.json", "result.json"])
@pytest.mark.parametrize("plant", [os.symlink, os.link, lambda _, path: os.mkfifo(path)], ids=["link", "hard", "fifo"])
def test_files_of_a_run_that_are_other_files(robustdiff, run, victim, name, plant):
    (run / name).unlink(missing_ok=True)
    plant(victim, run / name)
    outcome = call(robustdiff, run, "--resume", steps=9)
    if (name, plant) == ("metrics.jsonl", os.link):  # a line that a kill tore: the name is given to another file
        assert outcome.code == 0
    else:
        assert_refused(outcome, name)
    assert victim.read_text() == "precious"


def test_dangling_links_are_not_written_through(robustdiff, run, tmp_path):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "new")
    assert_refused(call(robustdiff, run, "--resume", steps=9), "metrics.jsonl is a symbolic link")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["checkpoints", "model", "checkpoints/step-00000006", ".model.0123456789ab.tmp"])
def test_linked_folders_are_not_emptied(robustdiff, run, tmp_path, name):
    outside = tmp_path / "outside"
    if (run / name).is_dir():
        shutil.move(run / name, outside)
    else:
        outside.mkdir()
    (outside / "precious").write_text("precious")
    before = contents(outside)
    (run / name).symlink_to(outside)
    assert_refused(call(robustdiff, run, "--resume", steps=9))
    assert contents(outside) == before


def sample(robustdiff, finished, output, *more):
    return robustdiff("sample", finished, "--output", output, "--num", 4, "--steps", 2, "--sampler", "ddim", *more)


def interrupted(robustdiff, finished, output, monkeypatch):
    """The part of a call that was stopped before the archive."""
    from robustdiff.evaluation import generate

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "atomic_write", stop)
        assert sample(robustdiff, finished, output).code != 0
    (part,) = output.parent.glob(".*.parts/0.uint8")
    return part


def test_planted_parts_do_not_become_samples(robustdiff, finished, tmp_path, monkeypatch):
    import numpy as np

    whole = tmp_path / "whole" / "a.npz"
    assert sample(robustdiff, finished, whole).code == 0
    output = tmp_path / "cut" / "a.npz"
    part = interrupted(robustdiff, finished, output, monkeypatch)
    pixels = len(part.read_bytes()) - 32
    part.write_bytes(bytes(pixels) + hashlib.sha256(bytes(pixels)).digest())
    (part.parent / "photo").write_text("precious")
    assert sample(robustdiff, finished, output).code == 0
    assert np.array_equal(np.load(output)["arr_0"], np.load(whole)["arr_0"])
    assert (part.parent / "photo").read_text() == "precious"


@pytest.mark.parametrize("plant", [os.symlink, os.link, lambda _, path: os.mkfifo(path)], ids=["link", "hard", "fifo"])
def test_parts_that_are_other_files(robustdiff, finished, tmp_path, victim, monkeypatch, plant):
    part = interrupted(robustdiff, finished, tmp_path / "cut" / "a.npz", monkeypatch)
    part.unlink()
    plant(victim, part)
    assert_refused(sample(robustdiff, finished, tmp_path / "cut" / "a.npz"), "0.uint8")
    assert victim.read_text() == "precious"
    shutil.move(part.parent, tmp_path / "elsewhere")
    part.parent.symlink_to(tmp_path / "elsewhere")
    assert_refused(sample(robustdiff, finished, tmp_path / "cut" / "a.npz"), ".parts is a symbolic link")


def test_records_and_pictures_that_are_other_files(robustdiff, finished, tmp_path, victim):
    assert sample(robustdiff, finished, tmp_path / "png").code == 0
    for folder, name in (("one", "000001.png"), ("two", ".robustdiff-samples.json")):
        shutil.copytree(tmp_path / "png", tmp_path / folder)
        (tmp_path / folder / name).unlink()
        (tmp_path / folder / name).symlink_to(victim)
        assert_refused(sample(robustdiff, finished, tmp_path / folder), name, "is not a regular file")
    (tmp_path / "png/.robustdiff-samples.json").write_text("[" * 100_000)
    assert_refused(sample(robustdiff, finished, tmp_path / "png"), "does not say that robustdiff sample made it")
    assert victim.read_text() == "precious"


# -- row 10: what is loaded -------------------------------------------------------------------------------------


def test_without_resume_nothing_that_was_planted_is_loaded(robustdiff, finished, tmp_path):
    folder = tmp_path / "run"
    for names in (["result.json"], ["result.json", "checkpoints"], [".robustdiff", "result.json"]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            source = finished / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        before = contents(folder)
        assert_refused(call(robustdiff, folder), str(folder))
        assert_refused(call(robustdiff, folder, "--resume"), str(folder))
        assert contents(folder) == before


@pytest.mark.parametrize(
    "manifest",
    [
        "{}",
        "[]",
        '{"state.json": 0}',
        '{"../../recipe.yaml": "0"}',
        '{"/etc/passwd": "0"}',
        '{"a\\u0000": "0"}',
        "[" * 10**5,
    ],
)
def test_manifests_that_name_nothing_or_other_files(robustdiff, run, manifest):
    (checkpoint(run) / "manifest.json").write_text(manifest)
    assert_refused(call(robustdiff, run, "--resume", steps=9), "no checkpoint in", "is whole")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "random-000.safetensors"])
def test_a_manifest_names_all_that_a_run_needs(robustdiff, run, name):
    (checkpoint(run) / name).unlink()
    seal(checkpoint(run))
    assert_refused(call(robustdiff, run, "--resume", steps=9), f"{name} is missing")


@pytest.mark.parametrize(
    "result",
    [
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        {"steps": -1},
        {"steps": "6"},
        {"loss": "\x1b[2J"},
        {"loss": [1]},
        {"images": 1},
        {"batch_size": 9},
        {"batches": 6},
        {"parameters": 0},
        {"more": 1},
    ],
    ids=str,
)
def test_a_planted_result_is_no_success(robustdiff, run, finished, result):
    if isinstance(result, dict):
        result = json.dumps(json.loads((finished / "result.json").read_text()) | result)
    (run / "result.json").write_text(result)
    outcome = call(robustdiff, run, "--resume")
    assert_refused(outcome, "result.json")
    assert "\x1b[2J" not in outcome.err


def test_a_result_that_is_not_finite_or_has_no_model(robustdiff, run, finished):
    text = (finished / "result.json").read_text()
    (run / "result.json").write_text(text.replace('"loss": ', '"loss": NaN, "a": '))
    assert_refused(call(robustdiff, run, "--resume"), "result.json", "is not a finite number")
    (run / "result.json").write_text(text)
    shutil.rmtree(run / "model")
    assert_refused(call(robustdiff, run, "--resume"), "has a result and no model")


@pytest.mark.parametrize(
    "line", [b"[1]\n", b"{}\n", b'{"step": "1"}\n', b'{"step": 1, "loss": NaN}\n', b"\xff\n", b"[" * 10**5 + b"\n"]
)
def test_metrics_that_no_run_writes(robustdiff, run, line):
    path = run / "metrics.jsonl"
    path.write_bytes(line + path.read_bytes())
    before = path.read_bytes()
    assert_refused(call(robustdiff, run, "--resume", steps=9), "metrics.jsonl, line 1, is damaged (")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "data", ["{", "[]", "[" * 100_000, '{"fingerprint": {"a": NaN}}', '{"fingerprint": 1, "images": "\\u001b[2J"}']
)
def test_a_record_of_data_that_no_run_writes(robustdiff, run, data):
    (run / "data.json").write_text(data)
    outcome = call(robustdiff, run, "--resume", steps=9)
    assert_refused(outcome, "data")
    assert "\x1b[2J" not in outcome.err
