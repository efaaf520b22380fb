"""robustdiff tune: the plan, a whole search in seconds, the same command again, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from robustdiff.study.tune import Tuning
from robustdiff.yaml_reader import read_yaml

TINY = [
    *("tune", "fashion-16-at", "--sampler", "iddpm", "--steps", "1"),
    *("--set", "batch_size=4", "--set", "threads=1", "--try", "lr=1e-4,1e30", "--try", "adversary.radius=null"),
    *("--updates", "2", "--candidates", "2", "--rungs", "1", "--seeds", "3", "--num", "16", "--batch-size", "16"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A search that two processes, started by the same command, have shared, and what they printed."""
    folder = tmp_path_factory.mktemp("tuning") / "shared"
    command = [sys.executable, "-m", "robustdiff", *TINY, "--output", str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    return folder, [output for output, _ in found]


def test_processes_share_a_search_and_print_its_result(shared):
    folder, outputs = shared
    record = json.loads((folder / "result.json").read_text())
    for output in outputs:
        for words in ("Rung 1 of 1", "Confirmation: 2 backward passes each", "Holm", "failed: the loss is"):
            assert words in output
        advice = output.strip().splitlines()[-1]
        assert advice.startswith({"untouched": "Leave the checkpoint as it is"}.get(record["answer"], "Train "))
    assert outputs[0].partition("Rung 1")[2] == outputs[1].partition("Rung 1")[2]
    names = sorted(path.name for path in (folder / "confirm" / "cells").glob("*.json"))
    assert names == sorted(
        f"{name}-s{seed}-iddpm-1.json" for name in ("c1", "p1", "repeat", "untouched") for seed in (1, 2, 3)
    )
    assert Tuning.model_validate(read_yaml(folder / "tune.yaml")).space["lr"] == (1e-4, 1e30)


def test_the_same_command_again_trains_nothing(shared, robustdiff):
    folder, outputs = shared
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if path.name != "result.json"}
    outcome = robustdiff(*TINY, "--output", folder)
    assert outcome.code == 0
    assert outcome.out.strip().splitlines()[-1] == outputs[0].strip().splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    outcome = robustdiff(*TINY, "--output", folder, "--num", "20")
    assert (outcome.code, "another num" in outcome.err) == (2, True)


def test_a_dry_run_prints_the_plan_and_writes_nothing(robustdiff, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = robustdiff(*TINY[:-4], "--num", "16", "--dry-run", "--processes", "2")
    assert outcome.code == 0, outcome.err
    assert "1 with δ, 1 plain, untouched" in outcome.out
    assert "The candidate is recommended if" in outcome.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sampler", "dddim"], ["--sampler", "unknown sampler 'dddim'"]),
        (["--sampler", "euler"], ["euler", "does not suit"]),
        (["--metric", "brightness"], ["--metric", "has a better direction"]),
        (["--metric", "fidd"], ["--metric", "unknown metric"]),
        (["--set", "lr"], ["--set lr: write it as KEY=VALUE"]),
        (["--set", "adversary.alpha=1"], ["unknown field adversary.alpha"]),
        (["--set", "seed=3"], ["--set seed", "give --seed"]),
        (["--try", "adversary.alpha=1,2"], ["unknown field adversary.alpha"]),
        (["--try", "adversary.steps=2,2"], ["--try adversary.steps", "distinct"]),
        (["--try", "adversary.steps="], ["--try adversary.steps", "distinct"]),
        (["--try", "lr"], ["--try lr: write it as KEY=VALUE, as in --try"]),
        (["--try", "lr=2"], ["--try lr=2: lr is given twice"]),
        (["--try", "steps=10,20"], ["--try steps", "the same for all"]),
        (["--try", "adversary.ramp=5"], ["adversary.ramp needs adversary.radius"]),
        (["--try", "adversary.step_size=[1"], ["--try adversary.step_size=[1", "not YAML"]),
        (["--candidates", "90"], ["--candidates 90", "give at most"]),
        (["--rungs", "3"], ["--updates", "cannot be halved"]),
        (["--set", "adversary.name=pgd"], ["--updates 2", "of one update"]),
        (["--features", "unknown"], ["unknown extractor"]),
    ],
)
def test_bad_input_is_named_before_anything_is_written(robustdiff, tmp_path, assert_bad_input, more, words):
    assert_bad_input(robustdiff(*TINY, "--output", tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_too_few_minutes_are_named(robustdiff, tmp_path, assert_bad_input):
    arguments = ["tune", "fashion-16-at", "--sampler", "ddim", "--steps", "5", "--minutes", "0.1"]
    assert_bad_input(robustdiff(*arguments, "--output", tmp_path / "out"), "--minutes 0.1", "give more minutes")
    assert not (tmp_path / "out").exists()
