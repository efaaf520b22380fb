r"""The training loop: adversarial or plain, from scratch or from a checkpoint.

A batch is drawn once and used in every pass of the adversary, with an optimiser step after each pass (Wang et al.,
2025, Algorithm 1). With M microbatches, each pass goes over all of them before the optimiser step, and every microbatch
keeps its own δ:

    for each pass k:   for each microbatch m:   ∇_θ L(x_m + δ_m^k) accumulates, ∇_δ L moves δ_m^k → δ_m^{k+1}
                       θ ← AdamW(θ);  θ̄ ← β θ̄ + (1 − β) θ

Checkpoints are taken between batches, so that no δ has to be stored.

In fp16 the loss is scaled. An update whose gradient overflows leaves θ, θ̄ and a target network as they are. It still
counts as a step of the run, for learning rates and schedules, and is counted in ``skipped_updates``.

A pass does not synchronise with the GPU: counters stay on the device until a line of metrics is written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from diffusers import EDMEulerScheduler
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from robustdiff.backbones.fused_norm import fuse_norms
from robustdiff.backbones.lora import RECORD, adapter_of
from robustdiff.backbones.model import Model, load_model
from robustdiff.data import ImageDataset
from robustdiff.data.latents import LatentDataset
from robustdiff.data.loader import to_device, worker_failures
from robustdiff.errors import InputError, RunError, printable
from robustdiff.files import (
    MARKER,
    atomic_folder,
    atomic_write,
    claim_folder,
    make_folder,
    open_regular,
    read_json,
    remove_leftovers,
)
from robustdiff.graphs import Recorder
from robustdiff.interrupt import Interrupt
from robustdiff.objectives.objective import Draw
from robustdiff.objectives.timesteps import LossSecondMoment
from robustdiff.progress import SILENT, Progress
from robustdiff.recipe import Recipe, SignsConfig, load_recipe
from robustdiff.training.batches import Batches
from robustdiff.training.build import Built, build_model
from robustdiff.training.checkpoint import (
    Scale,
    State,
    check_moments,
    check_objective,
    load_checkpoint,
    newest_checkpoint,
    remove_before,
    save_checkpoint,
)
from robustdiff.training.crops import arrange
from robustdiff.training.ema import EMA, REMAINDER, sufficient_decay
from robustdiff.training.optimizer import build_optimizer, create_state, set_counts, state_tensors
from robustdiff.training.result import RunResult
from robustdiff.training.watch import Interrupted, Watch
from robustdiff.training.watch_files import Best, FiredSign

__all__ = ["Trainer", "read_result", "train"]

logger = logging.getLogger(__name__)

# Fields that a resumed run may change.
FREE_TO_CHANGE = {"output", "threads", "checkpoint_every", "keep", "log_every", "trackers", "sampler", "watch"}
# Fields that change the rounding alone.
FREE_TO_CHANGE |= {"capture", "compile", "channels_last"}


def _build_teacher(built: Built, dataset: ImageDataset, accelerator: Accelerator) -> Callable[..., Any]:
    """Build the teacher of the objective, in the precision of the student."""
    config, own = built.objective, built.pretrained
    path = config.teacher_path
    model: Model | None = None
    if own is not None and (path is None or os.path.realpath(path) == os.path.realpath(own.path)):
        if built.model.adapter is not None:
            return _base_as_teacher(own, built, accelerator)
        path = own.path
        model = own if own.network is not built.model.network else None  # the student has a network of its own
    if model is None:
        assert path is not None  # a section that needs a teacher and has no path refuses new networks
        model = load_model(path)
        model.check_data(dataset)
        if model.condition != built.model.condition:
            same = "text encoders" if model.condition.takes_captions else "classes, or both none"
            raise InputError(f"the teacher {path} and the student must have the same {same}")
    # A diffusion model's table has an end as well, which DiffusionDenoiser says how it goes beyond.
    highest = config.teacher_sigma_max
    if isinstance(model.scheduler, EDMEulerScheduler) and model.scheduler.config.sigma_max < highest:
        raise InputError(
            f"the teacher {path} has levels up to {model.scheduler.config.sigma_max:g} and is asked up to "
            f"{highest:g}: lower objective.sigma_max, or take another teacher"
        )
    frozen = model.network.to(accelerator.device).eval().requires_grad_(False)

    def network(*arguments: Any, **condition: Any) -> Any:
        with accelerator.autocast():
            return frozen(*arguments, **condition)

    return config.teacher_of(model, network, built.process)


def _base_as_teacher(own: Model, built: Built, accelerator: Accelerator) -> Callable[..., Any]:
    """Return the student's network without its adapter as the teacher, so that one network is in memory."""
    student = built.model.network

    def network(*arguments: Any, **condition: Any) -> Any:
        training = student.training
        student.eval()
        try:
            with built.model.base(), accelerator.autocast():
                return student(*arguments, **condition)
        finally:
            student.train(training)

    return built.objective.teacher_of(own, network, built.process)


