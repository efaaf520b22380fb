"""Perturbations: ascent and projection against brute force, radii against their formulas, adversaries by counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import nn

from robustdiff.errors import InputError
from robustdiff.perturbation import (
    ADVERSARIES,
    NORMS,
    Adversary,
    Constant,
    FreeAdversary,
    NoAdversary,
    NoiseLevel,
    PerDimension,
    PGDAdversary,
    Points,
    Ramp,
    RandomAdversary,
    SamplerDistance,
    Within,
)
from robustdiff.process import DiffusionProcess

ALL_NORMS = sorted(NORMS)
SEEDS = st.integers(0, 2**31 - 1)
DUAL = {"l1": math.inf, "l2": 2.0, "linf": 1.0}
ORDER = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_ball(points: np.ndarray, order: float, radius: float) -> np.ndarray:
    """Points moved into the ball along their ray."""
    size = np.linalg.norm(points, ord=order, axis=1, keepdims=True)
    return points * np.minimum(1, radius / size)


@pytest.mark.parametrize("norm", ALL_NORMS)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, d=st.integers(1, 12))
def test_ascent_reaches_the_dual_norm_and_nothing_in_the_ball_reaches_more(norm, seed, d):
    grad = gaussian(seed, 3, d)
    direction = NORMS[norm].ascent(grad)
    for g, step in zip(grad.numpy(), direction.numpy(), strict=True):
        assert np.linalg.norm(step, ord=ORDER[norm]) == pytest.approx(1)
        assert g @ step == pytest.approx(np.linalg.norm(g, ord=DUAL[norm]))
        others = in_ball(np.random.default_rng(seed).normal(size=(500, d)) * 3, ORDER[norm], 1.0)
        assert (others @ g).max() <= g @ step + 1e-12


@pytest.mark.parametrize("norm", ALL_NORMS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, d=st.integers(1, 4))
def test_ascent_is_what_a_solver_finds(norm, seed, d):
    """Linear programmes in d = p − n for ℓ1 and ℓ∞; a constrained minimisation for ℓ2."""
    g = gaussian(seed, d).numpy()
    if norm == "l2":
        constraint = {"type": "ineq", "fun": lambda x: 1 - x @ x}
        found = minimize(lambda x: -g @ x, np.full(d, 0.1), constraints=constraint, method="SLSQP").x
    else:
        sums = np.ones((1, 2 * d)) if norm == "l1" else np.hstack([np.eye(d), np.eye(d)])
        parts = linprog(np.concatenate([-g, g]), A_ub=sums, b_ub=np.ones(len(sums)), bounds=(0, None)).x
        found = parts[:d] - parts[d:]
    direction = NORMS[norm].ascent(torch.from_numpy(g)[None])[0].numpy()
    assert g @ direction == pytest.approx(g @ found, rel=1e-5)


@pytest.mark.parametrize("norm", ALL_NORMS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, d=st.integers(1, 4), radius=st.floats(0.1, 2))
def test_projection_is_the_nearest_point_by_constrained_optimisation(norm, seed, d, radius):
    z = 2 * gaussian(seed, d).numpy()

    # Positive and negative parts make ‖·‖₁ and ‖·‖_∞ smooth: z = p − n, p, n ≥ 0.
    def size(x: np.ndarray) -> float:
        p, n = x[:d], x[d:]
        if norm == "l1":
            return radius - (p + n).sum()
        return radius**2 - ((p - n) ** 2).sum()

    bound = radius if norm == "linf" else None
    constraints = [] if norm == "linf" else [{"type": "ineq", "fun": size}]
    start = np.full(2 * d, radius / (4 * d))
    found = minimize(
        lambda x: ((x[:d] - x[d:] - z) ** 2).sum(), start, bounds=[(0, bound)] * 2 * d, constraints=constraints,
        options={"maxiter": 500, "ftol": 1e-14}, method="SLSQP",
    )  # fmt: skip
    assume(found.success and (norm == "linf" or size(found.x) > -1e-6))  # the solver has its own failures
    brute = found.x[:d] - found.x[d:]
    mine = NORMS[norm].project(torch.from_numpy(z)[None], torch.tensor([radius], dtype=torch.float64))[0].numpy()
    assert np.linalg.norm(mine, ord=ORDER[norm]) <= radius * (1 + 1e-9)
    # The squared distance to z exceeds its least by that to the nearest point, at least, wherever the solver ended.
    excess = ((brute - z) ** 2).sum() - ((mine - z) ** 2).sum()
    assert excess > -1e-6
    assert ((mine - brute) ** 2).sum() <= excess + 1e-5


@pytest.mark.parametrize("norm", ALL_NORMS)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, d=st.integers(1, 40), radius=st.floats(0.1, 5))
def test_no_point_of_the_ball_is_nearer_than_the_projection(norm, seed, d, radius):
    """And the angle at the projection is obtuse: ⟨z − Π(z), y − Π(z)⟩ ≤ 0, which characterises it on a convex set."""
    z = 2 * gaussian(seed, d)
    mine = NORMS[norm].project(z[None], torch.tensor([radius], dtype=torch.float64))[0].numpy()
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(size=(200, d)), rng.laplace(size=(200, d)) ** 3, np.eye(d), -np.eye(d)])
    points = np.concatenate([in_ball(9 * points, ORDER[norm], radius), mine + rng.normal(size=(200, d)) / 50])
    points = in_ball(points, ORDER[norm], radius)
    away = z.numpy() - mine
    assert (np.linalg.norm(points - z.numpy(), axis=1) >= np.linalg.norm(away) - 1e-9).all()
    assert ((points - mine) @ away <= 1e-9).all()


@pytest.mark.parametrize("norm", ALL_NORMS)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, d=st.integers(1, 40))
def test_projection_is_per_sample_idempotent_and_keeps_what_is_inside(norm, seed, d):
    z, radius = 2 * gaussian(seed, 4, 1, d, 1), torch.tensor([0.3, 1.0, 5.0, 1e6], dtype=torch.float64)
    projected = NORMS[norm].project(z, radius)
    assert (NORMS[norm](projected) <= radius * (1 + 1e-12)).all()
    torch.testing.assert_close(NORMS[norm].project(projected, radius), projected)
    assert torch.equal(projected[3], z[3]), "bit for bit"
    for i in range(4):
        torch.testing.assert_close(NORMS[norm].project(z[i : i + 1], radius[i : i + 1])[0], projected[i])


def ascents(adversary: FreeAdversary, x: torch.Tensor, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The perturbations that given gradients lead to."""
    deltas = []
    for delta, gradient in zip(adversary(x), [*gradients, torch.ones_like(x)], strict=True):
        deltas.append(delta.detach().clone())
        delta.grad = gradient
    return deltas


