"""The consistency loss: what depends on what, the solvers' orders, the schedules as printed, the target network."""

from __future__ import annotations

import copy
import math
import sys
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustdiff import ConsistencyObjective, FreeAdversary, PGDAdversary, RandomAdversary
from robustdiff.errors import InputError
from robustdiff.objectives.consistency import (
    DISTANCES,
    SOLVERS,
    ConsistencyConfig,
    DoublingScales,
    FixedScales,
    GrowingScales,
)
from robustdiff.objectives.preconditioning import karras_sigmas
from robustdiff.objectives.timesteps import LogNormal

STD = 0.6


class Network(nn.Module):
    """Small, smooth, and dependent on everything that it is called with; counts its calls."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(2, 2, 3, padding=1).double()
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x, t, class_labels=None):
        self.calls += 1
        shift = 0 if class_labels is None else class_labels.double()[:, None, None, None]
        return self.dropout(torch.tanh(self.convolution(x) + t.double()[:, None, None, None] / 1000 + shift))


class Teacher:
    """D of N(0, STD² I); counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x, sigma, **condition):
        self.calls += 1
        s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        return STD**2 / (STD**2 + s**2) * x


def tensors(n=4):
    generator = torch.Generator().manual_seed(1)
    x0, noise, delta = (torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x0.clamp(-1, 1), noise, 0.3 * delta]


def boundary(network, x, sigma, **condition):
    """f written out."""
    s = sigma[:, None, None, None]
    size = (s**2 + 0.25).sqrt()
    out = network(x / size, 250 * sigma.log(), **condition)
    return 0.25 / ((s - 0.002) ** 2 + 0.25) * x + (s - 0.002) * 0.5 / size * out


N_INDEX = torch.tensor([0, 4, 9, 16])


# -- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["solver", "student"])
@pytest.mark.parametrize("kind", ["heun", "euler", "training"])
def test_the_loss_written_out(kind, perturb):
    student, target = Network(0), Network(1)
    solver = "heun" if kind == "training" else kind
    teacher = None if kind == "training" else Teacher()
    objective = ConsistencyObjective(target, teacher, 18, metric="l2", perturb=perturb, solver=solver)
    x0, noise, delta = tensors()
    labels = torch.tensor([0, 1, 2, 3])
    losses = objective(student, objective.draw(x0, t=N_INDEX, noise=noise, class_labels=labels), delta)
    sigmas = karras_sigmas(18)
    upper, lower = sigmas[N_INDEX + 1], sigmas[N_INDEX]
    u, w = upper[:, None, None, None], lower[:, None, None, None]
    x = x0 + u * noise
    slope = noise if teacher is None else x / u * (1 - STD**2 / (STD**2 + u**2))
    solved = x + (w - u) * slope
    if kind == "heun":
        second = solved / w * (1 - STD**2 / (STD**2 + w**2))
        solved = x + (w - u) * (slope + second) / 2
    if perturb == "solver":
        solved = solved + delta
    else:
        x = x + delta
    end = boundary(student, x, upper, class_labels=labels)
    goal = boundary(target, solved, lower, class_labels=labels)
    torch.testing.assert_close(losses["loss"], (end - goal).square().mean((1, 2, 3)))
    assert torch.equal(losses["loss"], losses["distance"])


@pytest.mark.parametrize(("solver", "evaluations"), [("heun", 2), ("euler", 1)])
def test_the_teacher_is_called_in_the_draw_only(solver, evaluations):
    teacher, student, target = Teacher(), Network(0), Network(1)
    objective = ConsistencyObjective(target, teacher, solver=solver)
    x0, *_ = tensors()
    draw = objective.draw(x0)
    assert teacher.calls == evaluations
    for delta in FreeAdversary(steps=4, step_size=0.1)(draw.x_t, draw.t):
        objective(student, draw, delta)["loss"].mean().backward()
    assert teacher.calls == evaluations
    assert student.calls == target.calls == 4


@pytest.mark.parametrize("perturb", ["solver", "student"])
def test_one_backward_fills_the_gradients_of_the_student_and_of_delta(perturb):
    student, target = Network(0), Network(1)
    objective = ConsistencyObjective(target, Teacher(), perturb=perturb)
    x0, noise, delta = tensors()
    draw = objective.draw(x0, t=N_INDEX, noise=noise)
    delta.requires_grad_()
    objective(student, draw, delta)["loss"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(p.grad is None for p in target.parameters())
    assert delta.grad is not None
    for index in [(0, 0, 0, 0), (1, 1, 2, 3), (3, 0, 4, 4)]:
        step = torch.zeros_like(delta)
        step[index] = 1e-6
        with torch.no_grad():
            up, down = (objective(student, draw, delta + sign * step)["loss"].sum() for sign in (1, -1))
        assert delta.grad[index].item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-4, abs=1e-9)


