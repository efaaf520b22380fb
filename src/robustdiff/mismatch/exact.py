r"""The mismatch between sampling and training on known densities, computed exactly.

For a mixture of Gaussians q(x_0) = Σ_k w_k N(m_k, S_k), the distribution of x_t and the optimal ε̂ are

    q(x_t) = Σ_k w_k N(α m_k, α² S_k + σ² I),        ε*(x, t) = (x − α E[x_0 | x_t = x])/σ = −σ ∇ log q(x_t),

with (α, σ) the levels at t. Posteriors of less noisy points have closed forms as well. If z is distributed as the
mixture and observed as y = a z + b ξ, ξ ~ N(0, I), its posterior is

    q(z | y) = Σ_k r_k(y) N( m_k + G_k (y − a m_k), b² S_k (a² S_k + b²)⁻¹ ),     G_k = a S_k (a² S_k + b²)⁻¹,
    r_k(y) ∝ w_k N(y; a m_k, a² S_k + b² I).

With z = x_0, a = α_t, b = σ_t this gives E[x_0 | x_t]. With z = x_s, a = α_t/α_s, b² = σ_t² − a² σ_s² it gives
q(x_s | x_t), whose mean minimises the t-th term of the variational bound (Wang et al., 2025, arXiv 2502.17099,
Proposition 3; the noise-prediction loss is equivalent, Ho et al., 2020).

A step of a sampler is affine in x and ε̂, with noise of variance v (0 for DDIM):

    x_s = c_x x_t + c_ε ε̂(x_t, t) + √v z,        z ~ N(0, I).

The density p_θ(x_t) of the sampler's states is therefore computable in three cases:

    Gaussian state, affine ε̂, any d      mean and covariance                               :func:`push_gaussian`
    v = 0, invertible step, any d         log p_s(f(x)) = log p_t(x) − log |det ∂f/∂x|      :func:`change_of_variables`
    d ≤ 2, any step                       the same if v = 0, otherwise the integral
                                          ∫ p_t(x) N(y; c_x x + c_ε ε̂(x), v I) dx           :class:`Density`

It is compared with q(x_t) by D_KL and W₂. :func:`step_divergence` returns the term of one step in the chain rule of
D_KL, E_{q(x_t)} D_KL( q(x_s | x_t) ‖ p_θ(x_s | x_t) ) (Wang et al., 2025, Proposition 2). Computations are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.denoiser import Denoised
from robustdiff.samplers.sample import resolve
from robustdiff.samplers.sampler import Step as SamplerStep

__all__ = [
    "Density",
    "ExactModel",
    "GaussianMixture",
    "NoiseModel",
    "Posterior",
    "ShiftedModel",
    "Step",
    "affine_map",
    "change_of_variables",
    "gaussian_kl",
    "push_gaussian",
    "sampler_steps",
    "step_divergence",
]

NoiseModel = Callable[[Tensor, Tensor], Tensor]
"""A network as samplers call it: a function that maps (x_t (B, *), times (B,)) to ε̂ (B, *), separately for each
sample."""


@dataclass(frozen=True)
class Posterior:
    """The posterior q(z | y) for each of B observations y, a mixture of Gaussians.

    Attributes:
        weights: The weights r_k(y) of the components, with shape (B, K).
        means: The means of the components, with shape (B, K, d).
        variances: The eigenvalues of the components' covariances, which do not depend on y, with shape (K, d).
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    @property
    def mean(self) -> Tensor:
        """The posterior mean E[z | y], with shape (B, d)."""
        return torch.einsum("bk,bkd->bd", self.weights, self.means)

    @property
    def total_variance(self) -> Tensor:
        """The trace of the posterior covariance, tr Cov[z | y], with shape (B,)."""
        around = (self.means - self.mean[:, None]).square().sum(2) + self.variances.sum(1)
        return (self.weights * around).sum(1)


