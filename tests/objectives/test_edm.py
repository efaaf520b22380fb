"""The EDM loss is the network's own square error to a target of unit variance, and δ is a change of its noise."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest, norm

from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.objectives.edm import EDMObjective
from robustdiff.perturbation import FreeAdversary
from robustdiff.process import DiffusionProcess


def network(x, t):
    return torch.tanh(x + 0.001 * t[:, None, None, None])


def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 5, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


T = torch.tensor([3, 300, 600, 990])


def test_the_loss_is_that_of_the_network_to_its_own_target():
    objective = EDMObjective(sigma_data=0.7)
    x0, noise, _ = tensors()
    losses = objective(network, objective.draw(x0, t=T, noise=noise))
    s = objective.process.sigmas[T][:, None, None, None]
    size = (s**2 + 0.49).sqrt()
    x = x0 + s * noise
    target = (x0 - 0.49 / size**2 * x) / (s * 0.7 / size)
    expected = (network(x / size, 250 * s.flatten().log()) - target).square().mean((1, 2, 3))
    torch.testing.assert_close(losses["loss"], expected)
    denoised = 0.49 / size**2 * x + s * 0.7 / size * network(x / size, 250 * s.flatten().log())
    torch.testing.assert_close(losses["mse"], (denoised - x0).square().mean((1, 2, 3)))


def test_levels_and_weights_of_half_precision_points_are_not_rounded():
    asked = []

    def teacher(x, sigma):
        asked.append(sigma)
        return x

    objective = EDMObjective(teacher=teacher)
    x0, noise = (x.half() for x in tensors()[:2])
    losses = objective(lambda x, t: torch.zeros_like(x), objective.draw(x0, t=T, noise=noise))
    sigma = objective.process.sigmas[T]
    torch.testing.assert_close(asked[0], sigma.float())
    weights = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    assert weights[0] > torch.finfo(torch.half).max
    torch.testing.assert_close(losses["loss"], (weights * losses["mse"]).float())


def test_the_target_has_unit_variance():
    objective = EDMObjective(sigma_data=0.5)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(4, 1, 200, 200, generator=generator)
    losses = objective(lambda x, t: torch.zeros_like(x), objective.draw(x0, t=T, generator=generator))
    torch.testing.assert_close(losses["loss"], torch.ones(4), rtol=0.03, atol=0)


def test_a_perturbation_is_a_change_of_the_noise():
    objective = EDMObjective()
    x0, noise, delta = tensors()
    absorbed = noise + delta / objective.process.sigmas[T][:, None, None, None]
    perturbed = objective(network, objective.draw(x0, t=T, noise=noise), delta)["loss"]
    torch.testing.assert_close(perturbed, objective(network, objective.draw(x0, t=T, noise=absorbed))["loss"])
    assert not torch.allclose(perturbed, objective(network, objective.draw(x0, t=T, noise=noise))["loss"])


def test_with_unit_data_it_is_v_prediction_in_its_ascent_too():
    """F = −v at x/√(1 + σ²): δ, the losses and the gradients of the weights are those of v-prediction."""
    weights = torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(2, 5, 5).requires_grad_()
    x0, noise, _ = tensors()
    vp, index = DiffusionProcess.cosine(1000), torch.full((4,), 500)
    alpha, sigma = float(vp.alphas[500]), float(vp.sigmas[500])
    edm, v = EDMObjective(sigma_data=1.0), DenoisingObjective(vp, prediction="v_prediction")
    draws = edm.draw(x0, t=torch.full((4,), sigma / alpha, dtype=torch.float64), noise=noise), v.draw(x0, index, noise)
    models = (lambda x, t: torch.tanh(weights * x)), (lambda x, t: -torch.tanh(weights * x))
    found = []
    for objective, draw, model, unit in zip((edm, v), draws, models, (1 / alpha, 1.0), strict=True):
        for delta in FreeAdversary(steps=3, step_size=0.3 * unit)(draw.x_t, draw.t):
            losses = objective(model, draw, delta)["loss"]
            losses.mean().backward()
            found.append((delta.detach() / unit, losses.detach(), weights.grad))
            weights.grad = None
    assert found[2][0].abs().sum() > 0
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_levels_are_drawn_from_the_log_normal_distribution_itself():
    objective = EDMObjective(levels=3, sigma_min=0.3, sigma_max=1.0, mean=-0.5, std=0.8)
    x0 = torch.zeros(20000, 1)
    draw = objective.draw(x0, generator=torch.Generator().manual_seed(0))
    assert kstest(draw.t.log().numpy(), norm(-0.5, 0.8).cdf).pvalue > 0.01
    assert draw.t.min() < 0.3 < 1.0 < draw.t.max(), "it is not truncated"
    torch.testing.assert_close(draw.x_t, draw.t[:, None] * draw.noise)


def test_a_level_by_its_index_and_by_itself_has_the_same_loss():
    objective = EDMObjective(sigma_data=0.7)
    x0, noise, delta = tensors()
    by_index, by_level = (
        objective(network, objective.draw(x0, t=t, noise=noise), delta)["loss"]
        for t in (T, objective.process.sigmas[T])
    )
    torch.testing.assert_close(by_index, by_level)


def test_levels_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="sigma_min"):
        EDMObjective(sigma_min=3.0, sigma_max=1.0)


def test_below_its_bound_the_teacher_gives_the_target_and_is_called_once():
    calls = []

    def teacher(x, sigma):
        calls.append((x, sigma))
        return 0.3 * x

    objective = EDMObjective(teacher=teacher, teacher_below=10.0)
    x0, noise, delta = tensors()
    draw = objective.draw(x0, t=T, noise=noise)
    sigma = objective.process.sigmas[T]
    assert (sigma < 10).tolist() == [True, True, True, False]
    x = x0 + sigma[:, None, None, None] * noise
    torch.testing.assert_close(draw.x_t, x)
    torch.testing.assert_close(calls[0][1], sigma)
    plain = EDMObjective()
    taught = plain.draw(torch.cat([0.3 * x[:3], x0[3:]]), t=T, noise=noise)
    taught.x_t = x
    for perturbation in (None, delta):
        expected = plain(network, taught, perturbation)["loss"]
        torch.testing.assert_close(objective(network, draw, perturbation)["loss"], expected)
    assert len(calls) == 1


def test_a_teacher_has_the_same_minimiser_as_the_data():
    """Gaussian data: D(x, σ) = s² x/(s² + σ²), and the network that gives it has no loss left."""
    s = 0.5

    def best(x, sigma):
        return s**2 * x / (s**2 + sigma[:, None, None, None] ** 2)

    objective = EDMObjective(sigma_data=s, teacher=best, teacher_below=100.0)
    x0, noise, _ = tensors()
    losses = objective(lambda x, t: torch.zeros_like(x), objective.draw(x0, t=T, noise=noise))
    torch.testing.assert_close(losses["loss"], torch.zeros(4, dtype=torch.float64))