class _Bound(nn.Module):
    """A network that is called as its family binds it; its parameters are those of the network."""

    def __init__(self, network: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Any:
        return self.call(x, t, **condition)


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: all, or those of an adapter."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def _copy_of(network: nn.Module) -> nn.Module:
    """Return a copy of a network without gradients; it shares the frozen parameters, which take no memory again."""
    frozen = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, frozen).requires_grad_(False)


@dataclass(frozen=True)
class _Schedule:
    """Hold what the updates of a batch depend on besides the batch: numbers, or tensors in a recorded batch.

    Attributes:
        step: The number of updates before the batch.
        rates: The learning rate of each pass.
        weights: The weight of the parameters in the moving average after each pass.
    """

    step: int | Tensor
    rates: Sequence[float] | Tensor
    weights: Sequence[float] | Tensor


@dataclass(frozen=True)
class _Pass:
    """Hold what a pass over a batch gives, on the device.

    Attributes:
        losses: The mean of each loss in this process.
        samples: The losses of the samples of each microbatch.
        size: The mean ‖δ‖.
        stepped: Whether the optimiser made its step; None without scaling of the loss.
        at_radius: After the last pass, :meth:`Adversary.at_radius` of the batch.
    """

    losses: dict[str, Tensor]
    samples: list[Tensor]
    size: Tensor
    stepped: Tensor | None
    at_radius: Tensor | None