def test_without_a_gradient_to_delta_the_target_is_not_recorded():
    student, target = Network(0), Network(1)
    recorded = []
    target.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    objective = ConsistencyObjective(target, Teacher())
    x0, noise, delta = tensors()
    draw = objective.draw(x0, t=N_INDEX, noise=noise)
    objective(student, draw)
    objective(student, draw, delta)
    objective(student, draw, delta.requires_grad_())
    assert recorded == [False, False, True]


def test_the_target_is_recorded_only_for_a_perturbation_that_will_be_moved():
    student, target = Network(0), Network(1)
    recorded = []
    target.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    objective = ConsistencyObjective(target, Teacher())
    draw = objective.draw(tensors()[0])
    for k, delta in enumerate(FreeAdversary(steps=3, step_size=0.1)(draw.x_t, draw.t)):
        objective(student, draw, delta if k < 2 else delta.detach())["loss"].mean().backward()
    assert recorded == [True, True, False]


@pytest.mark.parametrize("perturb", ["solver", "student"])
@pytest.mark.parametrize("kind", [FreeAdversary, PGDAdversary])
def test_adversaries_ascend_on_it(kind, perturb):
    student, target = Network(0), Network(1)
    objective = ConsistencyObjective(target, Teacher(), perturb=perturb)
    x0, noise, _ = tensors()
    draw = objective.draw(x0, t=torch.tensor([2, 4, 9, 12]), noise=noise)
    plain = objective(student, draw)["loss"]
    adversary = kind(steps=3, step_size=0.05, radius=0.1)
    for delta in adversary(draw.x_t, draw.t, loss=lambda d: objective(student, draw, d)["loss"]):
        loss = objective(student, draw, delta)["loss"]
        if delta.requires_grad:
            loss.sum().backward()
    assert (loss > plain).all()
    assert (delta.detach().flatten(1).norm(dim=1) <= 0.1 + 1e-9).all()
    *_, random = RandomAdversary(steps=3, step_size=0.05, radius=0.1)(draw.x_t, draw.t)
    assert (loss > objective(student, draw, random)["loss"]).all()


def test_the_perturbed_point_and_the_index_of_its_level():
    x0, noise, _ = tensors()
    sigmas = karras_sigmas(18)
    for perturb, index in (("solver", N_INDEX), ("student", N_INDEX + 1)):
        draw = ConsistencyObjective(Network(1), perturb=perturb).draw(x0, t=N_INDEX, noise=noise)
        assert torch.equal(draw.t, index)
        torch.testing.assert_close(draw.x_t, x0 + sigmas[index][:, None, None, None] * noise)


def test_the_target_drops_out_what_the_student_does():
    student = Network(0, dropout=0.5).train()
    target = copy.deepcopy(student)
    outputs = []
    for network in (student, target):
        network.register_forward_hook(lambda module, inputs, output: outputs.append(output == 0))
    objective = ConsistencyObjective(target, Teacher())
    x0, noise, _ = tensors()
    draw = objective.draw(x0, t=N_INDEX, noise=noise)
    torch.manual_seed(5)
    objective(student, draw)
    objective(student, draw)
    assert 0.3 < outputs[0].double().mean() < 0.7
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[2]), "the next pass has a dropout of its own"


class WithFunction(Network):
    """Dropout by a function, of which the network's modules tell nothing."""

    def forward(self, x, t, class_labels=None):
        return nn.functional.dropout(super().forward(x, t, class_labels), 0.5, self.training)


class Dropless(Network):
    """A network without dropout, in spite of its name and its attribute p."""

    p = 0.5