class GaussianMixture:
    """The Gaussian mixture Σ_k w_k N(m_k, S_k) in d dimensions.

    Args:
        weights: The weights w_k > 0, which sum to 1, with shape (K,).
        means: The means m_k, with shape (K, d).
        covariances: The covariances S_k, symmetric and positive semi-definite, with shape (K, d, d); or, for isotropic
            components, their variances ≥ 0, with shape (K,).

    Attributes:
        variances: The eigenvalues of S_k, with shape (K, d).
        axes: The eigenvectors of S_k, in columns, with shape (K, d, d); None if all components are isotropic.

    Raises:
        InputError: If the shapes do not match, or a value is out of range.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        weights, means, covariances = (torch.as_tensor(a, dtype=torch.float64) for a in (weights, means, covariances))
        if means.ndim != 2 or weights.shape != means.shape[:1] or 0 in means.shape:
            raise InputError(
                f"a mixture needs weights (K,) and means (K, d); got {tuple(weights.shape)} and {tuple(means.shape)}"
            )
        K, d = means.shape
        if covariances.shape not in ((K,), (K, d, d)):
            raise InputError(f"covariances must be ({K},) or ({K}, {d}, {d}); got {tuple(covariances.shape)}")
        if not bool((weights > 0).all() and abs(float(weights.sum()) - 1) < 1e-6 and means.isfinite().all()):
            raise InputError(f"weights must be positive and sum to 1, and means finite; got weights {weights.tolist()}")
        if covariances.ndim == 1:
            variances, axes = covariances[:, None].expand(K, d), None
        else:
            if not torch.allclose(covariances, covariances.mT):
                raise InputError("a covariance is not symmetric: give S + Sᵀ halved")
            variances, axes = torch.linalg.eigh(covariances)
        if not bool((variances >= -1e-12 * variances.abs().amax()).all()):
            raise InputError("a covariance has a negative eigenvalue: it must be positive semi-definite")
        self.weights, self.means = weights / weights.sum(), means
        self.variances, self.axes = variances.clamp_min(0), axes

    def _like(self, means: Tensor, variances: Tensor) -> GaussianMixture:
        other = object.__new__(GaussianMixture)
        other.weights, other.means, other.variances, other.axes = self.weights, means, variances, self.axes
        return other

    @property
    def dim(self) -> int:
        """The number d of dimensions."""
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """The mean E[x], with shape (d,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """The covariance Cov[x], with shape (d, d)."""
        if self.axes is None:
            within = torch.diag(self.weights @ self.variances)
        else:
            within = torch.einsum("k,kid,kd,kjd->ij", self.weights, self.axes, self.variances, self.axes)
        around = self.means - self.mean
        return within + torch.einsum("k,ki,kj->ij", self.weights, around, around)

    def at(self, alpha: float, sigma: float) -> GaussianMixture:
        """Return the distribution of α x + σ ε, which is q(x_t) at the levels (α, σ)."""
        return self._like(alpha * self.means, alpha**2 * self.variances + sigma**2)

    def _along_axes(self, x: Tensor) -> Tensor:
        """Return the coordinates (B, K, d) of points (B, d) in the eigenvectors of each component."""
        return x if self.axes is None else torch.einsum("bki,kid->bkd", x, self.axes)

    def _from_axes(self, x: Tensor) -> Tensor:
        return x if self.axes is None else torch.einsum("bkd,kid->bki", x, self.axes)

    def _log_joint(self, x: Tensor) -> Tensor:
        """Return log w_k N(x; m_k, S_k), with shape (B, K)."""
        along = self._along_axes(x[:, None] - self.means)
        log_normal = -0.5 * (along.square() / self.variances + (2 * math.pi * self.variances).log()).sum(2)
        return self.weights.log() + log_normal

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q(x), with shape (B,), for points x (B, d)."""
        return self._log_joint(x).logsumexp(1)

    def score(self, x: Tensor) -> Tensor:
        """Return the score ∇ log q(x), with shape (B, d), for points x (B, d)."""
        pull = self._from_axes(self._along_axes(self.means - x[:, None]) / self.variances)
        return torch.einsum("bk,bkd->bd", self._log_joint(x).softmax(1), pull)

    def posterior(self, y: Tensor, a: float, b: float) -> Posterior:
        """Return the posterior q(z | y) of z from this mixture, for observations y = a z + b ξ (B, d), b > 0."""
        observed = self.at(a, b)
        gain = a * self.variances / observed.variances
        means = self.means + self._from_axes(gain * self._along_axes(y[:, None] - observed.means))
        return Posterior(observed._log_joint(y).softmax(1), means, b**2 * self.variances / observed.variances)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n points, with shape (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        x = torch.randn(n, self.dim, dtype=torch.float64, generator=generator) * self.variances[k].sqrt()
        if self.axes is not None:
            for component in range(len(self.weights)):  # a (n, d, d) copy of the axes would not fit
                x[k == component] = x[k == component] @ self.axes[component].mT
        return self.means[k] + x

    def cdf(self, x: Tensor) -> Tensor:
        """Return P(X ≤ x) in one dimension, with shape (B,), for x (B,)."""
        z = (x[:, None] - self.means[:, 0]) / self.variances[:, 0].sqrt()
        return torch.from_numpy(ndtr(z.numpy())) @ self.weights


class ExactModel:
    """The minimiser ε*(x, t) of the training loss, called as samplers call a network.

    Its times are ``process.times``; between two of them, where only dpm++ evaluates, levels are interpolated linearly.

    Args:
        mixture: The distribution of the data.
        process: The forward process.
    """

    def __init__(self, mixture: GaussianMixture, process: DiffusionProcess) -> None:
        self.mixture = mixture
        self.process = process

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ε*, with shape (B, *) and the precision of x, at points x (B, *) of d elements and times t (B,)."""
        times = self.process.times.double().numpy()
        flat = x.reshape(len(x), -1).double()
        noise = torch.empty_like(flat)
        for time in t.unique():
            alpha = float(np.interp(float(time), times, self.process.alphas.numpy()))
            sigma = float(np.interp(float(time), times, self.process.sigmas.numpy()))
            at = t == time
            noise[at] = -sigma * self.mixture.at(alpha, sigma).score(flat[at])
        return noise.to(x.dtype).reshape(x.shape)


@dataclass(frozen=True)
class ShiftedModel:
    """A model with an error of known size: ε̂ = (1 + scale)·ε + offset.

    For an exact model, the relative root-mean-square error is |scale| due to the scale and ‖offset‖/√(E‖ε*‖²) due to
    the offset. If the model is affine, so is the result.

    Args:
        model: The model that predicts ε.
        scale: The relative error in proportion to the prediction.
        offset: The error that is the same for all x, broadcast against x (B, *).
    """

    model: NoiseModel
    scale: float = 0.0
    offset: Tensor | float = 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ε̂, with shape (B, *)."""
        return (1 + self.scale) * self.model(x, t) + self.offset


@dataclass(frozen=True)
class Step:
    """The sampling step x_s = c_x x_t + c_ε ε̂(x_t, t) + √v z.

    Attributes:
        time: The time t that is passed to the network.
        of_x: The coefficient c_x.
        of_noise: The coefficient c_ε.
        variance: The variance v ≥ 0 of the noise.
        before: The levels (α_t, σ_t).
        after: The levels (α_s, σ_s).
    """

    time: float
    of_x: float
    of_noise: float
    variance: float
    before: tuple[float, float]
    after: tuple[float, float]

    def mean(self, model: NoiseModel, x: Tensor) -> Tensor:
        """Return the mean c_x x + c_ε ε̂(x, t) of the step, with shape (B, d), for points x (B, d)."""
        return self.of_x * x + self.of_noise * model(x, torch.full((len(x),), self.time, dtype=torch.float64))

    @property
    def transition(self) -> tuple[float, float]:
        """The coefficients (a, b) of the forward step q(x_t | x_s) = N(a x_s, b² I)."""
        a = self.before[0] / self.after[0]
        return a, math.sqrt(self.before[1] ** 2 - a**2 * self.after[1] ** 2)


def sampler_steps(process: DiffusionProcess, sampler: str, steps: int) -> list[Step]:
    """Return the steps of ``robustdiff.sample(…, clip=False)`` from the noisiest time to x_0, where (α, σ) = (1, 0).

    Args:
        process: A variance-preserving process.
        sampler: The name of the sampler: "ddim" or "iddpm".
        steps: The number S of steps, in [1, T].

    Raises:
        InputError: If the sampler is another one, the process does not preserve variance, or S is out of range.
    """
    if sampler not in ("ddim", "iddpm"):
        raise InputError(f"the density of {sampler!r} is not followed here: use ddim or iddpm")
    if not process.variance_preserving:
        raise InputError("the density is followed for a variance-preserving process: use .linear or .cosine")
    chosen, path, _ = resolve(None, process, sampler, steps, {})
    points, levels, result = path.points, path.levels, []
    # A step is linear in x, ε̂ and z: with one of them 1 and the others 0, its result is the coefficient of that one.
    x, noise, z = torch.eye(3, dtype=torch.float64)[:, :, None]
    for i in reversed(range(len(points))):
        x0, _ = points.split("epsilon", x, torch.full((3,), i), noise)
        before, after, denoised = levels[i + 1], levels[i], Denoised(x0, noise, None)
        step = chosen.step(SamplerStep(x, denoised, path, i, before, after, iter([z])))
        of_x, of_noise, deviation = step.flatten().tolist()
        result.append(Step(float(points.times[i]), of_x, of_noise, deviation**2, before, after))
    return result


def gaussian_kl(mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor) -> float:
    """Return D_KL(N(μ₀, C₀) ‖ N(μ₁, C₁)), for means (d,) and covariances (d, d), both positive definite.

    Their Wasserstein distance is the square root of :func:`robustdiff.metrics.fid.frechet_distance`.
    """
    root = torch.linalg.cholesky(cov1)
    eigenvalues = torch.linalg.eigvalsh(
        torch.linalg.solve_triangular(root, torch.linalg.solve_triangular(root, cov0, upper=False).mT, upper=False)
    )
    shift = torch.linalg.solve_triangular(root, (mean1 - mean0)[:, None], upper=False)
    # λ − 1 − log λ for each eigenvalue of C₁⁻¹C₀, without cancellation for small divergences.
    excess = eigenvalues - 1
    return 0.5 * float((excess - torch.log1p(excess)).sum() + shift.square().sum())


def affine_map(model: NoiseModel, time: float, d: int) -> tuple[Tensor, Tensor]:
    """Return the matrix M (d, d) and the offset c (d,) of an affine model ε̂(x, t) = M x + c at one time.

    Raises:
        ValueError: If the model is not affine at this time.
    """
    probes = torch.cat([torch.zeros(1, d), torch.eye(d), torch.full((1, d), -3.0)]).double()
    values = model(probes, torch.full((len(probes),), time, dtype=torch.float64))
    offset = values[0]
    matrix = (values[1:-1] - offset).mT
    if not torch.allclose(
        values[-1], probes[-1] @ matrix.mT + offset, rtol=1e-6, atol=1e-6 * float(values.abs().max())
    ):
        raise ValueError(f"the model is not affine at time {time:g}: its Gaussian does not stay one")
    return matrix, offset


def push_gaussian(step: Step, model: NoiseModel, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and covariance (d, d) of the state after a step with an affine model, from those before."""
    matrix, offset = affine_map(model, step.time, len(mean))
    identity = torch.eye(len(mean), dtype=torch.float64)
    jacobian = step.of_x * identity + step.of_noise * matrix
    return jacobian @ mean + step.of_noise * offset, jacobian @ cov @ jacobian.mT + step.variance * identity


def change_of_variables(step: Step, model: NoiseModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images of points x under a step without noise, and the determinants of its Jacobian at x.

    If a determinant is not positive, the step is not invertible, and log p − log |det| is the density of one branch.

    Points and images have shape (B, d), determinants (B,).

    Raises:
        ValueError: If the step has noise (v > 0).
    """
    if step.variance > 0:
        raise ValueError("a step with noise is no change of variables: use Density.push")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = step.mean(model, x)
        rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return y.detach(), torch.linalg.det(torch.stack(rows, 1))


def _reach(q: GaussianMixture, deviations: float) -> tuple[Tensor, Tensor]:
    """Return the lower and upper corner (d,) of a box that contains each component up to the given deviations."""
    reach = deviations * q.variances.amax(1, keepdim=True).sqrt()
    return (q.means - reach).amin(0), (q.means + reach).amax(0)


@dataclass(frozen=True)
class Density:
    """A density on a lattice of points in one or two dimensions.

    Attributes:
        points: The points, with shape (n^d, d) and the last dimension varying fastest. Steps without noise move them.
        log_density: log p at the points, with shape (n^d,); −∞ where the lattice does not resolve it.
        volumes: The volume of each point's cell, with shape (n^d,): ∫ f ≈ Σ volume · f.
        size: The number n of points in each dimension.
    """

    points: Tensor
    log_density: Tensor
    volumes: Tensor
    size: int

    @classmethod
    def on_lattice(
        cls, log_prob: Callable[[Tensor], Tensor], low: list[float], high: list[float], size: int
    ) -> Density:
        """Return a density on a regular lattice of size^d points.

        Args:
            log_prob: The logarithm of the density, (B, d) ↦ (B,).
            low: The lowest coordinate in each of the d dimensions.
            high: The highest coordinate in each dimension.
            size: The number of points in each dimension, ≥ 3.

        Raises:
            InputError: If d is not 1 or 2, or the size is below 3.
        """
        if len(low) not in (1, 2) or len(high) != len(low) or size < 3:
            raise InputError(f"a lattice has 1 or 2 dimensions and 3 or more points in each; got {len(low)} and {size}")
        axes = [torch.linspace(lo, hi, size, dtype=torch.float64) for lo, hi in zip(low, high, strict=True)]
        points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
        volume = math.prod((hi - lo) / (size - 1) for lo, hi in zip(low, high, strict=True))
        return cls(points, log_prob(points), torch.full((len(points),), volume, dtype=torch.float64), size)

    @property
    def masses(self) -> Tensor:
        """The mass of each cell, with shape (n^d,)."""
        return self.volumes * self.log_density.exp()

    @property
    def mass(self) -> float:
        """The integral ∫ p, which is 1 if the lattice is fine and wide enough."""
        return float(self.masses.sum())

    def push(self, step: Step, model: NoiseModel, cover: GaussianMixture | None = None) -> Density:
        """Return p_θ(x_s), where this density is p_θ(x_t).

        A step without noise moves the points of the lattice. A step with noise is integrated on a new regular lattice,
        which contains the means of all points with mass and six standard deviations of the noise around them. The
        rectangle rule is exact to 2·exp(−2π²s²) for a Gaussian whose standard deviation is s times the distance of the
        points; a step with an error above 10⁻⁵ is refused.

        Args:
            step: The step from t to s.
            model: The model.
            cover: The density q(x_s) for a later comparison by :meth:`kl_from`. A new lattice then also contains
                sixteen of its standard deviations, since D_KL(q ‖ p) depends on the far tails of p_θ.

        Raises:
            ValueError: If the step is not invertible (a determinant ≤ 0), or the lattice is too coarse for the noise:
                begin with a larger size.
        """
        if step.variance == 0:
            points, determinants = change_of_variables(step, model, self.points)
            if not bool((determinants > 0).all()):
                raise ValueError(f"the step at time {step.time:g} is not increasing: its density has several branches")
            return Density(points, self.log_density - determinants.log(), self.volumes * determinants, self.size)
        d, deviation = self.points.shape[1], math.sqrt(step.variance)
        means = step.mean(model, self.points).detach()
        lattice = means.reshape(*(self.size,) * d, d)
        held = (self.masses > 1e-9).reshape(lattice.shape[:-1])
        gap = max(float((lattice.diff(dim=i).norm(dim=-1) * held.narrow(i, 1, self.size - 1)).max()) for i in range(d))
        reached = means[self.masses > 1e-20]
        low, high = reached.amin(0) - 6 * deviation, reached.amax(0) + 6 * deviation
        if cover is not None:
            least, most = _reach(cover, 16)
            low, high = torch.minimum(low, least), torch.maximum(high, most)
        gap = max(gap, float((high - low).max()) / (self.size - 1))
        if gap > 1.2 * deviation:
            raise ValueError(
                f"points {gap:.2g} apart cannot hold noise of deviation {deviation:.2g} at time {step.time:g}: "
                f"begin with a lattice larger than {self.size}"
            )

        log_masses = self.log_density + self.volumes.log()
        edge = self._edge()

        def log_prob(y: Tensor) -> Tensor:
            result = []
            for part in y.split(max(1, 4_000_000 // len(means))):
                squares = torch.cdist(part, means, compute_mode="donot_use_mm_for_euclid_dist").square()
                terms = log_masses - squares / (2 * step.variance)
                most, source = terms.max(1)
                log_sum = most + (terms - most[:, None]).exp().sum(1).log()
                # Where the edge contributes most, points beyond it would contribute more: p is unknown there.
                result.append(torch.where(edge[source], -math.inf, log_sum))
            return torch.cat(result) - 0.5 * d * math.log(2 * math.pi * step.variance)

        return Density.on_lattice(log_prob, low.tolist(), high.tolist(), self.size)

    def _edge(self) -> Tensor:
        """Return a mask (n^d,) of the outermost points at which the density is known, along any axis."""
        d = self.points.shape[1]
        known = self.log_density.isfinite().reshape(*(self.size,) * d)
        inner = torch.ones_like(known)
        for axis in range(d):
            for shift in (-1, 1):
                neighbour = known.roll(shift, axis)
                neighbour.select(axis, 0 if shift == 1 else -1).fill_(False)
                inner &= neighbour
        return (known & ~inner).flatten()

    def kl_from(self, q: GaussianMixture) -> float:
        """Return D_KL(q ‖ p), by a sum over the lattice of p.

        Raises:
            ValueError: If the sum of q over the lattice differs from 1 by 10⁻⁴ or more, or a mass of 10⁻⁸ or more of q
                is where p is unknown.
        """
        log_q = q.log_prob(self.points)
        masses = self.volumes * log_q.exp()
        known = self.log_density.isfinite()
        found, lost = float(masses[known].sum()), float(masses[~known].sum())
        if not (abs(found - 1) < 1e-4 and lost < 1e-8):
            raise ValueError(
                f"the lattice finds {found:.6f} of q and not 1, and {lost:.1g} where p is unknown: begin with a wider "
                "one, or a larger size"
            )
        return float((masses * (log_q - self.log_density))[known].sum())

    def displacement(self, q: GaussianMixture) -> Tensor:
        """Return the displacement of each point by optimal transport from p to q in one dimension, with shape (n,).

        The transport map is Q⁻¹∘P with the distribution functions P and Q, and W₂² = Σ mass · displacement².

        Raises:
            ValueError: In two dimensions.
        """
        if self.points.shape[1] != 1:
            raise ValueError("optimal transport is computed in one dimension here")
        x, masses = self.points[:, 0], self.masses
        below = ((masses.cumsum(0) - masses / 2) / masses.sum()).clamp(1e-15, 1 - 1e-15)
        low, high = _reach(q, 9)
        fine = torch.linspace(float(low), float(high), 40_001, dtype=torch.float64)
        cdf, first = np.unique(q.cdf(fine).numpy(), return_index=True)
        return torch.from_numpy(np.interp(below.numpy(), cdf, fine.numpy()[first])) - x

    def w2(self, q: GaussianMixture) -> float:
        """Return the Wasserstein distance W₂(p, q), in one dimension (:meth:`displacement`)."""
        return math.sqrt(float((self.masses * self.displacement(q).square()).sum() / self.mass))


def step_divergence(mixture: GaussianMixture, step: Step, model: NoiseModel, size: int = 2001) -> float:
    """Return E_{q(x_t)} D_KL( q(x_s | x_t) ‖ N(c_x x_t + c_ε ε̂(x_t), v I) ), for a step with noise.

    With H the entropies, b² the variance of q(x_t | x_s) and μ(x) the mean of the step, it is

        H(x_t) − H(x_s) − d/2 log(2πe b²) + d/2 log(2πv) + E[ tr Cov(x_s | x_t) + ‖E[x_s | x_t] − μ(x_t)‖² ] / 2v.

    A single Gaussian with an affine model has a closed form; others are integrated on a lattice in one or two
    dimensions.

    Args:
        mixture: The distribution q(x_0) of the data.
        step: The step from t to s, with σ_t > 0 and σ_s > 0.
        model: The model.
        size: The number of points of the lattice in each dimension.

    Raises:
        ValueError: If v = 0, for which the divergence is infinite, or the mixture is a single Gaussian and the model is
            not affine.
        InputError: If a mixture of several Gaussians has more than two dimensions.
    """
    if step.variance == 0:
        raise ValueError("without noise a step's conditional law has no density: the divergence is infinite")
    q_t, q_s, d = mixture.at(*step.before), mixture.at(*step.after), mixture.dim
    a, b = step.transition
    if len(mixture.weights) == 1:
        entropies = [0.5 * float((2 * math.pi * math.e * q.variances).log().sum()) for q in (q_t, q_s)]
        origin = torch.zeros(1, d, dtype=torch.float64)
        basis = torch.eye(d, dtype=torch.float64)
        posterior = q_s.posterior(torch.cat([origin, basis]), a, b).mean
        matrix, offset = affine_map(model, step.time, d)
        slope = (posterior[1:] - posterior[0]).mT - step.of_x * basis - step.of_noise * matrix
        error = slope @ q_t.mean + posterior[0] - step.of_noise * offset
        mean_square = float((slope @ q_t.covariance @ slope.mT).trace() + error.square().sum())
        total_variance = float(q_s.posterior(origin, a, b).total_variance)
    else:
        densities = [_lattice_of(q, size) for q in (q_t, q_s)]
        entropies = [float(-(density.masses * density.log_density).sum()) for density in densities]
        x, masses = densities[0].points, densities[0].masses
        conditional = q_s.posterior(x, a, b)
        mean_square = float(masses @ (conditional.mean - step.mean(model, x).detach()).square().sum(1))
        total_variance = float(masses @ conditional.total_variance)
    return (
        entropies[0]
        - entropies[1]
        + 0.5 * d * (math.log(step.variance / b**2) - 1)
        + (total_variance + mean_square) / (2 * step.variance)
    )


def _lattice_of(q: GaussianMixture, size: int) -> Density:
    """Return q on a lattice that extends nine standard deviations around each component."""
    low, high = _reach(q, 9)
    return Density.on_lattice(q.log_prob, low.tolist(), high.tolist(), size)
