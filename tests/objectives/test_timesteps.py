"""Importance sampling of times: the weighted loss is unbiased, and the history is what it should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logit, ndtr
from scipy.stats import kstest, norm

from robustdiff.errors import InputError
from robustdiff.objectives.denoising import DenoisingConfig
from robustdiff.objectives.timesteps import (
    TIMESTEPS,
    Continuous,
    LogNormal,
    LogNormalLevels,
    LossSecondMoment,
    Uniform,
    uniform,
)
from robustdiff.process import DiffusionProcess


def filled(T: int = 6, history: int = 3) -> tuple[LossSecondMoment, np.ndarray]:
    """A sampler that has seen ``history`` losses at every time, and those losses."""
    sampler = LossSecondMoment(T, history=history)
    losses = np.random.default_rng(0).uniform(0.1, 2, (T, history)) * np.arange(1, T + 1)[:, None]
    for column in losses.T:
        sampler.update(torch.arange(T), torch.from_numpy(column))
    return sampler, losses


def test_probabilities_are_the_root_of_the_second_moment():
    sampler, losses = filled()
    moments = np.sqrt((losses**2).mean(1))
    expected = 0.999 * moments / moments.sum() + 0.001 / 6
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)


def test_times_are_drawn_with_their_probabilities_and_weighted_back():
    sampler, _ = filled()
    t, weight = sampler.draw(200_000, torch.Generator().manual_seed(0))
    assert weight is not None
    counts = np.bincount(t, minlength=6) / len(t)
    np.testing.assert_allclose(counts, sampler.probabilities, atol=0.005)
    loss_at = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    assert (weight * loss_at[t]).mean().item() == pytest.approx(loss_at.mean().item(), rel=0.01)


def test_until_every_time_has_its_losses_draws_are_uniform():
    sampler = LossSecondMoment(5, history=2)
    for _ in range(2):
        sampler.update(torch.arange(4), torch.ones(4))
    t, weight = sampler.draw(50, torch.Generator().manual_seed(1))
    expected, _ = Uniform(5).draw(50, torch.Generator().manual_seed(1))
    assert weight is None
    assert torch.equal(t, expected)


def test_the_oldest_loss_is_forgotten_and_what_is_not_finite_left_out():
    sampler = LossSecondMoment(1, history=2)
    for loss in (5.0, 1.0, float("nan"), float("inf"), 3.0):
        sampler.update(torch.tensor([0]), torch.tensor([loss]))
    assert sorted(sampler.state_dict()["losses"][0].tolist()) == [1.0, 3.0]


def test_a_state_continues_where_it_was():
    sampler, _ = filled()
    other = LossSecondMoment(6, history=3)
    other.load_state_dict(sampler.state_dict())
    for s in (sampler, other):
        s.update(torch.tensor([2]), torch.tensor([7.0]))
    assert torch.equal(sampler.probabilities, other.probabilities)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [(100.0, 0.1, "never falls between the levels 0.002 and 80"), (-1.1, 0.0, "std"), (-1.1, -1.0, "std")],
)
def test_a_distribution_that_is_nowhere_on_the_levels_is_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        LogNormal(torch.tensor([0.002, 1.0, 80.0]), mean, std)


def test_a_batch_is_remembered_in_its_order_one_loss_after_the_other():
    """Also a time that comes more often in it than the history is long."""
    T, history = 3, 4
    sampler, generator = LossSecondMoment(T, history), np.random.default_rng(0)
    expected, counts = np.zeros((T, history)), np.zeros(T, np.int64)
    for size in (1, 2, 30, 5, 30):
        times, losses = generator.integers(T, size=size), generator.normal(size=size)
        losses[generator.random(size) < 0.2] = np.inf
        for time, loss in zip(times, losses, strict=True):
            if np.isfinite(loss):
                expected[time, counts[time] % history] = loss
                counts[time] += 1
        sampler.update(torch.from_numpy(times), torch.from_numpy(losses))
        state = sampler.state_dict()
        assert np.array_equal(state["losses"], expected)
        assert np.array_equal(state["counts"], counts)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_times_of_a_flow_are_drawn_at_all_fractions(shift, monkeypatch):
    """σ = s u/(1 + (s − 1) u) of a uniform u, in (0, 1]: its inverse is uniform again."""
    process = DiffusionProcess.flow(5, shift)
    sampler = uniform(process)
    assert isinstance(sampler, Continuous)
    t, weight = sampler.draw(20_000, torch.Generator().manual_seed(0))
    assert weight is None
    sigma = t.double() / 1000
    u = sigma / (shift - (shift - 1) * sigma)
    assert kstest(u.numpy(), "uniform").pvalue > 0.01
    assert len(t.unique()) > 19_000
    assert isinstance(uniform(DiffusionProcess.cosine(5)), Uniform)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape))
    assert sampler.draw(1, None)[0].item() == pytest.approx(1000), "at time 0 there is no noise to predict"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_times_of_a_flow_are_drawn_logit_normally_at_its_fractions(shift):
    """logit u ~ N(0, 1) (Esser et al., 2024, equation 19), and the shift is a translation: logit σ = logit u + ln s."""
    t, weight = TIMESTEPS["logit-normal"](DiffusionProcess.flow(5, shift)).draw(
        20_000, torch.Generator().manual_seed(0)
    )
    assert weight is None
    assert kstest(logit(t.double().numpy() / 1000) - np.log(shift), "norm").pvalue > 0.01


def test_the_times_of_a_table_are_drawn_logit_normally_too():
    t, _ = TIMESTEPS["logit-normal"](DiffusionProcess.cosine(4)).draw(100_000, torch.Generator().manual_seed(0))
    edge = ndtr(logit(0.25))
    np.testing.assert_allclose(np.bincount(t) / len(t), [edge, 0.5 - edge, 0.5 - edge, edge], atol=0.005)


@pytest.mark.parametrize(("mean", "std"), [(100.0, 1.0), (-100.0, 1.0), (-1.2, 5.0), (0.0, 0.0), (float("nan"), 1.0)])
def test_levels_without_a_finite_loss_are_refused(mean, std):
    with pytest.raises(InputError, match="levels below 1e-12 or above 1e12"):
        LogNormalLevels(mean, std)


class Alternating(Uniform):
    """Times of the parity of the number of batches that were given to it."""

    adaptive = True
    batches = 0

    def update(self, t, losses):
        self.batches += 1

    def state_dict(self):
        return {"batches": torch.tensor([self.batches])}

    def load_state_dict(self, state):
        self.batches = int(state["batches"])


def test_a_distribution_that_is_registered_later_trains(monkeypatch):
    monkeypatch.setitem(TIMESTEPS._entries, "alternating", lambda process: Alternating(len(process)))
    config = DenoisingConfig.model_validate({"timesteps": "alternating"})
    objectives = [config.build(DiffusionProcess.cosine(10), 1) for _ in range(2)]
    objectives[0].timesteps.update(torch.zeros(2), torch.ones(2))
    assert objectives[0].state() == {"batches": [1]}
    objectives[1].load_state(objectives[0].state())
    assert objectives[1].timesteps.batches == 1
    assert "alternating" in DenoisingConfig.model_json_schema()["properties"]["timesteps"]["enum"]


def test_an_unknown_distribution_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown distribution of times 'x': use one of logit-normal, loss-second-mom"):
        DenoisingConfig.model_validate({"timesteps": "x"})


@pytest.mark.parametrize("name", ["uniform", "logit-normal"])
def test_most_distributions_take_nothing_from_losses(name):
    process = DiffusionProcess.cosine(10)
    sampler, other = TIMESTEPS[name](process), TIMESTEPS[name](process)
    sampler.update(torch.zeros(3, dtype=torch.long), torch.full((3,), 9.0))
    assert not sampler.adaptive
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})
    draws = [one.draw(20, torch.Generator().manual_seed(0))[0] for one in (sampler, other)]
    assert torch.equal(*draws)


def test_log_normal_levels_have_their_shares_far_in_both_tails():
    for edges in ([8.0, 8.5, 9.0], [-9.0, -8.5, -8.0]):
        z = np.array(edges)
        upper = norm.sf(np.abs(z))
        shares = np.abs(np.diff(upper))
        found = LogNormal(torch.from_numpy(np.exp(z)), 0.0, 1.0).probabilities
        np.testing.assert_allclose(found.numpy(), shares / shares.sum(), rtol=1e-10)
