"""Conditions: the arguments of a network beside x_t and t, in training and in sampling.

In training a share of the conditions is dropped: replaced by the empty one, which classifier-free guidance (Ho &
Salimans, 2022, arXiv 2207.12598) needs in sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError

__all__ = ["Condition"]


class Condition(ABC):
    """The arguments of a network beside x_t and t.

    Attributes:
        components: The parts that it has in a pipeline folder, by their names, such as a text encoder.
    """

    @property
    def components(self) -> dict[str, Any]:
        return {}

    def to(self, device: torch.device | str) -> Condition:
        """Move the condition's own network, if it has any, to a device, and return the condition."""
        return self

    @abstractmethod
    def batch(self, labels: Tensor | None, captions: Sequence[str] | None, dropped: Tensor | None) -> dict[str, Any]:
        """Return the arguments of the network for a batch of the data.

        Arguments:
            labels: The classes, with shape (B,), on the device of the network; None where the data has none.
            captions: The captions; None where the data has none.
            dropped: The samples whose condition is the empty one, booleans (B,); None: none of them.
        """

    @property
    def classes(self) -> int | None:
        """The number of classes, without an empty one; None where the condition is not a class."""
        return None

    def with_classes(self, num_classes: int) -> Condition:
        """Return the condition with so many classes, where a network embeds that number, or one more that is empty.

        Raises:
            InputError: If it embeds another number.
        """
        raise InputError(f"this model has no classes, and {num_classes} are to be sampled: leave --classes out")

    @property
    def droppable(self) -> bool:
        """True if there is an empty condition."""
        return False

    @abstractmethod
    def empty(self) -> dict[str, Any]:
        """Return the empty condition by the names of the arguments: tensors with one row, or a number for all samples.

        Raises:
            InputError: If the network has none, so that it cannot be guided.
        """

    @abstractmethod
    def check(self, num_classes: int | None, captions: bool, path: str) -> None:
        """Check that data has what the network needs.

        Arguments:
            num_classes: The number of the data's classes; None without labels.
            captions: Whether the data has captions.
            path: The model's name, for messages.

        Raises:
            InputError: If it has not.
        """
