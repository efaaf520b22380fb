"""The mismatch of samplers whose law is known, and of a real network on common random numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from scipy.special import gammaln
from torch import Tensor

from robustdiff.backbones.model import Model
from robustdiff.backbones.unet2d import UNet2D
from robustdiff.data import load_dataset
from robustdiff.data.dataset import ArrayDataset
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.noise import ImageNoise
from robustdiff.mismatch.distances import random_directions
from robustdiff.mismatch.measure import MEASURES, measure_mismatch
from robustdiff.process import DiffusionProcess

S = 0.25  # the standard deviation of the data below
T = 200
D = 16
PROCESS = DiffusionProcess.linear(T)


class Exact(torch.nn.Module):
    """ε*(x, t) = σ_t x/(α_t² s² + σ_t²), the exact ε of x_0 ~ N(0, s² I), times an error."""

    def __init__(self, error: float = 1.0, classes: int | None = None) -> None:
        super().__init__()
        self.config = FrozenDict(sample_size=4, in_channels=1, num_class_embeds=classes)
        self.device = torch.device("cpu")
        self.error = error
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if class_labels is not None:
            self.labels.append(class_labels)
        alpha, sigma = PROCESS.levels(t.long(), x)
        return self.error * sigma * x / (alpha**2 * S**2 + sigma**2)


@pytest.fixture(scope="module")
def gaussian_data() -> ArrayDataset:
    x = S * np.random.default_rng(0).standard_normal((4000, 4, 4, 1))
    images = np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)
    return ArrayDataset("gaussian", images, np.arange(4000) % 10)


def generator_of(network: torch.nn.Module, **settings) -> Generator:
    return Generator(
        Model(UNet2D(network), process=PROCESS, prediction="epsilon"), "ddim", 50, batch_size=500, **settings
    )


def spread(step) -> float:
    """The standard deviation of q(x_t)."""
    return float(np.sqrt(step.alpha**2 * S**2 + step.sigma**2))


def mean_norm(d: int) -> float:
    """E‖z‖, z ~ N(0, I)."""
    return float(np.sqrt(2) * np.exp(gammaln((d + 1) / 2) - gammaln(d / 2)))


@pytest.fixture(scope="module")
def exact(gaussian_data):
    generators = {"exact": generator_of(Exact())}
    settings = {"radii": [], "probes": 4, "times": [0.2, 0.8], "reservoir": 40}
    return measure_mismatch(generators, gaussian_data, ["ddim"], [T, 20], 2000, **settings)


def test_the_exact_noise_in_many_steps_has_no_exposure_bias(exact):
    path, coarse = exact.paths
    assert len(path.path) == T
    assert [step.time for step in path.path] == list(range(T - 1, -1, -1))
    for step in path.path:
        assert step.alpha == pytest.approx(float(PROCESS.alphas[int(step.time)]), rel=1e-6)
        delta = step.estimates["delta"]
        # Two hundred steps of DDIM are not infinitely many: at the end the spread is short by some percent.
        assert delta.value < 1e-3 * spread(step) ** 2
        assert delta.value == pytest.approx((step.std_sampling - step.std_training) ** 2, rel=1e-9)
        assert abs(step.estimates["noise"].value) < 0.032
    assert coarse.last["delta"].value > 20 * path.last["delta"].value


def test_the_training_side_is_that_of_the_closed_form(exact):
    for step in exact.paths[0].path[::20]:
        total = spread(step)
        assert step.std_training == pytest.approx(total, rel=0.02)
        assert step.x0_std_training == pytest.approx(step.alpha * S**2 / total, rel=0.02)
        assert step.noise_norm_training == pytest.approx(step.sigma / total * mean_norm(D), rel=0.02)


def test_as_published_delta_holds_the_data_that_the_path_has_forgotten(exact):
    """var(x̂_t − α x_0) = var(x̂_t) + α² s² for independent ones: large for the exact sampler too, growing as t falls."""
    published = [step.delta_given_x0 for step in exact.paths[0].path]
    expected = [
        (np.sqrt(step.std_sampling**2 + step.alpha**2 * S**2) - step.sigma) ** 2 for step in exact.paths[0].path
    ]
    assert published[-1] == pytest.approx((2**0.5 * S - exact.paths[0].path[-1].sigma) ** 2, rel=0.05)
    assert published == pytest.approx(expected, abs=0.003)
    assert published[-1] > 1000 * exact.paths[0].path[-1].estimates["delta"].value


def test_lipschitz_is_that_of_the_exact_noise(exact):
    for r in exact.robustness:
        alpha, sigma = float(PROCESS.alphas[r.index]), float(PROCESS.sigmas[r.index])
        assert r.lipschitz == pytest.approx(sigma / (alpha**2 * S**2 + sigma**2), rel=1e-5)
        assert r.robust == []


@pytest.fixture(scope="module")
def damaged(gaussian_data):
    options = {"clip": False}  # the closed form has none
    generators = {"exact": generator_of(Exact(), options=options), "damaged": generator_of(Exact(0.9), options=options)}
    return measure_mismatch(generators, gaussian_data, ["ddim"], [4], 1000, probes=0)


def test_states_and_distances_of_a_damaged_network_are_those_of_its_gaussian(damaged):
    """A linear network makes x̂_t = c_t x_T, so p is N(0, c_t²): every measure has a closed form."""
    path = damaged.paths[1].path
    c, kl = 1.0, 4
    directions = random_directions(D)
    for i, step in enumerate(path):
        if i:
            before = path[i - 1]
            noise = 0.9 * before.sigma / spread(before) ** 2
            c *= step.alpha * (1 - before.sigma * noise) / before.alpha + step.sigma * noise
        assert step.std_sampling == pytest.approx(c * path[0].std_sampling, rel=1e-4)
        q = spread(step)
        ratio = c / q
        truth = {
            "delta": (c - q) ** 2,
            "x0_std": (1 - step.sigma * 0.9 * step.sigma / q**2) / step.alpha * (c - q),
            "noise": ratio - 1,
            "sliced": np.sqrt(((c - q) ** 2 * (directions**2).sum(1)).mean()),
            "energy": mean_norm(D) * (2 * np.sqrt(c**2 + q**2) - np.sqrt(2) * (c + q)),
            "frechet": D * (c - q) ** 2,
            "kl": 0.5 * kl * (ratio**-2 - 1 + 2 * np.log(ratio)),
        }
        if i == 0:
            continue  # p and q are all but alike there
        for name, expected in truth.items():
            found = step.estimates[name]
            # What the estimator adds at n = 1000, as between samples of q: below it nothing is to be seen.
            bias = {"sliced": found.floor, "frechet": found.floor, "kl": 0.35 * expected}.get(name) or 0.0
            assert found.low - bias < expected < found.high + bias, (i, name)
    assert path[-1].estimates["sliced"].low > 2 * path[-1].estimates["sliced"].floor


def test_the_floor_is_what_two_samples_of_q_differ_by(damaged):
    last = damaged.paths[0].path[-1]
    assert last.estimates["energy"].floor == pytest.approx(0, abs=2e-3)
    assert last.estimates["kl"].floor == pytest.approx(0, abs=0.25)
    assert 0 < last.estimates["sliced"].floor < 0.1 * S
    assert last.estimates["noise"].floor is None


def test_means_lasts_and_differences_are_of_the_steps(damaged):
    exact, worse = damaged.paths
    for path in damaged.paths:
        assert path.last == path.path[-1].estimates
        for name, mean in path.mean.items():
            values = [step.estimates[name] for step in path.path]
            assert mean.value == pytest.approx(np.mean([e.value for e in values]))
            assert mean.high - mean.low <= max(e.high - e.low for e in values) * (1 + 1e-12)
    assert [d.measure for d in damaged.differences] == list(MEASURES)
    for d in damaged.differences:
        assert (d.checkpoint, d.baseline) == ("damaged", "exact")
        assert d.value == pytest.approx(worse.mean[d.measure].value - exact.mean[d.measure].value)
        assert d.low < d.value < d.high
    # The same x_T for both: the difference is surer than its two sides are apart.
    spread = next(d for d in damaged.differences if d.measure == "noise")
    assert spread.high - spread.low < 0.5 * (worse.mean["noise"].high - worse.mean["noise"].low)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def small(generators, dataset, *arguments, **settings):
    return measure_mismatch(generators, dataset, *arguments, **{"num": 60, "probes": 0, **settings})


def flat(result) -> list[float]:
    """All numbers of the paths."""
    text = json.dumps([asdict(path) for path in result.paths], default=str)
    found: list[float] = []
    json.loads(text, parse_float=lambda number: found.append(float(number)))
    return found


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "es", "time-shift", "dpm++"])
def test_every_sampler_is_seen_at_each_of_its_steps(digits_run, digits, sampler):
    options = {"cutoff": 0} if sampler == "time-shift" else None
    generator = Generator.load(digits_run, sampler=sampler, batch_size=32, options=options)
    (path,) = small({"a": generator}, digits, [sampler], [3]).paths
    assert len(path.path) == 3
    sigmas = [step.sigma for step in path.path]
    assert sigmas == sorted(sigmas, reverse=True)
    for step in path.path:
        assert np.isfinite([step.noise_norm_training, *(e.value for e in step.estimates.values())]).all()


def test_the_first_state_is_the_generators_noise(digits_run, digits):
    (path,) = small({"a": Generator.load(digits_run, batch_size=25)}, digits, ["iddpm"], [2], seed=5).paths
    x_T = ImageNoise(5, range(60), (1, 8, 8), torch.device("cpu")).draw().flatten(1)
    assert path.path[0].std_sampling == pytest.approx(float(x_T.std(0).mean()), rel=1e-5)


def test_one_checkpoint_twice_does_not_differ_from_itself(digits_run, digits):
    generator = Generator.load(digits_run, batch_size=60)
    result = small({"a": generator, "b": generator}, digits, ["iddpm"], [2])
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in result.differences)


def test_the_batch_size_changes_nothing(digits_run, digits):
    generator = Generator.load(digits_run, batch_size=60)
    one = flat(small({"a": generator}, digits, ["iddpm"], [2]))
    other = flat(small({"a": replace(generator, batch_size=17)}, digits, ["iddpm"], [2]))
    assert len(one) > 50
    assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


def test_the_reservoir_bounds_what_distances_are_of_and_not_the_rest(digits_run, digits):
    generator = Generator.load(digits_run, batch_size=60)
    (whole,) = small({"a": generator}, digits, ["ddim"], [2]).paths
    (part,) = small({"a": generator}, digits, ["ddim"], [2], reservoir=40).paths
    assert (whole.kept, part.kept, part.n) == (60, 40, 60)
    assert whole.path[1].estimates["delta"] == part.path[1].estimates["delta"]
    assert whole.path[1].estimates["energy"] != part.path[1].estimates["energy"]


def test_classes_are_those_of_the_real_images_on_both_sides(gaussian_data):
    model = Exact(classes=10)
    small({"a": generator_of(model)}, gaussian_data, ["ddim"], [2], probes=3, radii=[], times=[0.5])
    order = np.random.default_rng(0).permutation(4000)
    paths, probes = model.labels[:4], model.labels[4:]
    for labels in paths:
        assert labels.tolist() == (order[:60] % 10).tolist()
    for labels in probes:
        assert labels.tolist() == (order[:3] % 10).tolist()


@pytest.mark.parametrize("seed", [0, 3])
def test_captions_are_those_of_the_real_images_on_both_sides(make_sd_pipeline, tmp_path, monkeypatch, seed):
    generator = Generator.load(make_sd_pipeline(tmp_path), prompts=("another",), batch_size=25)
    texts = [f"shoe {i}" for i in range(80)]
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), np.uint8)
    data = ArrayDataset("shoes", images, captions=[[text, "another"] for text in texts])
    condition, given = generator.condition, []
    embed = condition.embed
    monkeypatch.setattr(condition, "embed", lambda captions: given.append([*captions]) or embed(captions))
    small({"a": generator}, data, ["ddim"], [1], num=40, probes=3, radii=[], times=[0.5], seed=seed)
    expected = [texts[i] for i in np.random.default_rng(seed).permutation(80)[:40]]
    assert given == [expected[:25], expected[25:], expected[:3]]
    with pytest.raises(InputError, match=r"a is conditioned on captions and plain has none: give the images"):
        small({"a": generator}, ArrayDataset("plain", images), ["ddim"], [1], num=40)


def test_a_network_is_called_as_samplers_call_it(gaussian_data, monkeypatch):
    """Where a network needs a wrapping, as a consistency model does, it is the wrapping that is measured."""
    generator = generator_of(Exact())
    monkeypatch.setattr(generator.model.backbone, "bind", lambda _: Exact())
    generator.model.network.forward = None
    settings = {"radii": [0.1], "probes": 3, "times": [0.5]}
    wrapped = small({"a": generator}, gaussian_data, ["ddim"], [2], **settings)
    assert wrapped == small({"a": generator_of(Exact())}, gaussian_data, ["ddim"], [2], **settings)


def test_a_consistency_model_is_measured_on_its_own_scales(gaussian_data):
    """f(x, σ) = s x/√(s² + σ²), the exact one of N(0, s² I) for σ_min → 0: every state is as wide as q has it."""

    class Consistency(Exact):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return S * x / (S**2 + sigmas[t.long()].to(x).reshape(-1, 1, 1, 1) ** 2) ** 0.5

    sigmas = torch.logspace(-2.7, 1.9, 40, dtype=torch.float64)
    process = DiffusionProcess(torch.ones(40), sigmas)
    generator = Generator(
        Model(UNet2D(Consistency()), process=process, prediction="sample"), "multistep", 2, batch_size=500
    )
    (path,) = measure_mismatch({"a": generator}, gaussian_data, ["multistep"], [4], 1000, probes=0).paths
    assert [step.sigma for step in path.path] == pytest.approx(sigmas[[39, 29, 19, 9]].tolist(), rel=1e-6)
    for step in path.path:
        assert step.alpha == 1
        assert step.std_sampling == pytest.approx(np.sqrt(S**2 + step.sigma**2), rel=0.01)
        assert step.x0_std_training == pytest.approx(S, rel=0.01)
        assert step.estimates["delta"].value < 3e-4 * (S**2 + step.sigma**2)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num": 2001}, "2000"),
        ({"num": 39}, "40"),
        ({"reservoir": 10}, "reservoir"),
        ({"probes": 1}, "probes"),
        ({"probes": 61}, "probes"),
        ({"radii": [0.1, -1.0]}, "radii"),
        ({"radii": [float("nan")]}, "radii"),
        ({"radii": [1e300]}, r"radii are 1e\+300; each must be positive, and at most 1e\+30"),
        ({"times": [1.0]}, "times"),
        ({"samplers": ["plms"]}, "plms"),
        ({"samplers": ["euler"]}, "euler"),
        ({"steps": [T + 1]}, "steps"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(gaussian_data, settings, words):
    model = Exact()
    model.forward = None  # type: ignore[assignment]
    with pytest.raises(InputError, match=words):
        measure_mismatch({"a": generator_of(model)}, gaussian_data, **{"num": 60, **settings})


def test_classes_that_the_data_does_not_have_are_refused(gaussian_data):
    with pytest.raises(InputError, match=r"7 classes .* 10"):
        small({"a": generator_of(Exact(classes=7))}, gaussian_data)
    unlabelled = ArrayDataset("plain", np.zeros((200, 4, 4, 1), np.uint8))
    with pytest.raises(InputError, match=r"7 classes and plain has none: give the images"):
        small({"a": generator_of(Exact(classes=7))}, unlabelled)


def test_robustness_does_not_depend_on_the_precision_of_the_paths(gaussian_data):
    settings = {"radii": [0.1], "probes": 3, "times": [0.5]}
    full, half = (
        small({"a": generator_of(Exact(), precision=p)}, gaussian_data, ["ddim"], [2], **settings).robustness
        for p in ("fp32", "bf16")
    )
    assert full == half
