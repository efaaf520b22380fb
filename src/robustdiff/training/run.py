r"""A training run: a recipe, trained in a folder of its own until it is finished or interrupted.

    recipe.yaml      the recipe, including defaults
    data.json        the data that it began with
    checkpoints/     the newest checkpoints, from which it is resumed
    metrics.jsonl    a line every ``log_every`` updates
    watch.jsonl, start.json, best/    of the watch
    model/           the trained model, a diffusers pipeline or an adapter
    result.json      written last: the run is finished

A folder belongs to a run if it has this package's marker, on which the run holds a lock, so that no second process
trains in it. A run is resumed only with the same recipe and data.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration, is_tensorboard_available, is_wandb_available, set_seed

from robustdiff.backbones.model import is_model_folder
from robustdiff.data import ImageDataset
from robustdiff.data.latents import LatentDataset
from robustdiff.data.loader import worker_failures
from robustdiff.distributed import agreement, make_accelerator
from robustdiff.errors import InputError, RunError
from robustdiff.files import (
    MARKER,
    atomic_write,
    check_outside,
    claim_folder,
    held,
    make_folder,
    remove_leftovers,
    write_json,
)
from robustdiff.interrupt import Interrupt
from robustdiff.progress import SILENT, Progress
from robustdiff.recipe import Recipe, SignsConfig, load_recipe
from robustdiff.training.build import Built, build_model, load_start
from robustdiff.training.checkpoint import newest_checkpoint, remove_before
from robustdiff.training.ema import REMAINDER, sufficient_decay
from robustdiff.training.metrics_log import MetricsLog
from robustdiff.training.run_files import DataRecord, Result, RunResult, read_data, read_result
from robustdiff.training.trainer import Trainer
from robustdiff.training.watch import Interrupted, Watch

__all__ = ["network_settings", "own_state_of_accelerate", "train"]

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = {"output", "threads", "checkpoint_every", "keep", "log_every", "trackers", "sampler", "watch"}
"""The fields of a recipe that do not affect the trained network."""
FREE_TO_CHANGE |= {"accumulate", "capture", "compile", "channels_last"}  # which change the rounding alone

_ALIKE: dict[str, dict[str, Any]] = {
    "data": {"workers": 0},
    "model": {"gradient_checkpointing": False},
    "watch": {"every": "auto", "batch_size": 1, "signs": SignsConfig()},  # which do not affect what is measured
}
"""The same for fields of sections, each with the value that stands for all."""


def network_settings(recipe: Recipe, free: Set[str] = FREE_TO_CHANGE) -> dict[str, Any]:
    """Return the settings of a recipe that affect the trained network, as JSON values.

    Two recipes for which they are equal train the same network, up to rounding.

    Args:
        recipe: The recipe.
        free: The fields that are left out.
    """
    sections = {name: section for name in _ALIKE if (section := getattr(recipe, name)) is not None}
    alike = {name: section.model_copy(update=_ALIKE[name]) for name, section in sections.items()}
    return recipe.model_copy(update=alike).model_dump(mode="json", exclude=set(free))


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


def _describe(dataset: ImageDataset) -> DataRecord:
    """Return the description of a dataset that ``data.json`` holds."""
    labels = dataset.labels
    return DataRecord(
        name=dataset.name,
        images=len(dataset),
        shape=dataset.shape,
        classes=dataset.num_classes,
        labels=None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        captions=dataset.caption_digest(),
        fingerprint=dataset.fingerprint(),
    )


def _check_data(path: Path, data: DataRecord) -> None:
    """Check that a resumed run has the data that it began with. A run without ``data.json`` is not checked."""
    if not path.exists():
        return
    before = read_data(path)
    if before.fingerprint == data.fingerprint:
        return
    counts = {"number of images": "images", "shape": "shape", "number of classes": "classes"}
    changes = [
        f"{what} {old} → {new}"
        for what, name in counts.items()
        if (old := getattr(before, name)) != (new := getattr(data, name))
    ]
    if not changes:
        changes += [name for name in ("labels", "captions") if getattr(before, name) != getattr(data, name)]
    raise InputError(
        f"{path.parent} was trained with other data ({', '.join(changes) or 'contents'}): restore the data, start a "
        f"new run from it with model.name=pretrained model.path={path.parent}, or remove {path} to go on all the same"
    )


def _claim(recipe: Recipe, folder: Path, resume: bool, data: DataRecord, lock: ExitStack) -> None:
    """Make the run's folder, or with ``resume`` check that a folder holds a run of the recipe and the data.

    No other process can claim it until ``lock`` is closed.
    """
    teacher = None if recipe.objective is None else recipe.objective.teacher_path
    read = [Path(source) for source in (recipe.model.source, teacher, recipe.data.folder) if source]
    check_outside(folder, read, "--set output=…")
    claim_folder(folder, "a run")
    if not lock.enter_context(held(folder / MARKER)):
        raise InputError(f"another process trains in {folder}: wait until it ends, or choose another --set output=…")
    remove_leftovers(folder, r"(?:recipe\.yaml|(?:data|start|result)\.json|metrics\.jsonl|model|best)")
    if any(path.name != MARKER for path in folder.iterdir()):
        if not resume:
            raise InputError(f"{folder} already holds a run: go on with --resume, or choose another --set output=…")
        _check_recipe(recipe, folder)
    if any((folder / "checkpoints").glob("step-*")):  # without checkpoints nothing was trained on other data
        _check_data(folder / "data.json", data)


def _prepare(recipe: Recipe, folder: Path, data: DataRecord) -> None:
    """Write what the run is of into its folder."""
    checkpoints = folder / "checkpoints"
    with atomic_write(folder / "recipe.yaml") as file:  # first, since the other files belong to a run only with it
        file.write(recipe.to_yaml().encode())
    make_folder(checkpoints)
    remove_leftovers(checkpoints, r"step-\d{8}")
    write_json(folder / "data.json", data.model_dump(mode="json"))


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
        own = recipe.watch is not None and recipe.watch.samplers and recipe.watch.steps
        free = free - ({"watch"} if own else {"watch", "sampler"})
    trained = network_settings(before, free)
    for name, value in network_settings(recipe, free).items():
        if trained[name] != value:
            raise InputError(
                f"{folder} was trained with another {name}: resume with the recipe it was started with, "
                "or choose another --set output=…"
            )


def train(recipe: Recipe, *, resume: bool = False, cpu: bool = False, progress: Progress = SILENT) -> RunResult | None:
    """Train a recipe until it is finished, or until SIGTERM or Ctrl-C.

    Args:
        recipe: The configuration.
        resume: Continue from the newest whole checkpoint in ``recipe.output``, or start from the beginning if there is
            none.
        cpu: Use the CPU even if there is a GPU.
        progress: The receiver of the progress, in updates, with the loss, the mean ‖δ‖ and the speed as a note.

    Returns:
        The contents of ``result.json``, or None if a signal stopped the run; it was then saved and can be resumed.

    Raises:
        InputError: If the recipe, the data, the checkpoint and the folder do not fit together, or another process
            trains in the folder.
        NotFiniteError: If the loss, or a parameter, is not finite.
        RunError: If a process of the run was killed.
        OSError: If the disk is full.
    """
    with own_state_of_accelerate(), ExitStack() as lock:
        return _train(recipe, resume, cpu, progress, lock)


@contextmanager
def own_state_of_accelerate() -> Iterator[None]:
    """Give accelerators of the block a state of their own, and give the caller's back after it.

    Accelerate keeps the first precision that it was given for the whole process, and the caller's accumulation of
    gradients, within which optimisers make no step; it has no public way to change them.
    """
    states = [state._shared_state for state in (AcceleratorState, GradientState)]
    outer = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, before in zip(states, outer, strict=True):
            state.clear()
            state.update(before)


def _train(recipe: Recipe, resume: bool, cpu: bool, progress: Progress, lock: ExitStack) -> RunResult | None:
    if not recipe.output:  # as in the record of a cell
        raise InputError("output is empty, which is the working folder: set output=. if that is meant")
    folder = Path(recipe.output)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    accelerator = _accelerator(recipe, cpu)
    start = load_start(recipe)
    dataset = recipe.data.load()
    seed = recipe.seed % 2**31  # NumPy's global generator takes 32 bits, the number of the process included
    set_seed(seed)  # before the network is built, so that all processes start from the same weights
    built = build_model(recipe, dataset, start)
    latents = LatentDataset(dataset, built.model.codec, recipe.data.flip) if recipe.caches_latents else None
    trainer = Trainer(recipe, accelerator, latents or dataset, built)
    watch = None if recipe.watch is None else Watch(recipe.watch, trainer, dataset, folder)
    if accelerator.is_main_process:
        data = _describe(trainer.dataset)
        _claim(recipe, folder, resume, data, lock)
    accelerator.wait_for_everyone()
    finished = folder / "result.json"
    if resume and finished.exists():
        before = read_result(finished)
        if before.steps > recipe.steps:
            raise InputError(
                f"{folder} has {before.steps} updates already, and steps={recipe.steps}: give as many or more to "
                "resume it, or choose another --set output=…"
            )
        if before.steps == recipe.steps or _stopped(before, recipe):
            _check_result(finished, before, trainer)
            logger.warning("%s was finished already", folder)
            return before.as_dict()
    if watch is not None:
        watch.read_real_images(progress)
    accelerator.wait_for_everyone()  # all have read the result, which is removed
    checkpoint = newest_checkpoint(folder / "checkpoints") if resume else None
    if accelerator.is_main_process:
        if finished.exists() and checkpoint is None:
            logger.warning("%s is finished and has no checkpoint: it starts again from the beginning", folder)
            finished.unlink()
        _prepare(recipe, folder, data)
    accelerator.wait_for_everyone()
    with trainer.vacated():
        if latents is not None:
            rank, processes = accelerator.process_index, accelerator.num_processes
            latents.fill(accelerator.device, recipe.data.workers, rank, processes, progress)
            accelerator.wait_for_everyone()
            built.model.codec.to("cpu")  # which nothing calls any more
        if built.model.condition.takes_captions and dataset.captions is not None and accelerator.device.type != "cpu":
            _embed_captions(dataset.captions, built, accelerator, progress)
    set_seed(seed, device_specific=True)  # dropout and random directions differ between processes
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
                    finished.unlink(missing_ok=True)  # of fewer updates, and only now that nothing refuses to go on
            metrics = MetricsLog(trainer, folder / "metrics.jsonl")
            with agreement(accelerator) as agree:
                if not _run(trainer, metrics, folder, interrupt, agree, progress, watch):
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
            raise type(error)(f"{error}; best/ holds the best model that was measured before") from None
        if accelerator.is_main_process:
            write_json(finished, result)
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
    """Return the accelerator of a run, if the device supports its precision and its trackers are installed."""
    for tracker in recipe.trackers:  # accelerate would leave one out that is not
        if not (is_wandb_available if tracker == "wandb" else is_tensorboard_available)():
            raise InputError(f"trackers: {tracker} is not installed: pip install {tracker}, or leave it out")
    try:
        accelerator = make_accelerator(
            cpu,
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
    trainer: Trainer,
    metrics: MetricsLog,
    folder: Path,
    interrupt: Interrupt,
    agree: Callable[[bool], bool],
    progress: Progress,
    watch: Watch | None,
) -> bool:
    """Make all updates, with metrics, checkpoints and the watch; False if a signal stopped the run, which was saved."""
    recipe = trainer.recipe
    saved = shown = trainer.step
    progress.begin(recipe.output, recipe.steps)
    progress.advance(trainer.step)
    # Killed between a checkpoint and its measurement, or after a sign that ends the run.
    resumed = watch is not None and trainer.step > 0 and watch.due(trainer.step, trainer.step >= recipe.steps)
    if watch is not None and resumed and watch.measure(trainer.step, interrupt, progress):
        return True
    for losses, size, done in trainer.updates():
        metrics.add(losses, size, done)
        # A signal may reach one process before another, and its sender, such as torchrun, does not wait for long.
        stop = done and agree(interrupt.received is not None)
        due = done and trainer.step - saved >= recipe.checkpoint_every
        last = trainer.step >= recipe.steps
        # A last batch that is left before its last pass is in no checkpoint: the run goes on from the batch before.
        final = done and trainer.step + trainer.adversary.passes > recipe.steps
        # Between batches, so that every line covers whole batches; before a checkpoint, so that none has a NaN.
        line = (done and metrics.updates >= recipe.log_every) or due or final or last
        if line or stop:
            note = metrics.flush() if watch is None else f"{metrics.flush()}  {watch.note}"
            progress.advance(trainer.step - shown, note)
            shown = trainer.step
        if due or final or stop:
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
            state = f"saved at update {saved}" if saved else "stopped before its first checkpoint"
            logger.warning("%s: %s is %s", interrupt.received or "a signal", folder, state)
            return False
        if ends:
            return True
    return True


def _stopped(result: Result, recipe: Recipe) -> bool:
    """Return whether a sign ended a finished run, and still would."""
    ends = recipe.watch is not None and recipe.watch.signs.action == "stop"
    return ends and any(sign.action == "stop" for sign in result.signs or [])


def _result(trainer: Trainer, metrics: MetricsLog) -> dict[str, Any]:
    """Return the contents of ``result.json`` of a finished run."""
    return {
        "steps": trainer.step,
        "batches": trainer.batch,
        "batch_size": trainer.recipe.batch_size,
        "backward_passes": trainer.step * trainer.adversary.backward_passes,
        "loss": metrics.line.get("loss"),
        "delta_norm": metrics.line.get("delta_norm"),
        "skipped": trainer.skipped(),
        "skipped_updates": int(trainer.skipped_updates),
        "parameters": trainer.trained_parameters,
        "data": trainer.dataset.name,
        "images": len(trainer.dataset),
        "processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "torch": torch.__version__,
    }


def _check_result(path: Path, result: Result, trainer: Trainer) -> None:
    """Check that a result belongs to a trainer's recipe and data, and that the model was exported."""
    if trainer.recipe.watch is not None and result.best is None:
        raise InputError(
            f"{path.parent} is finished and was not watched, which cannot be made up for: set watch=none, and measure "
            f"it by robustdiff evaluate {path.parent}"
        )
    expected = {
        "batches": result.steps // trainer.adversary.passes,
        "batch_size": trainer.recipe.batch_size,
        "backward_passes": result.steps * trainer.adversary.backward_passes,
        "parameters": trainer.trained_parameters,
        "images": len(trainer.dataset),
    }
    for name, value in expected.items():
        if (found := getattr(result, name)) != value:
            raise InputError(f"{path} is of another run ({name} {found} → {value}): remove it, and resume")
    if not is_model_folder(path.parent / "model"):
        raise InputError(f"{path.parent} has a result and no model: remove {path}, and resume")
