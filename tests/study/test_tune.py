"""The search for the best training: what is drawn, that compute is equal, what is kept, confirmed and recommended."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import zlib

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from robustdiff.errors import InputError, RunError
from robustdiff.recipe import load_recipe
from robustdiff.report.tune import advice, tune_markdown
from robustdiff.study import tune as module
from robustdiff.study.plan import plan, reference_cells
from robustdiff.study.run import reproduce
from robustdiff.study.tune import (
    Speed,
    Stage,
    Tuning,
    candidates,
    decide,
    default_space,
    new_tuning,
    plain_trainings,
    stages,
    tune,
)

SPACE = {"adversary.step_size": [0.3, 0.1], "adversary.steps": [3, 2], "lr": [1e-4, 3e-4], "ema": [0.995, "auto"]}
SMALL = {
    "recipe": "fashion-16-at",
    "set": {"batch_size": 4, "threads": 1},
    "sampler": "ddim",
    "steps": 1,
    "space": SPACE,
    "untouched": True,
    "candidates": 4,
    "rungs": 2,
    "updates": 6,
    "seeds": 3,
    "num": 40,
    "batch_size": 40,
    "features": "fashion-16",
}


def small(**changes) -> Tuning:
    return Tuning.model_validate({**SMALL, **changes})


@pytest.fixture
def measured(monkeypatch):
    """measured(fid, fails=()): studies write made-up cells with FID = fid(settings, seed) instead of training.

    The settings are the changes of the recipe; those of the untouched checkpoint are None. The studies that are run are
    returned.
    """

    def install(fid, fails=lambda settings: False):
        ran = []

        def run_study(study, folder, **options):
            assert options["tolerant"]
            ran.append((folder.name, study))
            more = {"measure": study.measure.model_dump(mode="json"), "device": "cpu", "threads": 1, "torch": "2"}

            def cell(value):
                return {**dict.fromkeys(("kid", "precision", "recall"), 0.5), "fid": value, "replicates": [value] * 200}

            for part in ("cells", "trainings"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            for run in plan(study, folder):
                settings = study.methods[run.method].set
                if fails(settings):
                    run.failure.write_text(json.dumps({"error": "the loss is nan"}))
                    continue
                training = {"steps": run.recipe.steps, "data": "fashion-16"}
                record = {**cell(fid(settings, run.seed)), **more, "seconds": 1.0, "training": training}
                run.cells[0].path.write_text(json.dumps({**record, "recipe": yaml.safe_load(run.recipe.to_yaml())}))
                run.path.write_text(json.dumps({"seconds": 2.0, "step": [1], "loss": [0.1]}))
            for one in reference_cells(study, folder):
                seed = study.references[one.network].seed
                reference = {"name": one.network, "path": "fashion-16", "seed": seed}
                one.path.write_text(json.dumps({**cell(fid(None, seed)), **more, "reference": reference}))
            return True

        monkeypatch.setattr(module, "run_study", run_study)
        return ran

    return install


def fid_by_step_size(plain=10.0, untouched=9.0, small_step=8.0, large_step=11.0):
    """Return an FID that varies by seed, and is otherwise that of the contestant's kind."""

    def fid(settings, seed):
        noise = 1 + 0.003 * np.random.default_rng([seed, zlib.crc32(str(settings).encode())]).normal()
        if settings is None:
            return untouched * noise
        if settings.get("adversary") is not None:
            return plain * noise
        return noise * (small_step if settings["adversary.step_size"] == 0.1 else large_step)

    return fid


# -- what is searched ----------------------------------------------------------------------------------------


def test_the_default_values_are_around_the_recipe_with_its_own_first():
    recipe = load_recipe("fashion-16-at", ["adversary.radius={eta: 0.1}", "ema=auto"])
    assert default_space(recipe) == {
        "adversary.step_size": (0.3, 0.03, 0.06, 0.15, 0.6, 0.9),
        "adversary.steps": (3, 2, 5),
        "adversary.radius": ({"eta": 0.1}, None, {"eta": 0.03}),
        "lr": (1e-4, 3e-5, 3e-4),
        "ema": ("auto", 0.9975),
    }
    assert 0.9975**recipe.steps < 0.05
    assert default_space(load_recipe("fashion-16-at"))["adversary.radius"] == (None, {"eta": 0.03}, {"eta": 0.1})