class Trainer:
    """A training run with its network, optimiser, objective and adversary. :meth:`updates` is the training loop.

    Raises:
        InputError: If the recipe, the data and the checkpoint do not fit together.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, dataset: ImageDataset, built: Built) -> None:
        self.recipe = recipe
        self.accelerator = accelerator
        self.dataset = dataset
        self.built = built
        self.adversary = recipe.adversary.build(built.process)
        self.buckets, self.sizes = arrange(recipe, dataset, built.model)
        self.step = 0
        self.batch = 0
        self.skipped_updates: int | Tensor = 0
        self.at_radius: Tensor | None = None  # of the last batch, as Adversary.at_radius returns it

        parts = accelerator.num_processes * recipe.accumulate
        if recipe.batch_size % parts:
            raise InputError(
                f"batch_size {recipe.batch_size} is not a multiple of {accelerator.num_processes} processes × "
                f"accumulate {recipe.accumulate}"
            )
        if built.model.adapter is not None and accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("model.lora is not for FSDP, which shards whole networks: launch the run without it")
        if recipe.optimizer != "adamw" and accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("optimizer=adamw8bit is not for FSDP: set optimizer=adamw")
        unet = built.model.network.train()
        by_default = accelerator.device.type == "cuda" and recipe.optimizer == "adamw"
        if by_default if recipe.channels_last is None else recipe.channels_last:
            unet = unet.to(memory_format=torch.channels_last)
            if accelerator.device.type == "cuda" and not recipe.compile:  # which fuses by itself
                fuse_norms(unet)
        config, adapted = built.objective, built.model.adapter is not None
        target = _copy_of(unet) if config.needs_target and config.copies_student(adapted) else None
        if recipe.compile:
            # In place, and not wrapped: names in checkpoints are the same with and without.
            unet.compile()
            if target is not None:
                target.compile()
        optimizer = build_optimizer(recipe, list(_trained(unet).values()), accelerator.device)
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        create_state(self.optimizer.optimizer)
        if target is not None:
            # Prepared as well, so that it has the student's precision, is in every checkpoint, and is sharded as the
            # student under FSDP. DDP, which only adds up gradients, takes no module without any.
            sharded = accelerator.distributed_type == DistributedType.FSDP
            target = accelerator.prepare_model(target, evaluation_mode=not sharded)
        self.target = target
        self.call = built.model.backbone.bind(self.model)
        built.model.codec.to(accelerator.device)
        built.model.condition.to(accelerator.device)
        teacher = _build_teacher(built, dataset, accelerator) if config.needs_teacher else None
        self.objective = config.build(built.process, recipe.steps, self._target_of_objective(), teacher)
        self.ema = EMA(list(_trained(self.model).values()), recipe.ema) if recipe.ema else None
        self.rate = self.learning_rate()  # of the last update
        self.recorder = self._recorder()

    def _recorder(self) -> Recorder | None:
        """Return the recorder of the passes over a batch, or None if they are not to be recorded."""
        accelerator, recipe = self.accelerator, self.recipe
        on_gpu = accelerator.device.type == "cuda"
        if recipe.capture is False or (recipe.capture == "auto" and not on_gpu):
            return None
        why = self.objective.unrecordable()
        if accelerator.num_processes > 1:
            why = "several processes train together"
        elif accelerator.scaler is not None:
            why = "the loss is scaled in fp16"
        elif recipe.optimizer != "adamw":
            why = f"optimizer={recipe.optimizer} counts its updates on the host"
        elif recipe.model.gradient_checkpointing:
            why = "gradient checkpointing reads the states of generators"
        if why is not None:
            if accelerator.is_main_process:
                logger.warning("the passes over a batch are not recorded as a CUDA graph, since %s", why)
            return None
        self.adversary.count_on(accelerator.device)

        def passes(draws: list[Draw], schedule: _Schedule) -> list[_Pass]:
            # AdamW refuses to be recorded without it, and with it warns of steps that are not.
            for group in self.optimizer.param_groups:
                group["capturable"] = on_gpu and torch.cuda.is_current_stream_capturing()
            return list(self._passes(draws, schedule))

        return Recorder(passes, accelerator.device, "a training pass")

    def _target_of_objective(self) -> nn.Module | None:
        """Return the target network as the objective calls it: a copy of the student, or the student itself."""
        if not self.built.objective.needs_target:
            return None
        target: nn.Module = self.accelerator.unwrap_model(self.model) if self.target is None else self.target
        call: Any = self.built.model.backbone.bind(target)
        return target if call is target else _Bound(target, call)  # most families call the network itself

    # -- the loop --------------------------------------------------------------------------------------------

    def learning_rate(self, step: int | None = None) -> float:
        """Return the learning rate of the update after ``step``: linear warm-up, then constant or half a cosine.

        Arguments:
            step: The number of updates before it. Default: those of the run so far.
        """
        recipe, step = self.recipe, self.step if step is None else step
        rate = recipe.lr * min(1.0, (step + 1) / recipe.warmup if recipe.warmup else 1.0)
        if recipe.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        return rate

    def batches(self) -> Iterator[list[Draw]]:
        """Yield the microbatches of each batch, from the run's current batch to its last."""
        parts = self.recipe, self.accelerator, self.dataset, self.built, self.objective, self.buckets, self.sizes
        yield from Batches(*parts, self.batch)

    def _remember(self, draws: list[Draw], losses: list[Tensor]) -> None:
        """Pass the losses of a batch, gathered from all processes in batch order, to the sampler of times.

        Only the losses of the first pass are used. Later passes repeat the same times at perturbed points, where the
        loss is larger, and would fill a time's history with one image.
        """
        if not isinstance(self.objective.timesteps, LossSecondMoment):
            return
        for draw, loss in zip(draws, losses, strict=True):
            plain = loss if draw.weight is None else loss / draw.weight
            t, plain = self.accelerator.gather((draw.t, plain))  # rank after rank, which is the batch's order
            self.objective.timesteps.update(t, plain)

    def _loss_of_delta(self, draw: Draw) -> Callable[[Tensor], Tensor]:
        """Return the function δ ↦ losses (B,), for adversaries with passes of their own."""

        def losses(delta: Tensor) -> Tensor:
            # No gradients of parameters are made here, so there is none to wait for from other processes.
            with self.accelerator.no_sync(self.model):
                loss = self.objective(self.call, draw, delta)["loss"]
            scaler = self.accelerator.scaler
            return loss if scaler is None else scaler.scale(loss)  # fp16 would underflow

        return losses

    def _optimizer_step(self) -> Tensor | None:
        """Make an optimiser step. Return whether it was made, as a boolean scalar, or None if no loss is scaled."""
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
            return None
        one = torch.ones((), device=self.accelerator.device)
        # The scale falls when a step is left out, and only then; reading it here would stall a GPU.
        before = scaler.scale(one)
        self.optimizer.step()
        stepped: Tensor = scaler.scale(one) >= before
        return stepped

    def updates(self) -> Iterator[tuple[dict[str, Tensor], Tensor, bool]]:
        """Train until ``recipe.steps`` updates are made.

        Yields:
            After each optimiser update, the mean of each loss in this process and the mean ‖δ‖, as tensors on the
            device, and whether the batch is complete, so that a checkpoint may be taken.
        """
        if self.step >= self.recipe.steps:  # killed between the last checkpoint and the export
            return
        passes = self.adversary.passes
        for draws in self.batches():
            began, done = self.step, False
            # The last batch of a run may be left before its last pass.
            recorded = self.recorder is not None and began + passes <= self.recipe.steps
            of_passes = self._record(draws) if recorded else self._passes(draws, self._schedule(began))
            for k, of_pass in enumerate(of_passes):
                if k == 0:
                    self._remember(draws, of_pass.samples)
                if of_pass.stepped is not None:
                    self.skipped_updates = self.skipped_updates + ~of_pass.stepped
                self.rate = self.learning_rate()
                self.step += 1
                done = k + 1 == passes
                if done:
                    self.at_radius = of_pass.at_radius
                self.batch += done
                yield of_pass.losses, of_pass.size, done
                if self.step >= self.recipe.steps:
                    return

    def _schedule(self, step: int) -> _Schedule:
        """Return what the updates of a batch that begins at an update depend on."""
        steps = range(step, step + self.adversary.passes)
        weights = [0.0 if self.ema is None else self.ema.weight(step + 1) for step in steps]
        return _Schedule(step, [self.learning_rate(step) for step in steps], weights)

    def _record(self, draws: list[Draw]) -> list[_Pass]:
        """Make all passes over a batch by the recorder."""
        assert self.recorder is not None
        schedule, device = self._schedule(self.step), self.accelerator.device
        numbers = (torch.tensor(value) for value in (schedule.step, schedule.rates, schedule.weights))
        of_passes: list[_Pass] = self.recorder(draws, _Schedule(*(to_device(number, device) for number in numbers)))
        # A replay changes tensors alone.
        self.objective.updates = self.step + len(of_passes)
        if self.ema is not None:
            self.ema.updates = self.step + len(of_passes)
        return of_passes

    def _passes(self, draws: list[Draw], schedule: _Schedule) -> Iterator[_Pass]:
        """Make the passes over a batch, each with an update of the optimiser, the moving average and the objective."""
        accelerator, recipe = self.accelerator, self.recipe
        perturbations = [
            self.adversary(draw.x_t, draw.t, loss=self._loss_of_delta(draw), training_step=schedule.step)
            for draw in draws
        ]
        for k, deltas in enumerate(zip(*perturbations, strict=True)):
            totals: dict[str, Tensor] = {}
            drawn: list[Tensor] = []
            for m, (draw, delta) in enumerate(zip(draws, deltas, strict=True)):
                last = m + 1 == len(draws)
                if k + 1 == self.adversary.passes:
                    # Nothing ascends any more: no backward down to δ, through a target network above all.
                    delta = delta.detach()
                sync: AbstractContextManager[Any] = nullcontext() if last else accelerator.no_sync(self.model)
                with sync:
                    losses = self.objective(self.call, draw, delta)
                    accelerator.backward(losses["loss"].mean() / len(draws))
                drawn.append(losses["loss"].detach())
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0) + value.detach().mean() / len(draws)
            if recipe.clip is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.rates[k]
            stepped = self._optimizer_step()
            self.optimizer.zero_grad(set_to_none=True)
            self.objective.after_update(self.model, stepped)
            if self.ema is not None:
                weight = schedule.weights[k]
                self.ema.update(stepped, weight if isinstance(weight, Tensor) else None)
            size = torch.cat([self.adversary.norm(d.detach()) for d in deltas]).mean()
            done = k + 1 == self.adversary.passes
            at_radius = self._at_radius(draws, deltas, schedule.step) if done else None
            yield _Pass(totals, drawn, size, stepped, at_radius)

    def _at_radius(self, draws: list[Draw], deltas: Sequence[Tensor], step: int | Tensor) -> Tensor | None:
        """Return :meth:`Adversary.at_radius` of the perturbations of a batch, which began at an update."""
        counts = [
            self.adversary.at_radius(delta.detach(), draw.x_t, draw.t, step)
            for draw, delta in zip(draws, deltas, strict=True)
        ]
        return None if counts[0] is None else torch.stack([count for count in counts if count is not None]).sum(0)

    # -- in and out ------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the run's state, not copies, by part of a checkpoint and name.

        Of a network with an adapter they are those of the adapter alone.
        """
        student = self.accelerator.unwrap_model(self.model)
        trained = _trained(student)
        tensors = {
            "model": self._stored(student),
            "optimizer": state_tensors(self.optimizer.optimizer, trained),
        }
        if self.target is not None:
            tensors["target"] = self._stored(self.accelerator.unwrap_model(self.target))
        if self.ema is not None:
            tensors["ema"] = dict(zip(trained, self.ema.average, strict=True))
        return tensors

    @property
    def _base(self) -> str | None:
        adapter = self.built.model.adapter
        return None if adapter is None else adapter.fingerprint

    def _stored(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a network that a checkpoint holds."""
        tensors: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        return tensors if self.built.model.adapter is None else adapter_of(tensors)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a folder. Every process must call it, between batches.

        Raises:
            RunError: If a parameter or a moment of the optimiser is not finite.
        """
        tensors = self.tensors()
        for part, what in (("model", "parameter"), ("optimizer", "moment of the optimiser")):
            if not torch.stack([value.isfinite().all() for value in tensors[part].values()]).all():
                raise RunError(
                    f"a {what} is not finite after update {self.step}: lower lr or adversary.step_size, or set clip=1; "
                    "checkpoints from before are kept"
                )
        scaler, scale = self.accelerator.scaler, None
        if scaler is not None:
            saved = scaler.state_dict()
            scale = Scale(scale=saved["scale"], growth_tracker=saved["_growth_tracker"])
        state = State(
            step=self.step,
            batch=self.batch,
            skipped=self.adversary.skipped,
            skipped_updates=int(self.skipped_updates),
            objective=self.objective.state(),
            scaler=scale,
            processes=self.accelerator.num_processes,
            base=self._base,
        )
        save_checkpoint(folder, state, self.accelerator, tensors, self.recipe.keep)

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, which may have been made on another device or in another memory format.

        Raises:
            InputError: If the checkpoint is of another network or malformed.
        """
        tensors = self.tensors()
        state = load_checkpoint(checkpoint, self.accelerator, tensors)
        check_moments(checkpoint, tensors["optimizer"], state.step)
        set_counts(self.optimizer.optimizer, _trained(self.accelerator.unwrap_model(self.model)), tensors["optimizer"])
        check_objective(checkpoint, state.objective, self.objective.state())
        if state.base != self._base:
            raise InputError(
                f"{checkpoint} is a LoRA of other weights than {self.recipe.model.source} has now: restore them, or "
                "start again with another --set output=…"
            )
        if state.step != state.batch * self.adversary.passes:
            raise InputError(
                f"{checkpoint / 'state.json'} does not fit the recipe ({state.step} updates are not those of "
                f"{state.batch} batches): remove its checkpoint to go on from the one before"
            )
        self.step, self.batch = state.step, state.batch
        if self.ema is not None:
            self.ema.updates = self.step
        self.adversary.skipped = state.skipped
        if self.recorder is not None:
            self.adversary.count_on(self.accelerator.device)
        self.skipped_updates = state.skipped_updates
        self.objective.load_state(state.objective)

    def averaged(self) -> AbstractContextManager[None]:
        """Replace the weights by their moving average within the block, if there is one."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def export(self, folder: Path, average: bool = True) -> None:
        """Write the model as a diffusers pipeline folder, with the averaged weights if there is a moving average.

        Arguments:
            average: False for the weights themselves.
        """
        with self.averaged() if average else nullcontext():
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:  # inside, since the state holds the parameters and not copies
                with atomic_folder(folder, replace=True) as temporary:
                    self.built.model.save(temporary, state)
        self.accelerator.wait_for_everyone()


_LONGEST_LINE = 2**16


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


class _Metrics:
    """Metrics of a run, written every ``log_every`` updates to ``metrics.jsonl`` and to accelerate's trackers."""

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self.trainer = trainer
        self.path = path
        self.line: dict[str, float] = {}
        self.begins = True  # the next update is the first of a batch
        self.file: BinaryIO | None = None
        if trainer.accelerator.is_main_process:
            self._drop_after(trainer.step)
            self.file = open_regular(path, "ab")
        self._restart()

    def _drop_after(self, step: int) -> None:
        """Remove the lines that a killed run wrote after its last checkpoint, since they will be written again."""
        with atomic_write(self.path) as kept:
            if not os.path.lexists(self.path):
                return
            with open_regular(self.path) as file:
                while line := file.readline(_LONGEST_LINE):
                    if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:  # torn by a kill
                        return
                    values = self._values(line)
                    if values["step"] <= step:
                        kept.write(line)
                        self.line = values

    def _values(self, line: bytes) -> dict[str, float]:
        """Return the numbers of a line. Anything else in it is refused."""
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not all(_finite(values.get(name)) for name in {"step", *values}):
            raise InputError(f"{self.path} is damaged: remove it, and resume without the lines that it has")
        return values

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.sizes: Tensor | float = 0.0
        self.updates = self.batches = 0
        self.of_passes: dict[str, Tensor] = {}
        self.since = time.perf_counter()

    def add(self, losses: dict[str, Tensor], size: Tensor, done: bool) -> None:
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
        """Write a line of metrics, and return a summary of it."""
        trainer, recipe = self.trainer, self.trainer.recipe
        sums = {name: self.sums[name] / self.updates for name in sorted(self.sums)}
        values = torch.stack([*sums.values(), *self.of_passes.values()])
        means = iter(trainer.accelerator.reduce(values, reduction="mean").tolist())
        line: dict[str, float] = {"step": trainer.step, **{name: next(means) for name in sums}}
        of_passes = {name: next(means) for name in self.of_passes}
        for name, part, whole in (("pass_ratio", "last", "first"), ("at_radius", "at", "of")):
            if of_passes.get(whole, 0) > 0 and math.isfinite(ratio := of_passes[part] / of_passes[whole]):
                line[name] = ratio
        line["delta_norm"] = float(self.sizes) / self.batches if self.batches else float(self.size)
        line["lr"] = trainer.rate
        line["epoch"] = trainer.batch * recipe.batch_size / len(trainer.dataset)
        line["skipped"] = trainer.adversary.skipped
        line["skipped_updates"] = int(trainer.skipped_updates)
        line["images_per_second"] = self.updates * recipe.batch_size / (time.perf_counter() - self.since)
        if not math.isfinite(line["loss"]):
            raise RunError(
                f"the loss is {line['loss']} at update {trainer.step}: lower lr or adversary.step_size, or set clip=1; "
                "checkpoints from before are kept"
            )
        if self.file is not None:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()
        self.line = line
        trainer.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=trainer.step)
        self._restart()
        speed = line["images_per_second"]
        return f"loss {line['loss']:.4f}  |δ| {line['delta_norm']:.3g}  {speed:.0f} images/s"


