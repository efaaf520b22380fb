"""The metric: batches of images in, named numbers out.

A metric is a class in one file of this folder, or in an installed package that names its module as an entry point of
the group ``robustdiff.metrics``::

    @METRICS.register("contrast")
    class Contrast(Metric):
        numbers = (Number("contrast", "contrast", ".1f", "higher"),)

        def reset(self): ...

What it says of its numbers makes the columns of tables, the figures and the keys of ``result.json``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.errors import InputError, RunError
from robustdiff.metrics.bootstrap import Array, interval
from robustdiff.metrics.features import FeatureExtractor
from robustdiff.metrics.reference import Reference
from robustdiff.registry import Registry

__all__ = [
    "DEFAULT",
    "METRICS",
    "Batch",
    "Context",
    "Measured",
    "Metric",
    "MetricCollection",
    "Need",
    "Number",
    "check_finite",
    "compared",
    "number_named",
]

DEFAULT = ("fid", "kid", "precision-recall", "brightness")
"""The metrics that are computed where none are named."""

Need = Literal["nothing", "features", "reference features"]


@dataclass(frozen=True)
class Number:
    """A number that a metric gives.

    Attributes:
        name: Its key in records.
        title: Its name in tables and figures.
        format: How its value is written, as :func:`format` takes it.
        better: Which values are better, "lower" or "higher"; None: neither.
        standard_error: Whether the metric gives its standard error as well, under the key ``NAME_se``.
        log: Whether figures have a logarithmic axis for it.
    """

    name: str
    title: str
    format: str
    better: Literal["lower", "higher"] | None = None
    standard_error: bool = False
    log: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of the values that belong to it."""
        return (self.name, f"{self.name}_se") if self.standard_error else (self.name,)


@dataclass(frozen=True)
class Context:
    """What metrics are made of.

    Arguments:
        extractor: The features of images.
        reference: The statistics of the real images under the same features.
        device: Where a metric puts a network of its own.
    """

    extractor: FeatureExtractor | None = None
    reference: Reference | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.extractor and self.reference and self.reference.fingerprint != self.extractor.fingerprint:
            raise ValueError(f"the reference was computed with another extractor than {self.extractor.name}")

    def has(self, need: Need) -> bool:
        """Return whether there is what a metric needs."""
        if need == "nothing":
            return True
        known = self.extractor is not None and self.reference is not None
        return known and (need == "features" or self.real.features is not None)

    @property
    def real(self) -> Reference:
        """Return the statistics of the real images, which a metric that needs features has."""
        assert self.reference is not None
        return self.reference


@dataclass(frozen=True)
class Batch:
    """Some of the images.

    Attributes:
        images: uint8 (B, C, H, W).
        start: The index of the first among all images of all processes.
        condition: What each was made for: classes (B,), or B captions; None where there is nothing.
        extractor: The features of images, which are extracted once, when a metric asks first.
    """

    images: Tensor
    start: int
    condition: Tensor | Sequence[Any] | None = None
    extractor: FeatureExtractor | None = None

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """Return the features, (B, D).

        Raises:
            InputError: If the extractor does not take the images.
            RunError: If they are not finite.
        """
        assert self.extractor is not None
        return self.extractor.extract(self.images)


class Metric(ABC):
    """A metric of sets of images, one after the other, each of which arrives in batches.

    With several processes each updates its own with its own indices, and one merges the states of all. The result is
    that of one process up to rounding. What is costly, such as a network of its own, is loaded in ``__init__`` and
    serves all sets.

    Arguments:
        context: The features and the statistics of the real images.

    Attributes:
        numbers: What it gives.
        needs: What must be in the context: "nothing"; "features", the extractor and the moments of the real images;
            "reference features", a sample of their features as well.
    """

    numbers: ClassVar[tuple[Number, ...]]
    needs: ClassVar[Need] = "nothing"

    def __init__(self, context: Context) -> None:
        self.context = context
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Begin a set of images."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add a batch.

        Raises:
            InputError: If the metric does not take the images, or lacks their condition.
        """

    @abstractmethod
    def state(self) -> Any:
        """Return what :meth:`merge_state` takes, to be pickled and sent to another process."""

    @abstractmethod
    def merge_state(self, state: Any) -> None:
        """Add the images of which another one's :meth:`state` was taken."""

    @abstractmethod
    def result(self) -> dict[str, float | None]:
        """Return the values by the keys of the numbers; None is one that is not defined.

        Raises:
            InputError: If the images are too few.
        """

    def replicates(self) -> dict[str, Array]:
        """Return bootstrap replicates, (R,), of those numbers that have an interval.

        Those of two sets of as many images must belong together, as with the weights of
        :func:`robustdiff.metrics.bootstrap.block_weights`.
        """
        return {}


