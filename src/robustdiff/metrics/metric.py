"""The metric protocol: a metric takes batches of images and returns named numbers.

A metric is a class in a file of this folder, or in a module that an installed package names as an entry point of the
group ``robustdiff.metrics``. Its attribute ``numbers`` gives the columns of tables, the figures and the keys of
``result.json``::

    @METRICS.register("contrast")
    class Contrast(Metric):
        numbers = (Number("contrast", "Contrast", ".1f", "higher"),)
        ...
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.errors import InputError, NotFiniteError, printable
from robustdiff.metrics.bootstrap import BLOCKS, Array, interval
from robustdiff.metrics.extractors.extractor import FeatureExtractor
from robustdiff.metrics.reference import Reference
from robustdiff.registry import Registry

__all__ = [
    "DEFAULT",
    "METRICS",
    "Batch",
    "Measured",
    "Metric",
    "MetricCollection",
    "Need",
    "Number",
    "check_finite",
    "compared",
    "number_named",
    "parse_metric",
    "parse_metrics",
    "ranked",
    "value_of",
]

DEFAULT = ("fid", "kid", "precision-recall", "brightness")
"""The metrics that are computed by default."""

Need = Literal["nothing", "captions", "features", "reference features"]


@dataclass(frozen=True)
class Number:
    """A description of a number that a metric returns.

    Attributes:
        name: The key in records, which no other metric has; the key of a standard error is ``NAME_se``.
        title: The name in tables and figures.
        format: The format of the value, as :func:`format` takes it.
        better: The direction of better values, "lower" or "higher", or None if neither is better.
        standard_error: True if the metric also returns a standard error.
        log: True for a positive number that is compared by ratios: on a logarithmic axis, with intervals of ln.
        detail: True for a number that explains another one. It is in records, and not in the tables of the terminal.
    """

    name: str
    title: str
    format: str
    better: Literal["lower", "higher"] | None = None
    standard_error: bool = False
    log: bool = False
    detail: bool = False


@dataclass(frozen=True)
class Batch:
    """A batch of images, uint8 (B, C, H, W).

    Attributes:
        start: The index of the first image of the batch among the images of all processes.
        condition: The classes, (B,), or None.
        extractor: The feature extractor, for metrics that need features.
        captions: The B captions for which the images were made, or None.
    """

    images: Tensor
    start: int
    condition: Tensor | None = None
    extractor: FeatureExtractor | None = None
    captions: Sequence[str] | None = None

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """Return the features, (B, D), which are extracted once and shared by all metrics."""
        assert self.extractor is not None
        return self.extractor.extract(self.images)


class Metric(ABC):
    """A metric of sets of images, which arrive in batches. :meth:`reset` begins a new set.

    With several processes, each updates its own instance with its own images, and the states of all are merged in one.
    A network that the metric needs is loaded once, in ``__init__``, for all sets.

    Args:
        real: The statistics of the real images, or None for metrics that need nothing.
        device: The device of networks that the metric loads.

    Attributes:
        numbers: The numbers that the metric returns.
        needs: "nothing"; "captions" of the images; "features", for features of the images and their mean and covariance
            over the real images; or "reference features", for what takes the real images themselves as well: a sample
            of their features, and their brightness.
        takes: A description, for messages, of the value that is given with the name, as NAME=VALUE, and is the third
            argument of ``__init__``; None if the metric takes no value.
        extractor: The feature extractor of the collection that the metric is in, or None.
    """

    numbers: ClassVar[tuple[Number, ...]]
    needs: ClassVar[Need] = "nothing"
    takes: ClassVar[str | None] = None
    extractor: FeatureExtractor | None = None

    def __init__(self, real: Reference | None = None, device: torch.device | str = "cpu") -> None:
        self.real, self.device = cast(Reference, real), device
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Begin a new set of images."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add a batch.

        Raises:
            InputError: If the metric does not take these images, or the captions that it needs are missing.
        """

    @abstractmethod
    def state(self) -> Any:
        """Return the state for :meth:`merge_state`, which can be pickled and sent to another process."""

    @abstractmethod
    def merge_state(self, state: Any) -> None:
        """Add the images of another instance, given its :meth:`state`."""

    @abstractmethod
    def result(self) -> dict[str, float | None]:
        """Return the numbers and standard errors by key; a number that is not defined is None.

        Raises:
            InputError: If there are too few images.
        """

    def replicates(self) -> dict[str, Array]:
        """Return bootstrap replicates, (R,), by key, of the numbers that have them (see ``metrics.bootstrap``)."""
        return {}

    @property
    def blocks(self) -> int:
        """The number of blocks that the replicates resample, 50 if a metric does not say otherwise."""
        return BLOCKS