def test_candidates_are_distinct_and_the_first_is_the_recipe():
    made, plain = candidates(small(candidates=8)), plain_trainings(small(candidates=8))
    assert (list(made), list(plain)) == ([f"c{i}" for i in range(1, 9)], ["p1", "p2"])
    assert made["c1"] == {"adversary.step_size": 0.3, "adversary.steps": 3, "lr": 1e-4, "ema": 0.995}
    assert plain["p1"] == {"adversary": "none", "lr": 1e-4, "ema": 0.995}
    for own in (made, plain):
        assert len({json.dumps(settings) for settings in own.values()}) == len(own)
    assert made == candidates(small(candidates=8))
    assert made != candidates(small(candidates=8, seed=1)), "another seed draws others"
    every = candidates(small(candidates=16))
    assert {tuple(own.values()) for own in every.values()} == set(itertools.product(*SPACE.values()))
    alone = plain_trainings(small(space={"adversary.steps": [2, 3]}, candidates=2))
    assert alone == {"p1": {"adversary": "none"}}


@pytest.mark.parametrize("name", ["free", "pgd", "none"])
def test_all_make_the_same_number_of_backward_passes(name):
    tuning = small(set={**SMALL["set"], "warmup": 120})
    settings = {"adversary": name} if name == "none" else {"adversary.name": name}
    changes = module._scaled(tuning, settings, 600)
    recipe = load_recipe("fashion-16-at", changes={**tuning.set, **changes})
    assert recipe.steps * recipe.adversary.example().backward_passes == 600
    share = recipe.steps / 1200
    assert recipe.ema**recipe.steps == pytest.approx(0.995**1200), "the start keeps its weight"
    assert recipe.warmup == round(120 * share)


def test_a_ramp_and_automatic_averages_keep_their_share_of_the_run():
    settings = {"adversary.radius": {"eta": 0.1}, "adversary.ramp": 240, "ema": "auto"}
    changes = module._scaled(small(), settings, 300)
    assert (changes["adversary.ramp"], changes["ema"], changes["steps"]) == (60, "auto", 300)
    with pytest.raises(InputError, match="less than the 4 of one update"):
        module._scaled(small(), {"adversary.name": "pgd"}, 3)


def test_the_ramp_of_a_radius_is_left_out_where_there_is_none(measured, tmp_path):
    ramped = {**SMALL["set"], "adversary.radius": {"eta": 0.1}, "adversary.ramp": 240}
    space = default_space(load_recipe("fashion-16-at", changes=ramped))
    tuning = small(set=ramped, space={"adversary.radius": space["adversary.radius"], "adversary.steps": [2, 3]})
    for settings, ramp in (
        ({"adversary.radius": None}, 0),
        ({"adversary.radius": {"eta": 0.03}}, 60),
        ({"adversary.radius": None, "adversary.radius.eta": 0.03}, 60),
        ({"adversary.steps": 2}, 60),
    ):
        changes = {**tuning.set, **module._scaled(tuning, settings, 300)}
        assert load_recipe("fashion-16-at", changes=changes).adversary.ramp == ramp
    measured(
        lambda settings, seed: 9.0 if settings is None else 8.0 + 0.001 * seed - (settings.get("adversary.ramp") == 0)
    )
    *_, record = tune(tuning, tmp_path)
    assert record["confirmation"]["contestants"]["candidate"]["settings"]["adversary.radius"] is None


def test_rungs_halve_and_trainings_double():
    tuning = small(candidates=12, rungs=3, updates=400, seeds=5)
    assert [(s.name, s.passes, s.candidates, s.plain, s.trainings, s.cells) for s in stages(tuning)] == [
        ("rung-1", 100, 12, 3, 15, 16),
        ("rung-2", 200, 6, 2, 8, 8),
        ("rung-3", 400, 3, 1, 4, 4),
        ("confirm", 400, 1, 1, 15, 20),
    ]
    stage, speed = Stage("x", 100, 1, 1, 2, 3), Speed(backward=0.5, evaluation=0.01)
    training, cell = 50 + module.PIECE, 0.01 * (40 + module.CELL) + module.PIECE
    assert stage.seconds(tuning, speed, 1) == pytest.approx(2 * training + 3 * cell)
    assert stage.seconds(tuning, speed, 2) == pytest.approx(module.START + (2 * training + 3 * cell) / 2 + training / 2)


def test_updates_are_chosen_by_the_minutes():
    speed = Speed(backward=0.2, evaluation=1e-3)
    fitted = module._fit(small(rungs=1), speed, 10, 2)

    def taken(own):
        return sum(stage.seconds(own, speed, 2) for stage in stages(own))

    assert taken(fitted) <= 600 < taken(fitted.model_copy(update={"updates": fitted.updates + 1}))
    with pytest.raises(InputError, match=r"--minutes 0.1: .* give more minutes"):
        module._fit(small(), speed, 0.1, 2)


