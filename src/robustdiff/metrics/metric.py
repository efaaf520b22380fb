"""The metric: batches of images in, named numbers out.

A metric is a class in one file of this folder, or in a module that an installed package names as an entry point of the
group ``robustdiff.metrics``. What it says of its numbers makes the columns of tables, the figures and the keys of
``result.json``::

    @METRICS.register("contrast")
    class Contrast(Metric):
        numbers = (Number("contrast", "Contrast", ".1f", "higher"),)
        ...
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

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
    "Metric",
    "MetricCollection",
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
        name: Its key in records; that of its standard error, if it has one, is ``NAME_se``.
        title: Its name in tables and figures.
        format: The format of its value, as :func:`format` takes it.
        better: Which values are better; None: neither.
        standard_error: Whether it has a standard error.
        log: Whether figures have a logarithmic axis for it.
    """

    name: str
    title: str
    format: str
    better: Literal["lower", "higher"] | None = None
    standard_error: bool = False
    log: bool = False


@dataclass(frozen=True)
class Batch:
    """Some of the images, uint8 (B, C, H, W).

    Attributes:
        start: The index of the first among all images of all processes.
        condition: The classes (B,) or the B captions that they were made for; None where there are none.
        extractor: The features, for metrics that need them.
    """

    images: Tensor
    start: int
    condition: Tensor | Sequence[Any] | None = None
    extractor: FeatureExtractor | None = None

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """Return the features, (B, D), which are extracted once for all metrics."""
        assert self.extractor is not None
        return self.extractor.extract(self.images)


class Metric(ABC):
    """A metric of sets of images, one set after the other, each of which arrives in batches.

    With several processes each updates its own with its own indices, and one merges the states of all. What is costly,
    such as a network of its own, is loaded in ``__init__`` and serves all sets.

    Arguments:
        real: The statistics of the real images; None only for metrics that need nothing.
        device: The device of a network of its own.

    Attributes:
        numbers: The numbers that it gives.
        needs: "nothing"; "features", those of the images, and the mean and covariance of those of the real images;
            "reference features", a sample of the real ones as well.
    """

    numbers: ClassVar[tuple[Number, ...]]
    needs: ClassVar[Need] = "nothing"

    def __init__(self, real: Reference | None = None, device: torch.device | str = "cpu") -> None:
        self.real, self.device = cast(Reference, real), device
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
        """Return the numbers and their standard errors by their keys; None is one that is not defined.

        Raises:
            InputError: If the images are too few.
        """

    def replicates(self) -> dict[str, Array]:
        """Return bootstrap replicates, (R,), of those numbers that have an interval, as in ``metrics.bootstrap``."""
        return {}


METRICS: Registry[type[Metric]] = Registry("metric", "metrics")
"""The metrics by name."""


def number_named(name: str) -> Number:
    """Return the number of a name; of one that no metric knows, the name is the title."""
    known = (number for metric in METRICS.values() for number in metric.numbers if number.name == name)
    return next(known, Number(name, name, ".4g"))


def compared(names: Sequence[str] = DEFAULT) -> bool:
    """Return whether any of the metrics compares with real images.

    Raises:
        InputError: If a metric is unknown.
    """
    needs = [METRICS[name].needs for name in names]
    return any(need != "nothing" for need in needs)


class MetricCollection:
    """Several metrics of the same images, which share the features that are extracted from them.

    Arguments:
        names: The metrics; by default :data:`DEFAULT`, and those of them that the reference does not suffice for give
            None.
        extractor: The features; none for metrics that need none.
        reference: The statistics of the real images under them.
        device: The device of networks that metrics have of their own.

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
        if extractor is not None and reference is not None and reference.fingerprint != extractor.fingerprint:
            raise ValueError(f"the reference was computed with another extractor than {extractor.name}")
        self.extractor = extractor
        self.reference = reference
        self.metrics: dict[str, Metric] = {}
        self._keys: list[str] = []
        for name in DEFAULT if names is None else names:
            kind = METRICS[name]
            for one in kind.numbers:
                self._keys += [one.name, f"{one.name}_se"] if one.standard_error else [one.name]
            lacks = ""
            if kind.needs != "nothing" and (extractor is None or reference is None):
                lacks = "features, and give their statistics"
            elif kind.needs == "reference features" and reference is not None and reference.features is None:
                lacks = "more than the mean and covariance of their features: give the images themselves"
            if not lacks:
                self.metrics[name] = kind(reference, device)
            elif names is not None:
                raise InputError(f"the metric {name} needs of real images {lacks}, or leave it out")

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

    def result(self, what: str) -> tuple[dict[str, float | None], dict[str, tuple[float, float]], dict[str, Array]]:
        """Return the numbers by their keys, the 95 % intervals of some, and the replicates that these are made of.

        Arguments:
            what: The images, for messages.

        Raises:
            InputError: If the images are too few.
            RunError: If a number is not finite.
        """
        found: dict[str, Any] = {}
        replicates: dict[str, Array] = {}
        for metric in self.metrics.values():
            found |= metric.result()
            replicates |= metric.replicates()
        values = {key: None if found.get(key) is None else float(found[key]) for key in self._keys}
        check_finite(what, values)
        intervals = {name: interval(float(found[name]), drawn) for name, drawn in replicates.items()}
        check_finite(what, {f"the interval of {name}": high - low for name, (low, high) in intervals.items()})
        return values, intervals, replicates


def check_finite(what: str, values: Mapping[str, float | None]) -> None:
    """Check that no number of some images is infinite or undefined; None is one that is left out.

    Raises:
        RunError: If one is.
    """
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise RunError(f"{what}: {name} is {value}; look at the images and at the weights of the features")