def _warn_of_the_start(recipe: Recipe) -> None:
    """Log a warning if the exported moving average will contain much of the starting weights."""
    if isinstance(recipe.ema, str) or (left := recipe.ema**recipe.steps) <= REMAINDER:
        return
    logger.warning(
        "ema %g leaves %.0f %% of the starting weights in the exported model of %d updates: set ema=auto, or ema=%g, "
        "which leaves at most %.0f %%",
        recipe.ema,
        100 * left,
        recipe.steps,
        sufficient_decay(recipe.steps),
        100 * REMAINDER,
    )


def _describe(dataset: ImageDataset) -> dict[str, Any]:
    """Return the description of a dataset that ``data.json`` holds."""
    labels = dataset.labels
    return {
        "name": dataset.name,
        "images": len(dataset),
        "shape": list(dataset.shape),
        "classes": dataset.num_classes,
        "labels": None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "captions": dataset.caption_digest(),
        "fingerprint": dataset.fingerprint(),
    }


def _check_data(path: Path, data: dict[str, Any]) -> None:
    """Check that a resumed run has the data that it began with. A run without ``data.json`` is not checked."""
    if not path.exists():
        return
    try:
        before = read_json(path, 2**20)
        fingerprint = before["fingerprint"]
    except (InputError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: restore it, or remove it to resume without a check of the data") from None
    if fingerprint == data["fingerprint"]:
        return
    counts = {"number of images": "images", "shape": "shape", "number of classes": "classes"}
    changes = [
        f"{what} {printable(str(before.get(k))[:40])} → {data[k]}"
        for what, k in counts.items()
        if before.get(k) != data[k]
    ]
    if not changes:
        changes += [name for name in ("labels", "captions") if before.get(name) != data[name]]
    raise InputError(
        f"{path.parent} was trained with other data ({', '.join(changes) or 'contents'}): restore the data, start a "
        f"new run from it with model.name=pretrained model.path={path.parent}, or remove {path} to go on all the same"
    )


def _prepare_folder(recipe: Recipe, folder: Path, resume: bool, dataset: ImageDataset) -> None:
    """Make the run's folder, or with ``resume`` check that an existing folder holds the same run."""
    teacher = None if recipe.objective is None else recipe.objective.teacher_path
    for source in (recipe.model.source, teacher, recipe.data.root):
        if source and Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
            raise InputError(f"output {folder} is in {source}, which is read: choose another --set output=…")
    claim_folder(folder, "a run")
    remove_leftovers(folder, r"(?:recipe\.yaml|(?:data|start|result)\.json|metrics\.jsonl|model|best)")
    if any(path.name != MARKER for path in folder.iterdir()):
        if not resume:
            raise InputError(f"{folder} already holds a run: go on with --resume, or choose another --set output=…")
        _check_recipe(recipe, folder)
    data, checkpoints = _describe(dataset), folder / "checkpoints"
    if any(checkpoints.glob("step-*")):  # without checkpoints nothing was trained on other data
        _check_data(folder / "data.json", data)
    with atomic_write(folder / "recipe.yaml") as file:  # first, since the other files belong to a run only with it
        file.write(recipe.to_yaml().encode())
    make_folder(checkpoints)
    remove_leftovers(checkpoints, r"step-\d{8}")
    with atomic_write(folder / "data.json") as file:
        file.write(json.dumps(data, indent=1).encode())


def _check_recipe(recipe: Recipe, folder: Path) -> None:
    """Check that a folder holds a run of a recipe."""
    path = folder / "recipe.yaml"
    if not path.exists():
        raise InputError(f"{folder} has no recipe.yaml, so it is not known of what it is a run: choose another output")
    before = load_recipe(str(path))
    # The cosine schedule and growing numbers of levels depend on the number of steps.
    fixed = recipe.lr_schedule == "constant" and (recipe.objective is None or recipe.objective.fixed_levels)
    free = FREE_TO_CHANGE | ({"steps"} if fixed else set())
    if (folder / "watch.jsonl").exists():  # lines of other measurements cannot be compared
        free = free - {"watch"}
    for name in Recipe.model_fields:
        if name not in free and _fixed(before, name) != _fixed(recipe, name):
            raise InputError(
                f"{folder} was trained with another {name}: resume with the recipe it was started with, "
                "or choose another --set output=…"
            )


def _fixed(recipe: Recipe, name: str) -> Any:
    """Return a field of a recipe, without settings that do not change the training."""
    value = getattr(recipe, name)
    same = {
        "data": {"workers": 0},
        "model": {"gradient_checkpointing": False},
        "watch": {"every": "auto", "batch_size": 1, "signs": SignsConfig()},
    }.get(name)
    return value if same is None or value is None else value.model_copy(update=same)


def train(recipe: Recipe, *, resume: bool = False, cpu: bool = False, progress: Progress = SILENT) -> RunResult | None:
    """Train a recipe until it is finished, or until SIGTERM or Ctrl-C.

    Arguments:
        recipe: The configuration.
        resume: Continue from the newest whole checkpoint in ``recipe.output``, or start from the beginning if there is
            none.
        cpu: Use the CPU even if there is a GPU.
        progress: The receiver of the progress, in updates, with the loss, the mean ‖δ‖ and the speed as a note.

    Returns:
        The contents of ``result.json``, or None if a signal stopped the run; it was then saved and can be resumed.

    Raises:
        InputError: If the recipe, the data, the checkpoint and the folder do not fit together.
        RunError: If the loss is not finite.
        OSError: If the disk is full.
    """
    folder = Path(recipe.output)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    dataset = recipe.data.load()
    accelerator = _accelerator(recipe, cpu)
    set_seed(recipe.seed)  # before the network is built, so that all processes start from the same weights
    built = build_model(recipe, dataset)
    latents = LatentDataset(dataset, built.model.codec, recipe.data.flip) if recipe.caches_latents else None
    trainer = Trainer(recipe, accelerator, latents or dataset, built)
    watch = None if recipe.watch is None else Watch(recipe.watch, trainer, dataset, folder, progress)
    if accelerator.is_main_process:
        _prepare_folder(recipe, folder, resume, trainer.dataset)
    accelerator.wait_for_everyone()
    finished = folder / "result.json"
    if resume and finished.exists():
        before = read_result(finished)
        if before["steps"] >= recipe.steps or _stopped(before, recipe):
            _check_result(finished, before, trainer)
            logger.info("%s is finished", folder)
            return RunResult(before)
    if latents is not None:
        rank, processes = accelerator.process_index, accelerator.num_processes
        latents.fill(accelerator.device, recipe.data.workers, rank, processes, progress)
        accelerator.wait_for_everyone()
        built.model.codec.to("cpu")  # which nothing calls any more
    if built.model.condition.takes_captions and dataset.captions is not None and accelerator.device.type != "cpu":
        _embed_captions(dataset.captions, built, accelerator, progress)
    set_seed(recipe.seed, device_specific=True)  # dropout and random directions differ between processes
    checkpoint = newest_checkpoint(folder / "checkpoints") if resume else None
    if recipe.trackers:
        accelerator.init_trackers("robustdiff", config={"recipe": recipe.to_yaml()})
    if accelerator.is_main_process:
        _warn_of_the_start(recipe)
    with Interrupt() as interrupt, worker_failures():
        try:
            if watch is not None:
                progress.begin(f"{recipe.output}: what it starts from", recipe.steps)
                watch.begin(checkpoint is None, interrupt, progress)
            if checkpoint is not None:
                trainer.load(checkpoint)
                if accelerator.is_main_process:
                    remove_before(checkpoint, recipe.keep)
            metrics = _Metrics(trainer, folder / "metrics.jsonl")
            if not _run(trainer, metrics, folder, interrupt, progress, watch):
                return None
            trainer.export(folder / "model")
            result = _result(trainer, metrics)
            if watch is not None:
                result |= watch.result(interrupt, progress)
        except Interrupted:
            logger.warning("%s: %s is stopped at update %d", interrupt.received or "a signal", folder, trainer.step)
            return None
        except RunError as error:
            if watch is None or not watch.lines:
                raise
            raise RunError(f"{error}; best/ holds the best model that was measured before") from None
        if accelerator.is_main_process:
            with atomic_write(finished) as file:
                file.write(json.dumps(result, indent=1).encode())
        accelerator.wait_for_everyone()
    if recipe.trackers:
        accelerator.end_training()
    return RunResult(result)


def _embed_captions(
    captions: Iterable[tuple[str, ...]], built: Built, accelerator: Accelerator, progress: Progress
) -> None:
    """Cache the embeddings of all captions, and move the text encoders off the device."""
    condition = built.model.condition
    texts = ["", *dict.fromkeys(text for own in captions for text in own)]
    condition.prepare(texts[accelerator.process_index :: accelerator.num_processes], progress)
    accelerator.wait_for_everyone()
    condition.prepare(texts, progress)  # those of the other processes, if they are not on disk
    condition.park()


def _accelerator(recipe: Recipe, cpu: bool) -> Accelerator:
    """Return the accelerator of a run, if the device supports its precision."""
    AcceleratorState._reset_state()  # another run in this process may have had another precision
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
            log_with=list(recipe.trackers) or None,
            project_config=ProjectConfiguration(project_dir=recipe.output, logging_dir=recipe.output),
        )
    except ValueError as error:
        message = f"precision={recipe.precision} is not for this device: {str(error).rstrip('.')}; set precision=auto"
        raise InputError(message) from None
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would silently train in fp32
        raise InputError("precision=fp16 is not for a CPU: set precision=bf16, fp32 or auto")
    return accelerator


