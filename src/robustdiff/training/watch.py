r"""The watch: measurements of the model while it is trained, of which the best is kept.

At step 0 (for a model that starts from a checkpoint), every ``watch.every`` updates and at the end, the model is
measured at each of the watch's samplers and numbers of steps, its cells. All measurements have the same noise (common
random numbers), so that the difference of a cell to that of the starting checkpoint has a narrow interval. A line of
``watch.jsonl`` has the cells, and their mean decides: ``best/`` holds the model with the best mean so far, with the
starting checkpoint among the candidates.

The lowest of several noisy numbers is below its expectation. The chosen model is therefore measured once more at the
end, with the noise of the next seed, and its difference to the starting checkpoint on that noise is recorded.

A measurement changes nothing of the training: weights, random states and modes are as before. ``best/`` is written
before its line, and lines are only appended. A resumed run does not measure again what has a line, so that an
interruption at any moment leads to the same lines and the same ``best/``. What was measured of the starting checkpoint
is in ``start.json``.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DistributedType

from robustdiff.backbones.lora import WEIGHTS, read_weights_into
from robustdiff.backbones.model import load_model
from robustdiff.data import ImageDataset
from robustdiff.distributed import from_main
from robustdiff.errors import InputError, RunError, printable
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import Cell, evaluate_cell
from robustdiff.evaluation.noise import NOISE, check_noise
from robustdiff.evaluation.prompts import captions_of
from robustdiff.evaluation.real_images import Target
from robustdiff.evaluation.recorded import Recordings
from robustdiff.files import atomic_write, open_regular, read_record, write_json
from robustdiff.interrupt import Interrupt
from robustdiff.metrics.bootstrap import interval, relative_interval
from robustdiff.metrics.extractors.classifier import SHIPPED
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.metric import MetricCollection, Number, compared, parse_metric, ranked, value_of
from robustdiff.metrics.reference import Reference
from robustdiff.progress import Progress
from robustdiff.recipe import WatchConfig
from robustdiff.samplers.sample import SAMPLERS
from robustdiff.training.run_files import read_metrics
from robustdiff.training.signs import SIGNS, History
from robustdiff.training.watch_files import (
    LONGEST_LINE,
    REMEDY,
    Best,
    FiredSign,
    Line,
    Sign,
    Start,
    WatchedCell,
    dump,
    read_lines,
)

if TYPE_CHECKING:
    from robustdiff.training.trainer import Trainer

__all__ = ["Interrupted", "Watch"]

logger = logging.getLogger(__name__)

LONG = 50  # the number of steps that diffusion models are watched at besides their own
SHARE = 0.10  # of the time of training, the most that every=auto spends
MOST = 50  # measurements of every=auto, at most


class Interrupted(Exception):
    """A signal arrived during a measurement, which is dropped."""


class Watch:
    """The watch of a run. Every process makes one and calls the same methods.

    Args:
        config: The section of the recipe.
        trainer: The trainer, whose network has the starting weights.
        dataset: The real images, and the captions of the generated ones.
        folder: The folder of the run, to which the constructor writes nothing.

    Attributes:
        note: The last measurement in words, for the line of progress.

    Raises:
        InputError: If a metric, sampler or extractor is unknown or does not suit the model or the data, or the network
            is sharded by FSDP.
    """

    def __init__(self, config: WatchConfig, trainer: Trainer, dataset: ImageDataset, folder: Path) -> None:
        self.config, self.trainer, self.dataset, self.folder = config, trainer, dataset, folder
        self.recipe, self.accelerator = trainer.recipe, trainer.accelerator
        self.note = ""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("watch is not for FSDP, whose shards are not sampled from: set watch=none")
        self.generators = self._generators()
        self.number, self.target = self._compared()
        self.metrics: MetricCollection
        if self.target.extractor is None:
            self._collect(None)
        self.every = None if config.every == "auto" else config.every
        self.lines: list[Line] = []
        self.start: Start | None = None
        self._clock: tuple[float, int] | None = None
        self._training: float | None = None  # the time of the whole training in seconds

    @property
    def fresh_seed(self) -> int:
        """The seed of the noise on which the chosen model is measured again."""
        return self.config.seed + 1

    def _compared(self) -> tuple[Number, Target]:
        """Return the watched number, and the real images, if its metric compares with them."""
        config, dataset = self.config, self.dataset
        name, values = parse_metric(config.metric)
        try:
            number = ranked(config.metric)
            value_of(name, values)
        except InputError as error:
            raise InputError(f"watch.metric: {error}") from None
        target = Target()
        if compared([name]):
            features = config.features
            if features is None:
                if self.recipe.data.name not in SHIPPED:
                    raise InputError(
                        f"watch: no features are known for {dataset.name}: set watch.features=inception and "
                        "watch.weights=FILE, or others; or set watch=none"
                    )
                features = self.recipe.data.name
            weights = None if config.weights is None else Path(config.weights)
            try:
                extractor = load_extractor(features, weights=weights, device=self.accelerator.device)
            except InputError as error:
                raise InputError(f"watch.features: {error}") from None
            target = Target(self.recipe.data, dataset, extractor)
        elif config.features is not None or config.weights is not None:
            raise InputError(f"watch.features is of no use to watch.metric={name}: leave it out")
        return number, target

    def _collect(self, reference: Reference | None) -> None:
        """Make the metric, with the statistics of the real images if it compares with them."""
        name, values = parse_metric(self.config.metric)
        try:
            self.metrics = MetricCollection([name], self.target.extractor, reference, self.accelerator.device, values)
        except InputError as error:
            raise InputError(f"watch.metric: {error}") from None
        if self.metrics.needs_captions and not self.trainer.built.model.condition.takes_captions:
            raise InputError(f"watch.metric={name} is for models of captions: leave it out")

    def read_real_images(self, progress: Progress) -> None:
        """Compute the statistics of the real images, if the metric compares with them, which may take long.

        Raises:
            InputError: If an image cannot be read.
        """
        if self.target.extractor is not None:
            self._collect(self.target.statistics(self.accelerator, progress))

    def _generators(self) -> list[Generator]:
        """Return the generator of each cell."""
        config, model, own = self.config, self.trainer.built.model, self.recipe.sampler
        captions = captions_of(self.dataset if model.condition.takes_captions else None)[: config.num]
        found = []
        samplers = config.samplers or (own.name or model.samplers[0],)
        for sampler in samplers:
            for steps in config.steps or _usual_steps(sampler, own.steps):
                try:
                    generator = Generator.of(
                        model,
                        data_classes=self.dataset.num_classes,
                        data_captions=captions,
                        sampler=sampler,
                        steps=steps,
                        batch_size=config.batch_size,
                        precision=self.recipe.precision,
                        guidance=config.guidance,
                        capture=False if self.recipe.capture is False else "auto",
                    )
                except InputError as error:
                    raise InputError(f"watch of {sampler} at {steps} steps: {error}") from None
                found.append(generator)
        return found

    # -- measurement -----------------------------------------------------------------------------------------

    def _measure(self, seed: int, average: bool, interrupt: Interrupt, progress: Progress) -> list[WatchedCell]:
        """Measure the cells of the network as it is, or of its moving average.

        Raises:
            Interrupted: If a signal arrived.
            NotFiniteError: If a number is not finite.
        """
        self.trainer.release()
        shown = _Within(self, interrupt, progress)
        cells = []
        with self._sampling(average):
            for generator in self.generators:
                shown.check()
                # Of its own recordings, so that their memory is free when training goes on.
                chosen = replace(generator, seed=seed, recordings=Recordings())
                cell, _ = evaluate_cell("watch", chosen, self.config.num, self.metrics, self.accelerator, 0, shown)
                cells.append(self._record(cell))
        return cells

    @contextmanager
    def _sampling(self, average: bool) -> Iterator[None]:
        """Prepare the model for sampling within the block, and leave everything as it was."""
        model, device = self.trainer.built.model, self.accelerator.device
        averaged = self.trainer.averaged() if average else nullcontext()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), averaged:
            model.codec.to(device)
            try:
                yield
            finally:
                model.network.train()
                if self.recipe.caches_latents:  # training does not call the codec
                    model.codec.to("cpu")

    def _record(self, cell: Cell) -> WatchedCell:
        """Return the watched number of a cell."""
        key = self.number.name
        value, replicates = cell.values[key], cell.replicates.get(key)
        if value is None:
            raise RunError(f"watch.metric: {key} is not defined for these images: choose another metric")
        assert cell.steps is not None
        return WatchedCell(
            sampler=cell.sampler,
            steps=cell.steps,
            metric=key,
            value=value,
            ci=cell.intervals.get(key),
            guidance=cell.guidance,
            replicates=None if replicates is None else replicates.tolist(),
            blocks=cell.blocks.get(key),
        )

    def _compare(self, cells: Sequence[WatchedCell], start: Sequence[WatchedCell]) -> None:
        """Set the differences of cells to those of the starting checkpoint on the same noise."""
        for cell, base in zip(cells, start, strict=True):
            self._judge(cell, [cell], [base])

    def _judge(self, compared: WatchedCell | Best, cells: Sequence[WatchedCell], start: Sequence[WatchedCell]) -> None:
        """Set the difference of a mean over cells to that of the starting checkpoint, with intervals if they have any.

        Args:
            compared: The record of the mean.
            cells: The cells of which it is the mean.
            start: The same cells of the starting checkpoint.
        """
        mean, base = self._mean(cells), self._mean(start)
        compared.difference = mean - base
        blocks, of_all = cells[0].blocks, [[cell.replicates for cell in own] for own in (cells, start)]
        if blocks is None or any(one is None for own in of_all for one in own):
            return
        drawn, of_base = (np.mean(np.array(own), axis=0) for own in of_all)
        compared.difference_ci = interval(compared.difference, drawn - of_base, blocks)
        if self.number.log:
            compared.relative_ci = relative_interval(mean, drawn, base, of_base, blocks)
            compared.relative = None if compared.relative_ci is None else compared.difference / base

    def _mean(self, cells: Sequence[WatchedCell]) -> float:
        return sum(cell.value for cell in cells) / len(cells)

    def _better(self, mean: float) -> bool:
        """Return whether a mean is better than those of all lines so far."""
        sign = 1 if self.number.better == "lower" else -1
        return all(sign * mean < sign * line.mean for line in self.lines)

    # -- the run ---------------------------------------------------------------------------------------------

    def begin(self, new: bool, interrupt: Interrupt, progress: Progress) -> None:
        """Measure the starting checkpoint, if there is one and it is not measured yet, and read the lines so far.

        Call it before a checkpoint of the run is loaded.

        Args:
            new: Whether the run starts from the beginning; earlier measurements are then removed.

        Raises:
            Interrupted: If a signal arrived.
            InputError: If a file of the watch is damaged, or its images have another noise than those of this version.
        """
        main = self.accelerator.is_main_process
        if main and new:
            for name in ("watch.jsonl", "start.json"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "best", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.lines = from_main(read_lines(self.folder / "watch.jsonl") if main else None)
        self._check_noise(self.lines)
        if not all(self._has_own_cells(line.cells) for line in self.lines):
            raise InputError(
                f"{printable(self.folder)} was watched with other samplers or numbers of steps: restore those, or "
                "remove watch.jsonl and start.json in it to resume without what they have"
            )
        if main:
            self._drop_torn_line()
        if self.every is None:
            self.every = next((line.every for line in self.lines if line.every is not None), None)
        if self.trainer.built.pretrained is None:
            return
        record: Start | None = from_main(self._read_start() if main else None)
        self._check_noise([] if record is None else [record])
        if record is None:
            began = time.perf_counter()
            first = self._measure(self.config.seed, self.config.average, interrupt, progress)
            fresh = self._measure(self.fresh_seed, self.config.average, interrupt, progress)
            record = Start(seconds=time.perf_counter() - began, cells=first, fresh=fresh, noise=NOISE)
            record = from_main(record)  # the seconds of one process decide for all
            if main:
                write_json(self.folder / "start.json", record.model_dump(exclude_none=True))
        self.start = record
        if not self.lines:
            self._keep()
            line = self._line(0, record.cells, record.seconds)
            line.images *= 2  # on two noises
            self._append(line)

    def _check_noise(self, records: Sequence[Line | Start]) -> None:
        """Check that measurements so far are of the images that are sampled now."""
        remedy = "resume it with {version}, or remove watch.jsonl and start.json in it to resume without what they have"
        for record in records:
            check_noise(self.folder, record.noise, remedy)

    def _has_own_cells(self, cells: Sequence[WatchedCell]) -> bool:
        """Return whether cells are those of this watch."""
        own = [(generator.sampler, generator.steps, self.number.name) for generator in self.generators]
        return [(cell.sampler, cell.steps, cell.metric) for cell in cells] == own

    def _drop_torn_line(self) -> None:
        """Remove the part of a line that a kill left at the end of ``watch.jsonl``, if there is such a file."""
        with suppress(FileNotFoundError), open_regular(self.folder / "watch.jsonl", "r+b") as file:
            whole = 0
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
                whole += len(line)
            file.truncate(whole)

    def _read_start(self) -> Start | None:
        """Return the contents of ``start.json``, or None if there is no such file."""
        path = self.folder / "start.json"
        if not path.exists():
            return None
        record = read_record(path, Start, REMEDY)
        if not (self._has_own_cells(record.cells) and self._has_own_cells(record.fresh)):
            raise InputError(f"{printable(path)} is damaged (its cells are not those of the recipe): {REMEDY}")
        for cell in (*record.cells, *record.fresh):
            cell.guidance = self.config.guidance  # which earlier versions did not write
        return record

    def due(self, step: int, last: bool) -> bool:
        """Return whether to measure after an update that completes a batch, or the last one of the run."""
        if self.every is None:
            self._choose_interval(step)
        if last:
            return True
        passes = self.trainer.adversary.passes
        return self.every is not None and step // self.every > (step - passes) // self.every

    def _choose_interval(self, step: int) -> None:
        """Choose the interval of every=auto from the speed of training so far, once it is known."""
        steps, now = self.recipe.steps, time.perf_counter()
        if self._clock is None:  # the first batch is slower than the others
            self._clock = now, step
            return
        since, before = self._clock
        if step - before < steps / 50:
            return
        training = from_main((now - since) / (step - before) * steps)
        if self.start is None:  # what a measurement takes is not known yet
            self.every = math.ceil(steps / 10)
            self._training = training
            return
        one = self.start.seconds / 2
        spare = SHARE * training - 4 * one  # of the start and the chosen model, each on two noises
        self.every = math.ceil(steps / (1 + min(MOST, max(0, int(spare / one)))))
        self._warn_of_cost(4 * one, training)

    def _warn_of_cost(self, seconds: float, training: float) -> None:
        """Log a warning if measurements take more of the time of training than every=auto shall spend."""
        if seconds > SHARE * training and self.accelerator.is_main_process:
            logger.warning(
                "%s: the watch takes about %.0f s, %.0f %% of the time of training: lower watch.num, or give fewer or "
                "smaller watch.steps",
                printable(self.recipe.output),
                seconds,
                100 * seconds / training,
            )

    def measure(self, step: int, interrupt: Interrupt, progress: Progress) -> bool:
        """Measure the model after an update, keep it if it is the best, and append a line.

        An update that has a line, from before an interruption, is not measured again, and neither is one before the
        last line, in a run that goes on with another interval.

        Returns:
            True if a sign ends the run.

        Raises:
            Interrupted: If a signal arrived.
            NotFiniteError: If a number is not finite.
        """
        line = next((line for line in self.lines if line.step == step), None)
        if line is None and self.lines and step < self.lines[-1].step:
            return False
        if line is None:
            began = time.perf_counter()
            cells = self._measure(self.config.seed, self.config.average, interrupt, progress)
            if self.start is not None:
                self._compare(cells, self.start.cells)
            line = self._line(step, cells, 0.0)
            if line.best:
                self._keep()
            line.seconds = time.perf_counter() - began
            if self._training is not None and not self.lines and self.every is not None:
                self._warn_of_cost((1 + math.ceil(self.recipe.steps / self.every)) * line.seconds, self._training)
            line.signs = from_main(self._signs(line) if self.accelerator.is_main_process else None)
            self._append(line)
        return self.config.signs.action == "stop" and any(sign.action == "stop" for sign in line.signs)

    def _keep(self) -> None:
        """Write the model to ``best/``, with the recipe, which names its sampler and data."""
        self.trainer.export(self.folder / "best", self.config.average)
        if self.accelerator.is_main_process:
            with atomic_write(self.folder / "best" / "recipe.yaml") as file:
                file.write(self.recipe.to_yaml().encode())

    def _line(self, step: int, cells: list[WatchedCell], seconds: float) -> Line:
        mean, images = self._mean(cells), self.config.num * len(cells)
        every = self.every if step else None
        return Line(
            step=step,
            cells=cells,
            mean=mean,
            best=self._better(mean),
            seconds=seconds,
            images=images,
            every=every,
            noise=NOISE,
        )

    def _append(self, line: Line) -> None:
        """Append a line to ``watch.jsonl``, show it and pass it to the trackers."""
        self.lines.append(line)
        if self.accelerator.is_main_process:
            with open_regular(self.folder / "watch.jsonl", "ab") as file:
                file.write(json.dumps(dump(line)).encode() + b"\n")
            for sign in line.signs:
                output = printable(self.recipe.output)
                logger.warning("%s: update %d: %s (%s)", output, line.step, sign.message, sign.name)
        best = self._chosen()
        self.note = f"{self.number.title} {line.mean:{self.number.format}} at {line.step}, best at {best.step}"
        values = {f"watch/{cell.sampler}-{cell.steps}": cell.value for cell in line.cells}
        self.accelerator.log({**values, "watch/mean": line.mean}, step=line.step)

    def _signs(self, line: Line) -> list[Sign]:
        """Return the signs that fire after a measurement."""
        config = self.config.signs
        if config.action == "off":
            return []
        adversary = self.trainer.adversary
        ascents = adversary.ascents * self.recipe.batch_size / adversary.passes
        lines = [dump(one) for one in (*self.lines, line)]
        written = read_metrics(self.folder / "metrics.jsonl")
        metrics = [one.model_dump() for one in written if one.step <= line.step]
        history = History(lines, metrics, ascents)
        fired = []
        for name, rule in SIGNS.items():
            threshold = getattr(config, name.replace("-", "_"))
            message = None if threshold is None else rule(history, threshold)
            if message is not None:
                fired.append(Sign(name=name, message=message, action=config.action))
        return fired

    def _chosen(self) -> Line:
        return next(line for line in reversed(self.lines) if line.best)

    def result(self, interrupt: Interrupt, progress: Progress) -> dict[str, Any]:
        """Return the watch's part of ``result.json``, with the chosen model measured on fresh noise.

        The network has the weights of the chosen model afterwards: call it when the run's own model is exported.

        Raises:
            Interrupted: If a signal arrived.
            InputError: If ``best/`` cannot be read.
        """
        line = self._chosen()
        start = None if self.start is None else self.start.fresh
        at_start = start is not None and line.step == 0
        if at_start:
            assert start is not None
            cells, start = start, None
        else:
            self._load_best()
            cells = self._measure(self.fresh_seed, False, interrupt, progress)
        if start is not None:
            self._compare(cells, start)
        best = Best(
            step=line.step,
            start=at_start,
            mean=self._mean(cells),
            seed=self.fresh_seed,
            images=self.config.num * len(cells),
            cells=cells,
            noise=NOISE,
        )
        if start is not None:
            self._judge(best, cells, start)
        signs = [FiredSign(step=one.step, **sign.model_dump()) for one in self.lines for sign in one.signs]
        return {"best": dump(best), "signs": [sign.model_dump() for sign in signs]}

    def _load_best(self) -> None:
        """Load the weights in ``best/`` into the network."""
        model, path = self.trainer.built.model, self.folder / "best"
        if model.adapter is not None:
            read_weights_into(model.network, model.backbone.part, path / WEIGHTS)
            model.network.to(self.accelerator.device)
            return
        model.network.load_state_dict(load_model(path).network.state_dict())


class _Within:
    """The progress of a measurement as a note on that of the run; it ends the measurement after a signal."""

    def __init__(self, watch: Watch, interrupt: Interrupt, progress: Progress) -> None:
        self.accelerator, self.interrupt, self.progress = watch.accelerator, interrupt, progress
        smallest = watch.config.num // self.accelerator.num_processes
        self.common = math.ceil(smallest / watch.config.batch_size)  # batches that every process has

    def begin(self, description: str, total: float) -> None:
        self.description, self.total, self.done, self.batches = description, total, 0.0, 0

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount
        self.batches += 1
        self.progress.advance(0, f"{self.description}: {min(self.done, self.total):g} of {self.total:g} images")
        if self.batches <= self.common:
            self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal arrived in any process. Every process must call it equally often."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self.interrupt.received is not None), device=self.accelerator.device)
            stop = bool(self.accelerator.reduce(flag, reduction="sum"))
        else:
            stop = self.interrupt.received is not None
        if stop:
            raise Interrupted


def _usual_steps(sampler: str, own: int | str | None) -> tuple[int, ...]:
    """Return the numbers of steps of a sampler that are watched by default, given those of the recipe.

    Raises:
        InputError: If those of the recipe are a string.
    """
    kind = SAMPLERS[sampler]
    if isinstance(own, str):
        raise InputError(f"sampler.steps={own} is not a number, and a watch is at numbers of steps: set watch.steps")
    if LONG in kind.grid_steps:
        return tuple(sorted({own or kind.default_steps, LONG}))
    return tuple(sorted({*kind.grid_steps, *([own] if own else [])}))
