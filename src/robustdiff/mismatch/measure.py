r"""Distances between p_θ(x_t) and q(x_t) along the path of a sampler, for checkpoints with common random numbers.

A network is trained on x_t ~ q(x_t), x_t = α_t x_0 + σ_t ε. A sampler calls it on its own states x̂_t, whose
distribution is p_θ(x_t) (Wang et al., 2025, arXiv 2502.17099, section 4.1). At each call of the network, the callback
:attr:`robustdiff.samplers.denoiser.Denoiser.on_evaluation` receives the state and its time. The states of n images are
compared with n points of q at the same α_t and σ_t, on which the network is also evaluated.

    measure    definition                                              unit            value for p_θ = q
    delta      δ_t = (std x̂_t − std x_t)² (exposure.py)                x², per element its floor
    x0_std     std x̂_0 on the path − std x̂_0 at true x_t               x_0             0
    noise      ‖ε̂‖ on the path over ‖ε̂‖ at true x_t, less 1            none            0
    sliced     sliced Wasserstein distance, per dimension              x               its floor
    energy     energy distance                                         x               0 (its floor: noise)
    frechet    squared Fréchet distance in PCA space (≤ 16 dimensions) x²              its floor
    kl         KL(q‖p_θ) by k-NN in PCA space (≤ 4 dimensions)         nats            0 (its floor: noise)

x̂_0 is the estimate that the sampler uses, after clipping; ε̂ is the network's estimate before scaling and clipping.

**PCA space.** The covariance of q(x_t) is α² C + σ² I with C the covariance of the data, so that its principal
components at every t are those of the data. One basis therefore serves all steps, samplers and checkpoints; for KL its
coordinates are scaled to unit variance under q(x_t). The Fréchet distance and KL do not detect differences outside this
space; the sliced Wasserstein and the energy distance use all dimensions. A projection can only lower KL, so that its
value estimates a lower bound. For a few thousand images, nearest neighbours require no more than about four dimensions
(:mod:`robustdiff.mismatch.distances`).

**Common random numbers.** :class:`robustdiff.evaluation.noise.ImageNoise` draws x_T and the step noise of image i.
Image i of q has one x_0 and one ε, which are the same for all times, samplers and checkpoints. A conditional network
receives the class, or the first caption, of the real image i in sampling and on the points of q. Replicates omit the
same images everywhere, which gives intervals for means over steps and for differences of checkpoints.

**Memory.** For the distances, the states of the first ``kept`` images are stored, 4·kept·d bytes for each step, for one
checkpoint and sampler at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from robustdiff.backbones.model import Model
from robustdiff.data import ImageDataset, to_unit
from robustdiff.errors import InputError, NotFiniteError
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.noise import NOISE, ImageNoise
from robustdiff.metrics.bootstrap import Array
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.mismatch.distances import (
    IMAGE_BLOCKS,
    Estimate,
    energy_distance,
    estimate,
    frechet,
    half_samples,
    image_block_of,
    kl_divergence,
    random_directions,
    sliced_wasserstein,
)
from robustdiff.mismatch.exposure import BlockMoments
from robustdiff.mismatch.robustness import Robustness, measure_robustness
from robustdiff.notebook import html_table
from robustdiff.progress import SILENT, Progress
from robustdiff.samplers.denoiser import Evaluation
from robustdiff.section import MOST_LENGTH

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
"""The descriptions of the measures of each step, by name."""

RESERVOIR = 2000
_FRECHET_DIMENSIONS, _KL_DIMENSIONS = 16, 4
_PCA_IMAGES = 5000
_TRUE = 2**40  # the first image number of the points of q, far above the numbers of sampled images


@dataclass(frozen=True)
class Step:
    """One evaluation of the network on the sampler's path.

    Standard deviations are over images, averaged over elements; times, levels and norms are averaged over images.

    Attributes:
        time: The time that is passed to the network.
        alpha: The signal level α_t.
        sigma: The noise level σ_t.
        std_sampling: The standard deviation of x̂_t.
        std_training: The standard deviation of x_t.
        delta_given_x0: δ_t' as published, with the mean given x_0 subtracted (:mod:`robustdiff.mismatch.exposure`).
        x0_std_sampling: The standard deviation of x̂_0 at x̂_t.
        x0_std_training: The standard deviation of x̂_0 at x_t.
        noise_norm_sampling: The norm ‖ε̂‖₂ at x̂_t.
        noise_norm_training: The norm ‖ε̂‖₂ at x_t.
        estimates: The estimate of each of :data:`MEASURES`, by name.
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
    """The measurements of one checkpoint with one sampler.

    Attributes:
        checkpoint: The name of the checkpoint.
        sampler: The name of the sampler.
        steps: The number of network evaluations for one image.
        n: The number of images.
        kept: The number of images from which the distances are estimated.
        path: The steps, beginning with the noisiest.
        mean: The mean over steps of each measure, by name.
        last: The estimate of each measure at the last step, by name.
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
    """The difference of two checkpoints in the mean over steps of a measure, with common random numbers.

    Attributes:
        checkpoint: The name of the checkpoint.
        baseline: The name of the checkpoint that is subtracted.
        sampler: The name of the sampler.
        steps: The number of network evaluations for one image.
        measure: The name of the measure, one of :data:`MEASURES`.
        value: The difference.
        low: The lower end of its 95 % interval.
        high: The upper end of its 95 % interval.
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
    """The result of :func:`measure_mismatch`.

    Attributes:
        data: The name of the dataset.
        seed: The seed of images and noise.
        paths: The measurements of each sampler, number of steps and checkpoint.
        differences: The differences of all pairs of checkpoints.
        robustness: The robustness of each checkpoint at each time.
        noise: The name of the noise, :data:`robustdiff.evaluation.noise.NOISE`.
    """

    data: str
    seed: int
    paths: list[Path]
    differences: list[Difference]
    robustness: list[Robustness]
    noise: str = NOISE

    def _repr_html_(self) -> str:
        rows = [
            [
                *(path.checkpoint, path.sampler, path.steps, MEASURES[name]),
                *(f"{cell.value:.3g}", f"{cell.low:.3g} … {cell.high:.3g}"),
                "–" if cell.floor is None else f"{cell.floor:.3g}",
            ]
            for path in self.paths
            for name, cell in path.mean.items()
        ]
        heading = ["", "sampler", "steps", "measure", "mean over steps", "95 % interval", "floor"]
        return html_table(f"p(x_t) against q(x_t) of {self.data}", heading, rows)


