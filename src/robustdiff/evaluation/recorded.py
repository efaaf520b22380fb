"""A model whose network's calls are recorded as CUDA graphs, for samplers (:mod:`robustdiff.graphs`).

A sampler calls the network once in each step, always with the same shapes, so that a graph of one call serves all steps
of all batches of one size. With classifier-free guidance the call is of the doubled batch. Everything else of a step is
computed as usual.

A graph reads the memory in which the parameters were when it was recorded. Parameters that are changed in place, by
training or by swapping in a moving average, are therefore those of the next replay. What else a call depends on is
compared before each batch, and the calls are recorded anew if it has changed: parameters that were replaced or moved,
modules that were exchanged, hooks, and adapters that were turned on or off.

Autocast casts the weights of linear layers and convolutions, and keeps the casts until its block ends: for all steps of
a batch. A graph would make them anew in each step. It is therefore recorded with weights that are cast once for a
batch, which leads to the same images. Weights that are held in half precision need no cast.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustdiff.backbones.frozen import AUTOCAST
from robustdiff.backbones.model import Model
from robustdiff.errors import printable
from robustdiff.graphs import Recorder
from robustdiff.objectives.objective import predict
from robustdiff.weights import DTYPES

__all__ = ["RecordedModel", "Recordings", "unrecordable"]

# Attributes of modules, of peft and of diffusers, by which other operations are made with the same parameters.
_SWITCHES = ("training", "processor", "disable_adapters", "active_adapter", "merged_adapters", "scaling")
_OFFLOAD = ("_hf_hook", "_diffusers_hook")  # of accelerate and of diffusers


def unrecordable(model: Model) -> str | None:
    """Return why the calls of a model's network cannot be recorded, or None if nothing speaks against it."""
    for module in model.network.modules():
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return "its network is spread over several devices"
        if type(module).__module__.startswith("bitsandbytes"):
            return "its weights are held by bitsandbytes"
        if not vars(module).keys().isdisjoint(_OFFLOAD):
            return "its weights may be moved between devices (offload)"
        if _hooks(module):
            return "it has hooks, which replays do not call"
    if len({parameter.device for parameter in model.network.parameters()}) > 1:
        return "its network is on several devices"
    return None


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def _state(network: nn.Module) -> Hashable:
    """Return what the operations of a network and their memory depend on, besides its arguments."""
    found: list[Hashable] = []
    for module in network.modules():
        found.append((id(module), type(module), _hooks(module)))
        found += [repr(getattr(module, name, None)) for name in (*_SWITCHES, *_OFFLOAD)]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found.append((tensor.data_ptr(), tensor.dtype, tensor.stride()))
    return tuple(found)


class _Calls(nn.Module):
    """The calls of a model's network with weights that are cast to half precision beforehand.

    Args:
        model: The model.
        dtype: The type of products; float32 for the weights themselves.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = model.network
        self._predict = partial(predict, model)
        self._own: dict[str, Tensor] = {}
        if dtype != torch.float32:
            # The first one stays, since diffusers takes the type of a network from it.
            first = next((id(one) for one in self.network.parameters() if one.is_floating_point()), None)
            for name, module in self.named_modules():
                if isinstance(module, AUTOCAST):
                    self._own |= {
                        f"{name}.{part}": parameter.detach()
                        for part, parameter in module.named_parameters(recurse=False)
                        if parameter.dtype == torch.float32 and id(parameter) != first
                    }
        self._cast = {name: own.to(dtype) for name, own in self._own.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights again, which may have changed in place."""
        if self._own:
            torch._foreach_copy_(list(self._cast.values()), list(self._own.values()))

    def forward(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        return self._predict(x, t, condition)

    def record(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """Return the network's output for the cast weights."""
        output: Tensor = functional_call(self, self._cast, (x, t, condition))
        return output


class RecordedModel:
    """A model whose calls are recorded and replayed. Its attributes are those of the model.

    Calls outside of inference mode, which may be for gradients, are not recorded.
    """

    def __init__(self, model: Model, recorder: Recorder) -> None:
        self.model, self.recorder = model, recorder

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Return the network's output, as :meth:`robustdiff.backbones.model.Model.__call__` does, as a tensor."""
        if not torch.is_inference_mode_enabled():
            return predict(self.model, x, t, condition)
        output: Tensor = self.recorder(x, t, condition)
        return output.clone()  # the next call overwrites it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Recordings:
    """The recorded calls of a model's network, kept from batch to batch as long as they are those of the network."""

    def __init__(self) -> None:
        self._of: Any = None
        self._recorder: Recorder | None = None
        self._calls: _Calls | None = None

    def model(self, model: Model, precision: str) -> Model | RecordedModel:
        """Return a model with recorded calls for one batch, or the model itself if they cannot be recorded.

        Args:
            model: The model, in eval mode.
            precision: The precision of autocast under which it will be called.
        """
        of = model, precision, _state(model.network)
        if of != self._of:
            self._of, self._recorder, self._calls = of, None, None
            if unrecordable(model) is None:
                self._calls = _Calls(model, DTYPES[precision])
                what = f"sampling of {printable(model.path)}"
                self._recorder = Recorder(self._calls.record, model.device, what, draws=False)
        elif self._calls is not None:
            self._calls.refresh()
        return model if self._recorder is None else RecordedModel(model, self._recorder)
