"""A study: what is planned, what is done once, and what can be made again."""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from robustdiff.data import DataConfig, load_dataset
from robustdiff.data.loader import worker_failures
from robustdiff.errors import InputError, NotFiniteError, RunError
from robustdiff.evaluation.noise import NOISE
from robustdiff.files import MARKER
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.metric import MetricCollection
from robustdiff.metrics.reference import reference_statistics
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
from robustdiff.progress import SILENT
from robustdiff.report.comparisons import _consequence
from robustdiff.report.levels import _fid_figure
from robustdiff.report.page import write_page
from robustdiff.report.study_section import study_section
from robustdiff.study import run as module
from robustdiff.study.analysis import Effect, contrast, effect, holm, mismatch_pairs, ratio_to, sensitivity, trend
from robustdiff.study.estimate import remaining
from robustdiff.study.plan import pieces, plan, reference_cells
from robustdiff.study.run import reproduce, run_study
from robustdiff.study.schema import Study, load_study
from robustdiff.study.store import (
    MEASURES,
    Results,
    cell_settings,
    check_results,
    claim_study,
    read_cell,
    read_results,
    write,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "title": "A tiny study",
    "recipe": "fashion-16-at",
    "set": {"threads": 1, "steps": 3, "batch_size": 4, "log_every": 1},
    "baseline": "plain",
    "methods": {
        "plain": {"description": "Without *any* δ.", "set": {"adversary": "none"}, "seeds": [0, 1]},
        "free": {"set": {"adversary.step_size": 0.5}},
    },
    "references": {"base": {"path": "fashion-16", "samplers": ["ddim"], "steps": [3], "precision": "bf16"}},
    "measure": {"samplers": ["ddim", "iddpm"], "steps": [2, 1], "num": 40, "batch_size": 20, "mismatch": 40},
}


class Parts(list):
    """The names of the pieces of work, in the order in which they are begun."""

    def begin(self, description, total):
        self.append(description)

    def advance(self, amount, note=""):
        pass


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was run to its end."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    study = load_study(folder / "tiny.yaml")
    threads = torch.get_num_threads()
    assert run_study(study, folder)
    torch.set_num_threads(threads)
    return study, folder


def test_the_plan_has_the_first_seed_of_every_method_first(study_file, tmp_path):
    runs = plan(load_study(study_file), tmp_path)
    assert [run.name for run in runs] == ["plain-s0", "free-s0", "plain-s1"]
    assert [cell.name for cell in runs[1].cells] == [
        "free-s0-ddim-1",
        "free-s0-iddpm-1",
        "free-s0-ddim-2",
        "free-s0-iddpm-2",
    ]
    recipe = runs[1].recipe
    assert (recipe.adversary.step_size, recipe.steps, recipe.seed) == (0.5, 3, 0)
    assert runs[0].recipe.adversary.name == "none"
    assert runs[2].recipe.seed == 1


def test_a_seed_can_be_measured_more_fully_than_the_others(tmp_path):
    plain = {**TINY["methods"]["plain"], "steps": [1], "seed_steps": {0: [4, 1]}}
    methods = {**TINY["methods"], "plain": plain}
    measure = {**TINY["measure"], "mismatch_methods": ["plain"]}
    study = Study.model_validate({**TINY, "methods": methods, "measure": measure})
    runs = {run.name: run for run in plan(study, tmp_path)}
    assert {name: run.steps for name, run in runs.items()} == {
        "plain-s0": (1, 4),
        "free-s0": (1, 2),
        "plain-s1": (1,),
    }
    assert [name for name, run in runs.items() if run.mismatch_path is not None] == ["plain-s0"]


def test_every_cell_is_a_file_that_says_how_it_was_made(finished):
    study, folder = finished
    for run in plan(study, folder):
        for cell in run.cells:
            record = json.loads(cell.path.read_text())
            assert (record["sampler"], record["steps"], record["n"]) == (cell.sampler, cell.steps, 40)
            assert record["recipe"]["adversary"] == run.recipe.adversary.model_dump(mode="json")
            assert np.mean(record["replicates"]) > 0
            assert len(record["replicates"]) == 200
            assert cell.path.with_suffix(".png").is_file() == (run.seed == 0)
    assert not list(folder.rglob("*.tmp"))


def test_only_what_is_missing_is_computed(finished):
    study, folder = finished
    cell = plan(study, folder)[1].cells[0]
    before = json.loads(cell.path.read_text())
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    cell.path.unlink()
    parts = Parts()
    assert run_study(study, folder, progress=parts)
    assert parts == [cell.name]
    after = json.loads(cell.path.read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in times if path != cell.path} == {
        path: time for path, time in times.items() if path != cell.path
    }


def test_a_lora_is_trained_once_and_measured(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(module, "_train_run", once(module._train_run))
    fields = {**TINY["set"], "steps": 1, "model.lora.rank": 2}
    methods = {"plain": {"set": {"adversary": "none"}}}
    measure = {"samplers": ["ddim"], "steps": [1], "num": 40}
    study = Study.model_validate({**TINY, "set": fields, "methods": methods, "measure": measure, "references": {}})
    assert run_study(study, tmp_path)
    (run,) = plan(study, tmp_path)
    assert run.done
    assert [cell.done for cell in run.cells] == [True]


def once(call):
    """Return a function that may be called only once."""
    calls = []

    def limited(*arguments):
        calls.append(arguments)
        assert len(calls) == 1, "it is done already"
        return call(*arguments)

    return limited


def test_a_longer_study_trains_on_before_it_measures(tmp_path):
    small = {**TINY["measure"], "samplers": ["ddim"], "steps": [1], "mismatch": 0}
    methods = {"plain": {"set": {"adversary": "none"}}}
    for updates in (1, 2):
        fields = {**TINY, "set": {**TINY["set"], "steps": updates, "lr_schedule": "constant"}}
        study = Study.model_validate({**fields, "methods": methods, "measure": small, "references": {}})
        assert run_study(study, tmp_path)
        (cell,) = plan(study, tmp_path)[0].cells
        assert read_cell(cell, study, plan(study, tmp_path)[0])["training"]["steps"] == updates
        cell.path.unlink()


def test_a_mismatch_of_fewer_updates_is_refused(finished, tmp_path):
    study, folder = finished
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "cells")
    longer = study.model_copy(update={"set": {**study.set, "steps": 6}})
    with pytest.raises(InputError, match=r"mismatch/.*\.json is of a network with 3 updates"):
        run_study(longer, tmp_path / "copy")


def mismatch_file(run, steps, **fields):
    """Write a mismatch file with made-up numbers."""
    mean = {name: {"value": 1.0, "floor": 1.0} for name in MISMATCHES}
    points = itertools.product(run.study.measure.samplers, steps)
    paths = [{"sampler": sampler, "steps": count, "mean": mean} for sampler, count in points]
    write(run.mismatch_path, {"n": 40, "images_seed": 0, "updates": 3, "paths": paths, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"n": 50}, "of 50 images, and the study's is 40"), ({"images_seed": 1}, "of images of the seed 1")],
)
def test_a_mismatch_of_other_images_is_refused(tmp_path, fields, message):
    study = Study.model_validate(TINY)
    mismatch_file(plan(study, tmp_path)[0], (1, 2), **fields)
    with pytest.raises(InputError, match=message):
        check_results(study, tmp_path)


