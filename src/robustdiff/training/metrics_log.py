"""The metrics of a training, written every ``log_every`` updates. Until then they stay on the device."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import NotFiniteError
from robustdiff.files import atomic_write, open_regular
from robustdiff.training.run_files import metrics_lines
from robustdiff.training.trainer import Trainer

__all__ = ["MetricsLog"]


class MetricsLog:
    """Gather the metrics of updates, and write them to ``metrics.jsonl`` and to accelerate's trackers.

    Lines that a killed run wrote after its last checkpoint are removed first, since they will be written again.

    Args:
        trainer: The trainer, at the update from which the run goes on.
        path: The file.

    Attributes:
        line: The last line, empty before the first.
        updates: The number of updates since.

    Raises:
        InputError: If a line of the file is malformed.
    """

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self.trainer = trainer
        self.path = path
        self.line: dict[str, Any] = {}
        self.begins = True  # the next update is the first of a batch
        if trainer.accelerator.is_main_process:
            self._drop_after(trainer.step)
        self._restart()

    def _drop_after(self, step: int) -> None:
        with atomic_write(self.path) as kept:
            if not os.path.lexists(self.path):
                return
            for line, values in metrics_lines(self.path):
                if values.step <= step:
                    kept.write(line)
                    self.line = values.model_dump()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.sizes = torch.zeros((), device=self.trainer.accelerator.device)
        self.updates = self.batches = 0
        self.of_passes: dict[str, Tensor] = {}
        self.since = time.perf_counter()

    def add(self, losses: dict[str, Tensor], size: Tensor, done: bool) -> None:
        """Add an update, as :meth:`Trainer.updates` yields it."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.updates += 1
        self.size = size
        if self.begins:
            self.first = losses["loss"]
        self.begins = done
        if done:  # the last pass has the largest δ
            self.sizes = self.sizes + size
            self.batches += 1
            more = {"first": self.first, "last": losses["loss"]} if self.trainer.adversary.passes > 1 else {}
            if self.trainer.at_radius is not None:
                more["at"], more["of"] = self.trainer.at_radius
            for name, value in more.items():
                self.of_passes[name] = self.of_passes.get(name, 0) + value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the speed of training."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def flush(self) -> str:
        """Write a line of the metrics since the last, and return a summary of it.

        Raises:
            NotFiniteError: If the loss is not finite.
        """
        trainer, recipe = self.trainer, self.trainer.recipe
        sums = {name: self.sums[name] / self.updates for name in sorted(self.sums)}
        # Of whole batches, or of the first pass over a last batch that is left before its last.
        size = self.sizes if self.batches else self.size
        values = torch.stack([*sums.values(), *self.of_passes.values(), size])
        means = iter(trainer.accelerator.reduce(values, reduction="mean").tolist())
        line: dict[str, float] = {"step": trainer.step, **{name: next(means) for name in sums}}
        of_passes = {name: next(means) for name in self.of_passes}
        for name, part, whole in (("pass_ratio", "last", "first"), ("at_radius", "at", "of")):
            if of_passes.get(whole, 0) > 0 and math.isfinite(ratio := of_passes[part] / of_passes[whole]):
                line[name] = ratio
        line["delta_norm"] = next(means) / max(self.batches, 1)
        line["lr"] = trainer.rate
        line["epoch"] = trainer.batch * recipe.batch_size / len(trainer.dataset)
        line["skipped"] = trainer.skipped()
        line["skipped_updates"] = int(trainer.skipped_updates)
        line["images_per_second"] = self.updates * recipe.batch_size / (time.perf_counter() - self.since)
        if not math.isfinite(line["loss"]):
            raise NotFiniteError(
                f"the loss is {line['loss']} at update {trainer.step}: lower lr or adversary.step_size, or set clip=1; "
                "checkpoints from before are kept"
            )
        if trainer.accelerator.is_main_process:
            with open_regular(self.path, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        self.line = line
        trainer.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=trainer.step)
        self._restart()
        speed = line["images_per_second"]
        return f"loss {line['loss']:.4f}  |δ| {line['delta_norm']:.3g}  {speed:.0f} images/s"
