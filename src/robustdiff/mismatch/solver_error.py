r"""The error of a solver's step on a teacher's probability-flow ODE, which is the mismatch in consistency distillation.

Distillation trains f(x_{n+1}, σ_{n+1}) towards f⁻(Φ̂(x_{n+1}), σ_n), where Φ̂ is one step of a solver, instead of f⁻ at
the point x(σ_n) of the trajectory through x_{n+1}. The local error is measured at x_{n+1} = x_0 + σ_{n+1} ε with real
x_0:

    δ_n = Φ̂(x_{n+1}; σ_{n+1} → σ_n) − x(σ_n),        RMS per dimension  √(E‖δ_n‖² / d).

√d times the RMS is comparable to the ℓ2 radius of adversarial training with ``perturb="solver"`` (Wang et al., 2025,
arXiv 2502.17099). With N levels uniform in σ^{1/ρ} a step is of the order 1/N. If D is smooth over a step, the error
falls as N⁻² with Euler's method and as N⁻³ with Heun's, down to rounding. A network is not smooth at small scales (its
time embedding has high frequencies), so that for short steps Heun's error falls more slowly.

The reference x(σ_n) is computed by M Heun steps between the two levels, uniform in σ^{1/ρ}. Its error is about M⁻² of
that of one step, and is estimated, with rounding, by the distance from the result of 2M steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustdiff.backbones.model import load_model
from robustdiff.data import to_unit
from robustdiff.errors import InputError
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.objectives.consistency import SOLVERS, heun_step
from robustdiff.objectives.preconditioning import Denoise, karras_sigmas
from robustdiff.progress import SILENT, Progress
from robustdiff.recipe import DataConfig

__all__ = ["LocalError", "SolverError", "fitted_order", "integrate", "measure_solver_error", "measure_teacher"]

_CHECKED = 32
"""The number of images on which the error of the reference is estimated."""
_ABOVE = 4.0
"""The ratio to the reference's error above which a local error is used for the fit."""


@dataclass(frozen=True)
class LocalError:
    """The error of one solver's step between two levels.

    Attributes:
        solver: The name of the solver: "heun" or "euler".
        scales: The number N of levels.
        n: The index of the lower level, ascending in σ.
        position: The requested position of the pair of levels, from 0 (the smallest) to 1 (the largest).
        upper: The upper level σ_{n+1}.
        lower: The lower level σ_n.
        rms: The local error √(mean ‖δ_n‖² / d).
        quantiles: The 5 %, 50 % and 95 % quantiles of ‖δ_n‖/√d over the images.
        reference: The RMS error of the reference, per dimension.
    """

    solver: str
    scales: int
    n: int
    position: float
    upper: float
    lower: float
    rms: float
    quantiles: tuple[float, float, float]
    reference: float


def integrate(denoise: Denoise, x: Tensor, upper: float, lower: float, steps: int, rho: float = 7.0) -> Tensor:
    """Integrate dx/dσ = (x − D(x, σ))/σ from one level to a lower one by Heun's method.

    Args:
        denoise: The denoiser D.
        x: Points at the level ``upper``, with shape (B, *).
        upper: The initial level σ.
        lower: The final level σ > 0.
        steps: The number of steps, uniform in σ^{1/ρ}.
        rho: The exponent ρ.
    """
    sigmas = karras_sigmas(steps + 1, lower, upper, rho).flip(0).to(x.dtype).to(x.device)
    for sigma, after in pairwise(sigmas):
        x = heun_step(denoise, x, sigma.expand(len(x)), after.expand(len(x)))
    return x


def _sizes(difference: Tensor) -> Tensor:
    """Return ‖δ‖/√d of each sample, with shape (B,), float64, on the CPU."""
    return difference.flatten(1).cpu().double().square().mean(1).sqrt()