@pytest.mark.parametrize("norm", ALL_NORMS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_a_useless_gradient_leaves_its_sample_and_is_counted(norm, bad):
    adversary = FreeAdversary(steps=3, step_size=0.5, norm=norm)
    good = gaussian(0, 2, 3, 4)
    broken = good.clone()
    broken[1] = 0.0
    broken[1, 0, 0] = bad
    deltas = ascents(adversary, torch.zeros(2, 3, 4, dtype=torch.float64), [good, broken])
    assert torch.equal(deltas[2][1], deltas[1][1])
    assert not torch.equal(deltas[2][0], deltas[1][0])
    assert deltas[2].isfinite().all()
    assert adversary.skipped == 1
    ascents(adversary, torch.zeros(2, 3, 4, dtype=torch.float64), [torch.zeros_like(good), broken])
    assert adversary.skipped == 1 + 2 + 1, "over all batches"


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_a_tiny_gradient_makes_a_full_step(norm):
    gradient = (gaussian(0, 2, 8) * 1e-30).float()
    deltas = ascents(FreeAdversary(steps=2, step_size=0.5, norm=norm), torch.zeros(2, 8), [gradient])
    torch.testing.assert_close(NORMS[norm](deltas[1]), torch.full((2,), 0.5))


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_a_huge_gradient_makes_a_full_step(norm):
    """The squares of 1e30 are infinite in float32."""
    gradient = (gaussian(0, 2, 8) * 1e30).float()
    deltas = ascents(FreeAdversary(steps=2, step_size=0.5, norm=norm), torch.zeros(2, 8), [gradient])
    torch.testing.assert_close(NORMS[norm](deltas[1]), torch.full((2,), 0.5))


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_a_batch_moves_as_its_samples_would_alone(norm):
    def settings(rows: slice) -> list[torch.Tensor]:
        adversary = FreeAdversary(steps=4, step_size=0.4, radius=0.9, norm=norm)
        return ascents(adversary, torch.zeros(3, 2, 5)[rows].double(), [gaussian(k, 3, 2, 5)[rows] for k in range(3)])

    together = settings(slice(None))
    for i in range(3):
        for whole, alone in zip(together, settings(slice(i, i + 1)), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, norm=st.sampled_from(ALL_NORMS), radius=st.floats(0, 2), steps=st.integers(1, 5))
def test_delta_starts_at_zero_and_never_leaves_the_ball(seed, norm, radius, steps):
    adversary = FreeAdversary(steps, step_size=0.7, radius=radius, norm=norm)
    x = gaussian(seed, 3, 2, 5)
    deltas = ascents(adversary, x, [gaussian(seed + k, 3, 2, 5) for k in range(steps - 1)])
    assert len(deltas) == steps == adversary.passes
    assert not deltas[0].any()
    for delta in deltas:
        assert delta.shape == x.shape
        assert (NORMS[norm](delta) <= radius + 1e-12).all()


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_a_radius_of_zero_keeps_delta_at_zero(norm):
    x = gaussian(0, 2, 6)
    free = ascents(FreeAdversary(3, 0.5, radius=0.0, norm=norm), x, [gaussian(1, 2, 6), gaussian(2, 2, 6)])
    pgd = list(PGDAdversary(3, 0.5, radius=0.0, norm=norm)(x, loss=lambda delta: (x + delta).square().sum(1)))
    for delta in (*free, *pgd, *RandomAdversary(3, 0.5, radius=0.0, norm=norm)(x)):
        assert not delta.any()


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_the_ball_holds_in_float32_for_a_whole_image(norm):
    """3·32·32 roundings, and a radius per sample by its time."""
    process, t = DiffusionProcess.cosine(1000), torch.tensor([0, 300, 999])
    radius = SamplerDistance(process, eta=0.1)
    x = torch.zeros(3, 3, 32, 32)
    bound = radius(Points(x, t), NORMS[norm])
    adversary = FreeAdversary(steps=4, step_size=2.0 * float(bound.max()), radius=radius, norm=norm)
    for k, delta in enumerate(adversary(x, t)):
        assert (NORMS[norm](delta.detach()) <= bound * (1 + 1e-5)).all()
        if k:
            torch.testing.assert_close(NORMS[norm](delta.detach()), bound, rtol=1e-4, atol=0)
        delta.grad = gaussian(k, 3, 3, 32, 32).float()


# -- radii ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_a_constant_radius_is_the_same_for_all(norm):
    assert Constant(2.5)(Points(torch.zeros(3, 7), torch.tensor([1, 2, 3]), 4), NORMS[norm]).tolist() == [2.5] * 3


@pytest.mark.parametrize(("norm", "expected"), [("l2", 0.1 * math.sqrt(48)), ("linf", 0.1), ("l1", 4.8)])
def test_a_radius_per_dimension_is_eta_times_the_size_of_ones(norm, expected):
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    assert PerDimension(0.1)(Points(x), NORMS[norm]).tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_the_radius_by_sampler_distance_is_its_formula(norm):
    process = DiffusionProcess.cosine(1000)
    alphas_cumprod = np.cumprod(1 - process.betas.numpy())
    t = torch.tensor([0, 3, 19, 20, 500, 999])
    expected = []
    for time in t.tolist():
        before = alphas_cumprod[time - 20] if time >= 20 else 1.0
        ones = {"l2": math.sqrt(12), "linf": 1.0, "l1": 12.0}[norm]
        expected.append(min(math.sqrt(2 - 2 * math.sqrt(alphas_cumprod[time] / before)), 0.3) * ones)
    radius = SamplerDistance(process, eta=0.3, steps=50)(Points(torch.zeros(6, 3, 4).double(), t), NORMS[norm])
    assert radius.tolist() == pytest.approx(expected, rel=1e-6)
    assert min(expected) < max(expected), "the cap is not all there is"


def test_the_stride_of_a_sampler_is_a_whole_number_of_times():
    """⌊1000/30⌋ = 33 times, so that t = 33 is the first from which the sampler does not go to the end."""
    process = DiffusionProcess.cosine(1000)
    a, distances = process.alphas_cumprod.tolist(), SamplerDistance(process, 9.0, 30).distances()
    expected = [math.sqrt(2 - 2 * math.sqrt(ratio)) for ratio in (a[32], a[33] / a[0])]
    assert distances[32:34].tolist() == pytest.approx(expected)


def test_sampler_distance_is_how_far_the_sampler_goes():
    """Simulated: x_s and x_t of one trajectory of the forward process, with data of unit variance."""
    process, time = DiffusionProcess.cosine(1000), 300
    ratio = (process.alphas_cumprod[time] / process.alphas_cumprod[time - 20]).item()
    x_s = gaussian(1, 200_000)
    x_t = math.sqrt(ratio) * x_s + math.sqrt(1 - ratio) * gaussian(2, 200_000)
    simulated = (x_t - x_s).square().mean().sqrt().item()
    assert SamplerDistance(process, eta=9.0).distances()[time].item() == pytest.approx(simulated, rel=0.01)


@pytest.mark.parametrize(("norm", "ones"), [("l2", math.sqrt(12)), ("linf", 1.0), ("l1", 12.0)])
@pytest.mark.parametrize("process", [DiffusionProcess.cosine(1000), DiffusionProcess.flow(1000)])
def test_the_radius_by_noise_moves_the_noise_by_eta(process, norm, ones):
    x, t = torch.zeros(3, 3, 4).double(), torch.tensor([0, 400, 999])
    radius = NoiseLevel(process, eta=0.2)(Points(x, t), NORMS[norm])
    assert radius.tolist() == pytest.approx([0.2 * ones * float(process.sigmas[i]) for i in t])
    delta = NORMS[norm].project(gaussian(0, 3, 3, 4) * 99, radius)
    moved = process.absorb(torch.zeros_like(x), t, delta)
    assert NORMS[norm](moved).tolist() == pytest.approx([0.2 * ones] * 3, rel=1e-6)


def test_a_radius_within_levels_is_zero_outside():
    process, t = DiffusionProcess.cosine(1000), torch.arange(1000)
    x = torch.zeros(1000, 2)
    inner = NoiseLevel(process, 0.3)
    radius = Within(inner, process, 0.2, 0.5)(Points(x, t), NORMS["l2"])
    full = inner(Points(x, t), NORMS["l2"])
    expected = [r if 0.2 <= s <= 0.5 else 0.0 for r, s in zip(full.tolist(), process.sigmas.tolist(), strict=True)]
    assert radius.tolist() == expected
    assert 0 < sum(r > 0 for r in expected) < 1000
    low, high = process.sigmas[[200, 500]].tolist()
    t = torch.tensor([199, 200, 500, 501])
    ends = Within(Constant(1.0), process, low, high)(Points(torch.zeros(4, 2).double(), t), NORMS["l2"])
    assert ends.tolist() == [0, 1, 1, 0], "the two levels are perturbed as well"


@pytest.mark.parametrize("norm", ALL_NORMS)
@pytest.mark.parametrize("kind", [NoiseLevel, lambda process, eta: Within(PerDimension(eta), process, 0.0, 0.5)])
def test_a_radius_that_is_not_known_is_not_without_effect(norm, kind, monkeypatch):
    """Look up a time that a GPU does not find: its index is behind the table, where levels are NaN, and so is δ."""
    process = DiffusionProcess.linear(1000)
    monkeypatch.setattr(process, "index", lambda t: t.long())
    radius = kind(process, 0.1)(Points(torch.zeros(2, 4), torch.tensor([1000, 100])), NORMS[norm])
    assert radius.isnan().tolist() == [True, False]
    delta = NORMS[norm].project(gaussian(0, 2, 4).float(), radius)
    assert delta[0].isnan().all()
    assert delta[1].isfinite().all()


def test_radii_by_noise_take_times_between_those_of_a_table():
    process, t = DiffusionProcess.flow(4), torch.tensor([100.0, 333.3, 999.9])
    x = torch.zeros(3, 2)
    radius = NoiseLevel(process, 0.3)
    assert radius(Points(x, t), NORMS["linf"]).tolist() == pytest.approx([0.03, 0.09999, 0.29997])
    inside = Within(radius, process, 0.2, 0.5)(Points(x, t), NORMS["linf"])
    assert inside.tolist() == pytest.approx([0, 0.09999, 0])


def test_outside_its_levels_the_passes_of_free_training_are_clean():
    process, t = DiffusionProcess.cosine(1000), torch.tensor([50, 900])
    adversary = FreeAdversary(step_size=0.3, radius=Within(Constant(9.0), process, 0.0, 0.5))
    for k, delta in enumerate(adversary(torch.zeros(2, 4), t)):
        assert delta[1].tolist() == [0] * 4
        assert delta[0].detach().norm().item() == pytest.approx(0.3 * k)
        delta.grad = torch.ones(2, 4)


@pytest.mark.parametrize("name", ["free", "pgd", "random"])
@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        (0.5, lambda process: Constant(0.5)),
        ({"eta": 0.1}, lambda process: PerDimension(0.1)),
        ({"eta": 0.1, "by_noise": True}, lambda process: NoiseLevel(process, 0.1)),
        ({"eta": 0.1, "sampler_steps": 20}, lambda process: SamplerDistance(process, 0.1, 20)),
        ({"value": 1.0, "within": [0.1, 0.5]}, lambda process: Within(Constant(1.0), process, 0.1, 0.5)),
    ],
)
def test_an_adversary_is_what_its_recipe_says(name, radius, expected):
    process = DiffusionProcess.cosine(100)
    fields = {"name": name, "steps": 4, "step_size": 0.7, "norm": "linf", "radius": radius, "ramp": 3}
    built = ADVERSARIES[name].model_validate(fields).build(process)
    assert (built.steps, built.step_size, built.norm.name) == (4, 0.7, "linf")
    assert built.radius == Ramp(expected(process), 3)