@pytest.mark.parametrize(
    ("network", "mode", "recordable"),
    [
        (WithFunction(), True, False),
        (WithFunction(), False, True),
        (Network(dropout=0.5), True, False),
        (Network(dropout=0.0), True, True),
        (Dropless(), True, True),
    ],
    ids=["function", "function-eval", "layer", "layer-0", "dropless"],
)
@pytest.mark.parametrize("perturb", ["solver", "student"])
def test_dropout_is_observed_and_refused_in_a_recording(network, mode, recordable, perturb, monkeypatch):
    student = copy.deepcopy(network).train(mode)
    objective = ConsistencyObjective(copy.deepcopy(student), Teacher(), perturb=perturb)
    x0, noise, _ = tensors()
    draw = objective.draw(x0, t=N_INDEX, noise=noise)
    delta = torch.zeros_like(x0).requires_grad_()
    torch.manual_seed(5)
    eager = objective(student, draw, delta)["loss"]
    assert objective.unrecordable() is None, "which is asked before anything is called"
    monkeypatch.setattr("robustdiff.objectives.consistency._recorded", lambda device: True)
    if recordable:
        assert torch.equal(objective(student, draw, delta)["loss"], eager)
    else:
        with pytest.raises(RuntimeError, match="the target drops out what the student does"):
            objective(student, draw, delta)


def test_the_functional_dropout_of_the_target_is_the_students():
    student = WithFunction().train()
    objective = ConsistencyObjective(copy.deepcopy(student), scales=2, sigma_min=1.0, sigma_max=1.0 + 1e-9)
    x0, noise, _ = tensors()
    draw = objective.draw(x0, noise=noise)
    torch.manual_seed(5)
    assert objective(student, draw)["distance"].max() < 1e-12, "the same network at two levels that nearly coincide"


def test_a_recording_needs_a_call_before_it(monkeypatch):
    objective = ConsistencyObjective(Network().train(), Teacher())
    x0, noise, _ = tensors()
    draw = objective.draw(x0, t=N_INDEX, noise=noise)
    monkeypatch.setattr("robustdiff.objectives.consistency._recorded", lambda device: True)
    with pytest.raises(RuntimeError, match="drops out"):
        objective(Network(), draw)


def test_weights():
    x0, noise, _ = tensors()
    sigmas = karras_sigmas(18)
    given = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    objective = ConsistencyObjective(Network(1), weighting="inverse-gap")
    losses = objective(Network(0), objective.draw(x0, t=N_INDEX, noise=noise, weight=given))
    expected = given * losses["distance"] / (sigmas[N_INDEX + 1] - sigmas[N_INDEX])
    torch.testing.assert_close(losses["loss"], expected)


def test_weights_multiply_the_loss_also_where_the_levels_are_drawn():
    given = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    x0, *_ = tensors()
    for more in ({}, {"weighting": "inverse-gap", "times": (-1.1, 2.0)}):
        objective = ConsistencyObjective(Network(1), **more)
        draw = objective.draw(x0, weight=given)
        losses = objective(Network(0), draw)
        gap = draw.upper - draw.lower if more else 1
        torch.testing.assert_close(losses["loss"], given * losses["distance"] / gap)


@pytest.mark.parametrize("teacher", [None, Teacher()])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_levels_and_weights_of_bfloat16_points_are_not_rounded(solver, teacher):
    """At 1281 scales many neighbouring levels are the same number in bfloat16."""
    times, points = [], []

    def network(x, t):
        times.append(t)
        points.append(x.dtype)
        return torch.zeros_like(x)

    objective = ConsistencyObjective(
        Network(1), teacher and (lambda x, sigma: teacher(x, sigma).to(x.dtype)), 1281, solver=solver,
        weighting="inverse-gap",
    )  # fmt: skip
    objective.target = network
    x0, t = torch.zeros(1280, 1, 2, 2, dtype=torch.bfloat16), torch.arange(1280)
    draw = objective.draw(x0, t=t)
    sigmas = karras_sigmas(1281)
    assert draw.weight.dtype == torch.float32
    torch.testing.assert_close(draw.weight.double(), 1 / (sigmas[1:] - sigmas[:-1]), rtol=1e-3, atol=0)
    assert draw.x_next.dtype == draw.solved.dtype == torch.bfloat16
    losses = objective(network, draw)
    assert losses["loss"].isfinite().all()
    assert set(points) == {torch.bfloat16}
    for seen, levels in zip(times, (sigmas[1:], sigmas[:-1]), strict=True):
        assert seen.dtype == torch.float32
        torch.testing.assert_close(seen.double(), 250 * levels.log(), rtol=1e-5, atol=1e-3)