# -- what is kept, confirmed and recommended -----------------------------------------------------------------


def test_the_better_half_goes_on_and_the_winner_is_confirmed_on_new_seeds(measured, tmp_path):
    ran = measured(fid_by_step_size())
    *rungs, record = tune(small(candidates=8, rungs=3, updates=12), tmp_path)
    assert [name for name, _ in ran] == ["rung-1", "rung-2", "rung-3", "confirm"]
    assert [sum(name[0] == "c" for name in rung["contestants"]) for rung in rungs] == [8, 4, 2]
    assert [sum(name[0] == "p" for name in rung["contestants"]) for rung in rungs] == [2, 1, 1]
    for rung, following in itertools.pairwise(rungs):
        assert {name for name, own in rung["contestants"].items() if own["kept"]} == following["contestants"].keys()
        for kind in "cp":
            values = {True: [0.0], False: [math.inf]}
            for name, own in rung["contestants"].items():
                if name[0] == kind:
                    values[own["kept"]].append(own["values"]["0"])
            assert max(values[True]) <= min(values[False])
        assert rung["untouched"] == rungs[0]["untouched"]

    study = ran[-1][1]
    searched = {seed for _, own in ran[:-1] for method in own.methods.values() for seed in method.seeds}
    assert searched == {0}
    assert all(method.seeds == (1, 2, 3) for method in study.methods.values())
    noises = {study.measure.noise_seed(seed) for seed in (1, 2, 3)}
    assert noises == {1, 2, 3} == {reference.seed for reference in study.references.values()}
    clean = load_recipe("fashion-16-at", changes={**study.set, **study.methods["repeat"].set})
    winner = record["confirmation"]["contestants"]["candidate"]
    steps = winner["settings"]["adversary.steps"]
    assert (clean.adversary.name, clean.adversary.radius.value, clean.adversary.steps) == ("random", 0, steps)

    assert (record["answer"], winner["settings"]["adversary.step_size"]) == ("candidate", 0.1)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert (recipe.steps, recipe.adversary.step_size, recipe.output) == (12, 0.1, str(tmp_path / "run"))
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(record))
    assert record["trainings"] == 10 + 5 + 3 + 9
    assert record["process_seconds"] == 3 * 27, "two seconds for a training, one for its cell"


def test_differences_are_those_of_paired_t_tests(measured, tmp_path):
    measured(fid_by_step_size(plain=9.1, small_step=9.0, large_step=9.05))
    *_, record = tune(small(seeds=5), tmp_path)
    values = {
        role: np.log([own["values"][str(seed)] for seed in range(1, 6)])
        for role, own in record["confirmation"]["contestants"].items()
    }
    deciding = [("candidate", "plain"), ("candidate", "untouched"), ("plain", "untouched")]
    found = {(own["of"], own["to"]): own for own in record["comparisons"]}
    assert list(found) == [*deciding, ("candidate", "control")]
    tests = {pair: scipy.stats.ttest_1samp(values[pair[0]] - values[pair[1]], 0) for pair in found}
    for pair, test in tests.items():
        ends = test.confidence_interval()
        assert found[pair]["interval"] == pytest.approx(np.expm1([ends.low, ends.high]).tolist())
        assert found[pair]["p"] == pytest.approx(test.pvalue)
    ordered = sorted(deciding, key=lambda pair: tests[pair].pvalue)
    adjusted = np.minimum(1, np.maximum.accumulate([(3 - i) * tests[p].pvalue for i, p in enumerate(ordered)]))
    assert [found[pair]["p_adjusted"] for pair in ordered] == pytest.approx(adjusted.tolist())
    assert "p_adjusted" not in found["candidate", "control"], "it explains and does not decide"


