r"""The base class of the losses of consistency models, at a perturbed point.

A student f_θ at a point x_next is pulled to a target f_θ⁻ at Φ̂, where a solver's step from x_next leads. δ is added to
one of the two points, and the loss is w d(f_θ, f_θ⁻), with θ⁻ the moving average θ⁻ ← μ θ⁻ + (1 − μ) θ. A gradient with
respect to δ passes through the target network as a constant function; θ⁻ has none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustdiff.objectives.objective import Draw, Objective, follow

__all__ = ["Distillation", "DistillationDraw", "Perturbed", "check_names"]

Perturbed = Literal["solver", "student"]


@dataclass(kw_only=True)
class DistillationDraw(Draw):
    """A training batch. ``x_t`` holds the points that δ is added to, Φ̂ or x_next, and ``t`` indices of their levels.

    Attributes:
        x_next: The student's points, with shape (B, *).
        solved: The solver's points Φ̂, with shape (B, *).
        upper: The levels σ of ``x_next``, or their times as indices of the process, with shape (B,).
        lower: Those of ``solved``, with shape (B,).
    """

    x_next: Tensor
    solved: Tensor
    upper: Tensor
    lower: Tensor


def check_names(**names: tuple[str, Collection[str]]) -> None:
    """Check settings, each given as its value and the known ones.

    Raises:
        ValueError: If one is unknown.
    """
    for name, (value, known) in names.items():
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")


@contextmanager
def _constant(network: Any) -> Iterator[None]:
    """Let a graph through the network lead to its input and not to its parameters, while they need no gradient.

    It is for a network that is also the student. diffusers' gradient checkpointing evaluates blocks again in the
    backward pass, when the parameters need gradients again; the blocks are then constant as well.
    """
    trained = [p for p in network.parameters() if p.requires_grad] if isinstance(network, nn.Module) else []
    checkpointed: list[Any] = (
        [m for m in network.modules() if getattr(m, "gradient_checkpointing", False)] if trained else []
    )
    calls = [module._gradient_checkpointing_func for module in checkpointed]
    for parameter in trained:
        parameter.requires_grad_(False)
    for module, call in zip(checkpointed, calls, strict=True):
        module._gradient_checkpointing_func = partial(_checkpoint, call)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, call in zip(checkpointed, calls, strict=True):
            module._gradient_checkpointing_func = call


def _checkpoint(call: Callable[..., Any], block: Callable[..., Any], *arguments: Any) -> Any:
    """Call a block by diffusers' checkpointing function, as a constant function in every evaluation."""

    def constant(*arguments: Any) -> Any:
        with _constant(block):
            return block(*arguments)

    return call(constant, *arguments)


class Distillation(Objective):
    """The base class of the losses of consistency models.

    Attributes:
        target: The target network, or a function of its kind.
        perturb: The point that δ is added to: "solver" (Φ̂) or "student" (x_next).
        distance: The distance d: (B, *), (B, *) ↦ (B,).
    """

    def __init__(
        self, target: Callable[..., Any], perturb: Perturbed, distance: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.target = target
        self.perturb = perturb
        self.distance = distance

    @abstractmethod
    def _function(self, network: Callable[..., Any], x: Tensor, level: Tensor, draw: Any) -> Tensor:
        """Return f(x, level), with shape (B, *), in at least float32."""

    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses of the student with δ added to ``draw.x_t``, in at least float32: "loss" (weighted) and
        "distance"."""
        assert isinstance(draw, DistillationDraw)
        x_next, solved, through_target = draw.x_next, draw.solved, False
        if delta is not None and self.perturb == "student":
            x_next = x_next + delta
        elif delta is not None:
            solved = solved + delta
            through_target = delta.requires_grad and torch.is_grad_enabled()
        end = self._function(model, x_next, draw.upper, draw)
        with _constant(self.target) if through_target else torch.no_grad():
            goal = self._function(self.target, solved, draw.lower, draw)
        distance = self.distance(end, goal)
        return {"loss": distance if draw.weight is None else draw.weight * distance, "distance": distance}

    def _follow(self, model: nn.Module, decay: float, stepped: Tensor | None) -> None:
        """Set θ⁻ ← μ θ⁻ + (1 − μ) θ, unless the optimiser skipped the step.

        The student's parameters must be in the same order as those of the target. Frozen ones, and those that the two
        networks share, stay as they are.
        """
        assert isinstance(self.target, nn.Module)
        both = zip(self.target.parameters(), model.parameters(), strict=True)
        pairs = [(target, own) for target, own in both if target is not own and own.requires_grad]
        if pairs:
            follow([target.data for target, _ in pairs], [own.data for _, own in pairs], 1 - decay, stepped)