class _Truth:
    """Points of q(x_t): two disjoint sets of n real images in random order, each image with one ε.

    A sampler is compared with the first set; the second set, compared with the first, gives the floor.
    """

    def __init__(self, dataset: ImageDataset, num: int, kept: int, seed: int, model: Model) -> None:
        self.dataset, self.num, self.seed, self.codec, self.device = dataset, num, seed, model.codec, model.device
        self.shape = model.codec.encoded_shape(dataset.shape)
        self._order = fixed_order(len(dataset), seed)
        images = self._images(self._order[-_PCA_IMAGES:])
        dimensions = min(_FRECHET_DIMENSIONS, images[0].numel(), len(images))
        self.pca = PCA(dimensions, random_state=seed % 2**32).fit(images.flatten(1).numpy())
        self.directions = random_directions(images[0].numel(), seed=seed)
        halves = (self.batch(range(kept), second) for second in (False, True))
        self.kept = [(x0.flatten(1).cpu().numpy(), noise.flatten(1).cpu().numpy()) for x0, noise in halves]

    def _images(self, indices: NDArray[np.int64]) -> Tensor:
        images = to_unit(self.dataset.__getitems__(indices.tolist())[0])
        with torch.inference_mode():
            return images if self.codec.identity else self.codec.encode(images.to(self.device)).cpu()

    def batch(self, indices: range, second: bool = False) -> tuple[Tensor, Tensor]:
        """Return x_0 and ε of images of the first or second set, each with shape (B, C, H, W)."""
        x0 = self._images(self._order[np.asarray(indices) + second * self.num])
        start = _TRUE * (1 + second)
        numbers = range(start + indices.start, start + indices.stop)
        return x0.to(self.device), ImageNoise(self.seed, numbers, self.shape, self.device).draw()

    def labels(self, indices: range) -> Tensor | None:
        """Return the classes of images of the first set, with shape (B,), or None if there are none."""
        labels = self.dataset.labels_of(self._order[np.asarray(indices)].tolist())
        return None if labels is None else labels.to(self.device)

    def captions(self, indices: range) -> list[str] | None:
        """Return the first caption of each image of the first set, or None if there are none."""
        return self.dataset.first_captions(self._order[np.asarray(indices)].tolist())


