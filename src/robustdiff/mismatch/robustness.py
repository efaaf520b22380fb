r"""The sensitivity of a network to perturbations of x_t: the robust loss and the Lipschitz constant of ε̂.

A perturbation of x_t = α_t x_0 + σ_t ε changes the noise (:mod:`robustdiff.process`): the training loss at x_t + δ is

    L(δ) = mean over elements of ( target(x_0, t, ε + δ/σ_t) − model(x_t + δ, t) )²,

and the **robust loss** of radius r is the supremum of L(δ) over ‖δ‖ ≤ r for each sample, averaged over samples, which
adversarial training minimises (Wang et al., 2025, arXiv 2502.17099, Theorem 1). The gradient here includes δ in the
target, since the supremum is that of L(δ); in training, δ in the target is a constant by default. The largest loss
of all points that projected gradient ascent visits is a lower bound of the supremum, at least the clean loss,
nondecreasing in the radius, and in the units of the training loss.

The **local Lipschitz constant** is the largest singular value of J = ∂ε̂(x, t)/∂x at x_t, by power iteration on JᵀJ,

    v ← JᵀJ v / ‖JᵀJ v‖,        ‖J v‖ → s_max from below.

It is the ratio of a change of ε̂ to a change of x: a small error e of x_t changes ε̂ by up to s_max·‖e‖. For Gaussian
data of unit variance the exact ε̂ has the constant σ_t; for concentrated data the constant approaches 1/σ_t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustdiff.objectives.objective import predict
from robustdiff.perturbation import PGDAdversary, Points
from robustdiff.process import DiffusionProcess, Prediction, broadcast
from robustdiff.progress import SILENT, Progress

__all__ = ["Robustness", "lipschitz", "measure_robustness", "robust_loss"]


@dataclass(frozen=True)
class Robustness:
    """The robustness of one checkpoint at one time, over n samples of q(x_t).

    Attributes:
        checkpoint: The name of the checkpoint.
        index: The index of the time in the process.
        sigma: The noise level σ_t.
        n: The number of samples.
        loss: The mean of the loss at δ = 0.
        loss_se: The standard error of ``loss``.
        radii: The ℓ2 radii, ascending, in units of x_t.
        robust: The robust loss at each radius.
        robust_se: The standard error of each robust loss.
        lipschitz: The mean over samples of the local Lipschitz constant.
        lipschitz_se: The standard error of ``lipschitz``.
        lipschitz_max: The largest local Lipschitz constant of the samples.
    """

    checkpoint: str
    index: int
    sigma: float
    n: int
    loss: float
    loss_se: float
    radii: list[float]
    robust: list[float]
    robust_se: list[float]
    lipschitz: float
    lipschitz_se: float
    lipschitz_max: float


class _WorstPoint(PGDAdversary):
    """Projected gradient ascent from any point, which returns the worst of the visited points."""

    def ascend(self, loss: Callable[[Tensor], Tensor], x_t: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the worst visited δ (B, *) of each sample, starting from ``start`` (B, *), and its loss (B,)."""
        delta, worst, highest = start, start, torch.full((len(x_t),), -torch.inf, device=x_t.device)
        for step in range(self.steps + 1):
            delta = delta.detach().requires_grad_()
            with torch.enable_grad():
                losses = loss(delta)
                (grad,) = torch.autograd.grad(losses.sum(), delta)
            higher = losses.detach() > highest
            highest = torch.where(higher, losses.detach(), highest)
            worst = torch.where(broadcast(higher, x_t), delta.detach(), worst)
            if step < self.steps:
                delta = self._ascend(delta.detach(), grad, Points(x_t))
        return worst, highest

    def inside(self, x_t: Tensor, radius: float, generator: torch.Generator) -> Tensor:
        """Draw a point of the ball for each sample, at the distance r·u^(1/d) in a random direction; uniform for ℓ2."""
        gaussian = torch.randn(x_t.shape, generator=generator).to(x_t)
        u = torch.rand(len(x_t), generator=generator).to(x_t)
        size = radius * u ** (1 / x_t[0].numel()) / self.norm(gaussian)
        return gaussian * broadcast(size, x_t)


