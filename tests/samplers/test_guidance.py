"""Classifier-free guidance: its formula, its null class, and the training that makes one."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from robustdiff.backbones.model import Model
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.process import DiffusionProcess
from robustdiff.recipe import load_recipe
from robustdiff.samplers import sample
from robustdiff.training.run import train

LINEAR = DiffusionProcess.linear(1000)


def by_class(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
    """A model whose output and learned variance are its class."""
    return (class_labels.float() / 10).reshape(-1, 1, 1, 1).expand(-1, 2 * x.shape[1], *x.shape[2:])


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0, 4.0])
def test_the_output_is_extrapolated_from_the_null_class(g):
    seen = []
    labels = torch.tensor([1, 3])
    sample(
        by_class,
        LINEAR,
        "ddim",
        2,
        shape=(2, 1, 4, 4),
        class_labels=labels,
        guidance=g,
        unconditional={"class_labels": 5},
        on_evaluation=seen.append,
    )
    expected = 0.5 + g * (labels / 10 - 0.5)
    for evaluation in seen:
        torch.testing.assert_close(evaluation.predicted.noise[:, 0, 0, 0], expected)
        torch.testing.assert_close(evaluation.predicted.variance[:, 0, 0, 0], labels / 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance": -1.0, "class_labels": torch.tensor([1]), "unconditional": {"class_labels": 0}}, "at least 0"),
        ({"guidance": float("nan"), "class_labels": torch.tensor([1]), "unconditional": {"class_labels": 0}}, "finite"),
        ({"guidance": 2.0}, "condition"),
        ({"guidance": 2.0, "class_labels": torch.tensor([1])}, "null class"),
    ],
)
def test_guidance_that_is_not_possible_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        sample(by_class, LINEAR, "ddim", 2, shape=(1, 1, 4, 4), **arguments)


@pytest.fixture
def conditional(make_unet):
    return lambda classes: make_unet(num_class_embeds=classes)


def test_a_null_class_is_not_sampled_where_it_is_known(conditional):
    scheduler, network = diffusers.DDPMScheduler(), conditional(4)
    assert Generator.of(Model.of(network, scheduler)).labels(range(8)).tolist() == [0, 1, 2, 3] * 2
    assert Generator.of(Model.of(network, scheduler), num_classes=3).labels(range(6)).tolist() == [0, 1, 2] * 2
    network.register_to_config(_null_class=True)
    assert Generator.of(Model.of(network, scheduler)).labels(range(6)).tolist() == [0, 1, 2] * 2
    with pytest.raises(InputError, match="its classes are 0 to 2"):
        Generator.of(Model.of(network, scheduler), label=3)


@pytest.mark.parametrize(("classes", "words"), [(2, "one less"), (5, "one less"), (None, "null class")])
def test_guidance_without_a_null_class_is_refused(conditional, classes, words):
    with pytest.raises(InputError, match=words):
        Generator.of(Model.of(conditional(4), diffusers.DDPMScheduler()), guidance=2.0, num_classes=classes)


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training with a null class."""
    folder = tmp_path_factory.mktemp("guided") / "run"
    small = ["model.channels=[8,16]", "model.groups=4", "steps=3", "batch_size=16", "threads=1", "ema=0"]
    train(load_recipe("digits", [*small, "model.class_cond=true", "model.condition_dropout=0.5", f"output={folder}"]))
    return folder


def test_training_with_condition_dropout_makes_a_null_class(guided_run, robustdiff):
    config = json.loads((guided_run / "model/unet/config.json").read_text())
    assert config["num_class_embeds"] == 11
    output = guided_run.parent / "guided.npz"
    outcome = robustdiff("sample", guided_run, "--num", 22, "--steps", 2, "--guidance", 2, "--output", output, "--cpu")
    assert (outcome.code, outcome.err[-200:]) == (0, outcome.err[-200:])
    with np.load(output) as file:
        assert file["arr_1"].tolist() == [i % 10 for i in range(22)]
        guided = file["arr_0"]
    plain = guided_run.parent / "plain.npz"
    assert robustdiff("sample", guided_run, "--num", 22, "--steps", 2, "--output", plain, "--cpu").code == 0
    with np.load(plain) as file:
        assert (file["arr_0"] != guided).any()


