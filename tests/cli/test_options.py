"""The options that say which real images a command reads."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler

from robustdiff.backbones.model import Model, load_model
from robustdiff.cli import out
from robustdiff.cli.options import SHIPPED_EXTRACTORS, SHIPPED_RECIPES, SHIPPED_SAMPLERS
from robustdiff.errors import InputError
from robustdiff.metrics.extractors.classifier import SHIPPED
from robustdiff.recipe import shipped_recipes
from robustdiff.samplers.sampler import SAMPLERS

SMALL = {
    "evaluate": ["--num", 8, "--steps", 1],
    "mismatch": ["--num", 40, "--steps", 2, "--probes", 0],
    "search-times": ["--num", 8, "--steps", 2],
    "solver-error": ["--num", 2, "--scales", 3, "--points", 2, "--substeps", 2],
}
"""The commands that compare with real images, and what makes each take a moment."""


@pytest.fixture(scope="module")
def models(digits_run, tmp_path_factory) -> dict[str, Path]:
    """A model that each of the commands takes; search-times needs a consistency model."""
    unet = load_model(digits_run).network
    folder = tmp_path_factory.mktemp("models") / "consistency"
    Model.of(unet, CMStochasticIterativeScheduler(num_train_timesteps=18)).save(folder)
    return {**dict.fromkeys(SMALL, digits_run), "search-times": folder}


@pytest.mark.parametrize("command", SMALL)
def test_real_images_are_read_as_set_says(robustdiff, models, tmp_path, monkeypatch, command, assert_bad_input):
    monkeypatch.chdir(tmp_path)
    features = ["--features", "digits"] if command in ("evaluate", "search-times") else []
    arguments = [command, models[command], *SMALL[command], *features]
    given = ["--set", "data.name=fashion-16", "--set", "data.split=test"]
    outcome = robustdiff(*arguments, *given)
    assert_bad_input(outcome, "8×8", "16×16", "set data.size=8")
    outcome = robustdiff(*arguments, *given, "--set", outcome.err.split("set ")[-1].strip())
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("command", SMALL)
@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["steps=3"], ["--set steps=3", "data"]),
        (["data.colour=1"], ["data.colour", "known here", "split"]),
        (["data.size=0"], ["data.size", "greater"]),
        (["data.channels=2"], ["data.channels"]),
        (["data.flip=true"], ["data.flip", "does not use it"]),
        (["data"], ["--set data: write it as KEY=VALUE"]),
        (["data.split=nowhere"], ["nowhere"]),
    ],
)
def test_bad_settings_of_real_images_are_one_line(
    robustdiff, models, tmp_path, monkeypatch, command, assignments, words, assert_bad_input
):
    monkeypatch.chdir(tmp_path)
    options = [part for assignment in assignments for part in ("--set", assignment)]
    assert_bad_input(robustdiff(command, models[command], *SMALL[command], *options), *words)


def test_statistics_of_real_images_are_computed_by_workers(robustdiff, models, tmp_path, monkeypatch, assert_bad_input):
    """By the commands that compute them; the others would ignore the number."""
    from robustdiff.evaluation import real_images

    used = []

    def statistics(*arguments, workers, **settings):
        used.append(workers)
        raise InputError("enough")

    monkeypatch.setattr(real_images, "reference_statistics", statistics)
    monkeypatch.chdir(tmp_path)
    for command in SMALL:
        uses = command in ("evaluate", "search-times")
        data = ["--data", "digits", "--set", "data.workers=2"]
        outcome = robustdiff(command, models[command], *SMALL[command], *data)
        assert_bad_input(outcome, "enough" if uses else "--set data.workers: this command does not use it")
    assert used == [2, 2]


@pytest.mark.parametrize("command", SMALL)
def test_results_are_written_before_they_are_printed(robustdiff, models, tmp_path, monkeypatch, command):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(out, "print", full)
    data = ["--data", "digits", *(["--features", "digits"] if command == "search-times" else [])]
    output = tmp_path / ("result.json" if command == "search-times" else "results")
    outcome = robustdiff(command, models[command], *SMALL[command], *data, "--output", output)
    assert (outcome.code, "disk is full" in outcome.err) == (1, True), outcome.err
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_the_help_has_the_names_that_are_registered():
    ours = [name for name, sampler in SAMPLERS.items() if sampler.__module__.startswith("robustdiff.")]
    assert ours == SHIPPED_SAMPLERS
    assert sorted(SHIPPED) == SHIPPED_EXTRACTORS
    assert sorted(shipped_recipes()) == SHIPPED_RECIPES
