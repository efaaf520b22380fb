"""The recipes of consistency models run, one after the other, as their comments say: at a tiny size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler

from robustdiff.backbones.adm import AdmFlags, build_adm
from robustdiff.backbones.kinds.kind import mark_as_own
from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError
from robustdiff.recipe import load_recipe

QUICK = ["precision=fp32", "steps=3", "batch_size=8", "threads=1", "accumulate=1", "log_every=1", "watch=none"]


def words(*overrides):
    return [word for value in (*QUICK, *overrides) for word in ("--set", value)]


@pytest.mark.parametrize("adversary", ["free", "none", "random"])
def test_fashion_16(robustdiff, tmp_path, adversary):
    edm, cm = tmp_path / "edm", tmp_path / "cm"
    outcome = robustdiff("train", "fashion-16-edm", *words(f"output={edm}"))
    assert outcome.code == 0, outcome.err
    own = [f"model.path={edm}", f"output={cm}", f"adversary.name={adversary}"]
    outcome = robustdiff("train", "fashion-16-consistency", *words(*own))
    assert outcome.code == 0, outcome.err
    result = json.loads((cm / "result.json").read_text())
    assert (result["steps"], result["batches"]) == (3, 3 if adversary == "none" else 1)
    assert (result["delta_norm"] > 0) == (adversary != "none")
    ConsistencyModelPipeline.from_pretrained(cm / "model")
    outcome = robustdiff("sample", cm, "--num", 4, "--output", tmp_path / "images.npz")
    assert outcome.code == 0, outcome.err
    with np.load(tmp_path / "images.npz") as file:
        assert file["arr_0"].shape == (4, 16, 16, 1)


def test_levels_of_a_recipe_are_taken_back():
    """Set what docs/consistency.md sets."""
    uniform = ["objective.times=uniform", "objective.weighting=uniform"]
    recipe = load_recipe("fashion-16-consistency", [*uniform, "objective.mean=null", "objective.std=null"])
    assert (
        recipe.objective
        == load_recipe("fashion-16-consistency", ["objective={name: consistency, teacher: fashion-16}"]).objective
    )
    with pytest.raises(InputError, match="leave them out"):
        load_recipe("fashion-16-consistency", uniform)
    changed = load_recipe("fashion-16-consistency", ["objective.mean=null", "objective.std=null"]).objective
    assert (changed.mean, changed.std) == (-1.1, 2.0)


def test_fashion_mnist(robustdiff, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (16, 28, 28, 1), dtype=np.uint8))
    data = ["data.name=npz", f"data.root={tmp_path / 'images.npz'}"]
    small = ["model.channels=[8,8,8]", "model.groups=4", "model.layers=1"]
    runs = {
        "fashion-mnist": small,
        "fashion-16-edm": [
            f"model.path={tmp_path / 'fashion-mnist'}", f"objective.teacher={tmp_path / 'fashion-mnist'}",
        ],
        "fashion-mnist-consistency": [
            f"model.path={tmp_path / 'fashion-16-edm'}", f"objective.teacher={tmp_path / 'fashion-16-edm'}",
        ],
    }  # fmt: skip
    for recipe, overrides in runs.items():
        outcome = robustdiff("train", recipe, *words(*data, *overrides, f"output={tmp_path / recipe}"))
        assert outcome.code == 0, outcome.err
    assert load_model(tmp_path / "fashion-mnist-consistency").scheduler.config.num_train_timesteps == 18


def test_imagenet(robustdiff, tmp_path):
    flags = AdmFlags(
        image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8",
        num_head_channels=32, class_cond=True, num_classes=4, use_new_attention_order=True,
    )  # fmt: skip
    unet = build_adm(flags)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)  # it starts at zero, where no gradient reaches δ
    Model.of(unet, mark_as_own(EDMEulerScheduler())).save(tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(16) % 4)
    own = [
        "data.name=npz", f"data.root={tmp_path / 'images.npz'}", "data.size=16", "data.workers=0",
        f"model.path={tmp_path / 'model'}", f"objective.teacher={tmp_path / 'model'}", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    outcome = robustdiff("train", "imagenet64-consistency", *words(*own))
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["delta_norm"] > 0
    assert load_model(tmp_path / "run").scheduler.config.num_train_timesteps == 40
