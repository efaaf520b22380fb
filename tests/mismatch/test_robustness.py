"""The robust loss against a trust-region problem, the Lipschitz constant against singular values."""

from __future__ import annotations

import itertools
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from scipy.optimize import brentq
from torch import Tensor

from robustdiff.mismatch.robustness import lipschitz, measure_robustness, robust_loss
from robustdiff.process import DiffusionProcess

SHAPE, D = (2, 1, 3), 6
PROCESS = DiffusionProcess.cosine(100)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(torch.nn.Module):
    """x ↦ M x, whatever the time."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).reshape(x.shape)


def worst_quadratic(a: np.ndarray, b: np.ndarray, r: float) -> float:
    """max ‖a − Bδ‖² over ‖δ‖ ≤ r: the multiplier λ > ‖B‖² at which ‖(λI − BᵀB)⁻¹Bᵀa‖ = r."""
    values, vectors = np.linalg.eigh(b.T @ b)
    c = vectors.T @ (b.T @ a)

    def excess(multiplier: float) -> float:
        return float(np.sum((c / (multiplier - values)) ** 2) - r**2)

    multiplier = brentq(excess, values[-1] * (1 + 1e-13), values[-1] + np.linalg.norm(c) / r + 1, xtol=1e-14)
    delta = vectors @ (-c / (multiplier - values))
    assert np.linalg.norm(delta) == pytest.approx(r, rel=1e-6)
    return float(np.sum((a - b @ delta) ** 2))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_robust_loss_of_a_linear_model_solves_the_trust_region_problem(prediction):
    matrix, n, index, radii = 0.5 * gaussian(D, D, seed=1), 5, 40, [0.1, 1.0, 3.0]
    x0, noise = gaussian(n, *SHAPE, seed=2), gaussian(n, *SHAPE, seed=3)
    (result,) = measure_robustness(
        "m", Linear(matrix), PROCESS, prediction, x0, noise, [index], radii[::-1], ascents=150, restarts=2
    )
    assert result.radii == radii
    alpha, sigma = float(PROCESS.alphas[index]), float(PROCESS.sigmas[index])
    assert result.sigma == sigma
    # The target moves by this much per δ.
    slope = {"epsilon": 1 / sigma, "v_prediction": alpha / sigma, "sample": 0.0}[prediction]
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[prediction].flatten(1)
    a = (target - (alpha * x0 + sigma * noise).flatten(1) @ matrix.T).numpy()
    assert result.loss == pytest.approx((a**2).mean(), rel=1e-10)
    assert result.loss_se == pytest.approx((a**2).mean(1).std(ddof=1) / n**0.5, rel=1e-10)
    b = matrix.numpy() - slope * np.eye(D)
    for r, value in zip(radii, result.robust, strict=True):
        exact = np.mean([worst_quadratic(row, b, r) / D for row in a])
        assert value == pytest.approx(exact, rel=1e-5)
        assert value <= exact * (1 + 1e-9)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_in_other_norms_the_worst_point_of_a_quadratic_is_a_corner(norm):
    b, a, r = gaussian(D, D, seed=4), gaussian(4, D, seed=5), 0.7
    found = robust_loss(lambda delta: ((a - delta @ b.T) ** 2).sum(1), torch.zeros(4, D).double(), [r], norm, 40, 40)
    if norm == "linf":
        corners = r * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D)), dtype=torch.float64)
    else:
        corners = r * torch.cat([torch.eye(D), -torch.eye(D)]).double()
    exact = ((a[:, None] - corners @ b.T) ** 2).sum(2).max(1).values
    assert found[0] == pytest.approx(exact.numpy(), rel=1e-6)


def test_it_is_never_below_the_clean_loss_nor_falling_with_the_radius():
    """Where one step of ascent overshoots: a loss with many local maxima."""
    x_t = gaussian(6, 4)

    def loss(delta: Tensor) -> Tensor:
        return torch.sin(20 * (x_t + delta)).sum(1)

    radii = [0.01, 0.02, 0.5, 0.6, 3.0]
    losses = robust_loss(loss, x_t, radii, ascents=3)
    before = loss(torch.zeros_like(x_t))
    for one in losses:
        assert (one >= before).all()
        before = one


def test_points_stay_in_the_ball():
    seen: list[Tensor] = []

    def loss(delta: Tensor) -> Tensor:
        seen.append(delta.detach())
        return (delta**2).sum(1) + delta.sum(1)

    robust_loss(loss, gaussian(5, 4), [0.3], ascents=8, restarts=3)
    assert max(float(delta.norm(dim=1).max()) for delta in seen) <= 0.3 * (1 + 1e-12)
    assert len(seen) == 4 * 9


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_lipschitz_constant_of_a_linear_model_is_its_spectral_norm(prediction):
    matrix, index = gaussian(D, D, seed=6), 30
    x0, noise = gaussian(3, *SHAPE), gaussian(3, *SHAPE, seed=1)
    model = Linear(matrix)
    (result,) = measure_robustness("m", model, PROCESS, prediction, x0, noise, [index], [], iterations=200)
    alpha, sigma = float(PROCESS.alphas[index]), float(PROCESS.sigmas[index])
    jacobian = matrix if prediction == "epsilon" else sigma * torch.eye(D) + alpha * matrix
    assert result.lipschitz == pytest.approx(np.linalg.norm(jacobian.numpy(), 2), rel=1e-8)
    assert result.lipschitz_max == pytest.approx(result.lipschitz, rel=1e-8)
    assert result.robust == []
    assert model.matrix.grad is None


def test_each_sample_has_its_own_constant():
    x, weight = gaussian(7, 5), gaussian(5, seed=1)
    constants = lipschitz(lambda x: weight * torch.sin(x), x, iterations=400)
    assert constants == pytest.approx((weight * torch.cos(x)).abs().max(1).values.numpy(), rel=1e-3)
    assert lipschitz(lambda x: weight * torch.sin(x), x, iterations=2).le(constants + 1e-12).all()


def test_the_constant_of_a_unet_is_the_largest_singular_value_of_its_jacobian():
    """With attention, whose fast backends have no second derivatives."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, 4, 4)
    constants = lipschitz(lambda x: unet(x, 5).sample, x, iterations=100)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda x: unet(x, 5).sample, x[i : i + 1]).reshape(16, 16)
        assert float(constants[i]) == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-3)


def test_a_prediction_of_x0_that_does_not_move_has_the_same_loss_everywhere():
    zero = Linear(torch.zeros(D, D).double())
    x0, noise = gaussian(3, *SHAPE), gaussian(3, *SHAPE, seed=1)
    progress = Mock()
    results = measure_robustness("m", zero, PROCESS, "sample", x0, noise, [3, 50], [1.0], progress=progress)
    for result in results:
        assert result.lipschitz == pytest.approx(1 / result.sigma)  # ε̂ = (x − α x̂_0)/σ
        assert result.robust == [pytest.approx(result.loss)]
    assert progress.advance.mock_calls == [call(1), call(1)]
