"""Adversaries, objectives and datasets of an installed package: recipes name them, with fields of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SRC = Path(__file__).resolve().parent.parent / "src"

MODULE = """
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


@DATASETS.register("murky")
def murky(*, size: int | None, channels: int | None, split: str, dark: Darkness = None) -> ArrayDataset:
    raise NotImplementedError
"""
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


MISTAKES = {
    "adversary.shift=-1": ["adversary.shift"],
    "adversary.steps=2": ["unknown field adversary.steps", "known here: name, shift"],
    "adversary=strong": ["adversary.name", "constant, free, none, pgd, random"],
    "objective.prediction=epsilon": ["unknown field objective.prediction", "known here: name, factor"],
    "objective.name=loss": ["objective.name", "absolute, consistency, denoising, edm"],
    "data.width=0": ["data.width"],
    "data.width=true": ["data.width", "no truth value"],
    "data.colour=red": ["data.colour", "workers, width, dark"],
    "data.background=black": ["stripes takes no background", "imagefolder", "workers, width, dark"],
    "data=digits": ["digits takes no width", "stripes"],
    "data.root=x": ["stripes takes no root"],
    "data=murky": ["theirs.murky", "Darkness", "annotate"],
}
READ = """
import json, sys
from robustdiff.errors import InputError
from robustdiff.recipe import load_recipe

messages = {}
for assignment in sys.argv[2:]:
    try:
        recipe = load_recipe(sys.argv[1], [assignment])
        recipe.data.load()
        messages[assignment] = recipe.model_dump(mode="json")
    except InputError as error:
        messages[assignment] = str(error)
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run a fresh Python, with the package installed, in a folder with a recipe that names what it has."""
    folder = tmp_path_factory.mktemp("theirs")
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (folder / "theirs.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "r.yaml").write_text(yaml.safe_dump(TINY))

    def run(*words):
        env = {**os.environ, "PYTHONPATH": f"{SRC}:{folder}", "CUDA_VISIBLE_DEVICES": ""}
        outcome = subprocess.run([sys.executable, *words], env=env, cwd=folder, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    return run, folder


def test_two_updates(python):
    run, folder = python
    run("-m", "robustdiff", "train", "r.yaml", "--set", "output=run")
    result = json.loads((folder / "run" / "result.json").read_text())
    assert (result["steps"], result["backward_passes"], result["data"]) == (2, 2, "stripes")
    assert result["delta_norm"] == pytest.approx(0.5 * 8)
    for line in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()):
        assert line["loss"] == pytest.approx(3 * line["mse"])
        assert line["absolute"] > 0
    written = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    assert written["adversary"] == {"name": "constant", "shift": 0.5}
    assert written["objective"] == {"name": "absolute", "factor": 3.0}
    assert (written["data"]["width"], written["data"]["dark"]) == (3, False)


def test_recipes_of_its_kinds(python):
    run, _ = python
    read = json.loads(run("-c", READ, "r.yaml", *MISTAKES, "adversary=none", "data={name: digits, background: white}"))
    for assignment, words in MISTAKES.items():
        assert isinstance(read[assignment], str), assignment
        for word in words:
            assert word in read[assignment]
    assert read["adversary=none"]["adversary"]["name"] == "none", "and its own fields go with it"
    assert "background" not in read["data={name: digits, background: white}"]["data"], "as older recipes have it"
