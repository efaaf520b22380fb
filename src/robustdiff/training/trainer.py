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
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from robustdiff.backbones.fused_norm import fuse_norms
from robustdiff.backbones.lora import adapter_of
from robustdiff.data import ImageDataset
from robustdiff.data.loader import to_device
from robustdiff.errors import InputError, NotFiniteError, RunError
from robustdiff.files import atomic_folder
from robustdiff.graphs import Recorder
from robustdiff.objectives.objective import Draw
from robustdiff.recipe import Recipe
from robustdiff.training.batches import Batches
from robustdiff.training.build import Built
from robustdiff.training.checkpoint import (
    Scale,
    State,
    check_moments,
    check_objective,
    load_checkpoint,
    save_checkpoint,
)
from robustdiff.training.crops import arrange
from robustdiff.training.ema import EMA
from robustdiff.training.optimizer import build_optimizer, create_state, set_counts, state_tensors
from robustdiff.training.teacher import build_teacher

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


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
        if not recipe.caches_latents:
            built.model.codec.to(accelerator.device)
        built.model.condition.to(accelerator.device)
        teacher = build_teacher(built, dataset, accelerator) if config.needs_teacher else None
        self.objective = config.build(built.process, recipe.steps, self._target_of_objective(), teacher)
        self.ema = EMA(list(_trained(self.model).values()), recipe.ema) if recipe.ema else None
        self.rate = self.learning_rate()  # of the last update
        self.recorder = self._recorder()

    @contextmanager
    def vacated(self) -> Iterator[None]:
        """Hold the frozen weights of the network on the CPU within the block, where others need the GPU's memory.

        A network without frozen weights stays: its gradients, which are not there yet, take more than the others need.
        """
        device = self.accelerator.device
        moves = device.type == "cuda" and self.built.model.adapter is not None
        frozen = [one for one in self.built.model.network.parameters() if moves and not one.requires_grad]
        for parameter in frozen:  # in place, since a target network has the same ones
            parameter.data = parameter.data.to("cpu")
        yield
        for parameter in frozen:
            parameter.data = parameter.data.to(device)

    def _recorder(self) -> Recorder | None:
        """Return the recorder of the passes over a batch, or None if they are not to be recorded."""
        accelerator, recipe = self.accelerator, self.recipe
        on_gpu = accelerator.device.type == "cuda"
        if recipe.capture is False or (recipe.capture == "auto" and not on_gpu):
            return None
        why = self.objective.unrecordable()
        for part in (self.adversary, self.objective):
            if not vars(type(part)).get("recordable"):
                why = f"{type(part).__name__} does not declare that it may be (recordable = True in its class)"
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
        # Weakly: a cycle would keep the weights on the GPU after the run, until the garbage collector comes by.
        trainer = weakref.proxy(self)

        def passes(draws: list[Draw], schedule: _Schedule) -> list[_Pass]:
            # A recording that was broken off leaves gradients that were not computed.
            trainer.optimizer.zero_grad(set_to_none=True)
            return list(trainer._passes(draws, schedule))

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

        Args:
            step: The number of updates before it. Default: those of the run so far.
        """
        recipe, step = self.recipe, self.step if step is None else step
        rate = recipe.lr * min(1.0, (step + 1) / recipe.warmup if recipe.warmup else 1.0)
        if recipe.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        return rate

    @property
    def trained_parameters(self) -> int:
        """Return the number of parameters that are trained."""
        return sum(parameter.numel() for parameter in _trained(self.built.model.network).values())

    def skipped(self) -> int:
        """Return the number of ascents that were skipped in all processes. Every process must call it."""
        own = torch.tensor(self.adversary.skipped, device=self.accelerator.device)
        return int(self.accelerator.reduce(own, reduction="sum"))

    def batches(self) -> Iterator[list[Draw]]:
        """Yield the microbatches of each batch, from the run's current batch to its last."""
        parts = self.recipe, self.accelerator, self.dataset, self.built, self.objective, self.buckets, self.sizes
        yield from Batches(*parts, self.adversary.passes, self.batch)

    def _remember(self, draws: list[Draw], losses: list[Tensor]) -> None:
        """Pass the losses of a batch, gathered from all processes in batch order, to the sampler of times.

        Only the losses of the first pass are used. Later passes repeat the same times at perturbed points, where the
        loss is larger, and would fill a time's history with one image.
        """
        if not self.objective.timesteps.adaptive:
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
                return self.objective(self.call, draw, delta)["loss"]

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
            if self.recorder is not None and began + passes <= self.recipe.steps:
                of_passes: Iterable[_Pass] = self._record(draws)
            else:
                self.release()
                of_passes = self._passes(draws, self._schedule(began))
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

    def release(self) -> None:
        """Remove recorded passes, whose memory is then free for other work; the next batch is recorded anew."""
        if self.recorder is not None:
            self.recorder.release()

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
        on_gpu = accelerator.device.type == "cuda"
        for k, deltas in enumerate(self._perturbations(draws, schedule.step)):
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
                if self.recorder is not None:
                    # AdamW refuses to be recorded without it. Other steps would count on the device, and warn of it.
                    group["capturable"] = on_gpu and torch.cuda.is_current_stream_capturing()
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

    def _perturbations(self, draws: list[Draw], step: int | Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the perturbations of the microbatches in each pass over a batch, which begins at an update.

        Raises:
            RunError: If the adversary yields another number than its passes, by which batches are counted.
        """
        perturbations = [
            self.adversary(draw.x_t, draw.t, loss=self._loss_of_delta(draw), training_step=step) for draw in draws
        ]
        passes, yielded = self.adversary.passes, 0
        for yielded, deltas in enumerate(zip(*perturbations, strict=True), 1):
            if yielded > passes:
                break
            yield deltas
        if yielded != passes:
            name, number = type(self.adversary).__name__, yielded if yielded < passes else f"more than {passes}"
            raise RunError(
                f"{name} yields {number} perturbations of a batch, and {name}.passes is {passes}: correct one of them"
            )

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
            NotFiniteError: If a parameter or a moment of the optimiser is not finite.
        """
        tensors = self.tensors()
        for part, what in (("model", "parameter"), ("optimizer", "moment of the optimiser")):
            if not torch.stack([value.isfinite().all() for value in tensors[part].values()]).all():
                raise NotFiniteError(
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
            skipped=self.skipped(),
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
        self.adversary.skipped = state.skipped if self.accelerator.is_main_process else 0
        if self.recorder is not None:
            self.adversary.count_on(self.accelerator.device)
        self.skipped_updates = state.skipped_updates
        self.objective.load_state(state.objective)

    def averaged(self) -> AbstractContextManager[None]:
        """Replace the weights by their moving average within the block, if there is one."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def export(self, folder: Path, average: bool = True) -> None:
        """Write the model as a diffusers pipeline folder, with the averaged weights if there is a moving average.

        Args:
            average: False for the weights themselves.
        """
        with self.averaged() if average else nullcontext():
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:  # inside, since the state holds the parameters and not copies
                with atomic_folder(folder, replace=True) as temporary:
                    self.built.model.save(temporary, state)
        self.accelerator.wait_for_everyone()