METRICS: Registry[type[Metric]] = Registry("metric", "metrics")
"""The metrics by name."""


def compared(names: Sequence[str] | None = None) -> bool:
    """Return whether any of the metrics, by default those that are computed, compares with real images.

    Raises:
        InputError: If a metric is unknown.
    """
    kinds = [METRICS[name] for name in (DEFAULT if names is None else names)]
    return any(kind.needs != "nothing" for kind in kinds)


def number_named(name: str) -> Number:
    """Return what is known of a number: what its metric says, or nothing but its name."""
    known = (number for metric in METRICS.values() for number in metric.numbers if number.name == name)
    return next(known, Number(name, name, ".4g"))


@dataclass(frozen=True)
class Measured:
    """The numbers of a set of images.

    Attributes:
        values: By their keys, standard errors among them; None where one is not defined or what it needs is missing.
        intervals: 95 % bootstrap intervals.
        replicates: What the intervals are made of, (R,), to be compared with those of another set.
    """

    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    replicates: dict[str, Array]


class MetricCollection:
    """Several metrics of the same images, which share what is extracted from them.

    Arguments:
        names: The metrics; by default :data:`DEFAULT`, where a value is None if what it needs is missing.
        extractor: The features; none for metrics that need none.
        reference: The statistics of the real images under them.
        device: Where a metric puts a network of its own.

    Raises:
        InputError: If a metric is unknown, or one that is named lacks what it needs.
        ValueError: If the reference is of another extractor.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        extractor: FeatureExtractor | None = None,
        reference: Reference | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        context = Context(extractor, reference, device)
        kinds = {name: METRICS[name] for name in (DEFAULT if names is None else names)}
        for name, kind in kinds.items():
            if names is not None and not context.has(kind.needs):
                raise InputError(
                    f"the metric {name} needs the features of real images, and no more than their mean and covariance "
                    "is known: give the images, or leave it out"
                    if context.has("features")
                    else f"the metric {name} compares with real images: give them and their features, or leave it out"
                )
        self.extractor, self.reference = extractor, reference
        self.keys = [key for kind in kinds.values() for number in kind.numbers for key in number.keys]
        self.metrics = {name: kind(context) for name, kind in kinds.items() if context.has(kind.needs)}

    def reset(self) -> None:
        """Begin a set of images."""
        for metric in self.metrics.values():
            metric.reset()

    def update(self, images: Tensor, start: int, condition: Tensor | Sequence[Any] | None = None) -> None:
        """Add a batch; the arguments are those of :class:`Batch`."""
        batch = Batch(images, start, condition, self.extractor)
        for metric in self.metrics.values():
            metric.update(batch)

    def state(self) -> dict[str, Any]:
        """Return the state of each metric, to be sent to another process."""
        return {name: metric.state() for name, metric in self.metrics.items()}

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Add the images of which the :meth:`state` of a collection of the same metrics was taken."""
        for name, metric in self.metrics.items():
            metric.merge_state(state[name])

    def result(self, what: str = "the images") -> Measured:
        """Return the numbers, and the intervals of those that have replicates.

        Arguments:
            what: What is measured, for messages.

        Raises:
            InputError: If the images are too few.
            RunError: If a number is not finite.
        """
        found: dict[str, float | None] = {}
        replicates: dict[str, Array] = {}
        for metric in self.metrics.values():
            found |= metric.result()
            replicates |= metric.replicates()
        values = {key: None if (value := found.get(key)) is None else float(value) for key in self.keys}
        check_finite(what, values)
        intervals = {
            name: interval(value, replicates[name])
            for name, value in values.items()
            if name in replicates and value is not None
        }
        check_finite(what, {f"the interval of {name}": high - low for name, (low, high) in intervals.items()})
        return Measured(values, intervals, {name: replicates[name] for name in intervals})


def check_finite(what: str, values: Mapping[str, float | None]) -> None:
    """Check that no number is infinite or undefined.

    Arguments:
        what: What the numbers are of, for the message.
        values: By name; None is a number that is left out.

    Raises:
        RunError: If one is not finite.
    """
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise RunError(f"{what}: {name} is {value}; look at the images and at the weights of the features")