@torch.inference_mode()
def measure_solver_error(
    denoise: Denoise,
    images: Tensor,
    scales: Sequence[int],
    solvers: Sequence[str],
    *,
    condition: Mapping[str, Tensor] | None = None,
    points: int = 8,
    substeps: int = 32,
    seed: int = 0,
    batch_size: int = 128,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    progress: Progress = SILENT,
) -> list[LocalError]:
    """Measure the local errors of solvers for several numbers of levels, with the same images and noise.

    Args:
        denoise: The teacher as a denoiser D.
        images: Real x_0 in [−1, 1], with shape (B, *).
        scales: The numbers N of levels.
        solvers: The names of the solvers, from :data:`robustdiff.objectives.consistency.SOLVERS`.
        condition: Further arguments of the teacher, such as the classes of the images, with B rows each.
        points: The number of pairs of levels, evenly spaced from the smallest to the largest; at most N − 1 are used.
        substeps: The number M of steps of the reference.
        seed: The seed of the noise.
        batch_size: The number of images in a batch.
        sigma_min: The smallest level.
        sigma_max: The largest level.
        rho: The exponent ρ of the levels.
        progress: The receiver of the progress.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)

    def conditioned(rows: slice) -> Denoise:
        given = {name: value[rows] for name, value in (condition or {}).items()}
        return lambda x, sigma: denoise(x, sigma, **given)

    pairs = sum(min(points, N - 1) for N in scales)
    progress.begin(f"{2 * (substeps + 1)} evaluations for each of the images", pairs * len(images))
    results = []
    for N in scales:
        sigmas = karras_sigmas(N, sigma_min, sigma_max, rho)
        asked = np.linspace(0, 1, min(points, N - 1))
        for position in asked.tolist():
            n = round(position * (N - 2))
            upper, lower = sigmas[n + 1].item(), sigmas[n].item()
            sizes: dict[str, list[Tensor]] = {solver: [] for solver in solvers}
            own: list[Tensor] = []
            for start in range(0, len(images), batch_size):
                rows = slice(start, start + batch_size)
                D = conditioned(rows)
                x = images[rows] + upper * noise[rows]
                exact = integrate(D, x, upper, lower, substeps, rho)
                if start < _CHECKED:
                    few = slice(start, min(start + batch_size, _CHECKED))
                    again = integrate(conditioned(few), x[: few.stop - start], upper, lower, 2 * substeps, rho)
                    own.append(_sizes(exact[: len(again)] - again))
                levels = x.new_full((len(x),), upper), x.new_full((len(x),), lower)
                for solver in solvers:
                    sizes[solver].append(_sizes(SOLVERS[solver](D, x, *levels) - exact))
                progress.advance(len(x))
            reference = torch.cat(own).square().mean().sqrt().item()
            for solver in solvers:
                size = torch.cat(sizes[solver])
                low, median, high = torch.quantile(size, torch.tensor([0.05, 0.5, 0.95], dtype=size.dtype)).tolist()
                rms = size.square().mean().sqrt().item()
                results.append(LocalError(solver, N, n, position, upper, lower, rms, (low, median, high), reference))
    return results


def fitted_order(errors: Sequence[LocalError]) -> float | None:
    """Fit the order p of RMS ∝ N⁻ᵖ by least squares over positions that several N have in common.

    Errors (of one solver) up to four times that of the reference are left out. The order is None if no position has
    errors for several N.
    """
    clear = [e for e in errors if e.rms > _ABOVE * e.reference]
    logs: dict[float, list[tuple[float, float]]] = {}
    for error in clear:
        logs.setdefault(round(error.position, 6), []).append((np.log(error.scales), np.log(error.rms)))
    centred = [np.array(v) - np.mean(v, axis=0) for v in logs.values()]
    if not centred or not (pairs := np.concatenate(centred))[:, 0].any():
        return None
    return float(-(pairs[:, 0] @ pairs[:, 1]) / (pairs[:, 0] @ pairs[:, 0]))


@dataclass(frozen=True)
class SolverError:
    """The result of :func:`measure_teacher`.

    Attributes:
        teacher: The path or name of the teacher.
        data: The name of the dataset.
        num: The number of images.
        dimensions: The number d of elements of an image, or of its latents.
        substeps: The number M of steps of the reference.
        seed: The seed of the noise.
        orders: The fitted order of each solver, by name.
        errors: The local errors.
    """

    teacher: str
    data: str
    num: int
    dimensions: int
    substeps: int
    seed: int
    orders: dict[str, float | None]
    errors: list[LocalError]


def measure_teacher(
    teacher: str,
    source: DataConfig,
    device: torch.device,
    scales: Sequence[int],
    solvers: Sequence[str],
    num: int = 256,
    *,
    substeps: int = 32,
    seed: int = 0,
    **settings: Any,
) -> SolverError:
    """Load a teacher and real images, and measure the local errors of solvers by :func:`measure_solver_error`.

    Args:
        teacher: The path of a run or a pipeline folder, or the name of a shipped model.
        source: The section ``data`` of a recipe, which describes the images.
        device: The device on which the teacher is evaluated.
        num: The number of images, which are the first of the dataset in a fixed pseudo-random order.
        scales, solvers, substeps, seed, settings: The arguments of :func:`measure_solver_error`. ``sigma_min``,
            ``sigma_max`` and ``rho`` are by default those of the teacher, if it is a denoiser over noise levels.

    Raises:
        InputError: If the teacher or the images cannot be loaded or do not match, there are fewer than ``num`` images,
            a solver is unknown, a number of levels is below 2, or ``sigma_max`` is above the teacher's levels.
    """
    if unknown := [name for name in solvers if name not in SOLVERS]:
        raise InputError(f"unknown solver {unknown[0]!r}: use {' or '.join(SOLVERS)}")
    if min(scales) < 2:
        text = ",".join(map(str, scales))
        raise InputError(f"--scales {text}: two levels are the fewest that have a step between them")
    model = load_model(teacher).to(device)
    denoise = model.denoiser()
    own = {name: value for name, value in model.kind.levels().items() if name != "sigma_data"}
    settings = {**own, **settings}
    model.kind.check_reaches(settings.get("sigma_max", 0.0), teacher)
    dataset = source.load()
    model.check_data(dataset)
    if num > len(dataset):
        raise InputError(f"--num {num}: {dataset.name} has {len(dataset)} images")
    chosen = fixed_order(len(dataset))[:num].tolist()
    batch, classes = dataset.__getitems__(chosen)[:2]
    images = model.codec.encode(to_unit(batch).to(device))
    labels = None if classes is None else classes.to(device)
    condition = model.condition.batch(labels, dataset.first_captions(chosen), None)
    settings |= {"condition": condition, "substeps": substeps, "seed": seed}
    errors = measure_solver_error(denoise, images, scales, solvers, **settings)
    orders = {name: fitted_order([e for e in errors if e.solver == name]) for name in solvers}
    return SolverError(teacher, dataset.name, num, images[0].numel(), substeps, seed, orders, errors)