def test_pairs_of_levels_are_drawn_uniformly_or_by_their_log_normal_share():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(8000, 1)
    t = ConsistencyObjective(Network(1), scales=5).draw(x0, generator=generator).t
    assert torch.bincount(t).tolist() == pytest.approx([2000] * 4, abs=4 * 2000**0.5)
    objective = ConsistencyObjective(Network(1), scales=5, times=(-1.1, 2.0))
    assert isinstance(objective.timesteps, LogNormal)
    t = objective.draw(x0, generator=generator).t
    logs = karras_sigmas(5).log()
    z = torch.distributions.Normal(-1.1, 2.0).cdf(logs)
    expected = (z[1:] - z[:-1]) / (z[-1] - z[0])
    torch.testing.assert_close(torch.bincount(t) / 8000, expected.float(), atol=0.025, rtol=0)


@pytest.mark.parametrize("argument", ["solver", "metric", "perturb", "weighting"])
def test_unknown_names_are_refused(argument):
    with pytest.raises(ValueError, match=f"unknown {argument} 'none'"):
        ConsistencyObjective(Network(1), **{argument: "none"})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        ConsistencyObjective(Network(1), decay=decay)
    for kind in (GrowingScales, DoublingScales):
        with pytest.raises(ValueError, match="decay"):
            kind(2, 10, decay, 100)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FixedScales, (1, 0.5)),
        (GrowingScales, (1, 10, 0.5, 100)),
        (GrowingScales, (5, 4, 0.5, 100)),
        (GrowingScales, (2, 10, 0.5, 0)),
        (DoublingScales, (0, 10, 0.5, 100)),
        (DoublingScales, (5, 4, 0.5, 100)),
        (DoublingScales, (2, 10, 0.5, 0)),
    ],
)
def test_scales_out_of_their_range_are_refused(kind, arguments):
    with pytest.raises(ValueError, match=r"start ≤ end|scales must be at least 2"):
        kind(*arguments)


# -- solvers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_local_error_has_the_solvers_order(solver, order):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    errors = []
    for h in (0.02, 0.01):
        lower = sigma * (1 - h)
        exact = x * ((STD**2 + lower**2) / (STD**2 + sigma**2)).sqrt()[:, None]
        errors.append((SOLVERS[solver](Teacher(), x, sigma, lower) - exact).norm(dim=1))
    assert torch.log2(errors[0] / errors[1]).tolist() == pytest.approx([order] * 3, abs=0.1)


# -- distances ------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.floats(1e-6, 10.0))
def test_distances(n, size):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, n, 2, 3, 3)) * size
    difference = (a - b).reshape(n, -1)
    c = 0.00054 * math.sqrt(18)
    expected = {
        "l1": np.abs(difference).mean(1),
        "l2": (difference**2).mean(1),
        "pseudo-huber": np.sqrt((difference**2).sum(1) + c**2) - c,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(DISTANCES[name]()(torch.from_numpy(a), torch.from_numpy(b)), value, rtol=1e-6)


def test_the_huber_distance_is_smooth_at_zero():
    a = torch.zeros(1, 4, requires_grad=True)
    DISTANCES["pseudo-huber"]()(a, torch.zeros(1, 4)).sum().backward()
    assert torch.equal(a.grad, torch.zeros(1, 4))


def test_lpips_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match="install the extra lpips"):
        ConsistencyObjective(Network(1), metric="lpips")


def test_lpips_without_its_weights_is_named(monkeypatch):
    def offline(**arguments):
        raise URLError("no route to host")

    stub = ModuleType("lpips")
    stub.LPIPS = offline
    monkeypatch.setitem(sys.modules, "lpips", stub)
    with pytest.raises(InputError, match=r"weights of VGG-16 .*no route to host.*pseudo-huber"):
        DISTANCES["lpips"]()