def _run(
    trainer: Trainer, metrics: _Metrics, folder: Path, interrupt: Interrupt, progress: Progress, watch: Watch | None
) -> bool:
    """Make all updates, with metrics, checkpoints and the watch; False if a signal stopped the run, which was saved."""
    recipe, accelerator = trainer.recipe, trainer.accelerator
    saved = shown = trainer.step
    progress.begin(recipe.output, recipe.steps)
    progress.advance(trainer.step)
    # Killed between a checkpoint and its measurement, or after a sign that ends the run.
    resumed = watch is not None and trainer.step > 0 and watch.due(trainer.step, trainer.step >= recipe.steps)
    if watch is not None and resumed and watch.measure(trainer.step, interrupt, progress):
        return True
    for losses, size, done in trainer.updates():
        metrics.add(losses, size, done)
        stop = interrupt.received is not None and done
        due = done and trainer.step - saved >= recipe.checkpoint_every
        last = trainer.step >= recipe.steps
        # Between batches, so that every line covers whole batches; before a checkpoint, so that none has a NaN.
        line = (done and metrics.updates >= recipe.log_every) or due or last
        if accelerator.num_processes > 1:
            # A signal may reach one process before another. They agree where the host waits for the GPU in any case.
            received = float(stop)
            stop = line and done and bool(accelerator.reduce(torch.tensor(received, device=accelerator.device)))
        if line or stop:
            note = metrics.flush() if watch is None else f"{metrics.flush()}  {watch.note}"
            progress.advance(trainer.step - shown, note)
            shown = trainer.step
        if due or ((stop or last) and done):
            trainer.save(folder / "checkpoints")
            saved = trainer.step
        ends = False
        if not stop and watch is not None and (done or last) and watch.due(trainer.step, last):
            try:
                with metrics.paused():
                    ends = watch.measure(trainer.step, interrupt, progress)
            except Interrupted:
                stop = True
            if (stop or ends) and done and saved < trainer.step:
                trainer.save(folder / "checkpoints")
        if stop and (watch is not None or not last):
            logger.warning("%s: %s is saved at update %d", interrupt.received or "a signal", folder, trainer.step)
            return False
        if ends:
            return True
    return True