def test_half_of_the_labels_become_the_null_class(tmp_path, monkeypatch):

    seen: list[int] = []
    draw = DenoisingObjective.draw

    def watched(self, x0, **arguments):
        seen.extend(arguments["class_labels"].tolist())
        return draw(self, x0, **arguments)

    monkeypatch.setattr(DenoisingObjective, "draw", watched)
    small = ["model.channels=[8,16]", "model.groups=4", "steps=6", "batch_size=64", "threads=1", "adversary=none"]
    train(load_recipe("digits", [*small, "model.class_cond=true", "model.condition_dropout=0.5", f"output={tmp_path}"]))
    assert set(seen) == set(range(11))
    assert 0.4 < np.mean(np.array(seen) == 10) < 0.6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.condition_dropout=0.1"], "model.class_cond"),
        (["model={name: pretrained, path: fashion-16}", "model.condition_dropout=0.1"], "null class"),
    ],
)
def test_condition_dropout_without_classes_is_refused(overrides, words, robustdiff, tmp_path):
    arguments = [part for override in [*overrides, f"output={tmp_path / 'run'}"] for part in ("--set", override)]
    data = "fashion-16-at" if "pretrained" in overrides[0] else "digits"
    outcome = robustdiff("train", data, *arguments, "--cpu")
    assert outcome.code == 2
    assert words in outcome.err


# -- conditions that are mappings --------------------------------------------------------------------------


def by_mapping(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, added: dict[str, Tensor], skipped: None) -> Tensor:
    """A model whose output is the sum of its conditions."""
    assert skipped is None
    total = encoder_hidden_states.mean((1, 2)) + 10 * added["text_embeds"].mean(1) + 100 * added["time_ids"].mean(1)
    return total.reshape(-1, 1, 1, 1).expand_as(x)


CONDITION = {
    "encoder_hidden_states": torch.tensor([1.0, 2.0]).reshape(2, 1, 1).expand(2, 3, 4),
    "added": {"text_embeds": torch.tensor([[3.0], [4.0]]).expand(2, 5), "time_ids": torch.tensor([[5.0], [6.0]])},
    "skipped": None,
}
EMPTY = {"encoder_hidden_states": torch.full((1, 3, 4), 0.5), "added": {"text_embeds": 0.25}, "skipped": None}


@pytest.mark.parametrize("time_ids", [None, 7, torch.full((1, 1), 7.0), torch.full((2, 1), 7.0)])
def test_a_condition_may_be_a_mapping_of_tensors(time_ids):
    """As added_cond_kwargs of SDXL. Names without an empty value are those of the condition."""
    seen: list[Tensor] = []
    empty = EMPTY
    if time_ids is not None:
        empty = {**EMPTY, "added": {**EMPTY["added"], "time_ids": time_ids}}
    sample(
        by_mapping, LINEAR, "ddim", 1, shape=(2, 4, 4, 4), condition=CONDITION, unconditional=empty, guidance=5.0,
        on_evaluation=lambda e: seen.append(e.predicted.noise[:, 0, 0, 0]),
    )  # fmt: skip
    full = torch.tensor([1 + 30 + 500.0, 2 + 40 + 600.0])
    null = torch.tensor([0.5 + 2.5 + 500.0, 0.5 + 2.5 + 600.0]) if time_ids is None else torch.full((2,), 703.0)
    torch.testing.assert_close(seen[0], null + 5 * (full - null))


@pytest.mark.parametrize(
    ("empty", "words"),
    [
        ({"added": 0}, "the empty added as a mapping of text_embeds, time_ids"),
        ({"added": {"pooled": 0}}, "the empty added as a mapping of text_embeds, time_ids"),
        (
            {"added": {"text_embeds": torch.zeros(3, 5)}},
            r"the empty added\['text_embeds'\].*one or 2 rows of shape \(5,\)",
        ),
        ({"added": {"text_embeds": None}}, r"the empty added\['text_embeds'\] as a number"),
        ({"encoder_hidden_states": None}, "the empty encoder_hidden_states as a number"),
        ({"encoder_hidden_states": torch.zeros(1, 2, 4)}, r"one or 2 rows of shape \(3, 4\)"),
        ({"skipped": 3}, "skipped=None is no tensor"),
        ({"skipped": torch.zeros(1)}, "skipped=None is no tensor"),
    ],
)
def test_an_empty_condition_that_does_not_fit_is_named(empty, words):
    given = {"condition": CONDITION, "unconditional": {**EMPTY, **empty}, "guidance": 2.0}
    with pytest.raises(InputError, match=words) as error:
        sample(by_mapping, LINEAR, "ddim", 1, shape=(2, 4, 4, 4), **given)
    assert "\n" not in str(error.value)