@pytest.mark.parametrize(("side", "seen"), [(8, 224), (255, 224), (256, 256)])
def test_lpips_is_given_colour_images_and_small_ones_at_224(monkeypatch, side, seen):
    class LPIPS(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.net = net

        def forward(self, a, b):
            assert self.net == "vgg"
            assert a.shape[1:] == b.shape[1:] == (3, seen, seen)
            return self.scale * (a - b).square().mean((1, 2, 3), keepdim=True)

    stub = ModuleType("lpips")
    stub.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", stub)
    distance = DISTANCES["lpips"]()
    a = torch.full((2, 1, side, side), 0.5, requires_grad=True)
    value = distance(a, torch.zeros(2, 1, side, side))
    torch.testing.assert_close(value, torch.full((2,), 0.5))
    value.sum().backward()
    assert a.grad is not None
    assert not any(p.requires_grad for p in distance.network.parameters())


# -- schedules and the target network -------------------------------------------------------------------------


def test_the_growing_schedule_is_the_printed_one():
    schedule = GrowingScales(2, 150, 0.9, 1000)
    # N − 1 = ⌈√(22797 k/1000 + 4) − 1⌉ by hand, such as ⌈4.18⌉ for k = 1, and μ = 0.9^(2/N).
    for k, N, decay in [
        (0, 2, 0.9),
        (1, 6, 0.965489),
        (17, 20, 0.989519),
        (500, 107, 0.998033),
        (999, 151, 0.998605),
        (1000, 151, 0.998605),
        (2000, 151, 0.998605),
    ]:
        assert schedule(k) == (N, pytest.approx(decay, abs=1e-6))
    assert all(schedule(k + 1)[0] >= schedule(k)[0] for k in range(1000))
    assert GrowingScales(2, 10, 0.0, 5)(3)[1] == 0


def test_the_doubling_schedule_is_the_printed_one():
    schedule = DoublingScales(10, 1280, 0.0, 400_000)
    changes = [k for k in range(0, 400_001, 1000) if k and schedule(k) != schedule(k - 1000)]
    assert changes == [50_000 * i for i in range(1, 8)]
    assert [schedule(k)[0] for k in (0, *changes, 400_000)] == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert schedule(10**9) == (1281, 0.0)
    # ⌊25/10⌋ = 2 is one doubling, in the middle.
    assert [DoublingScales(10, 25, 0.0, 1000)(k)[0] for k in (0, 499, 500, 999)] == [11, 11, 21, 21]


@pytest.mark.parametrize(
    ("kind", "end", "steps", "levels"),
    [
        ("growing", 19, 1, 10),
        ("growing", 19, 7, 19),
        ("growing", 19, 1000, 20),
        ("growing", 150, 7, 140),
        ("growing", 150, 1000, 151),
        ("doubling", 10, 7, 11),
        ("doubling", 25, 1, 11),
        ("doubling", 25, 1000, 21),
        ("doubling", 150, 1000, 151),
    ],
)
def test_a_saved_model_has_the_levels_of_the_last_update(kind, end, steps, levels):
    config = ConsistencyConfig(schedule=kind, start_scales=10, scales=end)
    objective = ConsistencyObjective(Network(1), scales=config.scale_schedule(steps))
    objective.load_state({"updates": steps - 1})
    trained = len(objective.process)
    objective.after_update(Network(0))
    assert (trained, len(objective.process), config.last_levels(steps)) == (levels,) * 3


def test_the_target_follows_the_student_by_the_decay():
    student, target = Network(0), Network(1)
    start = [p.clone() for p in target.parameters()]
    objective = ConsistencyObjective(target, decay=0.9)
    values = []
    for k in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * (k + 1))
        values.append([p.detach().clone() for p in student.parameters()])
        objective.after_update(student)
    for i, p in enumerate(target.parameters()):
        expected = 0.9**3 * start[i] + 0.1 * (0.81 * values[0][i] + 0.9 * values[1][i] + values[2][i])
        torch.testing.assert_close(p, expected)


def test_a_decay_of_zero_is_the_student_itself():
    student, target = Network(0), Network(1)
    ConsistencyObjective(target, decay=0.0).after_update(student)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), target.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_the_levels_grow_with_the_updates_and_are_restored():
    student, target = Network(0), Network(1)
    start = target.convolution.weight.clone()
    objective = ConsistencyObjective(target, scales=GrowingScales(2, 9, 0.9, 20))
    counts = [len(objective.process)]
    for k in range(20):
        objective.after_update(student)
        if k == 0:  # by the decay 0.9 of the two levels that the update was made at
            torch.testing.assert_close(target.convolution.weight, 0.9 * start + 0.1 * student.convolution.weight)
        counts.append(len(objective.process))
        assert counts[-1] == objective.timesteps.T + 1
    assert counts == [2, 3, 4, 5, 5, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10]
    again = ConsistencyObjective(Network(1), scales=GrowingScales(2, 9, 0.9, 20))
    again.load_state(objective.state())
    assert len(again.process) == 10
    assert FixedScales(18, 0.5)(10**6) == (18, 0.5)