@pytest.mark.parametrize("inner", [Constant(2.0), PerDimension(0.5)])
def test_a_ramp_multiplies_any_radius(inner):
    x = torch.zeros(1, 16)
    full = inner(Points(x), NORMS["l2"]).item()
    ramp = Ramp(inner, steps=4)
    sizes = [ramp(Points(x, None, step), NORMS["l2"]).item() / full for step in (0, 1, 3, 4, 100)]
    assert sizes == pytest.approx([0.25, 0.5, 1, 1, 1])
    assert ramp(Points(x, None, torch.tensor(100)), NORMS["l2"]).item() == pytest.approx(full), "as in a recording"


def test_radii_say_what_they_need():
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="needs t"):
        SamplerDistance(DiffusionProcess.cosine(100), 0.1)(Points(x), NORMS["l2"])
    with pytest.raises(ValueError, match="needs t"):
        NoiseLevel(DiffusionProcess.cosine(100), 0.1)(Points(x), NORMS["l2"])
    with pytest.raises(ValueError, match="needs t"):
        Within(Constant(1.0), DiffusionProcess.cosine(100), 0, 1)(Points(x), NORMS["l2"])
    with pytest.raises(ValueError, match="levels"):
        Within(Constant(1.0), DiffusionProcess.cosine(100), 0.5, 0.1)
    with pytest.raises(ValueError, match="training_step"):
        Ramp(Constant(1.0), 5)(Points(x), NORMS["l2"])
    with pytest.raises(ValueError, match="steps"):
        SamplerDistance(DiffusionProcess.cosine(10), 0.1, steps=11)