def robust_loss(
    loss: Callable[[Tensor], Tensor],
    x_t: Tensor,
    radii: Sequence[float],
    norm: str = "l2",
    ascents: int = 10,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    """Find the largest loss in the ball of each radius, by projected gradient ascent: a lower bound of the supremum.

    Args:
        loss: A differentiable function that maps δ (B, *) to losses (B,), separately for each sample.
        x_t: The points, with shape (B, *).
        radii: The radii r > 0, ascending, in units of the norm.
        norm: The name of the norm: "l2", "linf" or "l1".
        ascents: The number of gradient steps from each start, of length r/2.
        restarts: The number of random starts, in addition to the worst point of the next smaller ball (for the
            smallest, δ = 0).
        seed: The seed of the random starts.

    Returns:
        The largest losses, with shape (number of radii, B).
    """
    generator = torch.Generator().manual_seed(seed)
    worst, result = torch.zeros_like(x_t), []
    for r in radii:
        adversary = _WorstPoint(ascents, r / 2, r, norm)
        starts = [worst, *(adversary.inside(x_t, r, generator) for _ in range(restarts))]
        points, losses = zip(*(adversary.ascend(loss, x_t, start) for start in starts), strict=True)
        highest, which = torch.stack(losses).max(0)
        worst = torch.stack(points)[which, torch.arange(len(x_t), device=x_t.device)]
        result.append(highest)
    return torch.stack(result)


def lipschitz(function: Callable[[Tensor], Tensor], x: Tensor, iterations: int = 20, seed: int = 0) -> Tensor:
    """Estimate the largest singular value of each sample's Jacobian by power iteration, which converges from below.

    Args:
        function: A differentiable function (B, *) ↦ (B, *), applied separately to each sample.
        x: The points, with shape (B, *).
        iterations: The number m of products with JᵀJ. The relative error is of the order (s_2/s_1)^4m.
        seed: The seed of the initial vector.

    Returns:
        The singular values, with shape (B,).
    """
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    pushed = v
    # No other backend of attention supports second derivatives.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        point = x.detach().requires_grad_()
        value = function(point)
        # u ↦ Jᵀu is linear, so that its derivative along v, at any u, is Jv: one graph serves both products.
        u = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, point, u, create_graph=True)
        for _ in range(iterations):
            v = v / broadcast(v.flatten(1).norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny), v)
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            (v,) = torch.autograd.grad(value, point, pushed, retain_graph=True)
    return pushed.flatten(1).norm(dim=1)


def measure_robustness(
    checkpoint: str,
    model: Callable[..., Any],
    process: DiffusionProcess,
    prediction: Prediction,
    x0: Tensor,
    noise: Tensor,
    indices: Iterable[int],
    radii: Sequence[float],
    *,
    condition: dict[str, Any] | None = None,
    ascents: int = 10,
    restarts: int = 1,
    iterations: int = 20,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Robustness]:
    """Measure the robust loss and the local Lipschitz constant at given times.

    Args:
        checkpoint: The name of the checkpoint, copied to the result.
        model: The model in eval mode, called as diffusers calls it. Its parameters get no gradients.
        process: The process of the model.
        prediction: The parameterisation of the model.
        x0: Real images in [−1, 1], with shape (B, C, H, W).
        noise: The noise ε, with shape (B, C, H, W).
        indices: The time indices, in [0, T).
        radii: The ℓ2 radii > 0, in units of x_t; empty for no robust loss.
        condition: Further keyword arguments of the model.
        ascents: The number of gradient steps from each start.
        restarts: The number of random starts.
        iterations: The number of power iterations.
        seed: The seed of the random starts and vectors.
        progress: The receiver of the progress, which advances by one for each time.
    """
    channels, condition, radii = x0.shape[1], condition or {}, sorted(radii)
    result = []
    for index in indices:
        t = torch.full((len(x0),), index, device=x0.device)
        times = process.times_at(t, x0)
        x_t = process.diffuse(x0, t, noise)
        sigma = process.levels(t, x0)[1]

        def output(x: Tensor, times: Tensor = times) -> Tensor:
            return predict(model, x, times, condition)[:, :channels].to(x0.dtype)

        def loss(delta: Tensor, t: Tensor = t, x_t: Tensor = x_t, sigma: Tensor = sigma) -> Tensor:
            target = process.target(prediction, x0, t, noise + delta / sigma)
            return (target - output(x_t + delta)).square().flatten(1).mean(1)

        def predicted_noise(x: Tensor, t: Tensor = t) -> Tensor:
            return process.split(prediction, x, t, output(x))[1]

        with torch.no_grad():
            clean = loss(torch.zeros_like(x_t))
        losses = robust_loss(loss, x_t, radii, "l2", ascents, restarts, seed) if radii else ()
        constants = lipschitz(predicted_noise, x_t, iterations, seed)
        robust = [_mean(one) for one in losses]
        result.append(
            Robustness(
                checkpoint,
                index,
                float(process.sigmas[index]),
                len(x0),
                *_mean(clean),
                list(radii),
                [value for value, _ in robust],
                [error for _, error in robust],
                *_mean(constants),
                float(constants.max()),
            )
        )
        progress.advance(1)
    return result


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean over samples and its standard error."""
    numbers = values.cpu().double().numpy()  # not every device has float64
    return float(numbers.mean()), float(numbers.std(ddof=1) / np.sqrt(len(numbers)))