@dataclass
class _Record:
    """The sums over all images at one evaluation of the network, and the states of the first ``kept`` images."""

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
    """A callback that records the states of a sampler, and points of q at the same times."""

    def __init__(self, truth: _Truth, kept: int) -> None:
        self.truth, self.kept = truth, kept
        self.records: list[_Record] = []

    def begin(self, indices: range) -> None:
        """Begin a batch: the next evaluations are those of the images with the given numbers."""
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
    """Return a step, and the value and R replicates of each measure, with shape (1 + R,)."""
    alpha, sigma = np.concatenate(record.alphas)[:, None], np.concatenate(record.sigmas)[:, None]
    sampled = np.concatenate(record.states)
    first, second = (alpha * x0 + sigma * noise for x0, noise in truth.kept)
    subsets = blocks[:, image_block_of(np.arange(len(sampled)))]
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
        raise NotFiniteError(
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
    generator: Generator, truth: _Truth, num: int, kept: int, blocks: NDArray[np.bool_], progress: Progress
) -> tuple[list[Step], list[dict[str, Array]]]:
    """Return the steps of one checkpoint with one sampler, and the values and replicates at each step."""
    observer = _Observer(truth, kept)
    for batch in generator.batches(range(num)):
        observer.begin(batch)
        labels = None if generator.classes is None else truth.labels(batch)
        generator.sample(batch, labels, on_evaluation=observer)
        progress.advance(len(batch))
    steps, values = zip(*(_summarise(r, truth, num, blocks) for r in observer.records), strict=True)
    return list(steps), list(values)


def _mean_over_steps(path: list[Step], values: list[dict[str, Array]]) -> tuple[dict[str, Estimate], dict[str, Array]]:
    """Return the estimate of each measure's mean over steps, and its value and replicates, with shape (1 + R,)."""
    means: dict[str, Array] = {m: np.mean([step[m] for step in values], axis=0) for m in MEASURES}
    floors = {m: [step.estimates[m].floor for step in path] for m in MEASURES}
    floor = {m: None if None in f else float(np.mean(np.asarray(f, np.float64))) for m, f in floors.items()}
    return {m: estimate(means[m], floor[m]) for m in MEASURES}, means


