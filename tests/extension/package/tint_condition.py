"""A condition: the class as a vector of zeros and a one, which is all zeros where it is dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from robustdiff.conditions.condition import Condition
from robustdiff.errors import InputError


@dataclass(frozen=True)
class Tint(Condition):
    number: int

    @property
    def classes(self):
        return self.number

    @property
    def droppable(self):
        return True

    def batch(self, labels, captions, dropped, geometry=None):
        tint = one_hot(labels, self.number).float()
        return {"tint": tint if dropped is None else tint.masked_fill(dropped[:, None], 0)}

    def empty(self):
        return {"tint": torch.zeros(1, self.number)}

    def check(self, num_classes, captions, path):
        if num_classes != self.number:
            raise InputError(f"the model {path} has {self.number} classes and the data has {num_classes or 'none'}")