def test_a_number_of_steps_is_added_to_a_mismatch(tmp_path):
    done = Study.model_validate(TINY)
    more = Study.model_validate({**TINY, "measure": {**TINY["measure"], "mismatch_steps": [1, 2, 4]}})
    run = plan(done, tmp_path)[0]
    mismatch_file(run, (1, 2), noise=NOISE)
    check_results(more, tmp_path)
    assert run.mismatch_path not in run.missing
    assert run.mismatch_path in plan(more, tmp_path)[0].missing
    assert [
        piece.done for study in (done, more) for piece in pieces(study, tmp_path) if "mismatch p" in piece.name
    ] == [
        True,
        False,
    ]


def test_a_study_is_not_put_into_a_folder_of_something_else(tmp_path):
    folder = tmp_path / "study"
    for _ in range(2):
        claim_study(folder)
    assert (folder / MARKER).read_text().startswith("a study of robustdiff")
    for name in ("cells/plain-s0-ddim-1.json", "mine.yaml"):  # of a repository, and of robustdiff 0.2.0
        old = tmp_path / name[:4] / name
        old.parent.mkdir(parents=True)
        old.touch()
        claim_study(tmp_path / name[:4])
        assert not (tmp_path / name[:4] / MARKER).exists()
    for name in ("recipe.yaml", "notes.txt"):
        other = tmp_path / name[:4] / name
        other.parent.mkdir()
        other.touch()
        with pytest.raises(InputError, match=r"holds a run, and not a study|is not empty, and nothing in it says"):
            claim_study(other.parent)
        assert [*other.parent.iterdir()] == [other]


def test_work_that_leaves_no_file_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_train_run", once(lambda run, progress: True))
    study = Study.model_validate({**TINY, "references": {}})
    for part in ("locks", "trainings"):
        (tmp_path / part).mkdir()
    with pytest.raises(RunError, match="training plain-s0 is finished"):
        module._work(study, tmp_path, 0.0, SILENT)


def test_what_another_process_holds_is_left_to_it(finished):
    study, folder = finished
    held, other = plan(study, folder)[0].cells[0], plan(study, folder)[0].cells[1]
    held.path.unlink()
    other.path.unlink()
    parts = Parts()
    with (folder / "locks" / held.name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=run_study,
            args=(study, folder),
            kwargs={"progress": parts, "wait": 0.05},
        )
        thread.start()
        while not other.done and thread.is_alive():
            thread.join(0.05)
        assert parts == [other.name]
        assert not held.done
    thread.join(240)
    assert not thread.is_alive()
    assert parts == [other.name, held.name]


def test_a_reference_is_measured_as_it_is(finished, tmp_path):
    _, folder = finished
    before, after = reproduce(folder / "cells" / "base-ddim-3.json", tmp_path / "again")
    assert (before["reference"]["path"], before["steps"]) == ("fashion-16", 3)
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("change", [{"references": {"precision": "fp32"}}, {"data": {"split": "test"}}])
def test_a_reference_in_another_precision_or_on_other_images_is_refused(change):
    study = load_study(ROOT / "benchmarks" / "studies" / "fashion-16-consistency.yaml")
    folder = ROOT / "benchmarks" / "results" / "fashion-16-consistency"
    cell = reference_cells(study, folder)[0]
    assert read_cell(cell, study, None)["reference"]["precision"] == "bf16"
    teacher = study.references["teacher"].model_copy(update=change.get("references", {}))
    settings = {**study.set, **({"data": {"name": "fashion-16", **change["data"]}} if "data" in change else {})}
    other = study.model_copy(update={"references": {"teacher": teacher}, "set": settings})
    with pytest.raises(InputError, match="other settings"):
        read_cell(cell, other, None)


def test_other_real_images_are_measured_as_generated_ones(finished, tmp_path, robustdiff):
    """Against the metrics of these images, computed here."""
    study, folder = finished
    real = {"name": "fashion-16", "split": "test"}
    wanted = study.model_copy(update={"measure": study.measure.model_copy(update={"real": DataConfig(**real)})})
    shutil.copytree(folder, tmp_path / "study")
    assert run_study(wanted, tmp_path / "study")
    record = json.loads((tmp_path / "study" / "cells" / "real.json").read_text())
    test = load_dataset("fashion-16", split="test")
    images = test.__getitems__(fixed_order(len(test))[:40].tolist())[0]
    extractor = load_extractor("fashion-16")
    reference = reference_statistics(load_dataset("fashion-16"), extractor)
    metrics = MetricCollection(None, extractor, reference)
    metrics.update(images, 0)
    for name, value in metrics.result("x").values.items():
        assert record[name] == pytest.approx(value), name
    page = write_page(wanted, tmp_path / "study", tmp_path / "page.md")
    assert "40 other real images (the split `test` of `fashion-16`)" in page
    assert f"| {record['precision']:.3f} | {record['recall']:.3f} |" in page
    other = wanted.measure.model_copy(update={"real": DataConfig(name="fashion-16")})
    with pytest.raises(InputError, match=r"real\.json was made with other settings"):
        read_results(study.model_copy(update={"measure": other}), tmp_path / "study")
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump({**TINY, "measure": {**TINY["measure"], "num": 10_001, "real": real}}))
    outcome = robustdiff("study", path, "--output", tmp_path / "many")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "has 10000 images, fewer than measure.num=10001" in outcome.err


def test_a_cell_is_made_again_from_its_file_alone(finished, tmp_path, robustdiff):
    _, folder = finished
    path = folder / "cells" / "free-s0-iddpm-2.json"
    before, after = reproduce(path, tmp_path / "again")
    assert [before[name] for name in MEASURES] == [after[name] for name in MEASURES]
    assert before["weights"] == after["weights"]
    assert before["replicates"] == after["replicates"]

    record = json.loads(path.read_text())
    for factor, code, words in (1 + 1e-6, 0, "the same to "), (1.001, 1, "agree to 3 significant digits"):
        (tmp_path / "other.json").write_text(json.dumps({**record, "fid": record["fid"] * factor, "weights": "0"}))
        outcome = robustdiff("reproduce", str(tmp_path / "other.json"), "--output", str(tmp_path / "again"))
        assert outcome.code == code
        assert words in (outcome.err if code else outcome.out)
        assert "differs" in outcome.out, "that of the weights is said, and is no error"


@pytest.fixture
def of_other_noise(finished, tmp_path):
    """The same study, as robustdiff 0.2.0 made it: its files say nothing of the noise."""
    study, folder = finished
    for part in ("cells", "trainings", "mismatch", "runs"):
        shutil.copytree(folder / part, tmp_path / "old" / part)
    paths = [*(tmp_path / "old" / "cells").glob("*.json"), *(tmp_path / "old" / "mismatch").glob("*.json")]
    assert len(paths) == 13 + 2
    for path in paths:
        record = json.loads(path.read_text())
        assert record.pop("noise") == "philox"
        path.write_text(json.dumps(record))
    return study, tmp_path / "old"