def measure_mismatch(
    generators: Mapping[str, Generator],
    dataset: ImageDataset,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (10,),
    num: int | None = None,
    *,
    radii: Sequence[float] = (0.1, 0.3, 1.0),
    probes: int | None = None,
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
    reservoir: int = RESERVOIR,
    progress: Progress = SILENT,
) -> Mismatch:
    """Measure checkpoints with samplers, and their robustness at points of q.

    Args:
        generators: The generators, by the checkpoint's name. Their sampler, steps and seed are replaced, and classes
            and prompts are those of the real images. Their precision applies to the paths; robustness is measured
            without autocast.
        dataset: The real images.
        samplers: The names of the samplers. Default: the sampler of the first generator.
        steps: The numbers of network evaluations.
        num: The number n of images of each path, in [40, half of the dataset]. Default: 2000, or half of the dataset if
            that is less. The network is called twice for each image and step.
        radii: The ℓ2 radii of the robust loss, in units of x_t; empty for no robust loss. The radius of Wang et al.
            (2025) is η√d, with η = 0.1.
        probes: The number of images for the robust loss and the Lipschitz constant, in [2, n], or 0 to omit both.
            Default: 32, or n if that is less.
        times: The times of the robust loss and the Lipschitz constant, as fractions of T, in [0, 1).
        seed: The seed of images and noise.
        reservoir: The largest number of states of each step that are stored for the distances, ≥ 40.
        progress: The receiver of the progress.

    Raises:
        InputError: If a sampler, the steps or the images do not suit a checkpoint, classes or captions are missing, or
            a number is out of range.
        NotFiniteError: If a measure is not a number.
    """
    cells = list(itertools.product(samplers or [next(iter(generators.values())).sampler], steps))
    num = min(2000, len(dataset) // 2) if num is None else num
    probes = min(32, num) if probes is None else probes
    _check_generators(generators, dataset, cells, robust=probes > 0)
    _check_numbers(dataset, num, radii, probes, times, reservoir)
    kept, blocks = min(num, reservoir), half_samples(seed=seed)
    truth = _Truth(dataset, num, kept, seed, next(iter(generators.values())).model)
    captions = tuple(truth.captions(range(num)) or ())
    paths, differences, robustness = [], [], []
    for sampler, count in cells:
        measured: dict[str, dict[str, Array]] = {}
        for name, generator in generators.items():
            progress.begin(f"{name} · {sampler} {count}", num)
            prompts = captions if generator.condition.takes_captions else ()
            chosen = replace(generator, sampler=sampler, steps=count, seed=seed, prompts=prompts)
            path, values = _follow(chosen, truth, num, kept, blocks, progress)
            mean, means = _mean_over_steps(path, values)
            paths.append(Path(name, sampler, count, num, kept, path, mean, path[-1].estimates))
            for other, baseline in measured.items():
                for m in MEASURES:
                    gap = estimate(means[m] - baseline[m])
                    differences.append(Difference(name, other, sampler, count, m, gap.value, gap.low, gap.high))
            measured[name] = means
    for name, generator in generators.items() if probes else ():
        generator.model.network.eval()
        indices = [int(fraction * len(generator.model.process)) for fraction in times]
        progress.begin(f"{name} · robust loss", len(indices))
        robustness += measure_robustness(
            name,
            generator.model,
            generator.model.process,
            generator.model.prediction,
            *truth.batch(range(probes)),
            indices,
            radii,
            condition=generator.condition.batch(truth.labels(range(probes)), truth.captions(range(probes)), None),
            seed=seed,
            progress=progress,
        )
    return Mismatch(dataset.name, seed, paths, differences, robustness)


def _check_generators(
    generators: Mapping[str, Generator], dataset: ImageDataset, cells: Sequence[tuple[str, int]], robust: bool
) -> None:
    if len({generator.model.codec.fingerprint() for generator in generators.values()}) > 1:
        raise InputError("the models have different codecs, whose latents cannot be compared: measure each alone")
    for name, generator in generators.items():
        generator.model.check_shape(dataset.shape, name)
        if robust and generator.model.frozen is not None:
            raise InputError(
                f"{name} has weights in {generator.precision}, and robustness is measured in fp32: load it with "
                "half=False"
            )
        if generator.classes is not None and dataset.num_classes != generator.classes:
            raise InputError(
                f"{name} has {generator.classes} classes and {dataset.name} has {dataset.num_classes or 'none'}: "
                "give the images that it was trained on"
            )
        if generator.condition.takes_captions and dataset.captions is None:
            raise InputError(
                f"{name} is conditioned on captions and {dataset.name} has none: give the images that it was trained on"
            )
        for sampler, count in cells:
            replace(generator, sampler=sampler, steps=count)  # the constructor's checks, before any computation


def _check_numbers(
    dataset: ImageDataset, num: int, radii: Sequence[float], probes: int, times: Sequence[float], reservoir: int
) -> None:
    if len(dataset) < 4 * IMAGE_BLOCKS:
        raise InputError(
            f"{dataset.name} has {len(dataset)} images: the mismatch takes {4 * IMAGE_BLOCKS} or more, half of them "
            "for its floor"
        )
    if not 2 * IMAGE_BLOCKS <= num <= len(dataset) // 2:
        raise InputError(
            f"num is {num}: q(x_t) and its floor take two sets of so many real images, and {dataset.name} has "
            f"{len(dataset)}; give a number from {2 * IMAGE_BLOCKS} to {len(dataset) // 2}"
        )
    if reservoir < 2 * IMAGE_BLOCKS:
        raise InputError(f"reservoir is {reservoir}; give {2 * IMAGE_BLOCKS} or more")
    if probes != 0 and not 2 <= probes <= num:
        raise InputError(f"probes is {probes}; give 0, or a number from 2 to num = {num}")
    if not all(0 < r <= MOST_LENGTH for r in radii):
        raise InputError(f"radii are {', '.join(map(str, radii))}; each must be positive, and at most {MOST_LENGTH:g}")
    if not all(0 <= f < 1 for f in times):
        raise InputError(f"times are {', '.join(map(str, times))}; each must be in [0, 1)")