@pytest.mark.parametrize("bad", [-0.1, math.nan])
def test_radii_out_of_range_are_refused(bad):
    """A negative radius would turn δ around."""
    process = DiffusionProcess.cosine(100)
    by_time = [lambda eta: SamplerDistance(process, eta), lambda eta: NoiseLevel(process, eta)]
    for schedule in (Constant, PerDimension, *by_time):
        with pytest.raises(ValueError, match="at least 0"):
            schedule(bad)
    with pytest.raises(ValueError, match="at least 1"):
        Ramp(Constant(1.0), 0)


# -- adversaries ---------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A network that counts its forwards, and the backwards that reach its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.forwards = self.backwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        output = self.layer(x).tanh()
        output.register_hook(self._count)
        return output

    def _count(self, grad: torch.Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_free_makes_k_forwards_and_k_backwards_and_no_more(steps):
    model, x = Counting(), torch.randn(4, 6)
    optimizer = torch.optim.AdamW(model.parameters())
    for delta in FreeAdversary(steps)(x):
        model(x + delta).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.forwards, model.backwards) == (steps, steps)


@pytest.mark.parametrize("steps", [1, 3])
def test_pgd_makes_no_gradient_of_a_parameter_and_one_update(steps):
    model, x = Counting(), torch.randn(4, 6)
    adversary = PGDAdversary(steps, step_size=0.1)
    assert adversary.passes == 1
    seen = 0
    for delta in adversary(x, loss=lambda delta: model(x + delta).square().mean(1)):
        assert all(p.grad is None for p in model.parameters())
        assert (model.forwards, model.backwards) == (steps, steps)
        model(x + delta).square().mean().backward()
        seen += 1
    assert seen == 1
    assert (model.forwards, model.backwards) == (steps + 1, steps + 1)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reduced", [torch.mean, torch.sum, lambda losses: losses])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4])