def test_a_study_of_other_noise_is_shown_and_not_added_to(of_other_noise, study_file, finished, tmp_path, robustdiff):
    study, folder = of_other_noise
    assert run_study(study, folder), "nothing is missing"
    assert write_page(study, folder, tmp_path / "page.md") == write_page(*finished, tmp_path / "page.md")
    missing = folder / "cells" / "free-s0-iddpm-2.json"
    missing.unlink()
    outcome = robustdiff("study", study_file, "--output", folder)
    assert (outcome.code, outcome.err.strip().count("\n")) == (2, 0)
    assert "other noise" in outcome.err
    assert "another --output, or go on with robustdiff 0.2.0" in outcome.err
    assert not missing.exists()
    for path in (folder / "cells").glob("*.json"):
        path.unlink()
    with pytest.raises(InputError, match=r"mismatch.*other noise"):
        run_study(study, folder)


def test_a_page_does_not_mix_images_of_different_noise(of_other_noise, finished):
    study, folder = of_other_noise
    shutil.copy(finished[1] / "cells" / "free-s0-iddpm-2.json", folder / "cells")
    with pytest.raises(InputError, match="two kinds of noise"):
        read_results(study, folder)


def test_a_cell_of_other_noise_is_not_made_again(of_other_noise, tmp_path, robustdiff):
    _, folder = of_other_noise
    outcome = robustdiff("reproduce", folder / "cells" / "base-ddim-3.json", "--output", tmp_path / "again")
    assert (outcome.code, outcome.err.strip().count("\n")) == (2, 0)
    assert "reproduce it with robustdiff 0.2.0" in outcome.err
    assert not (tmp_path / "again").exists()


def test_dry_run_says_what_is_left(finished, study_file, tmp_path, robustdiff):
    study, folder = finished
    assert all((part.runs, part.cells, part.seconds) == (0, 0, 0) for part in remaining(study, folder))
    plain, free, base = remaining(load_study(study_file), tmp_path / "new")
    assert (plain.runs, plain.cells, free.runs, free.cells, base.runs, base.cells) == (2, 8, 1, 4, 0, 1)
    assert 0 < free.seconds < plain.seconds < 2 * free.seconds, "the mismatch is of the first seed alone"
    outcome = robustdiff("study", str(study_file), "--output", str(folder), "--dry-run")
    assert outcome.code == 0
    assert "in all" in outcome.out
    assert not (tmp_path / "new").exists()


def test_remaining_seconds_follow_what_is_finished(finished, tmp_path):
    """Cells that took 0.01 + 0.002·steps seconds an image, and runs of 3 updates that took 6 s."""
    study, folder = finished
    for part in ("cells", "trainings", "mismatch"):
        shutil.copytree(folder / part, tmp_path / part)
    for path in (tmp_path / "cells").glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "seconds": 40 * (0.01 + 0.002 * record["steps"])}))
    for path in (tmp_path / "trainings").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 6.0}))
    run = plan(study, tmp_path)[1]
    missing = run.cells[-1]
    missing.path.unlink()
    run.path.unlink()
    left = {part.method: part for part in remaining(study, tmp_path)}
    assert (left["free"].runs, left["free"].cells, left["plain"].seconds) == (1, 1, 0)
    assert left["free"].seconds == pytest.approx(6.0 + 40 * (0.01 + 0.002 * missing.steps))


def test_remaining_seconds_of_longer_trainings_are_in_proportion(finished, tmp_path, monkeypatch):
    study, folder = finished
    monkeypatch.setattr("robustdiff.study.estimate.time_sampling", lambda run: 0.01)
    shutil.copytree(folder / "trainings", tmp_path / "trainings")
    for path in (tmp_path / "trainings").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 6.0}))
    short = {part.method: part.seconds for part in remaining(study, tmp_path)}
    longer = study.model_copy(update={"set": {**study.set, "steps": 10 * study.set["steps"]}})
    trainings = {"plain": 2, "free": 1}
    for part in remaining(longer, tmp_path):
        assert part.seconds - short[part.method] == pytest.approx(9 * 6.0 * trainings.get(part.method, 0), rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "other"}, "baseline: 'other' is not one of the methods plain, free"),
        ({"compare": [["free", "other"]]}, "compare: 'other' is not one of the methods plain, free"),
        ({"trend": [["free", "plain"]]}, "trend: give pairs of two or more lengths of training"),
        ({"measure": {"mismatch_methods": ["other"]}}, "measure.mismatch_methods: 'other' is not one of the methods"),
        (
            {"methods": {"plain": {"seeds": [1, 2], "seed_steps": {3: [1]}}}},
            "methods.plain: seed_steps: 3 is not one of the seeds 1, 2",
        ),
        ({"methodes": {}}, "methodes"),
        ({"methods": {"plain": {"set": {"adversary.stepsize": 1}}}}, "unknown field adversary.stepsize"),
        ({"recipe": "nothing"}, "unknown recipe 'nothing'"),
        ({"measure": {"samplers": ["dddim"]}}, "unknown sampler 'dddim'"),
        ({"measure": {"steps": [0]}}, "measure.steps.0"),
        ({"measure": {"steps": [5, 5]}}, "given twice"),
        ({"measure": {"mismatch": 5}}, "40 images"),
        ({"measure": {"samplers": ["euler"]}}, "does not suit"),
        ({"set": {"seed": 3}}, "the study's own"),
        ({"set": {"watch.num": 100}}, "watch is not for studies"),
        ({"methods": {"plain": {"seeds": [0, 0]}}}, "given twice"),
        ({"methods": {"plain": {}, "Plain": {}}}, "the files of plain-s0 and Plain-s0 would have one name"),
        ({"methods": {"../plain": {}}}, "'../plain'"),
    ],
)
def test_bad_studies_are_named(tmp_path, robustdiff, change, message):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**TINY, **change}, sort_keys=False))
    outcome = robustdiff("study", str(path), "--output", str(tmp_path / "out"))
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_failures_are_named(tmp_path, study_file, robustdiff):
    assert robustdiff("study", str(tmp_path / "none.yaml")).code == 2
    (tmp_path / "cell.json").write_text('{"method": "plain"}')
    outcome = robustdiff("reproduce", str(tmp_path / "cell.json"), "--output", str(tmp_path))
    assert (outcome.code, "is not a cell of a study" in outcome.err) == (2, True)
    outcome = robustdiff(
        "study", str(study_file), "--output", str(tmp_path / "new"), "--report", str(tmp_path / "page.md")
    )
    assert (outcome.code, "run the study first" in outcome.err) == (2, True)