_FIELDS = frozenset(
    {"checkpoint", "sampler", "steps", "n", "guidance", "seconds", "blocks", "method", "seed", "measure", "numbers"}
    | {"replicates", "other_replicates", "noise", "threads", "device", "torch", "weights", "training", "recipe"}
    | {"reference", "extractor", "real_images", "robustdiff"}
)
"""The other fields of the records that hold numbers."""


def _keys(kind: type[Metric]) -> list[str]:
    """Return the keys of the numbers and standard errors of a metric."""
    keys = ((one.name, f"{one.name}_se") if one.standard_error else (one.name,) for one in kind.numbers)
    return [key for pair in keys for key in pair]


class _Metrics(Registry[type[Metric]]):
    """The metrics by name, no two of which return a number with the same key."""

    def register(self, name: str) -> Callable[[type[Metric]], type[Metric]]:
        add = super().register(name)

        def fields(one: type[Metric]) -> list[str]:
            return [f"{number.name}{end}" for number in one.numbers for end in ("", "_se", "_ci")]

        def checked(kind: type[Metric]) -> type[Metric]:
            taken = {field: other for other, one in self._entries.items() if one is not kind for field in fields(one)}
            for field in fields(kind):
                if field in _FIELDS:
                    raise ValueError(f"the metric {name} has a number {field}, which is another field of records")
                if field in taken:
                    raise ValueError(f"the metrics {taken[field]} and {name} have the same number {field}: rename one")
            return add(kind)

        return checked


METRICS: Registry[type[Metric]] = _Metrics("metric", "metrics")
"""The registry of metrics."""


def parse_metric(text: str) -> tuple[str, dict[str, str]]:
    """Return the name of a metric that is written as NAME or NAME=VALUE, and its value, if it has one, by the name."""
    name, separator, value = text.partition("=")
    return name, {name: value} if separator else {}


