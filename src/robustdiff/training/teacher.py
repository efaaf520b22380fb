"""The teacher of a distillation: a network of its own, the student's start, or the student without its adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from robustdiff.backbones.frozen import hold
from robustdiff.backbones.model import Model, load_model
from robustdiff.data import ImageDataset
from robustdiff.errors import InputError
from robustdiff.training.build import Built
from robustdiff.weights import DTYPES

__all__ = ["build_teacher"]


def build_teacher(built: Built, dataset: ImageDataset, accelerator: Accelerator) -> Callable[..., Any]:
    """Build the teacher of an objective that needs one, in the precision of the student, in which it is held.

    Returns:
        What :meth:`ObjectiveConfig.teacher_of` makes of the network, which has no gradients.

    Raises:
        InputError: If the teacher does not suit the student, the data or the levels of the objective.
    """
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
    bound, sigma = config.teacher_bound
    model.kind.check_reaches(sigma, str(path), bound)
    if (half := DTYPES.get(accelerator.mixed_precision)) is not None:
        hold(model.network, half)
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