def test_pgd_in_half_precision_is_that_of_float32(factor, reduced):
    """Whatever the loss is a mean or a sum of: the gradient of a mean over an image underflows."""
    x, weight = gaussian(5, 4, 3, 32, 32).float(), gaussian(6, 3, 32, 32).float()

    def loss(dtype: torch.dtype, delta: torch.Tensor) -> torch.Tensor:
        output = (weight.to(dtype) * (x + delta).to(dtype)).tanh()
        return reduced(factor * (output.float() - 0.3).square().flatten(1).mean(1))

    adversary = PGDAdversary(3, step_size=1.0)
    (half,) = adversary(x, loss=lambda delta: loss(torch.float16, delta))
    (full,) = adversary(x, loss=lambda delta: loss(torch.float32, delta))
    assert adversary.skipped == 0
    assert torch.cosine_similarity(half.flatten(1), full.flatten(1)).min() > 0.9999


def test_the_scale_of_pgd_changes_no_digit():
    model, x = Counting(), torch.randn(4, 6)
    adversary, loss = PGDAdversary(3, step_size=0.1), lambda delta: model(x + delta).square().mean(1)
    (found,) = adversary(x, loss=loss)
    expected = torch.zeros_like(x)
    for _ in range(3):
        expected.requires_grad_()
        (grad,) = torch.autograd.grad(loss(expected).sum(), expected)
        expected = expected.detach() + 0.1 * adversary.norm.ascent(grad)
    assert torch.equal(found, expected)


