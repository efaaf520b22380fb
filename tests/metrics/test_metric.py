"""Metrics together: shared features, missing needs, several processes, and a metric of an installed package."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import scipy.linalg
import torch

from robustdiff.errors import InputError, RunError
from robustdiff.evaluation.grid import Cell
from robustdiff.metrics.bootstrap import interval
from robustdiff.metrics.brightness import Brightness
from robustdiff.metrics.metric import (
    _FIELDS,
    METRICS,
    Metric,
    MetricCollection,
    Number,
    _keys,
    check_finite,
    compared,
    number_named,
    parse_metric,
    ranked,
)
from robustdiff.metrics.precision_recall import precision_recall
from robustdiff.metrics.reference import Reference
from robustdiff.study.store import CellRecord

KEYS = ["fid", "fid_corrected", "fid_mean_term", "kid", "kid_se", "precision", "recall", "brightness"]


@pytest.fixture(scope="module")
def noisy(digits):
    """Digits with noise of two strengths."""
    images, _ = digits.__getitems__(range(600))[:2]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return [(images + scale * noise).round().clamp(0, 255).to(torch.uint8) for scale in (8, 60)]


def filled(metrics, images):
    metrics.reset()
    for start in range(0, len(images), 128):
        metrics.update(images[start : start + 128], start)
    return metrics


def test_the_numbers_of_all_metrics(extractor, reference, noisy):
    metrics = filled(MetricCollection(None, extractor, reference), noisy[0])
    values, intervals, replicates, _ = metrics.result("x")
    assert list(values) == KEYS
    features = extractor(noisy[0]).numpy().astype(np.float64)
    real = reference.features.astype(np.float64)
    a, b = np.cov(features, rowvar=False), np.cov(real, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    fid = ((features.mean(0) - real.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    assert values["fid"] == pytest.approx(fid, rel=1e-5)
    assert values["fid_mean_term"] == pytest.approx(((features.mean(0) - real.mean(0)) ** 2).sum(), rel=1e-5)
    assert intervals == {"fid": interval(values["fid"], replicates["fid"], 50, log=True)}
    assert (values["precision"], values["recall"]) == precision_recall(features, real[:600])
    assert values["precision"] != values["recall"]
    assert values["brightness"] == pytest.approx(noisy[0].double().mean().item())
    assert values == metrics.result("x")[0], "it changes nothing"
    # A collection serves one set of images after the other.
    assert filled(metrics, noisy[1]).result("x")[0] != values
    assert filled(metrics, noisy[0]).result("x")[0] == values


def test_worse_images_get_worse_numbers(extractor, reference, noisy):
    metrics = MetricCollection(None, extractor, reference)
    (a, better, *_), (b, worse, *_) = (filled(metrics, images).result("x") for images in noisy)
    assert better["fid"][1] < worse["fid"][0]
    assert a["kid"] + 2 * a["kid_se"] < b["kid"] - 2 * b["kid_se"]
    assert a["precision"] > b["precision"]


def test_features_are_extracted_once_and_only_where_a_metric_needs_them(extractor, reference, noisy, monkeypatch):
    calls = []
    monkeypatch.setattr(extractor, "forward", lambda images: calls.append(len(images)) or torch.ones(len(images), 64))
    MetricCollection(["brightness"], extractor, reference).update(noisy[0][:5], 0)
    assert calls == []
    MetricCollection(None, extractor, reference).update(noisy[0][:5], 0)
    assert calls == [5]


def test_processes_together_are_one(extractor, reference, noisy):
    whole = filled(MetricCollection(None, extractor, reference), noisy[0]).result("x")[0]
    parts = [MetricCollection(None, extractor, reference) for _ in range(3)]
    for turn, start in enumerate(range(0, 600, 50)):
        parts[turn % 3].update(noisy[0][start : start + 50], start)
    states = [part.state() for part in parts]
    parts[0].reset()
    for state in states:
        parts[0].merge_state(state)
    merged = parts[0].result("x")[0]
    for key, value in whole.items():
        assert merged[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_collection_refuses(extractor, reference):
    with pytest.raises(ValueError, match="another extractor"):
        MetricCollection(None, extractor, replace(reference, fingerprint="0" * 64))
    with pytest.raises(
        InputError, match="unknown metric 'fd': use one of brightness, clip-score, fid, fid-shifted, kid, p"
    ):
        MetricCollection(["fid", "fd"], extractor, reference)
    metrics = MetricCollection(None, extractor, reference)
    with pytest.raises(InputError, match="no images"):
        metrics.result("x")
    with pytest.raises(InputError, match="extractor digits"):
        metrics.update(torch.zeros(2, 1, 9, 9, dtype=torch.uint8), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_named(value):
    check_finite("x", {"fid": 1.0, "kid": None})
    with pytest.raises(RunError, match=f"x: kid is {value}"):
        check_finite("x", {"fid": 1.0, "kid": value})


def test_without_real_features_fid_alone_compares(extractor, reference, noisy):
    known = filled(MetricCollection(None, extractor, reference), noisy[0]).result("x")[0]
    moments = Reference(reference.mean, reference.cov, extractor.fingerprint)
    alone = filled(MetricCollection(None, extractor, moments), noisy[0]).result("x")[0]
    assert alone == {**known, "kid": None, "kid_se": None, "precision": None, "recall": None}
    with pytest.raises(InputError, match="the metric kid needs of real images more than the mean"):
        MetricCollection(["fid", "kid"], extractor, moments)
    with pytest.raises(InputError, match="the metric fid needs of real images features"):
        MetricCollection(["fid"])


def test_brightness_needs_no_real_images(noisy):
    assert (compared(), compared(["brightness"]), compared(["brightness", "kid"])) == (True, False, True)
    values, intervals, *_ = filled(MetricCollection(["brightness"]), noisy[0]).result("x")
    assert values == {"brightness": pytest.approx(noisy[0].double().mean().item())}
    assert intervals == {}


def test_a_number_says_how_it_is_shown():
    assert (number_named("precision").title, number_named("precision").better) == ("precision", "higher")
    assert (number_named("other").title, number_named("other").better) == ("other", None)


# -- a metric of an installed package ------------------------------------------------------------------------

CONTRAST = '''
import numpy as np
from robustdiff.metrics.bootstrap import block_of, block_weights
from robustdiff.metrics.metric import METRICS, Metric, Number

@METRICS.register("contrast")
class Contrast(Metric):
    """The standard deviation of an image plus its class: values of single images, with replicates."""

    numbers = (Number("contrast", "Contrast", ".3f", "higher"),)
    made = 0

    def __init__(self, real, device):
        type(self).made += 1
        super().__init__(real, device)

    def reset(self):
        self.values = {}

    def update(self, batch):
        classes = [0] * len(batch.images) if batch.condition is None else batch.condition.tolist()
        deviations = batch.images.double().flatten(1).std(dim=1).tolist()
        for i, (deviation, number) in enumerate(zip(deviations, classes)):
            self.values[batch.start + i] = deviation + 1000 * number

    def state(self):
        return self.values

    def merge_state(self, state):
        self.values |= state

    def result(self):
        return {"contrast": np.float32(np.mean(list(self.values.values())))}

    def replicates(self):
        index, values = (np.array(part) for part in zip(*sorted(self.values.items())))
        block, weights = block_of(index, 50), block_weights(50)
        count, total = np.bincount(block, minlength=50), np.bincount(block, values, 50)
        return {"contrast": (weights @ total) / (weights @ count)}
'''


def a_metric(*numbers: Number) -> type[Metric]:
    return type("Other", (Brightness,), {"numbers": numbers})


def test_no_two_metrics_have_the_same_number(monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._load()))
    for key, words in {
        "brightness": "the metrics brightness and other have the same number brightness: rename one",
        "kid_se": "the metrics kid and other have the same number kid_se",
        "steps": "the metric other has a number steps, which is another field of records",
    }.items():
        with pytest.raises(ValueError, match=words):
            METRICS.register("other")(a_metric(Number("mine", "", ".1f"), Number(key, "", ".1f")))
        assert "other" not in METRICS
    METRICS.register("brightness")(METRICS["brightness"])  # as a module that is imported again
    METRICS.register("other")(a_metric(Number("mine", "", ".1f")))
    with pytest.raises(ValueError, match="the metrics other and third have the same number mine_se"):
        METRICS.register("third")(a_metric(Number("mine_se", "", ".1f")))


def test_the_fields_of_records_are_no_numbers():
    ours = {key for kind in METRICS.values() for key in _keys(kind)}
    cell = Cell("a", "ddim", 2, 3, {}, {}, {}, 1.0, guidance=1.0, blocks={"fid": 2})
    assert {*CellRecord.model_fields, *cell.record()} - ours <= _FIELDS


def test_the_value_of_a_metric_and_the_number_that_ranks(monkeypatch):
    assert parse_metric("fid") == ("fid", {})
    assert parse_metric("clip-score=a=b") == ("clip-score", {"clip-score": "a=b"})
    assert (ranked("fid").name, ranked("clip-score=x").name, ranked("kid").name) == ("fid", "clip_score", "kid")
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._load()))
    METRICS.register("two")(a_metric(Number("one", "", ".1f"), Number("two", "", ".1f", "higher")))
    assert ranked("two").name == "two"
    with pytest.raises(InputError, match="no number of the metric brightness has a better direction: choose another"):
        ranked("brightness")
    with pytest.raises(InputError, match="unknown metric 'fd'"):
        ranked("fd=3")


@pytest.fixture
def contrast(tmp_path, monkeypatch):
    (tmp_path / "contrast_metric.py").write_text(CONTRAST)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("contrast", "contrast_metric", "robustdiff.metrics")
    monkeypatch.setattr("robustdiff.registry.entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._load()))
    monkeypatch.setattr(METRICS, "_loaded", False)
    monkeypatch.delitem(__import__("sys").modules, "contrast_metric", raising=False)


def test_a_metric_of_an_installed_package_is_measured_compared_and_drawn(robustdiff, digits_run, contrast, tmp_path):
    import shutil

    shutil.copytree(digits_run, tmp_path / "other")
    arguments = ["--metrics", "contrast,fid", "--num", 60, "--steps", "1,2", "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", digits_run, tmp_path / "other", *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("Contrast") == 3
    assert "brightness" not in outcome.out
    record = json.loads((tmp_path / "e" / "result.json").read_text())
    for cell in record["cells"]:
        assert list(cell)[4:-2] == ["contrast", "contrast_ci", "fid", "fid_ci", "fid_corrected", "fid_mean_term"]
        assert cell["contrast_ci"][0] < cell["contrast"] < cell["contrast_ci"][1]
    changes = [{k: d[k] for k in d if k not in ("steps", "sampler")} for d in record["differences"]]
    pair = {"checkpoint": "other", "baseline": "digits", "relative": 0.0}
    ratios = {"contrast": None, "fid": [0.0, 0.0]}
    assert (
        changes == [{**pair, name: 0.0, f"{name}_ci": [0.0, 0.0], "relative_ci": ratios[name]} for name in ratios] * 2
    )
    assert {p.name for p in (tmp_path / "e").iterdir()} == {
        "contrast.png", "fid.png", "result.json", "samples-ddim.png",
    }  # fmt: skip
    assert METRICS["contrast"].made == 1, "its network would be loaded once"


def test_it_needs_no_real_images(robustdiff, contrast, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 7, 3), np.uint8)  # no features are made for that
    np.savez(tmp_path / "a.npz", arr_0=images)
    arguments = ["evaluate", tmp_path / "a.npz", "--metrics", "contrast,brightness"]
    outcome = robustdiff(*arguments, "--output", tmp_path / "e")
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "e" / "result.json").read_text())
    (cell,) = record["cells"]
    assert cell["contrast"] == pytest.approx(images.reshape(30, -1).std(axis=1, ddof=1).mean(), rel=1e-5)
    assert [record[key] for key in ("data", "reference", "features")] == [None] * 3
    outcome = robustdiff(*arguments, "--features", "digits")
    assert outcome.code == 2
    assert "--features is for comparing with real images" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--metrics", "fid,fd"],
            ["unknown metric 'fd'", "brightness, clip-score, fid, fid-shifted, kid, precision-recall"],
        ),
        (["--metrics", "fid,fid"], ["--metrics has fid twice"]),
        (["--metrics", ""], ["--metrics is empty"]),
        (["--metrics", "brightness", "--data", "digits"], ["--data", "leave it out"]),
        (["--metrics", "brightness", "--reference", "r.npz"], ["--reference", "leave it out"]),
    ],
)
def test_metrics_that_cannot_be_measured_are_one_line(robustdiff, tmp_path, arguments, words):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((8, 8, 8, 1), np.uint8))
    outcome = robustdiff("evaluate", tmp_path / "a.npz", *arguments)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    for word in words:
        assert word in outcome.err


def test_named_metrics_need_what_the_reference_has(robustdiff, reference, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "r.npz", mu=reference.mean, sigma=reference.cov)
    arguments = ["evaluate", tmp_path / "a.npz", "--reference", tmp_path / "r.npz", "--features", "digits"]
    assert robustdiff(*arguments, "--metrics", "fid").code == 0
    outcome = robustdiff(*arguments, "--metrics", "kid")
    assert outcome.code == 2
    assert "the metric kid needs of real images more than" in outcome.err