def parse_metrics(texts: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names of metrics that are written as NAME or NAME=VALUE, and the values by name."""
    pairs = [parse_metric(text) for text in texts]
    return [name for name, _ in pairs], {name: value for _, values in pairs for name, value in values.items()}


def ranked(text: str) -> Number:
    """Return the number by which images are ranked: the first number of a metric that has a better direction.

    Args:
        text: The metric, as NAME or NAME=VALUE.

    Raises:
        InputError: If the metric is unknown, or none of its numbers has a better direction.
    """
    name, _ = parse_metric(text)
    for number in METRICS[name].numbers:
        if number.better is not None:
            return number
    raise InputError(f"no number of the metric {name} has a better direction: choose another metric, such as fid")


def number_named(name: str) -> Number:
    """Return the number with a key. An unknown key gives a number with that title."""
    known = (number for metric in METRICS.values() for number in metric.numbers if number.name == name)
    return next(known, Number(name, name, ".4g"))


def compared(names: Sequence[str] = DEFAULT) -> bool:
    """Return whether any of the metrics compares with real images.

    Raises:
        InputError: If a metric is unknown.
    """
    needs = [METRICS[name].needs for name in names]
    return any(need in ("features", "reference features") for need in needs)


class Measured(NamedTuple):
    """The numbers of a set of images, each by key.

    Attributes:
        values: The numbers; one that is not defined is None.
        intervals: The 95 % intervals of those that have one.
        replicates: The bootstrap replicates, (R,), of those.
        blocks: The number of blocks that the replicates resample.
    """

    values: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    replicates: dict[str, Array]
    blocks: dict[str, int]


class MetricCollection:
    """A collection of metrics of the same images, which share the extracted features.

    Args:
        names: The names of the metrics. By default those of :data:`DEFAULT`, with the value None for a metric that the
            reference does not suffice for.
        extractor: The feature extractor, or None if no metric needs features.
        reference: The statistics of the real images under the extractor.
        device: The device of networks that metrics load.
        values: The values of metrics that take one, by name.

    Raises:
        InputError: If a metric is unknown, lacks its value or takes none, or a named metric lacks the extractor or
            reference that it needs.
        ValueError: If the reference was made with another extractor.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        extractor: FeatureExtractor | None = None,
        reference: Reference | None = None,
        device: torch.device | str = "cpu",
        values: Mapping[str, str] = {},
    ) -> None:
        if extractor is not None and reference is not None and reference.fingerprint != extractor.fingerprint:
            raise ValueError(f"the reference was computed with another extractor than {extractor.name}")
        self.extractor = extractor
        self.reference = reference
        self.metrics: dict[str, Metric] = {}
        self._keys: list[str] = []
        for name in DEFAULT if names is None else names:
            kind = METRICS[name]
            self._keys += _keys(kind)
            lacks = ""
            if compared([name]) and (extractor is None or reference is None):
                lacks = "features, and give their statistics"
            elif kind.needs == "reference features" and reference is not None and reference.features is None:
                lacks = "more than the mean and covariance of their features: give the images themselves"
            if not lacks:
                self.metrics[name] = kind(reference, device, *value_of(name, values))
                self.metrics[name].extractor = extractor
            elif names is not None:
                raise InputError(f"the metric {name} needs of real images {lacks}, or leave it out")

    def reset(self) -> None:
        """Begin a set of images."""
        for metric in self.metrics.values():
            metric.reset()

    @property
    def needs_captions(self) -> str | None:
        """The name of a metric that needs captions, or None."""
        return next((name for name, metric in self.metrics.items() if metric.needs == "captions"), None)

    def update(
        self, images: Tensor, start: int, condition: Tensor | None = None, captions: Sequence[str] | None = None
    ) -> None:
        """Add a batch; the arguments are those of :class:`Batch`."""
        batch = Batch(images, start, condition, self.extractor, captions)
        for metric in self.metrics.values():
            metric.update(batch)

    def state(self) -> dict[str, Any]:
        """Return the state of each metric by name, which can be sent to another process."""
        return {name: metric.state() for name, metric in self.metrics.items()}

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Add the images of another collection of the same metrics, given its :meth:`state`."""
        for name, metric in self.metrics.items():
            metric.merge_state(state[name])

    def result(self, what: str) -> Measured:
        """Return the numbers, with the 95 % intervals and replicates of those that have them.

        Args:
            what: The name of the images, for messages.

        Raises:
            InputError: If there are too few images.
            NotFiniteError: If a number is not finite.
        """
        found: dict[str, Any] = {}
        replicates: dict[str, Array] = {}
        blocks: dict[str, int] = {}
        for metric in self.metrics.values():
            found |= metric.result()
            drawn = metric.replicates()
            replicates |= drawn
            blocks |= dict.fromkeys(drawn, metric.blocks)
        values = {key: None if found.get(key) is None else float(found[key]) for key in self._keys}
        check_finite(what, values)
        intervals = {
            name: interval(float(found[name]), drawn, blocks[name], number_named(name).log)
            for name, drawn in replicates.items()
        }
        check_finite(what, {f"the interval of {name}": high - low for name, (low, high) in intervals.items()})
        return Measured(values, intervals, replicates, blocks)


def value_of(name: str, values: Mapping[str, str]) -> list[str]:
    """Return the value of a metric, as a list of one, or an empty list for a metric that takes none.

    Raises:
        InputError: If the metric lacks its value, or takes none and has one.
    """
    kind = METRICS[name]
    if kind.takes is None:
        if name in values:
            raise InputError(f"the metric {name} takes no value, and has {printable(values[name])}: write {name}")
        return []
    if not values.get(name):
        raise InputError(f"the metric {name} needs {kind.takes}: write it as {name}=VALUE")
    return [values[name]]


def check_finite(what: str, values: Mapping[str, float | None]) -> None:
    """Check that no number is infinite or NaN; None is allowed.

    Raises:
        NotFiniteError: If a number is not finite.
    """
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise NotFiniteError(f"{what}: {name} is {value}; look at the images and at the weights of the features")
