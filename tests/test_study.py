"""A study: what is planned, what is done once, and what can be made again."""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from robustdiff.errors import InputError
from robustdiff.report.study import Results, write_page
from robustdiff.study import MEASURES, load_study, plan, remaining, reproduce, run_study

TINY = {
    "title": "A tiny study",
    "recipe": "fashion-16-at",
    "set": {"threads": 1, "steps": 3, "batch_size": 4, "log_every": 1},
    "baseline": "plain",
    "methods": {
        "plain": {"set": {"adversary": "none"}, "seeds": [0, 1]},
        "free": {"set": {"adversary.step_size": 0.5}},
    },
    "references": {"base": {"path": "fashion-16", "samplers": ["ddim"], "steps": [3], "precision": "bf16"}},
    "measure": {"samplers": ["ddim", "iddpm"], "steps": [2, 1], "num": 40, "batch_size": 20, "mismatch": 40},
}


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
    parts = []
    assert run_study(study, folder, on_part=lambda description, total: parts.append(description))
    assert parts == [cell.name]
    after = json.loads(cell.path.read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in times if path != cell.path} == {
        path: time for path, time in times.items() if path != cell.path
    }


def test_what_another_process_holds_is_left_to_it(finished):
    study, folder = finished
    held, other = plan(study, folder)[0].cells[0], plan(study, folder)[0].cells[1]
    held.path.unlink()
    other.path.unlink()
    parts = []
    with (folder / "locks" / held.name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=run_study,
            args=(study, folder),
            kwargs={"on_part": lambda description, total: parts.append(description), "wait": 0.05},
        )
        thread.start()
        while not other.done and thread.is_alive():
            thread.join(0.05)
        assert parts == [other.name]
        assert not held.done
    thread.join(60)
    assert not thread.is_alive()
    assert parts == [other.name, held.name]


def test_a_reference_is_measured_as_it_is(finished, tmp_path):
    _, folder = finished
    before, after = reproduce(folder / "cells" / "base-ddim-3.json", tmp_path / "again")
    assert (before["reference"]["path"], before["steps"]) == ("fashion-16", 3)
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert not (tmp_path / "again").exists()


def test_a_cell_is_made_again_from_its_file_alone(finished, tmp_path, robustdiff):
    _, folder = finished
    path = folder / "cells" / "free-s0-iddpm-2.json"
    before, after = reproduce(path, tmp_path / "again")
    assert [before[name] for name in MEASURES] == [after[name] for name in MEASURES]
    assert before["weights"] == after["weights"]
    assert before["replicates"] == after["replicates"]

    record = json.loads(path.read_text())
    record["fid"] += 1
    (tmp_path / "other.json").write_text(json.dumps(record))
    outcome = robustdiff("reproduce", str(tmp_path / "other.json"), "--output", str(tmp_path / "again"))
    assert outcome.code == 0
    assert "differs" in outcome.out
    assert "not the same" in outcome.out


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


def test_remaining_seconds_are_those_of_what_is_finished(finished):
    """The speed of the finished parts, times what is left."""
    study, folder = finished
    run = plan(study, folder)[1]
    cell = run.cells[-1]
    text = cell.path.read_text()
    cell.path.unlink()
    others = [json.loads(c.path.read_text()) for r in plan(study, folder) for c in r.cells if c.done]
    rate = sum(c["seconds"] for c in others) / sum(c["n"] * c["steps"] for c in others)
    left = {part.method: part for part in remaining(study, folder)}
    cell.path.write_text(text)
    assert (left["free"].runs, left["free"].cells, left["plain"].seconds) == (0, 1, 0)
    assert left["free"].seconds == pytest.approx(rate * 40 * cell.steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "other"}, "baseline 'other' is not one of the methods plain, free"),
        ({"methodes": {}}, "methodes"),
        ({"methods": {"plain": {"set": {"adversary.stepsize": 1}}}}, "unknown field adversary.stepsize"),
        ({"recipe": "nothing"}, "unknown recipe 'nothing'"),
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
    outcome = robustdiff("reproduce", str(tmp_path / "cell.json"))
    assert (outcome.code, "is not a cell of a study" in outcome.err) == (2, True)
    outcome = robustdiff(
        "study", str(study_file), "--output", str(tmp_path / "new"), "--report", str(tmp_path / "page.md")
    )
    assert (outcome.code, "run the study first" in outcome.err) == (2, True)


def test_the_page_is_made_of_the_cells(finished, tmp_path):
    study, folder = finished
    text = write_page(study, folder, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == text
    for name in ("fid", "loss", "samples-ddim", "samples-iddpm"):
        assert f"page/{name}.png" in text
        assert (tmp_path / "page" / f"{name}.png").stat().st_size > 1000
    fids = [json.loads((folder / "cells" / f"plain-s{seed}-ddim-2.json").read_text())["fid"] for seed in (0, 1)]
    assert f"{np.mean(fids):.2f} ± {np.std(fids, ddof=1):.2f}" in text
    assert "13 of 13 planned cells" in text


def test_a_change_is_the_mean_of_paired_relative_differences(study_file, tmp_path):
    """Against a computation by hand, on made-up cells."""
    study = load_study(study_file)
    rng = np.random.default_rng(0)
    (tmp_path / "cells").mkdir()
    made = {}
    for run in plan(study, tmp_path):
        for cell in run.cells:
            fid = float(rng.uniform(5, 10))
            made[run.method, run.seed, cell.sampler, cell.steps] = fid, fid + rng.normal(0, 0.2, 200)
            record = {"fid": fid, "replicates": made[run.method, run.seed, cell.sampler, cell.steps][1].tolist()}
            cell.path.write_text(json.dumps(record))
    change = Results(study, tmp_path).change("free", ["ddim", "iddpm"], 2)
    expected, replicates = 0.0, np.zeros(200)
    for sampler in ("ddim", "iddpm"):
        (fid, own), (base, others) = made["free", 0, sampler, 2], made["plain", 0, sampler, 2]
        expected += (fid / base - 1) / 2
        replicates += (own - others) / base / 2
    low, high = np.quantile(replicates - replicates.mean() + expected, [0.025, 0.975])
    assert change.mean == pytest.approx(expected)
    assert (change.low, change.high) == pytest.approx((low, high))
    assert change.seeds == pytest.approx((expected,))


def test_a_missing_cell_leaves_no_number(finished):
    study, folder = finished
    cell = plan(study, folder)[1].cells[2]
    text = cell.path.read_text()
    cell.path.unlink()
    results = Results(study, folder)
    cell.path.write_text(text)
    assert results.change("free", ["ddim", "iddpm"], 2) is None
    assert results.change("free", ["iddpm"], 2) is not None
    assert results.missing == {"free": 1}


def test_unreadable_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        load_study(tmp_path / "bad.yaml")


STUDIES = sorted((Path(__file__).resolve().parent.parent / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_this_project_are_valid_and_fair(path):
    """Methods of one study differ in what they say they differ in: not in batches, moving average or precision."""
    study = load_study(path)
    runs = plan(study, Path("study"))
    assert len({run.name for run in runs}) == len(runs)
    for name in ("batch_size", "ema", "precision", "data", "threads"):
        assert len({str(getattr(run.recipe, name)) for run in runs}) == 1, name
    assert runs[0].recipe.threads == 1
