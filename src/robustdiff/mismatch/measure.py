r"""How far p_θ(x_t) is from q(x_t) along a sampler's own path, for checkpoints on common random numbers.

A network is trained on x_t ~ q(x_t), x_t = α_t x_0 + σ_t ε, and is called by a sampler on states x̂_t of its own making,
the law of which is p_θ(x_t) (Wang et al., 2025, arXiv 2502.17099, section 4.1). Wherever a sampler calls the network,
:attr:`robustdiff.samplers.denoiser.Denoiser.on_evaluation` shows the state and its time. For n images this is set
beside n points of q at the very α_t and σ_t of that call, and the network is called on them too.

    measure    what it is                                              unit            equal laws give
    delta      δ_t = (std x̂_t − std x_t)² (exposure.py)                x², per element its floor
    x0_std     std x̂_0 on the path − std x̂_0 at true x_t               x_0             0
    noise      ‖ε̂‖ on the path over ‖ε̂‖ at true x_t, less 1            none            0
    sliced     sliced Wasserstein distance, per dimension              x               its floor
    energy     energy distance                                         x               0 (its floor: noise)
    frechet    squared Fréchet distance in PCA space (≤ 16 dimensions) x²              its floor
    kl         KL(q‖p_θ) by k-NN in PCA space (≤ 4 dimensions)         nats            0 (its floor: noise)

x̂_0 is what the sampler goes on with, clipped if it clips; ε̂ is the network's own, before scaling and clipping.

**PCA space.** The covariance of q(x_t) is α² C + σ² I with C that of the data, so its principal components are the
data's at every t: one basis for all steps, samplers and checkpoints, and, for KL, coordinates of unit variance under
q(x_t). What happens outside it these two do not see; sliced Wasserstein and energy distance look at all dimensions.
Projecting can only lower KL, so this is an estimate of a lower bound; four dimensions are what nearest neighbours can
bear at a few thousand images (:mod:`robustdiff.mismatch.distances`).

**Common random numbers.** x_T and the step noise of image i are what :class:`robustdiff.evaluation.generate.ImageNoise`
has for it; image i of q has one x_0 and one ε, the same at all times, samplers and checkpoints. Classes, where there
are any, are those of the real image i on both sides. Replicates leave out the same images everywhere, so means over
steps and differences of checkpoints have intervals of their own.

**Memory.** Means, variances and norms are sums. Distances need samples: the states of the first ``kept`` images are
held, 4·kept·d bytes a step, for one checkpoint and sampler at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from robustdiff.data import ImageDataset, to_unit
from robustdiff.errors import InputError, RunError
from robustdiff.evaluation.generate import Generator, ImageNoise
from robustdiff.mismatch.distances import (
    BLOCKS,
    Array,
    Estimate,
    block_of,
    energy_distance,
    estimate,
    frechet,
    half_samples,
    kl_divergence,
    random_directions,
    sliced_wasserstein,
)
from robustdiff.mismatch.exposure import BlockMoments
from robustdiff.mismatch.robustness import Robustness, measure_robustness
from robustdiff.samplers.denoiser import Evaluation

__all__ = ["MEASURES", "Difference", "Mismatch", "Path", "Step", "measure_mismatch"]

MEASURES: dict[str, str] = {
    "delta": "δ_t: difference of standard deviations, squared",
    "x0_std": "standard deviation of x̂_0, sampling − training",
    "noise": "length of ε̂, sampling over training − 1",
    "sliced": "sliced Wasserstein distance, per dimension",
    "energy": "energy distance",
    "frechet": "squared Fréchet distance, PCA",
    "kl": "KL(q‖p) in nats, k-NN, PCA",
}
"""What is measured at each step, by name."""

RESERVOIR = 2000
_FRECHET_DIMENSIONS, _KL_DIMENSIONS = 16, 4
_PCA_IMAGES = 5000
_TRUE = 2**40  # from here on the image numbers are those of true points: no sampler comes this far


@dataclass(frozen=True)
class Step:
    """One evaluation of the network on the sampler's path.

    Attributes:
        time: What the network is given as time; the mean over images where they differ.
        alpha: α_t, likewise.
        sigma: σ_t, likewise.
        std_sampling: std x̂_t, over images, averaged over elements.
        std_training: std x_t.
        delta_given_x0: δ_t as published, with the mean given x_0 subtracted (:mod:`robustdiff.mismatch.exposure`).
        x0_std_sampling: std x̂_0 at x̂_t.
        x0_std_training: std x̂_0 at x_t.
        noise_norm_sampling: ‖ε̂‖₂ at x̂_t, averaged over images.
        noise_norm_training: ‖ε̂‖₂ at x_t.
        estimates: Each of :data:`MEASURES`.
    """

    time: float
    alpha: float
    sigma: float
    std_sampling: float
    std_training: float
    delta_given_x0: float
    x0_std_sampling: float
    x0_std_training: float
    noise_norm_sampling: float
    noise_norm_training: float
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class Path:
    """One checkpoint under one sampler.

    Attributes:
        checkpoint: Its name.
        sampler: The sampler.
        steps: Network evaluations for one image.
        n: Images.
        kept: How many of them the distances are of.
        path: The steps, from the noisiest on.
        mean: The mean over steps of each measure.
        last: Each measure at the last step.
    """

    checkpoint: str
    sampler: str
    steps: int
    n: int
    kept: int
    path: list[Step]
    mean: dict[str, Estimate]
    last: dict[str, Estimate]


@dataclass(frozen=True)
class Difference:
    """The mean over steps of a measure, of one checkpoint minus that of another, on common random numbers.

    Attributes:
        checkpoint: The one.
        baseline: The other.
        sampler: The sampler.
        steps: Network evaluations for one image.
        measure: One of :data:`MEASURES`.
        value: The difference.
        low: The lower end of its 95 % interval.
        high: The upper end.
    """

    checkpoint: str
    baseline: str
    sampler: str
    steps: int
    measure: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Mismatch:
    """All paths, the differences of all pairs of checkpoints, and the robustness of each checkpoint by time."""

    data: str
    seed: int
    paths: list[Path]
    differences: list[Difference]
    robustness: list[Robustness]


class _Truth:
    """Points of q(x_t): two disjoint sets of n real images in random order, each image with one ε.

    The first set is what a sampler is compared with; the second, compared with the first, makes the floor.
    """

    def __init__(self, dataset: ImageDataset, num: int, kept: int, seed: int, device: torch.device) -> None:
        self.dataset, self.num, self.seed, self.device = dataset, num, seed, device
        self._order = np.random.default_rng(seed).permutation(len(dataset))
        images = self._images(self._order[-_PCA_IMAGES:])
        dimensions = min(_FRECHET_DIMENSIONS, images[0].numel(), len(images))
        self.pca = PCA(dimensions, random_state=seed).fit(images.flatten(1).numpy())
        self.directions = random_directions(images[0].numel(), seed=seed)
        halves = (self.batch(range(kept), second) for second in (False, True))
        self.kept = [(x0.flatten(1).cpu().numpy(), noise.flatten(1).cpu().numpy()) for x0, noise in halves]

    def _images(self, indices: NDArray[np.int64]) -> Tensor:
        return to_unit(self.dataset.__getitems__(indices.tolist())[0])

    def batch(self, indices: range, second: bool = False) -> tuple[Tensor, Tensor]:
        """x_0 and ε of some images of a set, each with shape (B, C, H, W)."""
        x0 = self._images(self._order[np.asarray(indices) + second * self.num])
        start = _TRUE * (1 + second)
        numbers = range(start + indices.start, start + indices.stop)
        return x0.to(self.device), ImageNoise(self.seed, numbers, self.dataset.shape, self.device).draw()

    def labels(self, indices: range) -> Tensor | None:
        """The classes of some images of the first set, with shape (B,)."""
        labels = self.dataset.__getitems__(self._order[np.asarray(indices)].tolist())[1]
        return None if labels is None else labels.to(self.device)


@dataclass
class _Record:
    """What is kept of one evaluation of the network over all images: sums, and the states of the first ``kept``."""

    d: int
    time: float = 0.0
    states: list[NDArray[np.float32]] = field(default_factory=list)
    alphas: list[NDArray[np.float32]] = field(default_factory=list)
    sigmas: list[NDArray[np.float32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampling, self.training, self.second, self.given_x0, self.x0_sampling, self.x0_training = (
            BlockMoments(self.d) for _ in range(6)
        )
        self.noise_sampling, self.noise_training = BlockMoments(1), BlockMoments(1)


class _Observer:
    """Looks on while batches of images are sampled, and sets points of q beside every state."""

    def __init__(self, truth: _Truth, kept: int) -> None:
        self.truth, self.kept = truth, kept
        self.records: list[_Record] = []

    def begin(self, indices: range) -> None:
        """The next evaluations are those of these images."""
        self.indices, self.evaluation = indices, 0
        self.first, self.second = self.truth.batch(indices), self.truth.batch(indices, second=True)

    def __call__(self, evaluation: Evaluation) -> None:
        if self.evaluation == len(self.records):
            self.records.append(_Record(evaluation.x_t[0].numel()))
        record, indices = self.records[self.evaluation], self.indices
        self.evaluation += 1
        process, t = evaluation.process, evaluation.index
        x_t, other = (process.diffuse(x0, t, noise) for x0, noise in (self.first, self.second))
        seen: list[Evaluation] = []
        replace(evaluation.denoiser, on_evaluation=seen.append, finite=None)(x_t, t, process)
        (true,) = seen
        alpha, sigma = process.levels(t, x_t)
        record.time += float(process.times[t.cpu()].double().sum())
        record.sampling.update(evaluation.x_t, indices)
        record.training.update(x_t, indices)
        record.second.update(other, indices)
        record.given_x0.update(evaluation.x_t - alpha * self.first[0], indices)
        record.x0_sampling.update(evaluation.used.x0, indices)
        record.x0_training.update(true.used.x0, indices)
        record.noise_sampling.update(evaluation.predicted.noise.flatten(1).norm(dim=1)[:, None], indices)
        record.noise_training.update(true.predicted.noise.flatten(1).norm(dim=1)[:, None], indices)
        room = max(0, self.kept - indices.start)
        record.states.append(evaluation.x_t.flatten(1)[:room].float().cpu().numpy())
        record.alphas.append(alpha.flatten()[:room].cpu().numpy())
        record.sigmas.append(sigma.flatten()[:room].cpu().numpy())


def _summarise(record: _Record, truth: _Truth, num: int, blocks: NDArray[np.bool_]) -> tuple[Step, dict[str, Array]]:
    """A step, and for each measure its value and replicates, (1 + R,)."""
    alpha, sigma = np.concatenate(record.alphas)[:, None], np.concatenate(record.sigmas)[:, None]
    sampled = np.concatenate(record.states)
    first, second = (alpha * x0 + sigma * noise for x0, noise in truth.kept)
    subsets = blocks[:, block_of(np.arange(len(sampled)))]
    basis = truth.pca.components_
    a, s = float(alpha.mean()), float(sigma.mean())
    # Unit variance under q(x_t), whose covariance has the data's eigenvectors.
    whitening = (basis / np.sqrt(a**2 * truth.pca.explained_variance_ + s**2)[:, None])[:_KL_DIMENSIONS]

    def distances(x: NDArray[np.float32], subsets: NDArray[np.bool_]) -> dict[str, Array]:
        return {
            "sliced": sliced_wasserstein(x, first, truth.directions, subsets),
            "energy": energy_distance(x, first, subsets),
            "frechet": frechet(x @ basis.T, first @ basis.T, subsets),
            "kl": kl_divergence(x @ whitening.T, first @ whitening.T, subsets=subsets),
        }

    std, std_true = record.sampling.std(blocks), record.training.std(blocks)
    x0_std, x0_std_true = record.x0_sampling.std(blocks), record.x0_training.std(blocks)
    norm, norm_true = record.noise_sampling.mean(blocks), record.noise_training.mean(blocks)
    values = {
        "delta": (std - std_true) ** 2,
        "x0_std": x0_std - x0_std_true,
        "noise": norm / norm_true - 1,
        **distances(sampled, subsets),
    }
    if undefined := [name for name, value in values.items() if np.isnan(value).any()]:
        raise RunError(
            f"{MEASURES[undefined[0]]}: not a number at time {record.time / num:g}: check the network's weights, or "
            "measure in fp32"
        )
    floors = {name: float(floor[0]) for name, floor in distances(second, subsets[:1]).items()}
    floors["delta"] = float((record.second.std(blocks[:1])[0] - std_true[0]) ** 2)
    step = Step(
        time=record.time / num,
        alpha=a,
        sigma=s,
        std_sampling=float(std[0]),
        std_training=float(std_true[0]),
        delta_given_x0=float((record.given_x0.std(blocks[:1])[0] - s) ** 2),
        x0_std_sampling=float(x0_std[0]),
        x0_std_training=float(x0_std_true[0]),
        noise_norm_sampling=float(norm[0]),
        noise_norm_training=float(norm_true[0]),
        estimates={name: estimate(values[name], floors.get(name)) for name in MEASURES},
    )
    return step, values


def _follow(
    generator: Generator,
    truth: _Truth,
    num: int,
    kept: int,
    blocks: NDArray[np.bool_],
    on_images: Callable[[int], None],
) -> tuple[list[Step], list[dict[str, Array]]]:
    """The steps of one checkpoint under one sampler, and the values and replicates of each."""
    observer = _Observer(truth, kept)
    for batch in generator.batches(range(num)):
        observer.begin(batch)
        labels = None if generator.classes is None else truth.labels(batch)
        generator.sample(batch, labels, on_evaluation=observer)
        on_images(len(batch))
    steps, values = zip(*(_summarise(r, truth, num, blocks) for r in observer.records), strict=True)
    return list(steps), list(values)


def measure_mismatch(
    generators: Mapping[str, Generator],
    dataset: ImageDataset,
    samplers: Sequence[str] = ("ddim",),
    steps: Sequence[int] = (10,),
    num: int = 2000,
    *,
    radii: Sequence[float] = (0.1, 0.3, 1.0),
    probes: int = 32,
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
    reservoir: int = RESERVOIR,
    on_part: Callable[[str, int], None] = lambda description, total: None,
    on_progress: Callable[[int], None] = lambda amount: None,
) -> Mismatch:
    """Measure checkpoints under samplers, and their robustness at true points.

    Arguments:
        generators: By the checkpoint's name; their sampler, steps and seed are replaced, the rest is used as it is;
            their precision is that of the paths, and robustness is measured without autocast.
        dataset: The real images.
        samplers: Names of samplers.
        steps: Numbers of network evaluations.
        num: Images n of each path, in [40, half of the dataset]. The network is called twice an image and step.
        radii: ℓ2 radii of the robust loss, in units of x_t; none for no robust loss. The paper's is η√d, with η = 0.1.
        probes: Images of the robust loss and the Lipschitz constant, in [2, n]; 0 leaves both out.
        times: Where these two are measured, as fractions of T, in [0, 1).
        seed: Of images and noise.
        reservoir: The most states of each step that are kept for distances.
        on_part: Called when a part begins, with its description and the number of units in it.
        on_progress: Called with the units done since the last call.

    Raises:
        InputError: If a sampler or steps do not suit a checkpoint, the images do not suit it or lack classes, or a
            number is out of range.
    """
    cells = list(itertools.product(samplers, steps))
    for name, generator in generators.items():
        generator.model.backbone.check_shape(dataset.shape, generator.model.codec, name)
        if generator.classes is not None and dataset.num_classes != generator.classes:
            raise InputError(
                f"{name} has {generator.classes} classes and {dataset.name} has {dataset.num_classes or 'none'}: "
                "give the images that it was trained on"
            )
        for sampler, count in cells:
            replace(generator, sampler=sampler, steps=count)  # its checks, before anything takes time
    if not 2 * BLOCKS <= num <= len(dataset) // 2:
        raise InputError(
            f"num is {num}: q(x_t) and its floor take two sets of so many real images, and {dataset.name} has "
            f"{len(dataset)}; give a number from {2 * BLOCKS} to {len(dataset) // 2}"
        )
    if reservoir < 2 * BLOCKS:
        raise InputError(f"reservoir is {reservoir}; give {2 * BLOCKS} or more")
    if probes != 0 and not 2 <= probes <= num:
        raise InputError(f"probes is {probes}; give 0, or a number from 2 to num = {num}")
    if not all(0 < r < np.inf for r in radii):
        raise InputError(f"radii are {', '.join(map(str, radii))}; each must be positive and finite")
    if not all(0 <= f < 1 for f in times):
        raise InputError(f"times are {', '.join(map(str, times))}; each must be in [0, 1)")
    kept, blocks = min(num, reservoir), half_samples(seed=seed)
    truth = _Truth(dataset, num, kept, seed, next(iter(generators.values())).model.device)
    paths, differences, robustness = [], [], []
    for sampler, count in cells:
        measured: dict[str, dict[str, Array]] = {}
        for name, generator in generators.items():
            on_part(f"{name} · {sampler} {count}", num)
            chosen = replace(generator, sampler=sampler, steps=count, seed=seed)
            path, values = _follow(chosen, truth, num, kept, blocks, on_progress)
            means = {m: np.mean([step[m] for step in values], axis=0) for m in MEASURES}
            mean = {}
            for m in MEASURES:
                floors = [step.estimates[m].floor for step in path]
                mean[m] = estimate(means[m], None if None in floors else float(np.mean(np.asarray(floors, np.float64))))
            paths.append(Path(name, sampler, count, num, kept, path, mean, path[-1].estimates))
            for other, baseline in measured.items():
                for m in MEASURES:
                    gap = estimate(means[m] - baseline[m])
                    differences.append(Difference(name, other, sampler, count, m, gap.value, gap.low, gap.high))
            measured[name] = means
    for name, generator in generators.items() if probes else ():
        generator.model.network.eval()
        indices = [int(fraction * len(generator.model.process)) for fraction in times]
        on_part(f"{name} · robust loss", len(indices))
        images = range(probes)
        labels = truth.labels(images)
        robustness += measure_robustness(
            name,
            generator.model,
            generator.model.process,
            generator.model.prediction,
            *truth.batch(images),
            indices,
            radii,
            condition=None if generator.classes is None else {"class_labels": labels},
            seed=seed,
            on_time=lambda: on_progress(1),
        )
    return Mismatch(dataset.name, seed, paths, differences, robustness)
