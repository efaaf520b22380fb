"""The watch over interruptions: the same lines, the same best, and damaged files are named."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robustdiff.errors import InputError
from robustdiff.recipe import Recipe
from robustdiff.training import watch as module
from robustdiff.training.run import train
from robustdiff.training.run_files import read_result
from robustdiff.training.watch_files import Start

TUNED = {
    "data": "digits",
    "adversary": "free",
    "steps": 9,
    "batch_size": 8,
    "ema": 0.5,
    "threads": 1,
    "log_every": 1,
    "checkpoint_every": 3,
    "watch": {"every": 4, "steps": [2], "num": 40},
}
UNET = "unet/diffusion_pytorch_model.safetensors"


class Crash(Exception):
    """As a kill: the run ends where it is."""


def lines(recipe):
    found = [json.loads(line) for line in (Path(recipe.output) / "watch.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def result(recipe):
    return json.loads((Path(recipe.output) / "result.json").read_text())


def weights(recipe, part="best"):
    return load_file(Path(recipe.output) / part / UNET)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_run):
    """The recipe of an uninterrupted run."""
    recipe = {**TUNED, "model": {"name": "pretrained", "path": str(digits_run)}, "lr": 3e-3}
    finished = Recipe.model_validate({**recipe, "output": str(tmp_path_factory.mktemp("watched") / "run")})
    train(finished)
    return finished


@pytest.fixture
def whole(tmp_path, finished):
    """The recipe of a finished run, in a folder of its own."""
    shutil.copytree(finished.output, tmp_path / "whole")
    return finished.model_copy(update={"output": str(tmp_path / "whole")})


def assert_alike(first, second):
    assert lines(first) == lines(second)
    assert same(weights(first), weights(second))
    assert same(weights(first, "model"), weights(second, "model"))
    assert result(first)["best"] == result(second)["best"]
    assert result(first)["signs"] == result(second)["signs"]


@pytest.mark.parametrize(
    ("place", "call"),
    [("_measure", 1), ("_append", 0), ("_measure", 2), ("_append", 2), ("result", 0)],
)
def test_a_run_that_is_killed_at_any_place_ends_as_one_in_one_go(tuned, whole, monkeypatch, place, call):
    cut, calls = tuned("cut", lr=3e-3), []

    def crash(self, *arguments):
        calls.append(1)
        if len(calls) == call + 1:
            raise Crash
        return own(self, *arguments)

    own = getattr(module.Watch, place)
    monkeypatch.setattr(module.Watch, place, crash)
    with pytest.raises(Crash):
        train(cut)
    train(cut, resume=True)
    assert_alike(whole, cut)


def test_a_kill_between_a_measurement_and_a_checkpoint(tuned, whole, watch, monkeypatch):
    """The measurement after update 6 has its line, and the newest checkpoint is that of update 3."""
    cut, measured = tuned("cut", lr=3e-3), []
    own = module.Watch._measure
    monkeypatch.setattr(module.Watch, "_measure", lambda self, *a: measured.append(self.trainer.step) or own(self, *a))
    for at, every in ((6, 3), (9, 100)):

        def crash(done, at=at):
            if done >= at:
                raise Crash

        rarer = cut.model_copy(update={"checkpoint_every": every})
        with pytest.raises(Crash):
            train(rarer, resume=True, progress=watch(crash))
    assert [path.name for path in (Path(cut.output) / "checkpoints").iterdir()] == ["step-00000003"]
    train(cut, resume=True)
    assert measured == [0, 0, 6, 9, 9]  # twice at the start, and the chosen model at the end
    assert_alike(whole, cut)


def test_a_torn_line_is_dropped(whole):
    path = Path(whole.output) / "watch.jsonl"
    before = lines(whole)
    with path.open("ab") as file:
        file.write(b'{"step": 12, "ce')
    longer = whole.model_copy(update={"steps": 12})
    train(longer, resume=True)
    assert lines(longer)[: len(before)] == before
    assert [line["step"] for line in lines(longer)] == [0, 6, 9, 12]


def test_a_torn_first_line_is_dropped(tiny, watch):
    """A new network, whose first line was torn after its first checkpoint."""
    recipe = tiny(steps=2, checkpoint_every=1, watch={"every": 2, "steps": [2], "num": 40})

    def crash(done):
        if done >= 2:
            raise Crash

    with pytest.raises(Crash):
        train(recipe, progress=watch(crash))
    path = Path(recipe.output) / "watch.jsonl"
    assert not path.exists()
    path.write_bytes(b'{"step": 2, "ce')
    train(recipe, resume=True)
    assert [line["step"] for line in lines(recipe)] == [2]


@pytest.mark.parametrize("cell", [1, 3, 5], ids=["at the start", "in between", "at the end"])
def test_a_signal_during_a_measurement_saves_and_resumes(tuned, whole, monkeypatch, cell):
    cut, calls = tuned("cut", lr=3e-3), []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == cell:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments)

    own = module.evaluate_cell
    monkeypatch.setattr(module, "evaluate_cell", signalled)
    assert train(cut) is None
    assert len(calls) == cell  # the measurement is dropped
    assert not (Path(cut.output) / "result.json").exists()
    train(cut, resume=True)
    assert_alike(whole, cut)


def test_a_longer_run_is_not_measured_before_the_last_line(tuned):
    """The run of 7 updates has its last checkpoint at 6, since its last batch ends after one of three passes."""
    short = tuned(steps=7, checkpoint_every=1000, watch={"every": 100})
    train(short)
    longer = short.model_copy(update={"steps": 12, "watch": short.watch.model_copy(update={"every": 1})})
    train(longer, resume=True)
    assert [line["step"] for line in lines(longer)] == [0, 7, 9, 12]
    assert train(longer, resume=True)["steps"] == 12


def test_a_signal_after_the_last_whole_batch_says_what_is_saved(tuned, monkeypatch, caplog):
    recipe, calls = tuned(steps=7, checkpoint_every=1000, watch={"every": 100}), []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 3:  # after two at the start
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments)

    own = module.evaluate_cell
    monkeypatch.setattr(module, "evaluate_cell", signalled)
    assert train(recipe) is None
    assert "is saved at update 6" in caplog.text
    assert [path.name for path in (Path(recipe.output) / "checkpoints").iterdir()] == ["step-00000006"]
    assert train(recipe, resume=True)["steps"] == 7


def test_another_watch_is_refused_after_the_first_measurement(whole):
    longer = whole.model_copy(update={"steps": 12})
    other = longer.model_copy(update={"watch": whole.watch.model_copy(update={"seed": 5})})
    with pytest.raises(InputError, match="another watch"):
        train(other, resume=True)
    with pytest.raises(InputError, match="another watch"):
        train(longer.model_copy(update={"watch": None}), resume=True)
    found = train(longer.model_copy(update={"watch": whole.watch.model_copy(update={"every": 1})}), resume=True)
    assert found["steps"] == 12


def test_another_sampler_is_refused_where_the_watch_takes_it_from_the_recipe(whole):
    longer = whole.model_copy(update={"steps": 12})
    other = longer.model_copy(update={"sampler": whole.sampler.model_copy(update={"name": "iddpm"})})
    with pytest.raises(InputError, match="another sampler"):
        train(other, resume=True)
    assert (Path(whole.output) / "result.json").exists()


def test_another_sampler_is_taken_where_the_watch_names_its_own(tuned):
    recipe = tuned(watch={"samplers": ["ddim"]}, steps=3)
    train(recipe)
    train(
        recipe.model_copy(update={"steps": 6, "sampler": recipe.sampler.model_copy(update={"steps": 7})}), resume=True
    )
    assert [cell["steps"] for line in lines(recipe) for cell in line["cells"]] == [2, 2, 2]


def test_a_folder_is_refused_before_the_real_images_are_read(whole, monkeypatch):
    monkeypatch.setattr(module.Watch, "read_real_images", None)
    with pytest.raises(InputError, match="already holds a run"):
        train(whole)


def test_the_watch_may_begin_later(tuned):
    recipe = tuned(lr=3e-3)
    train(recipe.model_copy(update={"watch": None}))
    found = train(recipe.model_copy(update={"steps": 12}), resume=True)
    assert [line["step"] for line in lines(recipe)] == [0, 9, 12]
    assert found["best"] is not None


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("watch.jsonl", '"step": 6', '"step": 0'),
        ("watch.jsonl", '"sampler": "', '"sampler": "x'),
        ("watch.jsonl", '"mean": ', '"mean": NaN, "x": '),
        ("start.json", '"metric": "fid"', '"metric": "kid"'),
        ("start.json", '"replicates": [', '"replicates": [1.0, '),
        ("result.json", '"start": false', '"start": 7'),
        ("result.json", '"signs"', '"sign"'),
    ],
)
def test_a_damaged_file_is_named(whole, name, old, new):
    path = Path(whole.output) / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=name) as error:
        train(whole.model_copy(update={"steps": 12}), resume=True)
    assert "\n" not in str(error.value)


def test_replicates_are_in_the_start_alone_as_in_earlier_versions(whole):
    folder = Path(whole.output)
    assert not [name for name in ("watch.jsonl", "result.json") if "replicates" in (folder / name).read_text()]
    record = json.loads((folder / "start.json").read_text())
    names = {"sampler", "steps", "metric", "value", "ci", "replicates", "blocks"}
    assert all(set(cell) == names for cell in (*record["cells"], *record["fresh"]))
    record["cells"][0] |= {"ci": None, "replicates": None, "blocks": None}  # as of a metric without any, before
    assert Start.model_validate_json(json.dumps(record)).cells[0].replicates is None


@pytest.mark.parametrize("name", ["watch.jsonl", "start.json"])
def test_measurements_of_other_noise_are_not_continued(whole, name):
    path = Path(whole.output) / name
    text = path.read_text()
    records = [json.loads(part) for part in (text.splitlines() if name == "watch.jsonl" else [text])]
    assert [record.pop("noise") for record in records] == ["philox"] * len(records)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    longer = whole.model_copy(update={"steps": 12})
    with pytest.raises(InputError, match=r"robustdiff 0\.2\.0.*remove watch\.jsonl and start\.json"):
        train(longer, resume=True)
    assert (Path(whole.output) / "result.json").exists()
    for made in ("watch.jsonl", "start.json"):
        (Path(whole.output) / made).unlink()
    train(longer, resume=True)
    assert [line["step"] for line in lines(longer)] == [0, 9, 12]


def test_results_from_before_the_watch_are_read(digits_run):
    assert "best" not in read_result(digits_run / "result.json")
