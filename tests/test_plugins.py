"""Adversaries, objectives and datasets of an installed package are trained with by their names, and with their options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SRC = Path(__file__).resolve().parent.parent / "src"

MODULE = '''
from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from robustdiff.data import DATASETS, ArrayDataset
from robustdiff.objectives.denoising import DenoisingConfig, DenoisingObjective
from robustdiff.objectives.objective import OBJECTIVES, ObjectiveConfig
from robustdiff.perturbation import ADVERSARIES, Adversary, AdversaryConfig


class Constant(Adversary):
    def __init__(self, shift):
        super().__init__(steps=1)
        self.shift = shift

    def __call__(self, x_t, t=None, *, loss=None, training_step=None):
        yield x_t.new_full(x_t.shape, self.shift)


@ADVERSARIES.register("constant")
class ConstantConfig(AdversaryConfig):
    name: Literal["constant"] = "constant"
    shift: float = Field(0.25, ge=0)

    def build(self, process):
        return Constant(self.shift)


class Absolute(DenoisingObjective):
    def __init__(self, process, factor):
        super().__init__(process, prediction="sample")
        self.factor = factor

    def __call__(self, model, draw, delta=None):
        losses = super().__call__(model, draw, delta)
        return {**losses, "loss": self.factor * losses["loss"], "absolute": losses["loss"].sqrt()}


@OBJECTIVES.register("absolute")
class AbsoluteConfig(ObjectiveConfig):
    prediction: ClassVar = "sample"
    name: Literal["absolute"] = "absolute"
    factor: float = 2.0

    def new_process(self, process, steps):
        return DenoisingConfig(prediction="sample").new_process(process, steps)

    def build(self, process, steps, target=None, teacher=None):
        return Absolute(process, self.factor)


@DATASETS.register("stripes")
def stripes(
    *, size: int | None, channels: int | None, split: str, width: Annotated[int, Field(ge=1)] = 2, dark: bool = False
) -> ArrayDataset:
    rows = np.arange(8)[:, None] // width % 2 * (100 if dark else 255)
    images = np.broadcast_to(rows, (16, 8, 8))[..., None].astype(np.uint8)
    return ArrayDataset("stripes", images)
'''
ENTRY_POINTS = """
[robustdiff.adversaries]
constant = theirs
[robustdiff.objectives]
absolute = theirs
[robustdiff.datasets]
stripes = theirs
"""
TINY = {
    "data": {"name": "stripes", "width": 3},
    "objective": {"name": "absolute", "factor": 3.0},
    "adversary": {"name": "constant", "shift": 0.5},
    "model": {"channels": [8], "groups": 4, "layers": 1},
    "steps": 2,
    "batch_size": 4,
    "threads": 1,
    "log_every": 1,
}


@pytest.fixture
def command(tmp_path):
    """Run the command line in a fresh process, with the package installed."""
    site = tmp_path / "site"
    info = site / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "theirs.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))

    def run(*overrides):
        words = [word for value in (f"output={tmp_path / 'run'}", *overrides) for word in ("--set", value)]
        return subprocess.run(
            [sys.executable, "-m", "robustdiff", "train", tmp_path / "r.yaml", "--resume", *words],
            env={**os.environ, "PYTHONPATH": f"{SRC}:{site}", "CUDA_VISIBLE_DEVICES": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_two_updates_and_two_more(command, tmp_path):
    outcome = command()
    assert outcome.returncode == 0, outcome.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["backward_passes"], result["data"]) == (2, 2, "stripes")
    assert result["delta_norm"] == pytest.approx(0.5 * 8)
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        assert line["loss"] == pytest.approx(3 * line["mse"])
        assert line["absolute"] > 0
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["adversary"] == {"name": "constant", "shift": 0.5}
    assert written["objective"] == {"name": "absolute", "factor": 3.0}
    assert (written["data"]["width"], written["data"]["dark"]) == (3, False)
    outcome = command("steps=4")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4
    outcome = command("steps=4", "data.width=2")
    assert (outcome.returncode, "another data" in outcome.stderr) == (2, True)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("adversary.shift=-1", ["adversary.shift"]),
        ("adversary.steps=2", ["unknown field adversary.steps", "known here: name, shift"]),
        ("adversary=strong", ["adversary.name", "constant, free, none, pgd, random"]),
        ("objective.prediction=epsilon", ["unknown field objective.prediction", "known here: name, factor"]),
        ("objective.name=loss", ["objective.name", "absolute, consistency, denoising, edm"]),
        ("data.width=0", ["data.width"]),
        ("data.width=true", ["data.width"]),
        ("data.colour=red", ["data.colour", "workers, width, dark"]),
        ("data.background=black", ["stripes takes no background", "imagefolder", "workers, width, dark"]),
        ("data=digits", ["digits takes no width", "stripes"]),
        ("data.root=x", ["stripes takes no root"]),
    ],
)
def test_a_mistake_is_named(command, assignment, words):
    outcome = command(assignment)
    assert outcome.returncode == 2
    assert len(outcome.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in outcome.stderr


def test_its_adversary_is_switched_off_by_name(command, tmp_path):
    outcome = command("adversary=none")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["delta_norm"] == 0


def test_an_option_that_is_no_type_is_named(command, tmp_path):
    module = tmp_path / "site" / "theirs.py"
    module.write_text(module.read_text().replace("dark: bool", "dark: Darkness"))
    outcome = command()
    assert outcome.returncode == 2
    assert len(outcome.stderr.strip().splitlines()) == 1
    for word in ("theirs.stripes", "Darkness", "annotate"):
        assert word in outcome.stderr
