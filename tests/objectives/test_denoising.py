"""The denoising loss: at (ε, δ) it is the ordinary loss at ε + δ/σ_t; the bound against torch.distributions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.objectives.edm import EDMObjective
from robustdiff.objectives.timesteps import LossSecondMoment
from robustdiff.perturbation import FreeAdversary
from robustdiff.process import PREDICTIONS, DiffusionProcess

COSINE = DiffusionProcess.cosine(1000)


class Network(nn.Module):
    """Small, smooth, and dependent on everything that it is called with."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, outputs, 3, padding=1).double()

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> SimpleNamespace:
        shift = 0 if class_labels is None else class_labels.double()[:, None, None, None]
        return SimpleNamespace(sample=torch.tanh(self.convolution(x) + t.double()[:, None, None, None] / 1000 + shift))


def tensors(n: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0, noise, delta = (torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x0.clamp(-1, 1), noise, 0.3 * delta]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_at_delta_is_the_plain_loss_at_the_absorbed_noise(prediction):
    process = DiffusionProcess.flow(1000) if prediction == "flow" else COSINE
    objective, model, (x0, noise, delta) = DenoisingObjective(process, prediction), Network(), tensors()
    t = torch.tensor([1, 100, 500, 990])
    absorbed = noise + delta / process.sigmas[t][:, None, None, None]
    perturbed = objective(model, objective.draw(x0, t=t, noise=noise), delta)["loss"]
    plain = objective(model, objective.draw(x0, t=t, noise=absorbed))["loss"]
    torch.testing.assert_close(perturbed, plain, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(perturbed, objective(model, objective.draw(x0, t=t, noise=noise))["loss"])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_mean_square_to_the_target_written_out(prediction):
    objective, model, (x0, noise, _) = DenoisingObjective(COSINE, prediction), Network(), tensors()
    t = torch.tensor([1, 100, 500, 990])
    alpha, sigma = COSINE.alphas[t][:, None, None, None], COSINE.sigmas[t][:, None, None, None]
    target = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[
        prediction
    ]
    expected = (model(alpha * x0 + sigma * noise, t).sample - target).square().mean((1, 2, 3))
    torch.testing.assert_close(objective(model, objective.draw(x0, t=t, noise=noise))["mse"], expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_delta_moves_the_input_and_not_the_target(prediction):
    """The gradient against finite differences of the loss with the target held where it was."""
    objective, model, (x0, noise, delta) = DenoisingObjective(COSINE, prediction), Network(), tensors(1)
    t = torch.tensor([300])
    alpha, sigma = float(COSINE.alphas[300]), float(COSINE.sigmas[300])
    draw = objective.draw(x0, t=t, noise=noise)
    variable = delta.clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(model, draw, variable)["loss"].sum(), variable)
    moved_noise = noise + delta / sigma
    target = {
        "epsilon": moved_noise,
        "sample": x0,
        "v_prediction": alpha * moved_noise - sigma * x0,
        "flow": moved_noise - x0,
    }[prediction]

    def held(moved: torch.Tensor) -> float:
        return float((model(draw.x_t + moved, t).sample.detach() - target).square().mean())

    for index in ((0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 4, 4)):
        step = torch.zeros_like(delta)
        step[index] = 1e-5
        assert grad[index].item() == pytest.approx((held(delta + step) - held(delta - step)) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_through_the_target_the_gradient_is_that_of_the_loss(prediction):
    """Against finite differences of the loss; the losses and the parameters' gradients do not change."""
    process = DiffusionProcess.flow(1000) if prediction == "flow" else COSINE
    model, (x0, noise, delta), t = Network(), tensors(1), torch.tensor([300])
    whole, input_alone = (DenoisingObjective(process, prediction, through_target=through) for through in (True, False))
    draw = whole.draw(x0, t=t, noise=noise)
    found = []
    for objective in (whole, input_alone):
        variable = delta.clone().requires_grad_()
        loss = objective(model, draw, variable)["loss"].sum()
        found.append((loss, torch.autograd.grad(loss, [variable, *model.parameters()])))
    (loss, (gradient, *weights)), (same, (_, *others)) = found
    assert loss == same
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    step = 1e-6
    for index in [(0, 0, 0, 0), (0, 1, 2, 3), (0, 1, 4, 4)]:
        moved = torch.zeros_like(delta)
        moved[index] = step
        ends = [whole(model, draw, delta + sign * moved)["loss"].item() for sign in (1, -1)]
        assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_through_the_target_every_parameterisation_ascends_alike():
    """One denoiser, as ε̂, x̂_0 and v̂: δ after two steps is one, and that of x̂_0 whose target does not move."""
    x0, noise, _ = tensors(3)
    t, network = torch.tensor([100, 500, 900]), Network()

    def denoiser(prediction):
        def model(x, times):
            x0_hat, index = network(x, times).sample, times.long()
            alpha, sigma = COSINE.levels(index, x)
            eps_hat = (x - alpha * x0_hat) / sigma
            return COSINE.target(prediction, x0_hat, index, eps_hat)

        return model

    found = {}
    for prediction, through in (("epsilon", True), ("v_prediction", True), ("sample", True), ("sample", False)):
        objective = DenoisingObjective(COSINE, prediction, through_target=through)
        draw = objective.draw(x0, t=t, noise=noise)
        for delta in FreeAdversary(steps=3, step_size=0.3)(draw.x_t):
            objective(denoiser(prediction), draw, delta)["loss"].sum().backward()
        found[prediction, through] = delta.detach()
    expected = found["sample", False]
    for delta in found.values():
        torch.testing.assert_close(delta, expected)


def test_at_a_denoiser_the_step_through_the_input_alone_lowers_the_loss():
    """The exact ε̂ of Gaussian data: J is between 0 and I/σ_t, so −Jᵀr goes down, and with the target up."""
    variance = 0.25
    generator = torch.Generator().manual_seed(0)
    x0 = variance**0.5 * torch.randn(64, 2, 5, 5, generator=generator, dtype=torch.float64)
    t = torch.full((64,), 200)
    alpha, sigma = float(COSINE.alphas[200]), float(COSINE.sigmas[200])

    def model(x, times):
        return sigma * x / (alpha**2 * variance + sigma**2)

    for through, sign in ((False, -1), (True, 1)):
        objective = DenoisingObjective(COSINE, through_target=through)
        draw = objective.draw(x0, t=t, generator=torch.Generator().manual_seed(1))
        before, after = (
            objective(model, draw, delta)["loss"].detach()
            for delta in _steps_of(objective, model, draw, FreeAdversary(steps=2, step_size=0.05))
        )
        assert (sign * (after - before) > 0).all()


def _steps_of(objective, model, draw, adversary):
    """The perturbations of an adversary, each after its backward pass."""
    for delta in adversary(draw.x_t):
        objective(model, draw, delta)["loss"].sum().backward()
        yield delta


def test_delta_moves_the_learned_variance_through_the_network_alone():
    """The gradient of the bound against finite differences with both posteriors held at x_t + δ."""
    objective, model, (x0, noise, delta) = DenoisingObjective(COSINE, variance="learned_range"), Network(4), tensors(1)
    t = torch.tensor([300])
    draw = objective.draw(x0, t=t, noise=noise)
    variable = delta.clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(model, draw, variable)["vb"].sum(), variable)
    x = draw.x_t + delta
    true_variance, beta = COSINE.posterior_variance[t], COSINE.betas[t]
    image, _ = COSINE.split("epsilon", x, t, model(x, t).sample[:, :2].detach())
    means = COSINE.posterior_mean(x0, x, t), COSINE.posterior_mean(image, x, t)

    def held(moved: torch.Tensor) -> float:
        v = model(draw.x_t + moved, t).sample[:, 2:].detach()
        log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * true_variance.log()
        divergence = kl_divergence(
            Normal(means[0], true_variance.sqrt()), Normal(means[1], (0.5 * log_variance).exp())
        )  # fmt: skip
        return float(divergence.mean()) / math.log(2)

    for index in ((0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 4, 4)):
        step = torch.zeros_like(delta)
        step[index] = 1e-5
        expected = (held(delta + step) - held(delta - step)) / 2e-5
        assert grad[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_bound_is_a_divergence_of_gaussians_in_bits():
    objective = DenoisingObjective(COSINE, variance="learned_range", vb_scale=0.5)
    model, (x0, noise, delta) = Network(4), tensors()
    t = torch.tensor([1, 100, 500, 990])
    draw = objective.draw(x0, t=t, noise=noise)
    losses = objective(model, draw, delta)
    x = draw.x_t + delta
    epsilon, v = model(x, t).sample.chunk(2, 1)
    a = COSINE.alphas_cumprod
    before, beta = (table[t][:, None, None, None] for table in (torch.cat([a.new_ones(1), a[:-1]]), COSINE.betas))
    a = a[t][:, None, None, None]

    def mean(image: torch.Tensor) -> torch.Tensor:
        return (before.sqrt() * beta * image + (1 - beta).sqrt() * (1 - before) * x) / (1 - a)

    true_variance = beta * (1 - before) / (1 - a)
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * true_variance.log()
    image = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
    divergence = kl_divergence(
        Normal(mean(x0), true_variance.sqrt()), Normal(mean(image), (0.5 * log_variance).exp())
    )  # fmt: skip
    torch.testing.assert_close(losses["vb"], divergence.mean((1, 2, 3)) / math.log(2))
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.5 * losses["vb"])


def test_the_bound_does_not_depend_on_what_the_network_predicts():
    """Four networks that mean the same image and the same variance have one bound, at t = 0 as well."""
    x0, noise, delta = tensors()
    t = torch.tensor([0, 100, 500, 990])
    alpha, sigma = (table[t][:, None, None, None] for table in (COSINE.alphas, COSINE.sigmas))
    image, v = x0 + 0.01 * noise, torch.tanh(delta)
    x = alpha * x0 + sigma * noise + delta
    epsilon = (x - alpha * image) / sigma
    outputs = {"epsilon": epsilon, "sample": image, "v_prediction": alpha * epsilon - sigma * image}
    outputs["flow"] = epsilon - image
    bounds = []
    for prediction, output in outputs.items():
        objective = DenoisingObjective(COSINE, prediction, variance="learned_range")
        draw = objective.draw(x0, t=t, noise=noise)
        bounds.append(objective(lambda x, t, o=output: torch.cat([o, v], 1), draw, delta)["vb"])
    assert (bounds[0] > 0).all()
    for bound in bounds[1:]:
        torch.testing.assert_close(bound, bounds[0], rtol=1e-6, atol=1e-9)


def test_at_time_zero_the_bound_is_the_likelihood_of_the_grey_values():
    objective, model, (x0, noise, _) = DenoisingObjective(COSINE, variance="learned_range"), Network(4), tensors()
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    x0[0, 0, 0, 0], x0[0, 0, 0, 1] = -1, 1
    t = torch.zeros(4, dtype=torch.long)
    draw = objective.draw(x0, t=t, noise=noise)
    epsilon, v = (part.detach().numpy() for part in model(draw.x_t, t).sample.chunk(2, 1))
    sigma, alpha = float(COSINE.sigmas[0]), float(COSINE.alphas[0])
    mean = (draw.x_t.numpy() - sigma * epsilon) / alpha  # at t = 0 the mean of the posterior is x̂_0
    low, high = float(COSINE.posterior_variance[1].log()), float(COSINE.betas[0].log())
    std = np.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low))

    def cdf(z: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    pixels = x0.numpy()
    above = np.where(pixels > 0.999, 1.0, cdf((pixels + 1 / 255 - mean) / std))
    below = np.where(pixels < -0.999, 0.0, cdf((pixels - 1 / 255 - mean) / std))
    expected = -np.log2(np.maximum(above - below, 1e-12)).mean((1, 2, 3))
    np.testing.assert_allclose(objective(model, draw)["vb"].detach().numpy(), expected, rtol=1e-8)


def test_the_bound_does_not_train_the_mean():
    objective, model, (x0, noise, _) = DenoisingObjective(COSINE, variance="learned_range"), Network(4), tensors()
    objective(model, objective.draw(x0, t=torch.tensor([0, 5, 50, 500]), noise=noise))["vb"].sum().backward()
    grad = model.convolution.weight.grad
    assert grad is not None
    assert not grad[:2].any()
    assert grad[2:].any()


def test_input_perturbation_moves_the_point_and_not_the_target():
    objective = DenoisingObjective(COSINE, input_perturbation=0.5)
    x0, noise, xi = tensors()
    t = torch.tensor([1, 100, 500, 990])
    draw = objective.draw(x0, t=t, noise=noise, input_noise=xi)
    torch.testing.assert_close(draw.x_t, COSINE.diffuse(x0, t, noise + 0.5 * xi))
    expected = (Network()(draw.x_t, t).sample - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(objective(Network(), draw)["loss"], expected)


def test_with_input_perturbation_the_target_absorbs_delta_alone():
    objective, (x0, noise, xi) = DenoisingObjective(COSINE, input_perturbation=0.5), tensors()
    t, delta = torch.tensor([1, 100, 500, 990]), 0.1 * noise.flip(0)
    draw = objective.draw(x0, t=t, noise=noise, input_noise=xi)
    target = noise + delta / COSINE.sigmas[t][:, None, None, None]
    expected = (Network()(draw.x_t + delta, t).sample - target).square().mean((1, 2, 3))
    torch.testing.assert_close(objective(Network(), draw, delta)["mse"], expected)


def test_weights_multiply_the_loss_alone():
    objective, (x0, noise, _) = DenoisingObjective(COSINE), tensors()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    losses = objective(Network(), objective.draw(x0, t=torch.tensor([1, 2, 3, 4]), noise=noise, weight=weight))
    torch.testing.assert_close(losses["loss"], weight * losses["mse"])


def test_weights_of_samples_and_of_drawn_times_are_multiplied():
    times = LossSecondMoment(1000, history=1)
    times.load_state_dict({"losses": torch.arange(1.0, 1001.0)[:, None].double(), "counts": torch.ones(1000).long()})
    (x0, _, _), weight = tensors(), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    for objective in (DenoisingObjective(COSINE), DenoisingObjective(COSINE, timesteps=times), EDMObjective()):
        drawn, both = (
            objective.draw(x0, generator=torch.Generator().manual_seed(0), **given)
            for given in ({}, {"weight": weight})
        )
        assert torch.equal(drawn.t, both.t)
        of_times = torch.ones(4).double() if drawn.weight is None else drawn.weight
        torch.testing.assert_close(both.weight.double(), weight * of_times)


def test_weights_multiply_both_terms_of_the_hybrid_loss_and_neither_as_reported():
    objective = DenoisingObjective(COSINE, variance="learned_range", vb_scale=0.25)
    (x0, noise, delta), weight = tensors(), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    t = torch.tensor([0, 2, 300, 900])
    plain = objective(Network(4), objective.draw(x0, t=t, noise=noise), delta)
    weighted = objective(Network(4), objective.draw(x0, t=t, noise=noise, weight=weight), delta)
    for name in ("mse", "vb"):
        assert torch.equal(plain[name], weighted[name])
    torch.testing.assert_close(weighted["loss"], weight * (plain["mse"] + 0.25 * plain["vb"]))


def test_a_model_may_return_a_tensor_or_an_object_with_a_sample():
    objective, network, (x0, noise, delta) = DenoisingObjective(COSINE), Network(), tensors()
    draw = objective.draw(x0, t=torch.tensor([1, 2, 3, 4]), noise=noise, class_labels=torch.tensor([0, 1, 2, 3]))
    as_tensor = objective(lambda x, t, **condition: network(x, t, **condition).sample, draw, delta)["loss"]
    assert torch.equal(as_tensor, objective(network, draw, delta)["loss"])


def test_conditions_and_times_reach_the_model():
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        calls.append((t, condition))
        return x

    process, labels = DiffusionProcess.flow(10), torch.tensor([3, 1, 4, 1])
    objective = DenoisingObjective(process, "flow")
    objective(model, objective.draw(tensors()[0], t=torch.tensor([0, 4, 8, 9]), class_labels=labels))
    assert calls[0][0].tolist() == [100, 500, 900, 1000]
    assert calls[0][1]["class_labels"] is labels


def test_a_draw_is_reproducible_and_covers_the_times():
    objective, x0 = DenoisingObjective(DiffusionProcess.cosine(5)), torch.zeros(500, 1, 1, 1)
    draws = [objective.draw(x0, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(draws[0].x_t, draws[1].x_t)
    assert sorted(set(draws[0].t.tolist())) == [0, 1, 2, 3, 4]


def test_mistakes_are_named():
    x0, noise, _ = tensors()
    learned = DenoisingObjective(COSINE, variance="learned_range")
    with pytest.raises(ValueError, match="2 channels where"):
        learned(Network(2), learned.draw(x0, noise=noise))
    for arguments, word in (
        ({"prediction": "score"}, "score"),
        ({"variance": "big"}, "big"),
        ({"vb_scale": 1.0}, "vb_scale"),
        ({"input_perturbation": -1.0}, "input_perturbation"),
    ):
        with pytest.raises(ValueError, match=word):
            DenoisingObjective(COSINE, **arguments)
    with pytest.raises(ValueError, match="variance-preserving"):
        DenoisingObjective(DiffusionProcess.flow(10), "flow", variance="learned_range")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_points_in_half_precision_are_float32(dtype):
    objective = DenoisingObjective(COSINE, variance="learned_range")
    x0, noise, delta = (value.to(dtype) for value in tensors())
    model = Network(4)
    draw = objective.draw(x0, t=torch.tensor([0, 100, 500, 990]), noise=noise)
    losses = objective(lambda x, t: model(x.double(), t).sample.to(dtype), draw, 0.1 * delta)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in losses.values())
    large = objective(lambda x, t: torch.full_like(x, 300.0).repeat(1, 2, 1, 1), draw)  # its square is no float16
    assert large["mse"].isfinite().all()
