"""The watch: it changes nothing of the training, keeps the best, and refuses what it cannot measure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from robustdiff.backbones.model import load_model
from robustdiff.errors import InputError, RunError
from robustdiff.evaluation.real_images import load_target
from robustdiff.evaluation.sources import evaluate_sources
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.recipe import Recipe, SignsConfig
from robustdiff.training import watch as module
from robustdiff.training.run import train
from robustdiff.training.watch_files import Line, Start, WatchedCell

UNET = "unet/diffusion_pytorch_model.safetensors"


def lines(recipe):
    found = [json.loads(line) for line in (Path(recipe.output) / "watch.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def weights(recipe, part="best"):
    return load_file(Path(recipe.output) / part / UNET)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def learned(recipe):
    found = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in found]


# -- it changes nothing -----------------------------------------------------------------------------------------


def test_a_watched_run_is_bit_for_bit_the_same_run_and_a_new_network_has_no_start(tiny, outcome):
    fields = {"adversary": "random", "model": {"dropout": 0.3}, "ema": "auto", "checkpoint_every": 3}
    plain = tiny("plain", **fields)
    watched = tiny("watched", watch={"every": 2, "steps": [2], "num": 40}, **fields)
    train(plain)
    found = train(watched)
    assert same(outcome(plain), outcome(watched))
    assert learned(plain) == learned(watched)
    assert [line["step"] for line in lines(watched)] == [3, 6]  # where the batches of three passes end
    assert all(cell["difference"] is None for line in lines(watched) for cell in line["cells"])
    assert found["best"]["start"] is False
    assert found["best"]["difference"] is None


# -- what it measures -------------------------------------------------------------------------------------------


def test_the_lines_and_the_best_are_those_of_evaluate(tuned, digits_run):
    recipe = tuned(lr=3e-3, watch={"steps": [2, 3]})
    found = train(recipe)
    assert [line["step"] for line in lines(recipe)] == [0, 6, 9]  # batches of three passes end at 3, 6 and 9
    start, *others = lines(recipe)
    assert (start["images"], others[0]["images"], found["best"]["images"]) == (160, 80, 80)
    assert all(cell["difference"] is None for cell in start["cells"])
    for line in others:
        assert line["every"] == 4
        assert line["mean"] == pytest.approx(np.mean([cell["value"] for cell in line["cells"]]))
        for cell, base in zip(line["cells"], start["cells"], strict=True):
            assert (cell["sampler"], cell["steps"], cell["metric"]) == (base["sampler"], base["steps"], "fid")
            assert cell["difference"] == pytest.approx(cell["value"] - base["value"])
            assert cell["difference_ci"][0] <= cell["difference"] <= cell["difference_ci"][1]
            assert cell["relative"] == pytest.approx(cell["value"] / base["value"] - 1)
            assert -1 < cell["relative_ci"][0] <= cell["relative"] <= cell["relative_ci"][1]
    assert [line["best"] for line in lines(recipe)] == [
        all(line["mean"] < before["mean"] for before in lines(recipe)[:i]) for i, line in enumerate(lines(recipe))
    ]
    best = found["best"]
    assert not best["start"]
    assert best["step"] == [line["step"] for line in lines(recipe) if line["best"]][-1]
    target = load_target(recipe.data, None, None, torch.device("cpu"))
    runs = {"best": f"{recipe.output}/best", "start": str(digits_run)}
    given = {"samplers": ["ddim"], "steps": [2, 3], "num": 40, "metrics": ["fid"]}
    chosen = next(line for line in lines(recipe) if line["step"] == best["step"])
    for seed, cells in ((1, best["cells"]), (0, chosen["cells"])):
        grid = evaluate_sources(runs, {}, target, Accelerator(cpu=True), seed=seed, **given)
        for cell in cells:
            value = {c.checkpoint: c.values["fid"] for c in grid.cells if c.steps == cell["steps"]}
            assert cell["value"] == pytest.approx(value["best"], rel=1e-4)
            assert cell["difference"] == pytest.approx(value["best"] - value["start"], abs=1e-2)
    assert best["difference"] == pytest.approx(np.mean([cell["difference"] for cell in best["cells"]]))
    assert best["difference_ci"][0] < best["difference"] < best["difference_ci"][1]
    assert best["relative"] == pytest.approx(best["difference"] / (best["mean"] - best["difference"]))
    assert best["relative_ci"][0] < best["relative"] < best["relative_ci"][1]


def test_without_average_the_weights_themselves_are_measured_and_kept(tuned):
    averaged, raw = tuned("averaged"), tuned("raw", watch={"average": False})
    train(averaged)
    train(raw)
    assert same(weights(averaged, "model"), weights(raw, "model"))
    assert lines(averaged)[0] == lines(raw)[0]
    assert lines(averaged)[1]["mean"] != lines(raw)[1]["mean"]


def test_the_start_is_kept_where_nothing_is_better(tuned, digits_run):
    recipe = tuned(lr=0.3, ema=0)
    found = train(recipe)
    assert (found["best"]["step"], found["best"]["start"]) == (0, True)
    assert found["best"]["seed"] == 1
    assert same(weights(recipe), load_file(digits_run / "model" / UNET))
    assert found["signs"][0]["name"] == "long-sampling"
    assert found["signs"][0]["step"] > 0


def test_a_loss_that_is_not_finite_names_the_best(tuned):
    with pytest.raises(RunError, match=r"loss is .*; best/ holds the best model"):
        train(tuned(lr=1e20))


def test_a_lora_is_kept_as_one(tuned, digits_run, monkeypatch):
    monkeypatch.setattr(module.Watch, "_better", lambda self, mean: True)
    base = {"name": "pretrained", "path": str(digits_run), "lora": {"rank": 2}}
    recipe = tuned(model=base, lr=1e-2, ema=0)
    found = train(recipe)
    assert load_model(Path(recipe.output) / "best").adapter is not None
    first, last = (Path(recipe.output) / part / "pytorch_lora_weights.safetensors" for part in ("best", "model"))
    assert same(load_file(first), load_file(last))
    assert (found["best"]["step"], found["best"]["start"]) == (9, False)
    assert found["best"]["difference"] != 0


def test_captions_and_the_clip_score(tiny, make_sd_pipeline, clip_folder, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(("a red shoe", "blue")[i % 2])
    recipe = tiny(
        data={"name": "imagefolder", "root": str(photos), "size": 8, "channels": 3},
        model={"name": "pretrained", "path": str(make_sd_pipeline(tmp_path / "sd"))},
        codec={"name": "vae", "cache": True},
        adversary="free",
        batch_size=4,
        watch={"every": 4, "num": 6, "steps": [2], "metric": f"clip-score={clip_folder}", "guidance": 2.0},
    )
    prompts, evaluate_cell = [], module.evaluate_cell

    def seen(name, generator, *others):
        prompts.append(generator.prompts)
        return evaluate_cell(name, generator, *others)

    monkeypatch.setattr(module, "evaluate_cell", seen)
    train(recipe)
    assert prompts[0] == tuple(("a red shoe", "blue")[i % 2] for i in fixed_order(8)[:6])
    assert [line["step"] for line in lines(recipe)] == [0, 6]
    cell = lines(recipe)[-1]["cells"][0]
    assert (cell["metric"], cell["guidance"]) == ("clip_score", 2.0)
    means = [line["mean"] for line in lines(recipe)]
    assert lines(recipe)[-1]["best"] == (means[1] > means[0])


def test_trackers_get_the_measurements(tuned, monkeypatch):
    logged = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.setdefault(step, {}).update(values))
    train(tuned())
    assert {"watch/ddim-2", "watch/mean"} <= logged[0].keys()
    assert {"watch/mean", "loss"} <= logged[9].keys()


# -- signs that end a run ---------------------------------------------------------------------------------------


def test_a_sign_ends_the_run_if_it_shall(tuned):
    recipe = tuned(lr=0.3, ema=0, steps=60, watch={"every": 3, "signs": {"action": "stop"}})
    found = train(recipe)
    assert found["steps"] < 60
    assert found["signs"][-1] == {**found["signs"][-1], "step": found["steps"], "action": "stop"}
    assert (found["best"]["step"], found["best"]["start"]) == (0, True)
    assert train(recipe, resume=True) == found  # it is finished, and stays so
    (Path(recipe.output) / "result.json").unlink()
    assert train(recipe, resume=True) == found  # as after a kill before the result was written
    going_on = recipe.watch.model_copy(update={"every": 100, "signs": SignsConfig()})
    assert train(recipe.model_copy(update={"watch": going_on, "steps": 15}), resume=True)["steps"] == 15


def test_signs_count_the_ascents_of_all_processes(monkeypatch):
    watch, seen = object.__new__(module.Watch), []
    watch.config, watch.recipe = SimpleNamespace(signs=SignsConfig()), SimpleNamespace(batch_size=12)
    watch.trainer = SimpleNamespace(adversary=SimpleNamespace(ascents=2, passes=3))
    watch.accelerator, watch.folder, watch.lines = SimpleNamespace(num_processes=2), Path(), []
    monkeypatch.setattr(module, "read_metrics", lambda path: [])
    monkeypatch.setattr(module, "History", lambda lines, metrics, ascents: seen.append(ascents))
    monkeypatch.setattr(module, "SIGNS", {})
    cell = WatchedCell(sampler="ddim", steps=2, metric="fid", value=1.0)
    assert watch._signs(Line(step=3, cells=[cell], mean=1.0, best=True, seconds=1.0, images=9)) == []
    assert seen == [8.0]


def test_signs_can_be_off(tuned):
    assert train(tuned(lr=0.3, ema=0, watch={"signs": {"long_sampling": None}}))["signs"] == []


# -- every=auto -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "every", "warns"),
    [(1.0, 143, False), (2.4, 1000, False), (5.0, 1000, True), (0.001, 20, False)],
    ids=["seven times", "at the end", "too dear", "at most 51 times"],
)
def test_auto_spends_a_tenth_of_the_training(monkeypatch, caplog, seconds, every, warns):
    """1000 updates of 0.1 s: 10 s for measurements, four of which are of the start and the chosen model."""
    watch = object.__new__(module.Watch)
    watch.recipe, watch.every = SimpleNamespace(steps=1000, output="run"), None
    watch.accelerator = SimpleNamespace(is_main_process=True)
    watch.start, watch._clock = SimpleNamespace(seconds=2 * seconds), None  # on two noises
    for step in range(1, 30):
        monkeypatch.setattr(module.time, "perf_counter", lambda step=step: 100 + 0.1 * step)
        watch._choose_interval(step)
        if watch.every is not None:
            break
    assert step == 21
    assert watch.every == pytest.approx(every, abs=1)
    assert ("lower watch.num" in caplog.text) == warns


def test_auto_is_chosen_once(tuned):
    recipe = tuned(watch={"every": "auto"})
    train(recipe)
    assert lines(recipe)[-1]["every"] == 9


def test_the_clock_of_the_main_process_decides_for_all(tuned, monkeypatch):
    """Processes that measured at different updates would wait for each other for ever."""

    def from_main(value):
        return value.model_copy(update={"seconds": 1e9}) if isinstance(value, Start) else value

    recipe = tuned(watch={"every": "auto"})
    whole = recipe.steps
    monkeypatch.setattr(module, "from_main", from_main)
    train(recipe)
    assert [line["step"] for line in lines(recipe)] == [0, whole], "a measurement of an hour is made at the end alone"


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "fod"}, "watch.metric: unknown metric 'fod': use one of"),
        ({"metric": "brightness"}, "watch.metric: no number of the metric brightness"),
        ({"metric": "clip-score"}, "watch.metric: .*clip-score=VALUE"),
        ({"metric": "fid=3"}, "watch.metric: .*takes no value"),
        ({"samplers": ["heun9"]}, "heun9"),
        ({"samplers": ["multistep"]}, "multistep"),
        ({"steps": [5000]}, "watch of ddim at 5000 steps"),
        ({"features": "resnet"}, "watch.features: unknown extractor"),
        ({"features": "inception"}, "watch.features: .*weights"),
        ({"guidance": 2.0}, "watch of ddim"),
        ({"signs": {"at_radius": 2}}, "at_radius"),
        ({"every": 0}, "every"),
        ({"steps": [2, 2]}, "twice"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(tuned, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):  # pydantic's, or InputError
        train(tuned(watch=fields))
    assert not (tmp_path / "run").exists()


def test_data_without_features_is_refused_by_name(tuned, tmp_path):
    for i in range(4):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    data = {"name": "imagefolder", "root": str(tmp_path / "photos"), "size": 8, "channels": 1}
    with pytest.raises(InputError, match=r"no features are known for .*watch\.features"):
        train(tuned(data=data, watch={"samplers": ["ddim"]}))
    assert not (tmp_path / "run").exists()


def test_shards_are_refused(tuned, tmp_path):
    recipe = tuned()
    trainer = SimpleNamespace(recipe=recipe, accelerator=SimpleNamespace(distributed_type="FSDP"))
    with pytest.raises(InputError, match="FSDP"):
        module.Watch(recipe.watch, trainer, None, tmp_path)


def test_the_usual_steps():
    assert module._usual_steps("ddim", None) == (20, 50)
    assert module._usual_steps("ddim", 5) == (5, 50)
    with pytest.raises(InputError, match=r"sampler\.steps=10,10 is not a number.*set watch\.steps"):
        module._usual_steps("ddim", "10,10")
    assert module._usual_steps("multistep", 3) == (1, 2, 3, 4, 8)
    assert module._usual_steps("lcm", None) == (1, 2, 4, 8)


def test_none_switches_it_off():
    assert Recipe.model_validate({"watch": "none"}).watch is None
    assert Recipe.model_validate({}).watch is None
