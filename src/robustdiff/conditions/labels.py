"""Class labels as the condition; a null class after the classes of the data is the empty condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError

__all__ = ["Labels"]


@dataclass(frozen=True)
class Labels(Condition):
    """The condition of a network that is called with ``class_labels``.

    Args:
        embedded: The number of classes that the network embeds, including the null class.
        null: Whether the last class is the null class.
    """

    embedded: int
    null: bool = False

    @property
    def classes(self) -> int:
        return self.embedded - self.null

    def classes_of(self, data_classes: int) -> int | None:
        return data_classes if data_classes == self.embedded - 1 else None

    def with_classes(self, num_classes: int) -> Labels:
        if num_classes not in (self.embedded, self.embedded - 1):
            raise InputError(
                f"this model has {self.embedded} classes, and {num_classes} are to be sampled: give that number, or "
                "one less where its last is the null class (--classes)"
            )
        return Labels(self.embedded, null=num_classes < self.embedded)

    def batch(
        self,
        labels: Tensor | None,
        captions: Sequence[str] | None,
        dropped: Tensor | None,
        geometry: Tensor | None = None,
    ) -> dict[str, Any]:
        assert labels is not None
        if dropped is not None:
            labels = labels.masked_fill(dropped, self.classes)
        return {"class_labels": labels}

    @property
    def droppable(self) -> bool:
        return self.null

    def empty(self) -> dict[str, Any]:
        if not self.null:
            raise InputError(
                "guidance needs a class-conditional model whose last class is the null class: say how many classes it "
                "has without that one (--classes), or train it with model.condition_dropout"
            )
        return {"class_labels": self.classes}

    def check(self, num_classes: int | None, captions: bool, path: str) -> None:
        if num_classes is None:
            raise InputError(f"the model {path} needs class labels, and this data has none: choose data that has them")
        if num_classes > self.classes:
            raise InputError(
                f"the model {path} knows {self.classes} classes and the data has {num_classes}: choose data of no more "
                "classes"
            )