def test_the_page_is_made_of_the_cells(finished, tmp_path):
    study, folder = finished
    text = write_page(study, folder, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == text
    for name in ("fid", "samples-ddim", "samples-iddpm"):
        assert f"page/{name}.png" in text
        assert (tmp_path / "page" / f"{name}.png").stat().st_size > 1000
    fids = [json.loads((folder / "cells" / f"plain-s{seed}-ddim-2.json").read_text())["fid"] for seed in (0, 1)]
    assert f"{np.mean(fids):.2f} ± {np.std(fids, ddof=1):.2f}" in text
    assert "planned measurements are there" not in text
    assert "**Question.**" not in text, "the study asks none"
    asked = study.model_copy(update={"question": "Is *it* so?", "answer": "No."})
    asked_text = write_page(asked, folder, tmp_path / "asked.md")
    assert "# A tiny study\n\n**Question.** Is \\*it\\* so?\n\n**Answer.** No.\n\nTrained on" in asked_text
    assert "on one thread of a CPU (torch " in text
    methods = "- `plain`: Without \\*any\\* δ.\n- `free`: adversary.step\\_size: 0.5\n- `base`: fashion-16\n"
    assert f"## The methods\n\n{methods}" in text
    base = json.loads((folder / "cells" / "base-ddim-3.json").read_text())["fid"]
    row = next(line for line in text.split("| ddim vs base, ddim 3; steps |")[1].splitlines() if "| plain |" in line)
    changes = ", ".join(f"{fid / base - 1:+.1%}".replace("-", "−") for fid in fids)
    assert row.split(" | ")[2].removesuffix(" |") == changes, "two trainings have no interval"


def made_up_cell(run, fid, replicates):
    """Return the required contents of a cell's file, with given numbers."""
    return {
        "fid": fid,
        "replicates": list(replicates),
        **dict.fromkeys(("kid", "precision", "recall"), 0.5),
        "measure": run.study.measure.model_dump(mode="json"),
        "recipe": yaml.safe_load(run.recipe.to_yaml()),
        "training": {"steps": run.recipe.steps},
    }


def test_an_effect_is_of_paired_trainings_with_the_noise_that_they_share(tmp_path):
    """Against a computation by hand, on made-up cells of three seeds, whose replicates vary together."""
    study = Study.model_validate(
        {**TINY, "methods": {n: {**m, "seeds": [0, 1, 2]} for n, m in TINY["methods"].items()}}
    )
    rng = np.random.default_rng(0)
    (tmp_path / "cells").mkdir()
    made, common = {}, {name: rng.normal(0, 0.2, 200) for name in ("ddim", "iddpm")}
    for run in plan(study, tmp_path):
        for cell in run.cells:
            fid = float(rng.uniform(5, 10))
            drawn = fid + rng.normal(0, 0.1, 200) + common[cell.sampler] * (run.method == "free")
            made[run.method, run.seed, cell.sampler, cell.steps] = fid, drawn
            cell.path.write_text(json.dumps(made_up_cell(run, *made[run.method, run.seed, cell.sampler, cell.steps])))

    def difference(sampler, seed):
        (fid, own), (base, others) = made["free", seed, sampler, 2], made["plain", seed, sampler, 2]
        logs = np.log((own - own.mean() + fid) / (others - others.mean() + base))
        return np.log(fid / base), logs

    results = read_results(study, tmp_path)
    for found, values in (
        (effect(results, "free", "ddim", 2), [difference("ddim", s) for s in range(3)]),
        (
            contrast(results, "free", ("ddim", "iddpm"), 2),
            [
                tuple(a - b for a, b in zip(difference("ddim", s), difference("iddpm", s), strict=True))
                for s in range(3)
            ],
        ),
    ):
        assert found.logs == pytest.approx({s: value for s, (value, _) in enumerate(values)})
        products = [np.cov(values[i][1], values[j][1])[0, 1] for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found.shared == pytest.approx(np.mean(products))
        assert found.shared > 0
    apart = study.model_copy(update={"measure": study.measure.model_copy(update={"image_noise": "training"})})
    assert effect(replace(results, study=apart), "free", "ddim", 2).shared == 0
    chosen = {**study.methods, "free": study.methods["free"].model_copy(update={"chosen_on": (1,)})}
    picked = replace(results, study=study.model_copy(update={"methods": chosen}))
    left = effect(picked, "free", "ddim", 2)
    assert (list(left.logs), left.interval) == ([0, 2], None)
    reference = results.cells["plain", 0, "ddim", 2]
    assert list(ratio_to(picked, "free", "ddim", 2, reference).logs) == [0, 2]
    # The images of a reference are common to all trainings, also where each of these has images of its own.
    fid, drawn = made["plain", 0, "ddim", 2]
    variance = np.var(np.log(drawn - drawn.mean() + fid), ddof=1)
    assert ratio_to(replace(results, study=apart), "free", "ddim", 2, reference).shared == pytest.approx(variance)


def test_the_mismatch_is_of_guided_samples_where_the_cells_are(finished, tmp_path, monkeypatch):
    measure = finished[0].measure.model_copy(update={"guidance": 3.0})
    given = {}

    def load(*arguments, **settings):
        given.update(settings)
        raise InputError("as far as this")

    monkeypatch.setattr(module.Generator, "load", load)
    run = next(iter(plan(finished[0].model_copy(update={"measure": measure}), tmp_path)))
    with pytest.raises(InputError, match="as far as this"):
        module._measure_mismatch(run, "mismatch", SILENT)
    assert given["guidance"] == 3.0


def test_the_mismatch_is_compared_between_all_methods_that_the_study_compares(tmp_path):
    own = {"baseline": "repeat", **TINY["methods"]["free"]}
    methods = {"plain": TINY["methods"]["plain"], "repeat": {"seeds": [0]}, "free": own}
    study = Study.model_validate({**TINY, "methods": methods, "compare": [["free", "plain"]]})
    keys = [(method, 0, "ddim", 2) for method in ("plain", "free")]
    results = Results(study, dict.fromkeys([*keys, ("repeat", 0, "ddim", 2)]), {}, dict.fromkeys(keys))
    assert mismatch_pairs(results) == (keys, [(keys[1], keys[0])])


def test_an_effect_of_too_few_trainings_is_shown_beside_tested_ones():
    from robustdiff.report import words as report_words  # its functions begin with "test"

    few = Effect({0: np.log(1.1), 1: np.log(0.9)}, 0.0)
    assert report_words.tested_effect(few, None) == "+10.0%, −10.0%"


def test_the_page_decides_by_trainings(tmp_path):
    """Against scipy's paired t-test of ln FID, and pooled deviations by hand, on made-up cells of three seeds."""
    methods = {n: {**m, "seeds": [0, 1, 2]} for n, m in TINY["methods"].items()}
    methods["late"] = {"set": {"lr_schedule": "cosine", "adversary": "none"}, "seeds": [0, 1, 2]}
    methods["late-free"] = {**methods["free"], "baseline": "late"}
    methods["single"] = {"seeds": [0]}
    measure = {**TINY["measure"], "steps": [10], "mismatch": 0}
    references = {"base": {"path": "fashion-16", "samplers": ["ddim", "iddpm"], "steps": [10, 20]}}
    study = Study.model_validate(
        {**TINY, "methods": methods, "measure": measure, "references": references, "contrast": ["ddim", "iddpm"]}
    )
    rng = np.random.default_rng(1)
    (tmp_path / "cells").mkdir()
    logs = {name: np.zeros((3, 2)) for name in methods}
    more = {"threads": 1, "device": "cpu", "torch": "2", "kid_se": 0.1}
    for run in plan(study, tmp_path):
        passes = 1 if run.method in ("plain", "late") else 3
        training = {"steps": 3, "batches": 3 // passes, "backward_passes": 3, "delta_norm": 0.1, "images": 7}
        for i, cell in enumerate(run.cells):
            fid = float(rng.uniform(5, 10))
            if run.method == "late-free":
                fid = float(np.exp(logs["late"][run.seed, i]) * rng.uniform(1.44, 1.45))
            logs[run.method][run.seed, i] = np.log(fid)
            record = {**made_up_cell(run, fid, np.full(200, fid)), **more, "brightness": 10 * fid}
            cell.path.write_text(json.dumps({**record, "training": {**training, "data": "fashion-16"}}))
    for sampler, steps, fid in ("ddim", 10, 4.0), ("iddpm", 10, 16.0), ("ddim", 20, 3.0):
        reference = {"reference": {"name": "base", "path": "fashion-16"}, **more}
        record = {**made_up_cell(plan(study, tmp_path)[0], fid, np.full(200, fid)), **reference, "sampler": sampler}
        record["steps"] = steps
        (tmp_path / "cells" / f"base-{sampler}-{steps}.json").write_text(json.dumps(record))
    text = write_page(study, tmp_path, tmp_path / "page.md").replace("−", "-")
    tests, columns = {}, {}
    for method, baseline in ("free", "plain"), ("late", "plain"), ("late-free", "late"):
        columns[method] = np.concatenate([logs[method] - logs[baseline], [[0]] * 3], axis=1)
        columns[method][:, 2] = columns[method][:, 0] - columns[method][:, 1]
        tests[method] = [scipy.stats.ttest_1samp(column, 0) for column in columns[method].T]
    adjusted = iter(holm([test.pvalue for own in tests.values() for test in own]))
    for method, baseline in ("free", "plain"), ("late", "plain"), ("late-free", "late"):
        for own, test, column in zip(
            ("ddim", "iddpm", "ddim against iddpm"), tests[method], columns[method].T, strict=True
        ):
            ends, p = test.confidence_interval(), next(adjusted)
            mean, low, high = (f"{np.expm1(value):+.1%}" for value in (np.mean(column), ends.low, ends.high))
            mean = f"**{mean}**" if p < 0.05 else mean
            p = "< 0.001" if p < 0.001 else f"{p:.2g}"
            assert f"| {method} vs {baseline} | {own} | 3 | {mean} | {low} … {high} | {p} |" in text
    assert "- **late-free** vs late, ddim: **+44" in text
    assert f"| single vs plain | {np.expm1(logs['single'][0, 0] - logs['plain'][0, 0]):+.1%} |" in text
    for passes, own in (1, ("plain", "late")), (3, ("free", "late-free")):
        row = next(line for line in text.splitlines() if line.startswith(f"| {passes} pass"))
        for i, cell in enumerate(row.split("|")[2:4]):
            deviation = np.sqrt(np.mean([logs[method][:, i].var(ddof=1) for method in own]))
            bound = np.expm1(scipy.stats.t.ppf(0.975, 4) * np.sqrt(2) * deviation)
            assert cell.strip() == f"{np.expm1(deviation):.1%} ({bound:.0%})"
    ends = scipy.stats.ttest_1samp(logs["free"][:, 0] - np.log(4), 0).confidence_interval()
    mean, low, high = np.expm1([np.mean(logs["free"][:, 0] - np.log(4)), ends.low, ends.high])
    rows = text.partition("| vs base; 10 steps | ddim | iddpm |")[2]
    assert f"| free | {mean:+.1%} ({low:+.1%} … {high:+.1%}), n = 3 | " in rows
    assert "ddim +1.00 (13 networks); iddpm +1.00 (13 networks)" in text
    assert (tmp_path / "page" / "brightness.png").is_file()
    # Without a reference at other steps, FID against steps would be columns of points.
    charts = next(block.charts for block in study_section(study, tmp_path).blocks if block.charts)
    assert charts[0].columns[0].values[-1] == ("base, as it is", "4.00 (4.00 … 4.00)")
    (tmp_path / "cells" / "base-ddim-20.json").unlink()
    assert "fid.png" not in write_page(study, tmp_path, tmp_path / "page.md")


def test_the_page_shows_the_terms_of_fid_and_fid_at_the_real_brightness_where_they_are(tmp_path):
    """Against scipy's paired t-test, on made-up cells of three seeds, of which one then lacks the mean term."""
    methods = {name: {**TINY["methods"][name], "seeds": [0, 1, 2]} for name in ("plain", "free")}
    measure = {**TINY["measure"], "steps": [10], "mismatch": 0, "metrics": ["fid-shifted"], "image_noise": "training"}
    study = Study.model_validate({**TINY, "methods": methods, "measure": measure, "references": {}})
    rng = np.random.default_rng(3)
    (tmp_path / "cells").mkdir()
    training = {"steps": 3, "batches": 3, "backward_passes": 3, "delta_norm": 0.1, "images": 7, "data": "fashion-16"}
    more = {"threads": 1, "device": "cpu", "torch": "2", "training": training}
    logs, terms, paths = {}, {}, {}
    for run in plan(study, tmp_path):
        for cell in run.cells:
            fid, shifted, term = rng.uniform(5, 10), rng.uniform(3, 4), rng.uniform(1, 2)
            logs.setdefault((run.method, cell.sampler), []).append(np.log(shifted))
            terms.setdefault((run.method, cell.sampler), []).append((term, fid - term))
            own = {"fid_shifted": shifted, "fid_mean_term": term, "other_replicates": {"fid_shifted": [shifted] * 200}}
            cell.path.write_text(json.dumps({**made_up_cell(run, fid, np.full(200, fid)), **more, **own}))
            paths[run.method, run.seed, cell.sampler] = cell.path
    text = write_page(study, tmp_path, tmp_path / "page.md").replace("−", "-")
    lines = text[text.index("after the images of each training are shifted") :].splitlines()
    row = next(line for line in lines if line.startswith("| free vs plain |"))
    for sampler, cell in zip(study.measure.samplers, row.split("|")[2:4], strict=True):
        test = scipy.stats.ttest_1samp(np.subtract(logs["free", sampler], logs["plain", sampler]), 0)
        ends = test.confidence_interval()
        mean = np.mean(np.subtract(logs["free", sampler], logs["plain", sampler]))
        mean, low, high = (f"{np.expm1(value):+.1%}" for value in (mean, ends.low, ends.high))
        assert cell.strip() == f"{mean} ({low} … {high}), n = 3"
    shown = [" + ".join(f"{value:.2f}" for value in np.mean(terms["free", s], axis=0)) for s in study.measure.samplers]
    assert f"| free | {' | '.join(shown)} |" in text
    assert "## FID at the real brightness" in text
    path = paths["free", 1, study.measure.samplers[0]]
    record = json.loads(path.read_text())
    del record["fid_mean_term"]
    path.write_text(json.dumps(record))
    assert f"| free | – | {shown[1]} |" in write_page(study, tmp_path, tmp_path / "page.md")


def test_the_page_shows_a_metric_without_replicates(tmp_path):
    measure = {**TINY["measure"], "steps": [10], "mismatch": 0, "metrics": ["brightness"]}
    study = Study.model_validate({**TINY, "measure": measure, "references": {}})
    (tmp_path / "cells").mkdir()
    training = {"steps": 3, "batches": 3, "backward_passes": 3, "delta_norm": 0.1, "images": 7, "data": "fashion-16"}
    more = {"threads": 1, "device": "cpu", "torch": "2", "training": training}
    shown: dict[tuple[str, str], list[float]] = {}
    for run in plan(study, tmp_path):
        for cell in run.cells:
            brightness = None if (run.method, run.seed) == ("free", 0) else 0.5 + len(shown) + run.seed
            record = {**made_up_cell(run, 5.0, np.full(200, 5.0)), **more, "brightness": brightness}
            cell.path.write_text(json.dumps({**record, "measure": measure}))
            if brightness is not None:
                shown.setdefault((run.method, cell.sampler), []).append(brightness)
    text = write_page(study, tmp_path, tmp_path / "page.md")
    table = text[text.index("## brightness") :]
    for (method, sampler), numbers in shown.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        shown_by_sampler = dict(zip(study.measure.samplers, row.split("|")[2:-1], strict=True))
        assert shown_by_sampler[sampler].split("±")[0].strip() == f"{np.mean(numbers):.1f}"
    with pytest.raises(ValueError, match="unknown metric 'brightnes'"):
        Study.model_validate({**TINY, "measure": {**measure, "metrics": ["brightnes"]}})


def test_the_trend_over_lengths_of_training_is_that_of_each_seed(tmp_path):
    """Against scipy's regression in each seed and t-test of the slopes, on made-up cells of four seeds."""
    lengths, seeds = (6, 12, 48), range(4)
    methods = {f"plain-{n}": {"set": {"adversary": "none", "steps": n}, "seeds": [*seeds]} for n in lengths}
    methods |= {f"free-{n}": {"set": {"steps": n}, "seeds": [*seeds], "baseline": f"plain-{n}"} for n in lengths}
    measure = {**TINY["measure"], "steps": [10], "mismatch": 0, "image_noise": "training"}
    trended = [[f"free-{n}", f"plain-{n}"] for n in lengths]
    study = Study.model_validate(
        {**TINY, "baseline": "plain-48", "methods": methods, "trend": trended, "measure": measure, "references": {}}
    )
    rng = np.random.default_rng(2)
    (tmp_path / "cells").mkdir()
    logs = {}
    training = {"batches": 3, "backward_passes": 3, "delta_norm": 0.1, "images": 7, "data": "fashion-16"}
    more = {"threads": 1, "device": "cpu", "torch": "2", "kid_se": 0.1}
    for run in plan(study, tmp_path):
        for cell in run.cells:
            fid = float(np.exp(rng.normal(2, 0.01) - (run.method[:4] == "free") * 0.1 * np.log2(run.recipe.steps)))
            logs[run.method, run.seed, cell.sampler] = np.log(fid)
            record = {**made_up_cell(run, fid, np.full(200, fid)), **more}
            cell.path.write_text(json.dumps({**record, "training": {**training, "steps": run.recipe.steps}}))
    results = read_results(study, tmp_path)
    slopes = [
        scipy.stats.linregress(
            np.log2(lengths), [logs[f"free-{n}", s, "ddim"] - logs[f"plain-{n}", s, "ddim"] for n in lengths]
        ).slope
        for s in seeds
    ]
    found = trend(results, "ddim", 10)
    assert list(found.logs.values()) == pytest.approx(slopes)
    assert found.p == pytest.approx(scipy.stats.ttest_1samp(slopes, 0).pvalue)
    text = write_page(study, tmp_path, tmp_path / "page.md")
    assert "over 6, 12, 48 updates in each of 4 seeds" in text
    assert "adjusted by Holm's method for their 3 tests" in text, "the other slope, and the effect with each sampler"
    shown = f"{np.expm1(np.mean(slopes)):+.1%}".replace("-", "−")
    assert f"| with each doubling | ddim | 4 | **{shown}** | " in text
    assert "the longer it is, the more the method is worth with ddim" in text, "FID was made to fall by a tenth"
    for slope, said in (
        (0.1, "the less the method is worth"),
        (
            0.0,
            "no change of the effect with length was found with ddim. From 6 to 48 updates the ratio of FIDs may",
        ),
    ):
        made = Effect({0: slope - 0.01, 1: slope, 2: slope + 0.01})
        assert said in "".join(_consequence(made, "ddim", lengths))
    for cell in tmp_path.glob("cells/free-48-*"):
        cell.unlink()
    assert "Not known yet: `free-48` has no cells." in write_page(study, tmp_path, tmp_path / "page.md")


def test_a_reference_at_the_steps_of_the_methods_stands_beside_them(finished, tmp_path):
    study, folder = finished
    beside = study.model_copy(
        update={"references": {"base": study.references["base"].model_copy(update={"steps": (2,)})}}
    )
    shutil.copytree(folder / "cells", tmp_path / "cells")
    (tmp_path / "cells" / "base-ddim-3.json").rename(tmp_path / "cells" / "base-ddim-2.json")
    fid = json.loads((tmp_path / "cells" / "base-ddim-2.json").read_text())["fid"]
    text = write_page(beside, tmp_path, tmp_path / "page.md")
    table = text.partition("\n## FID\n")[2].partition("| 2 steps | ddim | iddpm |")[2].partition("\n\n")[0]
    assert f"| base, as it is | {fid:.2f} | – |" in table
    assert "ddim 2; steps" not in text


def test_the_lines_are_those_of_methods_with_several_numbers_of_steps(finished, tmp_path):
    study, folder = finished
    few = {**study.methods, "free": study.methods["free"].model_copy(update={"steps": (2,)})}
    figure, _ = _fid_figure(read_results(study.model_copy(update={"methods": few}), folder))
    assert "free" not in [text.get_text() for text in figure.legends[0].get_texts()]
    figure, caption = _fid_figure(read_results(study, folder))
    assert "free" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "single trainings as thin lines" in caption
    results = read_results(study, folder)
    del results.cells["plain", 1, "ddim", 2]
    panel = _fid_figure(results)[0].axes[0]
    colour = next(line.get_color() for line in panel.get_lines() if line.get_label() == "plain")
    *each, mean = [line for line in panel.get_lines() if line.get_color() == colour]
    assert [list(line.get_xdata()) for line in each] == [[1, 2], [1]], "a line for each seed, with what it has"
    fids = [results.cells["plain", 0, "ddim", steps]["numbers"]["fid"] for steps in (1, 2)]
    assert list(each[0].get_ydata()) == fids
    assert list(mean.get_ydata()) == pytest.approx([(fids[0] + each[1].get_ydata()[0]) / 2, fids[1]])
    assert mean.get_linewidth() > each[0].get_linewidth()


def test_a_missing_cell_leaves_no_number(finished):
    study, folder = finished
    cell = plan(study, folder)[1].cells[2]
    text = cell.path.read_text()
    cell.path.unlink()
    results = read_results(study, folder)
    cell.path.write_text(text)
    assert [effect(results, "free", sampler, 2) is None for sampler in ("ddim", "iddpm")] == [True, False]
    assert results.missing == {"free-s0": 1}


def test_a_folder_of_its_name_does_not_hide_a_shipped_study(tmp_path, monkeypatch):
    """As `robustdiff demo --output demo` makes one, and then goes on."""
    (tmp_path / "demo").mkdir()
    expected = load_study("demo")
    monkeypatch.chdir(tmp_path)
    assert load_study("demo") == expected


def test_unreadable_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        load_study(tmp_path / "bad.yaml")


STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_this_project_are_valid_and_fair(path):
    """Methods of one study differ in what they say they differ in: not in batches, or a pair in precision."""
    study = load_study(path)
    runs = plan(study, Path("study"))
    assert len({run.name for run in runs}) == len(runs)
    for name in ("batch_size", "data", "threads"):
        assert len({str(getattr(run.recipe, name)) for run in runs}) == 1, name
    precision = {run.method: run.recipe.precision for run in runs}
    own = [(name, method.baseline or study.baseline) for name, method in study.methods.items()]
    for one, other in [*own, *study.compare]:
        assert precision[one] == precision[other], f"{one} and {other}"
    assert runs[0].recipe.threads == 1
    for run in runs:
        assert run.recipe.ema**run.recipe.steps < 0.1, f"{run.name}: its moving average still holds the base"


def test_results_of_other_settings_are_no_results(finished, tmp_path, robustdiff):
    """A changed study must not take the old files for its own."""
    _, folder = finished
    for other, words in (
        ({"set": {**TINY["set"], "lr": 0.01}}, "other settings"),
        ({"measure": {**TINY["measure"], "num": 44}}, "other settings"),
    ):
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump({**TINY, **other}, sort_keys=False))
        for option in ([], ["--report", str(tmp_path / "page.md")]):
            outcome = robustdiff("study", str(path), "--output", str(folder), *option)
            assert outcome.code == 2
            assert words in outcome.err


def test_settings_that_train_the_same_network_make_the_same_study(finished, tmp_path):
    """Results that are there stay results, and a training that failed has failed."""
    study, folder = finished
    images = {"name": "fashion-16", "split": "test"}
    free = {"data.workers": 1, "model.gradient_checkpointing": True, "accumulate": 2, "log_every": 7}
    more = {"data": DataConfig(**images, workers=1), "real": DataConfig(**images, workers=1)}
    others = {
        "set": {**study.set, **free},
        "measure": study.measure.model_copy(update=more),
    }
    few = study.measure.model_copy(
        update={name: value.model_copy(update={"workers": 0}) for name, value in more.items()}
    )
    before, after = study.model_copy(update={"measure": few}), study.model_copy(update=others)
    (tmp_path / "cells").mkdir()
    for path in (folder / "cells").glob("*.json"):
        record = json.loads(path.read_text())
        text = json.dumps({**record, "measure": cell_settings(few)})
        (tmp_path / "cells" / path.name).write_text(text)
    (tmp_path / "cells" / "real.json").write_text(json.dumps({**record, "measure": few.model_dump(mode="json")}))
    failed = plan(before, tmp_path)[2]
    module._fail(failed, NotFiniteError("the loss is nan"))
    check_results(after, tmp_path)
    assert read_results(after, tmp_path) == replace(read_results(before, tmp_path), study=after)
    assert len(read_results(after, tmp_path).references) == 1
    assert plan(after, tmp_path)[2].error == "the loss is nan"


def test_a_broken_file_is_named(finished, robustdiff):
    study, folder = finished
    cell = plan(study, folder)[1].cells[0]
    text = cell.path.read_text()
    cell.path.write_text(text[:50])
    outcome = robustdiff("study", str(folder / "tiny.yaml"), "--output", str(folder))
    cell.path.write_text(text)
    assert outcome.code == 2
    assert "delete it" in outcome.err


def test_a_training_that_fails_is_left_out_and_the_rest_is_done(tmp_path, robustdiff):
    """A learning rate that makes the parameters infinite."""
    bad = {"set": {"adversary": "none", "lr": 1e30}}
    path = tmp_path / "bad.yaml"
    small = {**TINY["measure"], "samplers": ["ddim"], "steps": [1], "mismatch": 0}
    methods = {"wild": bad, "plain": {"set": {"adversary": "none"}}}
    path.write_text(yaml.safe_dump({**TINY, "methods": methods, "measure": small, "references": {}}, sort_keys=False))
    outcome = robustdiff("study", str(path), "--output", str(tmp_path / "out"))
    assert outcome.code == 1
    assert "wild-s0" in outcome.err
    assert "to try again, change its settings and delete" in outcome.err
    assert sorted(p.stem for p in (tmp_path / "out" / "cells").glob("*.json")) == ["plain-s0-ddim-1"]
    text = write_page(load_study(path), tmp_path / "out", tmp_path / "page.md")
    assert "The training wild-s0 failed" in text


def test_a_training_that_failed_is_tried_again_with_other_settings(tmp_path):
    wild, tame = (Study.model_validate({**TINY, "set": {**TINY["set"], "lr": lr}}) for lr in (1.0, 1e-5))
    run = plan(wild, tmp_path)[0]
    module._fail(run, NotFiniteError("the loss is nan"))
    assert run.error == "the loss is nan"
    assert [piece.name for piece in pieces(wild, tmp_path) if piece.done and piece.kind == "training"] == [
        "training plain-s0"
    ]
    assert plan(tame, tmp_path)[0].error is None
    assert not any(piece.done for piece in pieces(tame, tmp_path))
    write(run.failure, {"error": "the loss is nan"})
    assert plan(tame, tmp_path)[0].error is not None, "the settings are not known"


def test_a_failure_that_may_pass_is_tried_again(tmp_path, monkeypatch):
    def killed(*arguments, **settings):
        with worker_failures():
            raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")

    small = {**TINY["measure"], "samplers": ["ddim"], "steps": [1], "mismatch": 0}
    methods = {"plain": {"set": {"adversary": "none"}}}
    study = Study.model_validate({**TINY, "methods": methods, "measure": small, "references": {}})
    for name in ("train", "_measure"):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, killed)
            with pytest.raises(RunError, match="free memory"):
                run_study(study, tmp_path)
        assert not list((tmp_path / "trainings").glob("*.failed.json"))
    assert run_study(study, tmp_path)
    assert [path.stem for path in (tmp_path / "cells").glob("*.json")] == ["plain-s0-ddim-1"]


def test_a_network_that_cannot_be_measured_has_failed(tmp_path, monkeypatch):
    measure = module._measure

    def measured(network, *arguments, **options):
        if network.endswith("free-s0"):
            raise NotFiniteError("the network's output is not finite")
        return measure(network, *arguments, **options)

    monkeypatch.setattr(module, "_measure", measured)
    small = {**TINY["measure"], "samplers": ["ddim"], "steps": [1], "mismatch": 0}
    methods = {name: {**method, "seeds": [0]} for name, method in TINY["methods"].items()}
    study = Study.model_validate({**TINY, "methods": methods, "measure": small, "references": {}})
    with pytest.raises(RunError, match=r"free-s0\.failed\.json: the network's output is not finite"):
        run_study(study, tmp_path)
    assert run_study(study, tmp_path, tolerant=True)
    assert [path.stem for path in (tmp_path / "cells").glob("*.json")] == ["plain-s0-ddim-1"]


def test_the_page_says_what_the_cells_say(tmp_path):
    """Single trainings, the map of α and K, and the mismatch, on made-up cells."""
    adversaries = {"free-a": [0.1, 2], "free-b": [0.5, 2], "free-c": [0.5, 4]}
    methods = {
        "plain": {"set": {"adversary": "none"}},
        **{n: {"set": {"adversary.step_size": a, "adversary.steps": k}} for n, (a, k) in adversaries.items()},
    }
    measure = {**TINY["measure"], "samplers": ["ddim"], "steps": [5, 10]}
    study = Study.model_validate({**TINY, "methods": methods, "measure": measure, "references": {}})
    fids = {"plain": 10.0, "free-a": 8.0, "free-b": 10.1, "free-c": 15.0}
    (tmp_path / "cells").mkdir()
    (tmp_path / "mismatch").mkdir()
    training = {"steps": 3, "batches": 3, "backward_passes": 3, "delta_norm": 0.1, "data": "fashion-16", "images": 7}
    more = {"threads": 1, "device": "cpu", "torch": "2", "training": training, "kid_se": 0.1}
    for run in plan(study, tmp_path):
        for cell in run.cells:
            replicates = fids[run.method] + np.random.default_rng(cell.steps).normal(0, 0.3, 200)
            cell.path.write_text(json.dumps({**made_up_cell(run, fids[run.method], replicates), **more}))
        means = [{"value": 2 * fids[run.method], "floor": 1.0 + n} for n in (5, 10)]
        paths = [
            {"sampler": "ddim", "steps": n, "mean": dict.fromkeys(MISMATCHES, mean)}
            for n, mean in zip((5, 10), means, strict=True)
        ]
        run.mismatch_path.write_text(json.dumps({"paths": paths}))
    text = write_page(study, tmp_path, tmp_path / "page.md")
    assert "No comparison has the 3 trainings that an interval needs." in text
    assert "| free-a vs plain | ddim | −20.0% | −20.0% |" in text
    assert "| α = 0.1, K = 2 | −20.0% |" in text
    assert "| α = 0.5, K = 4 | +50.0% |" in text
    ranks = next(line for line in text.splitlines() if line.startswith("| ranks of their changes"))
    assert ranks.count("+1.00") == len(MISMATCHES), "the mismatch moves as FID does"
    agreeing = next(line for line in text.splitlines() if line.startswith("| pairs in which both move"))
    assert agreeing.count("6 of 6") == len(MISMATCHES)


def test_settings_are_compared_on_the_seeds_that_all_of_them_have(tmp_path):
    """Take the geometric mean over these; one sampler needs no map of colours, and a method without cells no row."""
    methods = {
        "plain": {"set": {"adversary": "none"}, "seeds": [0, 1, 2, 3]},
        "a": {"set": {"adversary.step_size": 0.1}, "seeds": [0, 1, 2, 3], "chosen_on": [0, 1]},
        "b": {"set": {"adversary.step_size": 0.5}, "seeds": [0, 1], "chosen_on": [0, 1]},
        "c": {"set": {"adversary.step_size": 0.7}, "seeds": [1, 0, 2], "chosen_on": [0, 1]},
    }
    measure = {**TINY["measure"], "samplers": ["ddim"], "steps": [10], "mismatch": 0}
    study = Study.model_validate({**TINY, "methods": methods, "measure": measure, "references": {}})
    rng = np.random.default_rng(0)
    (tmp_path / "cells").mkdir()
    training = {"steps": 3, "batches": 3, "backward_passes": 3, "delta_norm": 0.1, "data": "fashion-16", "images": 7}
    more = {"threads": 1, "device": "cpu", "torch": "2", "training": training, "kid_se": 0.1}
    fids = {}
    for run in plan(study, tmp_path):
        for cell in run.cells:
            fid = fids[run.method, run.seed] = float(np.exp(rng.normal(2, 0.3)))
            cell.path.write_text(json.dumps({**made_up_cell(run, fid, np.full(200, fid)), **more}))
    found = sensitivity(read_results(study, tmp_path), "ddim", 10)
    assert (found.baseline, found.seeds) == ("plain", [0, 1])
    assert list(found.changes) == [(0.1, 3), (0.5, 3), (0.7, 3)]
    for method, change in zip("abc", found.changes.values(), strict=True):
        ratios = [fids[method, seed] / fids["plain", seed] for seed in (0, 1)]
        assert change == pytest.approx(np.sqrt(np.prod(ratios)) - 1)
    text = write_page(study, tmp_path, tmp_path / "page.md")
    assert "the geometric mean over trainings (seed 0, 1)" in text
    assert not (tmp_path / "page" / "sensitivity.png").exists()
    assert "| c vs plain |" in text
    assert "b vs plain" not in text, "it was chosen on all of its seeds"


def test_processes_share_a_study_and_say_how_much_of_it_is_done(finished, tmp_path):
    """Each piece is done once, and the cells are those of one process."""
    study, folder = finished
    small = study.model_copy(update={"methods": {"plain": study.methods["plain"]}})
    shutil.copytree(folder, tmp_path / "shared")
    expected = {}
    for cell in [cell for run in plan(small, tmp_path / "shared") for cell in run.cells][::2]:
        expected[cell.path] = {**json.loads(cell.path.read_text()), "seconds": 0}
        cell.path.unlink()
    done = Percentages()
    assert run_study(small, tmp_path / "shared", processes=2, progress=done, wait=0.05)
    assert {path: {**json.loads(path.read_text()), "seconds": 0} for path in expected} == expected
    assert done.title == "A tiny study (%)"
    assert done == sorted(done)
    assert done[-1] == pytest.approx(100)
    assert run_study(small, tmp_path / "shared", processes=2), "nothing is left"


class Percentages(list):
    """The percentages that are said to be done."""

    def begin(self, description, total):
        self.title = description

    def advance(self, amount, note=""):
        self.append(amount + (self[-1] if self else 0))


def test_the_largest_work_is_begun_first_and_trainings_before_what_needs_them(tmp_path):
    study = Study.model_validate(TINY)
    order = pieces(study, tmp_path)
    assert [piece.name for piece in order if piece.kind == "training"] == [
        f"training {n}" for n in ("plain-s0", "free-s0", "plain-s1")
    ]
    names = [piece.name for piece in order]
    assert names[:2] == ["training plain-s0", "training free-s0"]
    assert names.index("training plain-s1") > names.index("free-s0-iddpm-1"), "the first seeds are measured first"
    sizes = [piece.size for piece in order if piece.cell is not None and piece.run is not None and piece.run.first]
    assert sizes == sorted(sizes, reverse=True)
    assert [piece.name for piece in order if piece.ready] == [
        *("training plain-s0", "training free-s0", "base-ddim-3", "training plain-s1")
    ]