def _stopped(result: Mapping[str, Any], recipe: Recipe) -> bool:
    """Return whether a sign ended a finished run, and still would."""
    ends = recipe.watch is not None and recipe.watch.signs.action == "stop"
    return ends and any(sign["action"] == "stop" for sign in result.get("signs") or [])


def _result(trainer: Trainer, metrics: _Metrics) -> dict[str, Any]:
    """Return the contents of ``result.json`` of a finished run."""
    return {
        "steps": trainer.step,
        "batches": trainer.batch,
        "batch_size": trainer.recipe.batch_size,
        "backward_passes": trainer.step * trainer.recipe.adversary.backward_passes,
        "loss": metrics.line.get("loss"),
        "delta_norm": metrics.line.get("delta_norm"),
        "skipped": trainer.adversary.skipped,
        "skipped_updates": int(trainer.skipped_updates),
        "parameters": sum(p.numel() for p in _trained(trainer.built.model.network).values()),
        "data": trainer.dataset.name,
        "images": len(trainer.dataset),
        "processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "torch": torch.__version__,
    }


def read_result(path: Path) -> dict[str, Any]:
    """Read the ``result.json`` of a run.

    Raises:
        InputError: If the file is malformed.
        OSError: If the file cannot be read.
    """
    result = read_json(path, 2**20)
    kinds: dict[str, type] = {"loss": float, "delta_norm": float, "data": str, "device": str, "torch": str}
    counts = ("steps", "batches", "batch_size", "backward_passes", "skipped", "skipped_updates")
    kinds |= dict.fromkeys((*counts, "parameters", "images", "processes"), int)
    watched = {"best", "signs"}  # of runs that were watched
    if not isinstance(result, dict) or result.keys() - watched != kinds.keys() or len(result.keys() & watched) == 1:
        raise InputError(f"{path} is damaged: remove it, and resume the run")
    if "best" in result:
        try:
            Best.model_validate(result["best"])
            TypeAdapter(list[FiredSign]).validate_python(result["signs"])
        except ValidationError as error:
            where = printable(".".join(map(str, error.errors()[0]["loc"]))[:40])
            raise InputError(f"{path} is damaged ({where}): remove it, and resume the run") from None
    for name, kind in kinds.items():
        value = result[name]
        right = type(value) is kind or (kind is float and value is None)
        if not right or (type(value) is int and value < 0):
            raise InputError(
                f"{path} is damaged ({name}: {printable(repr(value)[:40])}): remove it, and resume the run"
            )
    return result


def _check_result(path: Path, result: dict[str, Any], trainer: Trainer) -> None:
    """Check that a result belongs to a trainer's recipe and data, and that the model was exported."""
    expected = {
        "batches": result["steps"] // trainer.adversary.passes,
        "batch_size": trainer.recipe.batch_size,
        "backward_passes": result["steps"] * trainer.recipe.adversary.backward_passes,
        "parameters": sum(p.numel() for p in _trained(trainer.built.model.network).values()),
        "images": len(trainer.dataset),
    }
    for name, value in expected.items():
        if result[name] != value:
            raise InputError(f"{path} is of another run ({name} {result[name]} → {value}): remove it, and resume")
    if not any((path.parent / "model" / name).is_file() for name in ("model_index.json", RECORD)):
        raise InputError(f"{path.parent} has a result and no model: remove {path}, and resume")
