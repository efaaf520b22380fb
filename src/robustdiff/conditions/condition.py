"""Conditions: the arguments of a network besides x_t and t, in training and in sampling.

In training a fraction of the conditions is dropped, that is, replaced by the empty condition, which classifier-free
guidance (Ho & Salimans, 2022, arXiv 2207.12598) uses in sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.progress import SILENT, Progress

__all__ = ["Condition"]


class Condition(ABC):
    """The arguments of a network besides x_t and t.

    Attributes:
        components: The components of the condition in a pipeline folder by name, such as a text encoder.
        pipeline_settings: The settings of the condition in a pipeline folder by name, which are not components.
    """

    @property
    def components(self) -> dict[str, Any]:
        return {}

    @property
    def pipeline_settings(self) -> dict[str, Any]:
        return {}

    def to(self, device: torch.device | str) -> Condition:
        """Move the network of the condition, if it has one, to a device, and return the condition."""
        return self

    def park(self) -> None:  # noqa: B027  (for conditions with a network)
        """Move the network of the condition, if it has one, to the CPU, while :meth:`batch` returns what it did."""

    def prepare(self, texts: Iterable[str], progress: Progress = SILENT) -> None:  # noqa: B027  (for captions)
        """Compute and cache the arguments of the network for captions, if it takes them.

        Args:
            texts: The captions; several processes may prepare the same ones at once.
            progress: The progress, in captions.
        """

    def fingerprint(self) -> str:
        """Return a hash of everything that the arguments of the network depend on besides those of :meth:`batch`."""
        return type(self).__name__

    @abstractmethod
    def batch(
        self,
        labels: Tensor | None,
        captions: Sequence[str] | None,
        dropped: Tensor | None,
        geometry: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of the network for a batch of the data.

        Args:
            labels: The classes (B,), on the device of the network; None if the data has none.
            captions: The captions; None if the data has none.
            dropped: The mask (B,) of the samples whose condition is replaced by the empty one; None drops none.
            geometry: The height and width of each original image, and the top and left of the crop in the resized
                image, in pixels, int64 (B, 4); None if the images are whole and have the size of the batch.
        """

    @property
    def classes(self) -> int | None:
        """The number of classes, without the null class; None if the condition is not a class."""
        return None

    def classes_of(self, data_classes: int) -> int | None:
        """Return the number of classes to sample for a network that was trained on data with a number of classes.

        It is None for the condition's own number. Another one is known if the data leaves out a null class that the
        network embeds.
        """
        return None

    def with_classes(self, num_classes: int) -> Condition:
        """Return the condition for a number of classes; the network embeds as many, or one more for the null class.

        Raises:
            InputError: If the network embeds another number of classes.
        """
        raise InputError(f"this model has no classes, and {num_classes} are to be sampled: leave --classes out")

    @property
    def takes_captions(self) -> bool:
        """True if the network is conditioned on captions."""
        return False

    @property
    def droppable(self) -> bool:
        """True if there is an empty condition."""
        return False

    @abstractmethod
    def empty(self) -> dict[str, Any]:
        """Return the empty condition by argument: tensors with one row, or one number for all samples.

        Raises:
            InputError: If the network has no empty condition, so that guidance is impossible.
        """

    @abstractmethod
    def check(self, num_classes: int | None, captions: bool, path: str) -> None:
        """Check that the data has the labels or captions that the network needs.

        Args:
            num_classes: The number of classes of the data; None if it has no labels.
            captions: Whether the data has captions.
            path: The name of the model in messages.

        Raises:
            InputError: If the data does not have them.
        """