def test_differences_of_small_values_are_ratios_too(measured, tmp_path):
    """FIDs of 0.0001, as those of a metric on another scale."""
    fid = fid_by_step_size()
    found = []
    for factor in (1, 1e-5):
        measured(lambda settings, seed, factor=factor: factor * fid(settings, seed))
        *_, record = tune(small(), tmp_path / str(factor))
        found += [own[name] for own in record["comparisons"] for name in ("mean", "p")]
    assert found[len(found) // 2 :] == pytest.approx(found[: len(found) // 2])
    measured(lambda settings, seed: -0.25 if settings is None else fid(settings, seed))
    with pytest.raises(InputError, match=r"the FID of untouched is -0\.25 with seed 1, and .*: rank by another"):
        list(tune(small(), tmp_path / "negative"))


@pytest.mark.parametrize(
    ("fids", "answer", "words"),
    [
        ({"small_step": 8.0}, "candidate", "Train with the candidate's settings: α = 0.1"),
        ({"small_step": 9.5, "large_step": 9.5}, "untouched", "Leave the checkpoint as it is"),
        ({"plain": 8.0, "small_step": 8.5}, "plain", "Train plainly: no δ"),
        ({"plain": 8.0, "small_step": 8.0, "large_step": 8.0}, "plain", "Train plainly"),
    ],
)
def test_what_is_recommended(measured, tmp_path, fids, answer, words):
    measured(fid_by_step_size(**fids))
    *_, record = tune(small(seeds=5), tmp_path)
    assert record["answer"] == answer
    assert words in advice(record, tmp_path)
    assert (tmp_path / "recipe.yaml").exists() == (answer != "untouched")
    if answer == "plain":
        assert load_recipe(str(tmp_path / "recipe.yaml")).adversary.name == "none"
    page = tune_markdown(record)
    assert words in page
    assert "| seed 5 |" in page
    command = page.partition("`")[2].partition("`")[0]
    assert "--set threads=1 --try adversary.step_size=0.3,0.1 --try adversary.steps=3,2 --try lr=" in command
    assert command.endswith("--num 40 --batch-size 40")


def comparison(of, to, **changes):
    return {"of": of, "to": to, "better": True, "complete": True, "p_adjusted": 0.01, **changes}


@pytest.mark.parametrize(
    ("changes", "untouched", "answer"),
    [
        ({}, True, "candidate"),
        ({("candidate", "plain"): {"p_adjusted": 0.06}}, True, "plain"),
        ({("candidate", "untouched"): {"complete": False}}, True, "plain"),
        ({("candidate", "plain"): {"better": False}, ("plain", "untouched"): {"better": False}}, True, "untouched"),
        ({("candidate", "untouched"): {"better": False}, ("plain", "untouched"): {"p_adjusted": 1}}, True, "untouched"),
        ({}, False, "candidate"),
        ({("candidate", "plain"): {"p_adjusted": 0.06}}, False, "plain"),
    ],
)
def test_the_rule(changes, untouched, answer):
    pairs = [("candidate", "plain"), *([("candidate", "untouched"), ("plain", "untouched")] if untouched else [])]
    assert decide([comparison(*pair, **changes.get(pair, {})) for pair in pairs], untouched) == answer


def test_what_fails_loses_its_rung(measured, tmp_path):
    measured(fid_by_step_size(), fails=lambda settings: settings["lr"] == 3e-4)
    *rungs, record = tune(small(candidates=16, rungs=3, updates=12), tmp_path)
    failed = [own for own in rungs[0]["contestants"].values() if own["failed"]]
    assert failed
    assert all(not own["values"] and not own["kept"] and own["settings"]["lr"] == 3e-4 for own in failed)
    assert record["answer"] == "candidate"
    assert "failed: the loss is nan" in tune_markdown(record)


def test_without_any_candidate_plain_fine_tuning_is_confirmed(measured, tmp_path):
    measured(fid_by_step_size(plain=8.0), fails=lambda settings: "adversary.steps" in settings)
    *_, record = tune(small(), tmp_path)
    assert list(record["confirmation"]["contestants"]) == ["plain", "untouched"]
    assert record["answer"] == "plain"
    assert "Train plainly" in advice(record)


def test_without_any_plain_fine_tuning_it_ends(measured, tmp_path):
    measured(fid_by_step_size(), fails=lambda settings: "adversary" in settings)
    with pytest.raises(RunError, match="every plain fine-tuning failed"):
        list(tune(small(), tmp_path))


def test_a_candidate_that_fails_in_the_confirmation_is_not_recommended(measured, tmp_path):
    ran = measured(fid_by_step_size(), fails=lambda settings: len(ran) == 3 and "adversary.step_size" in settings)
    *_, record = tune(small(), tmp_path)
    assert record["confirmation"]["contestants"]["candidate"]["failed"] == dict.fromkeys("123", "the loss is nan")
    assert record["answer"] == "untouched"
    assert "no common seed" in advice(record)
    assert tune_markdown(record)


def test_higher_is_better_for_some_metrics(measured, tmp_path, monkeypatch):
    ran = measured(fid_by_step_size())
    stub = module.run_study

    def with_precision(study, folder, **options):
        stub(study, folder, **options)
        for path in (folder / "cells").glob("*.json"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps({**record, "precision": 1 - record["fid"] / 20}))
        return True

    monkeypatch.setattr(module, "run_study", with_precision)
    *_, record = tune(small(metric="precision-recall"), tmp_path)
    assert ran[0][1].measure.metrics == ()
    assert record["confirmation"]["contestants"]["candidate"]["settings"]["adversary.step_size"] == 0.1
    first = record["comparisons"][0]
    assert (first["relative"], first["better"], record["answer"]) == (False, True, "candidate")
    assert first["mean"] == pytest.approx(0.1, abs=0.02), "a difference and no ratio"
    with pytest.raises(ValueError, match="has a better direction"):
        small(metric="brightness")


def test_a_folder_is_bound_to_its_search(measured, tmp_path):
    measured(fid_by_step_size())
    chosen = small(minutes=30.0)
    first = list(tune(chosen, tmp_path))
    assert list(tune(chosen, tmp_path)) == first
    assert list(tune(small(minutes=30.0, updates=99), tmp_path)) == first, "another process took other speeds"
    for other, name in ((small(), "minutes"), (small(minutes=30.0, num=44), "num")):
        with pytest.raises(InputError, match=f"another {name}"):
            next(tune(other, tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        next(tune(chosen, tmp_path / "other"))


def test_a_search_from_nothing_has_no_untouched_checkpoint(tmp_path):
    tuning, speed = new_tuning(
        "fashion-16", {"threads": 1, "batch_size": 4}, {}, tmp_path, sampler="ddim", steps=2, updates=8, num=40
    )
    assert not tuning.untouched
    assert tuning.set["adversary"] == "free", "a recipe without an adversary has candidates of free AT"
    assert tuning.space["adversary.steps"] == (3, 2, 5)
    assert 0 < speed.evaluation < speed.backward < math.inf
    assert not list(tmp_path.iterdir())


# -- with real trainings -------------------------------------------------------------------------------------


def test_why_a_checkpoint_is_no_contestant_is_said(tmp_path, caplog):
    tuning, recipe = small(sampler="multistep"), load_recipe("fashion-16-at")
    assert not module._samples(recipe, tuning, ())
    assert "fashion-16 is no contestant: the sampler multistep does not suit it" in caplog.text
    model = {"name": "pretrained", "path": str(tmp_path)}
    with pytest.raises(InputError):
        module._samples(load_recipe("fashion-16-at", {"model": model}), tuning, ())


def test_a_search_of_other_noise_is_not_continued(measured, tmp_path):
    measured(lambda settings, seed: 1.0)
    list(tune(small(), tmp_path))
    path = tmp_path / "tune.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings.pop("noise") == "philox"
    path.write_text(yaml.safe_dump(settings))  # as robustdiff 0.2.0 wrote it
    with pytest.raises(InputError, match=r"tune\.yaml .*other noise.*with robustdiff 0\.2\.0"):
        next(tune(small(), tmp_path))


class Killer:
    """A progress that sends SIGTERM in the training with a number."""

    def __init__(self, number):
        self.left = number

    def begin(self, description, total):
        self.left -= description.startswith("training")

    def advance(self, amount, note=""):
        if self.left == 0 and note.startswith("loss"):
            self.left = -1
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_search_with_a_candidate_that_diverges_goes_on_after_signals(tmp_path):
    """Its result is that of an undisturbed one."""
    settings = {"set": {**SMALL["set"], "log_every": 1}, "updates": 2, "candidates": 2, "rungs": 1, "num": 16}
    tuning = small(**settings, space={"adversary.steps": [2], "lr": [1e-4, 1e30]})
    threads = torch.get_num_threads()
    for number in (2, 3):
        assert "answer" not in [*tune(tuning, tmp_path / "killed", progress=Killer(number)), {}][-1]
    *_, record = tune(tuning, tmp_path / "killed")
    *_, undisturbed = tune(tuning, tmp_path / "whole")
    torch.set_num_threads(threads)
    assert {**record, "process_seconds": 0} == {**undisturbed, "process_seconds": 0}
    wild = record["rungs"][0]["contestants"]["c2"]
    assert (wild["settings"]["lr"], wild["values"], wild["kept"]) == (1e30, {}, False)
    assert "the loss is nan" in wild["failed"]["0"]
    contestants = record["confirmation"]["contestants"]
    assert list(contestants) == ["candidate", "plain", "control", "untouched"]
    assert all(list(own["values"]) == ["1", "2", "3"] for own in contestants.values())
    assert len(set(contestants["untouched"]["values"].values())) == 3, "each seed has image noise of its own"
    cell = tmp_path / "whole" / "confirm" / "cells" / "untouched-s2-ddim-1.json"
    before, after = reproduce(cell, tmp_path / "again")
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert before["fid"] == contestants["untouched"]["values"]["2"]
