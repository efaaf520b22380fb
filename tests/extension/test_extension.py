"""A package of somebody else's adds kinds, one file each, which recipes and commands name with fields of their own.

``package`` has a dataset, an adversary, an objective, a sampler, a metric, a codec, and a backbone with its condition.
It is made a wheel and installed by pip, as a user does; no module of robustdiff names any of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

SRC = Path(__file__).resolve().parents[2] / "src"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PACKAGE = Path(__file__).parent / "package"
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
CONV = {
    "data": "digits",
    "model": {"name": "conv", "width": 6, "condition_dropout": 0.5},
    "codec": {"name": "blocks", "side": 4},
    "adversary": {"name": "free", "steps": 2},
    "steps": 4,
    "batch_size": 4,
    "threads": 1,
    "log_every": 1,
    "checkpoint_every": 2,
    "precision": "fp32",
}

MISTAKES = {
    "model=convolutional": ["unknown model 'convolutional'", "pretrained, conv, dit, unet"],
    "codec={name: blocks, side: 0}": ["codec.side"],
    "codec=block": ["unknown codec 'block'", "blocks, pixels, vae"],
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
    "data={name: digits, background: white}": ["digits takes no background", "imagefolder"],
}
SAMPLE = ["sample", "run", "--cpu", "--steps", "3", "--num", "4"]
SAMPLE_CONV = ["sample", "conv", "--cpu", "--steps", "3", "--num", "4"]
COMMANDS = {
    "run": ["train", "r.yaml", "--set", "output=run"],
    "ddim": [*SAMPLE, "--output", "ddim.npz", "--sampler", "ddim"],
    "none": [*SAMPLE, "--output", "none.npz", "--sampler", "churned", "--set", "part=0"],
    "some": [*SAMPLE, "--output", "some.npz", "--sampler", "churned", "--set", "part=0.5"],
    "evaluation": [
        *["evaluate", "run", "--cpu", "--output", "evaluation", "--metrics", "contrast,brightness"],
        *["--sampler", "churned", "--steps", "2,3", "--num", "8"],
    ],
    "conv": ["train", "c.yaml", "--set", "output=conv"],
    "again": ["train", "c.yaml", "--set", "output=conv", "--set", "steps=8", "--resume"],
    "plain": [*SAMPLE_CONV, "--output", "plain.npz"],
    "guided": [*SAMPLE_CONV, "--output", "guided.npz", "--guidance", "3"],
    "tuned": [
        *["train", "c.yaml", "--set", "model={name: pretrained, path: conv}", "--set", "codec=null"],
        *["--set", "output=tuned"],
    ],
    "tuned samples": ["sample", "tuned", "--cpu", "--steps", "3", "--num", "4", "--output", "tuned.npz"],
    "two": ["sample", "run", "--cpu", "--output", "two.npz", "--sampler", "churned", "--steps", "2", "--num", "8"],
}
RUN = """
import contextlib, io, json, sys
from pathlib import Path
from robustdiff import cli
from robustdiff.errors import InputError
from robustdiff.recipe import load_recipe

said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.app(arguments, standalone_mode=False)
    said[name] = out.getvalue()
Path("said.json").write_text(json.dumps(said))

read = {}
for assignment in sys.argv[2:]:
    try:
        recipe = load_recipe("r.yaml", [assignment])
        recipe.data.load()
        read[assignment] = recipe.model_dump(mode="json")
    except InputError as error:
        read[assignment] = str(error)
Path("read.json").write_text(json.dumps(read))
"""


def make_wheel(folder: Path) -> Path:
    """Return a wheel of the package, as a build backend makes it of its ``pyproject.toml``."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    name, version = project["name"].replace("-", "_"), project["version"]
    information = f"{name}-{version}.dist-info"
    groups = project["entry-points"].items()
    points = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups]
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in PACKAGE.glob("*.py"):
            archive.write(path, path.name)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/entry_points.txt", "".join(points))
        archive.writestr(f"{information}/RECORD", "")
    return wheel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where a fresh Python, with the package installed, has run COMMANDS on a recipe that names its kinds."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("extension")
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(make_wheel(folder))], check=True, capture_output=True)
    (folder / "r.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "c.yaml").write_text(yaml.safe_dump(CONV))
    env = {**os.environ, "PYTHONPATH": f"{SRC}:{site}", "CUDA_VISIBLE_DEVICES": ""}
    values = [*MISTAKES, "adversary=none"]
    outcome = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(COMMANDS), *values], env=env, cwd=folder, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    return folder


def test_a_dataset_an_adversary_and_an_objective_train(folder):
    trained = folder / "run"
    result = json.loads((trained / "result.json").read_text())
    assert (result["steps"], result["backward_passes"], result["data"]) == (2, 2, "stripes")
    assert result["delta_norm"] == pytest.approx(0.5 * 8)
    for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()):
        assert line["loss"] == pytest.approx(3 * line["mse"])
        assert line["absolute"] > 0
    written = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert written["adversary"] == {"name": "constant", "shift": 0.5}
    assert written["objective"] == {"name": "absolute", "factor": 3.0}
    assert (written["data"]["width"], written["data"]["dark"]) == (3, False)


def test_a_sampler_samples_with_its_option(folder):
    ddim, none, some = (np.load(folder / f"{name}.npz")["arr_0"] for name in ("ddim", "none", "some"))
    assert np.array_equal(none, ddim)
    assert not np.array_equal(some, ddim)


def test_a_metric_measures_beside_ours(folder):
    assert "contrast" in json.loads((folder / "said.json").read_text())["evaluation"]
    cells = json.loads((folder / "evaluation" / "result.json").read_text())["cells"]
    assert [(cell["sampler"], cell["steps"]) for cell in cells] == [("churned", 2), ("churned", 3)]
    images = np.load(folder / "two.npz")["arr_0"].reshape(8, -1)
    assert cells[0]["contrast"] == pytest.approx(images.std(1, ddof=1).mean())
    assert cells[0]["brightness"] == pytest.approx(images.mean())


def test_recipes_of_its_kinds(folder):
    read = json.loads((folder / "read.json").read_text())
    for assignment, words in MISTAKES.items():
        assert isinstance(read[assignment], str), assignment
        for word in words:
            assert word in read[assignment]
    assert read["adversary=none"]["adversary"]["name"] == "none", "and its own fields go with it"


def test_a_backbone_with_its_condition_and_a_codec_are_trained_saved_loaded_and_sampled(folder):
    written = yaml.safe_load((folder / "conv" / "recipe.yaml").read_text())
    assert (written["model"]["width"], written["codec"]) == (6, {"name": "blocks", "side": 4})
    assert json.loads((folder / "conv" / "result.json").read_text())["steps"] == 8, "and it went on from 4"
    saved = folder / "conv" / "model"
    assert json.loads((saved / "codec" / "codec.json").read_text()) == {"codec": {"name": "blocks", "side": 4}}
    config = json.loads((saved / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"], config["classes"]) == (16, 2, 10)
    plain, guided, tuned = (np.load(folder / f"{name}.npz") for name in ("plain", "guided", "tuned"))
    assert plain["arr_0"].shape == tuned["arr_0"].shape == (4, 8, 8, 1)
    assert plain["arr_1"].tolist() == [0, 1, 2, 3]
    assert not np.array_equal(plain["arr_0"], guided["arr_0"])
    assert not np.array_equal(plain["arr_0"], tuned["arr_0"])
    before, after = (load_file(folder / run / "model" / "unet" / WEIGHTS) for run in ("conv", "tuned"))
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