def test_a_loss_of_zero_or_nan_leaves_delta_and_is_counted():
    x = torch.randn(2, 3)
    adversary = PGDAdversary(1)
    (delta,) = adversary(x, loss=lambda delta: (delta * torch.tensor([[0.0], [math.nan]])).sum(1))
    assert delta.tolist() == [[0.0] * 3] * 2
    assert adversary.skipped == 2


def test_pgd_keeps_the_gradients_that_were_there():
    """As between the microbatches of one update."""
    model, x = Counting(), torch.randn(4, 6)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    list(PGDAdversary(3)(x, loss=lambda delta: model(x + delta).square().mean(1)))
    assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_pgd_finds_the_worst_point_of_a_linear_loss(norm):
    weight, x = gaussian(3, 10), gaussian(4, 2, 10)
    (delta,) = PGDAdversary(40, 0.05, radius=1.0, norm=norm)(x, loss=lambda delta: (x + delta) @ weight)
    worst = np.linalg.norm(weight.numpy(), ord=DUAL[norm])
    assert ((delta @ weight) / worst).tolist() == pytest.approx([1, 1], rel=1e-6)


@pytest.mark.parametrize("norm", ALL_NORMS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_pgd_climbs_a_convex_loss(norm, steps):
    """Along ⟨∇L, d⟩ = ‖∇L‖_* a convex loss rises by at least that much times the step; also where autograd is off."""
    target, x, seen = gaussian(0, 4, 8), gaussian(1, 4, 8), []

    def loss(delta: torch.Tensor) -> torch.Tensor:
        values = (x + delta - target).square().sum(1)
        seen.append((values.detach(), 2 * (x + delta - target).detach()))
        return values

    with torch.no_grad():
        (delta,) = PGDAdversary(steps, step_size=0.5, norm=norm)(x, loss=loss)
    assert len(seen) == steps
    loss(delta.detach())
    for (before, gradient), (after, _) in itertools.pairwise(seen):
        slope = np.linalg.norm(gradient.numpy(), ord=DUAL[norm], axis=1)
        assert (after.numpy() >= before.numpy() + 0.5 * slope - 1e-9).all()


def test_free_raises_the_loss_on_a_frozen_model():
    target, x, losses = gaussian(0, 4, 8), gaussian(1, 4, 8), []
    for delta in FreeAdversary(steps=4, step_size=0.5)(x):
        loss = (x + delta - target).square().sum(1)
        loss.mean().backward()
        losses.append(loss.detach())
    assert all((later > earlier).all() for earlier, later in itertools.pairwise(losses))


def test_free_without_backward_says_so():
    with pytest.raises(RuntimeError, match="backward"):
        list(FreeAdversary(steps=2)(torch.zeros(1, 2)))


def test_pgd_without_a_loss_says_so():
    with pytest.raises(ValueError, match="loss"):
        list(PGDAdversary()(torch.zeros(1, 2)))


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_random_has_the_sizes_of_free_and_one_direction(norm):
    generator = torch.Generator().manual_seed(0)
    deltas = list(RandomAdversary(4, 0.5, radius=1.2, norm=norm, generator=generator)(torch.zeros(5, 20)))
    for k, delta in enumerate(deltas):
        torch.testing.assert_close(NORMS[norm](delta), torch.full((5,), min(0.5 * k, 1.2)))
    assert torch.nn.functional.cosine_similarity(deltas[1], deltas[2]).tolist() == pytest.approx([1] * 5)
    again = list(RandomAdversary(4, 0.5, 1.2, norm, generator.manual_seed(0))(torch.zeros(5, 20)))
    assert all(torch.equal(a, b) for a, b in zip(deltas, again, strict=True))


@pytest.mark.parametrize(("norm", "variance"), [("l2", 1 / 5), ("linf", 1.0), ("l1", 1 / 5)])
def test_random_directions_are_uniform(norm, variance):
    generator = torch.Generator().manual_seed(1)
    delta = list(RandomAdversary(2, 1.0, norm=norm, generator=generator)(torch.zeros(40_000, 5)))[1].double()
    assert delta.mean(0).abs().max() < 0.02
    torch.testing.assert_close(torch.cov(delta.T), variance * torch.eye(5).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_a_section_has_an_example_with_the_passes_of_every_process(name):
    radius = {"eta": 0.1, "sampler_steps": 2000}
    section = ADVERSARIES[name].model_validate({"name": name, "steps": 4, "ramp": 3, "radius": radius})
    built, example = section.build(DiffusionProcess.cosine(2000)), section.example()
    assert (example.passes, example.backward_passes) == (built.passes, built.backward_passes)
    assert built.passes == {"none": 1, "free": 4, "pgd": 1, "random": 4}[name]
    assert built.backward_passes == {"none": 1, "free": 1, "pgd": 5, "random": 1}[name]


def test_an_adversary_is_the_perturbations_that_it_makes_of_points():
    """A call checks the points at once, and passes all of its arguments on."""
    given = []

    class Once(Adversary):
        def perturb(self, points, loss):
            given.append((points.x_t, points.t, points.training_step, loss))
            yield points.x_t + 1

    x_t, t, loss = torch.zeros(2, 3), torch.tensor([1, 2]), torch.sum
    (delta,) = Once(steps=1)(x_t, t, loss=loss, training_step=7)
    assert torch.equal(delta, torch.ones(2, 3))
    assert [one is other for one, other in zip(given[0], (x_t, t, 7, loss), strict=True)] == [True] * 4
    with pytest.raises(InputError, match="add the noise in float32"):
        Once(steps=1)(x_t.half())
    with pytest.raises(NotImplementedError, match="Adversary does not implement perturb"):
        next(Adversary(steps=1)(x_t))


def test_none_is_one_pass_at_zero():
    (delta,) = NoAdversary()(torch.ones(2, 3))
    assert not delta.any()
    assert NoAdversary().passes == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.inf}, "step_size"),
        ({"norm": "l3"}, "l3"),
        ({"radius": -1.0}, "radius"),
        ({"radius": math.nan}, "radius"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        FreeAdversary(**arguments)


# -- at the radius ----------------------------------------------------------------------------------------------


def test_how_many_samples_are_at_their_radius():
    x_t = torch.zeros(4, 1, 2, 2)
    delta = torch.stack([torch.full((1, 2, 2), value) for value in (0.5, 0.49, 0.0, 0.5 * (1 - 1e-6))])  # ‖δ‖ = 1, …
    assert FreeAdversary(3, 0.1, 1.0).at_radius(delta, x_t, None, None).tolist() == [2, 4]
    assert FreeAdversary(3, 0.1, 1.0, "linf").at_radius(delta, x_t, None, None).tolist() == [0, 4]
    assert FreeAdversary(3, 0.1, 0.0).at_radius(delta, x_t, None, None).tolist() == [0, 0]
    assert FreeAdversary(3, 0.1).at_radius(delta, x_t, None, None) is None


def test_the_number_of_ascents():
    assert (FreeAdversary(3).ascents, PGDAdversary(3).ascents, FreeAdversary(1).ascents) == (2, 3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adversary", [FreeAdversary(), PGDAdversary(), RandomAdversary()])
def test_points_that_would_round_delta_away_are_refused(adversary, dtype):
    x_t = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    delta = 0.1 * torch.ones_like(x_t) / 64
    assert (x_t + delta == x_t).float().mean() > (0.5 if dtype == torch.bfloat16 else 0)
    with pytest.raises(InputError, match=r"torch\.b?float16.*add the noise in float32"):
        next(adversary(x_t, loss=lambda delta: delta.sum()))


def test_under_autocast_rounding_keeps_delta_on_average():
    """Points in float32 lie between the numbers of bfloat16, so that a small δ moves a part of them by a whole step."""
    x_t = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    moved = (x_t + 1e-3).bfloat16().double() - x_t.bfloat16().double()
    assert moved.mean().item() == pytest.approx(1e-3, rel=0.05)
    on_grid = x_t.bfloat16()
    assert (on_grid.float() + 1e-3).bfloat16().double().sub(on_grid.double()).mean().item() < 0.8e-3


def test_none_takes_points_of_any_precision():
    assert next(NoAdversary()(torch.ones(2, 3, dtype=torch.bfloat16))).abs().sum() == 0
