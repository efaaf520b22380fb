r"""Functions of tensors as CUDA graphs: recorded once for each shape of their arguments, and replayed.

A GPU is given its work kernel by kernel, and for a small network the host needs longer for that than the GPU for the
work. A CUDA graph holds all kernels of a function, and is launched as one. The graph works on the memory of the first
recording, so that arguments are copied into it before each replay.

    call 1 of a shape:  the function itself, on the stream of the recording, where libraries allocate what they need
    call 2:             recorded, and replayed
    further calls:      arguments copied, replayed

Random numbers of PyTorch's global generator are fresh in each replay. On other devices than GPUs the same copies are
made, and the function is called on them.

The memory of recordings is theirs as long as they exist, and nothing else can use it: :meth:`Recorder.release` frees it
before other work that needs much.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import first_line

__all__ = ["Recorder"]

logger = logging.getLogger(__name__)


class Recorder:
    """A function whose calls are recorded and replayed.

    The function may change tensors in place, such as parameters. It must not change anything else, must not wait for
    the GPU, and must make the same operations in each call with arguments of the same shapes. A call that cannot be
    recorded is made again as it is, so that the function must not read gradients that were there before it.

    Args:
        function: The function. Its arguments and its result are tensors, numbers, strings and None, and lists, tuples,
            dictionaries and dataclasses of them.
        device: The device that the function computes on. Arguments on the CPU are copied to it.
        what: A name of the function for the line that is logged if it cannot be recorded.
        draws: Whether the function draws random numbers, which then are those of PyTorch's global generator.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, what: str, *, draws: bool = True) -> None:
        self.function, self.device, self.what, self.draws = function, device, what, draws
        self._recordings: dict[Hashable, _Recording] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._bytes = 0  # of the memory that recordings hold
        self._failed = False

    def __call__(self, *arguments: Any) -> Any:
        """Return what the function returns.

        The tensors of the result are overwritten by the next call: copy those that are needed longer.
        """
        if self._failed:
            return self.function(*arguments)
        tensors: list[Tensor] = []
        key = _key(arguments, tensors)
        recording = self._recordings.get(key)
        first = recording is None
        if recording is None:
            if self._bytes and not self._room():
                self._give_up("the GPU has too little memory for batches of several shapes at once")
                return self.function(*arguments)
            recording = self._recordings[key] = _Recording(arguments, tensors, self.device)
        recording.fill(tensors)
        if self.device.type != "cuda":
            return self.function(*recording.arguments)
        if first:
            with self._on_stream(), _without_cached_casts():
                return self.function(*recording.arguments)
        if recording.graph is None and not self._record(recording):
            return self.function(*arguments)
        assert recording.graph is not None
        recording.graph.replay()
        return recording.result

    def release(self) -> None:
        """Remove the recordings and their memory, so that further calls are recorded anew."""
        self._recordings.clear()
        self._pool, self._bytes = None, 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _room(self) -> bool:
        """Return whether there is as much memory beside the recordings as they hold, for a call that is not one."""
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device) - self._bytes
        return free + max(unused, 0) >= self._bytes

    def _give_up(self, why: str) -> None:
        """Make all further calls as they are. The allocator frees the memory of recordings when it needs it."""
        self._failed = True
        self._recordings.clear()
        logger.warning("%s runs without a CUDA graph, since %s", self.what, why)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Make the calls of the block on the stream of the recording, after those before and before those after."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _record(self, recording: _Recording) -> bool:
        """Record the function. Return False, and never try again, if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        generator = torch.cuda.default_generators[index]
        # A graph draws from the state that its generator has in the recording, and a recording that is broken off
        # leaves that state as one that may be drawn from in it alone. Other graphs may draw from the generator's own.
        own, spare = generator.graphsafe_get_state(), generator.clone_state()
        if not self.draws:
            generator.graphsafe_set_state(spare)
        torch.cuda.empty_cache()  # as a recording does, so that what it takes can be counted
        held = torch.cuda.memory_reserved(self.device)
        try:
            # Threads that load data may call CUDA meanwhile. Graphs share their memory, since no two run at a time.
            with (
                _without_cached_casts(),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                result = self.function(*recording.arguments)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # which may be that of the recording otherwise
            if self.draws:
                generator.graphsafe_set_state(spare)
            self._give_up(f"it cannot be recorded: {first_line(error)}")
            return False
        finally:
            if not self.draws:
                generator.graphsafe_set_state(own)
        self._pool = graph.pool()
        self._bytes += max(0, torch.cuda.memory_reserved(self.device) - held)
        recording.graph, recording.result = graph, result
        return True


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Make no use of autocast's cache of cast weights in the block.

    A cast that was cached outside would be freed while a graph still reads it, and one that is made inside, by an
    autocast of the function's own, is there after a replay only. The call before the recording is made so too, since
    code compiled with the cache is compiled again without it, which a recording cannot do.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(cached)


class _Recording:
    """A graph with its arguments and its result.

    Args:
        arguments: The arguments of the function.
        tensors: The tensors in them, in their order.
        device: The device of the copies.
    """

    def __init__(self, arguments: Any, tensors: list[Tensor], device: torch.device) -> None:
        self.tensors = [torch.empty_like(tensor, device=device, requires_grad=False) for tensor in tensors]
        self.arguments = _replaced(arguments, iter(self.tensors))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def fill(self, tensors: list[Tensor]) -> None:
        """Copy other tensors of the same shapes into the arguments."""
        for own, other in zip(self.tensors, tensors, strict=True):
            own.copy_(other, non_blocking=True)


def _key(value: Any, tensors: list[Tensor]) -> Hashable:
    """Return the structure of a value, with the shapes of its tensors, which are appended to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return (Tensor, value.shape, value.stride(), value.dtype, value.device)
    if dataclasses.is_dataclass(value):
        return (type(value), *(_key(getattr(value, field.name), tensors) for field in dataclasses.fields(value)))
    if isinstance(value, Mapping):
        return (dict, *((name, _key(one, tensors)) for name, one in value.items()))
    if isinstance(value, list | tuple):
        return (type(value), *(_key(one, tensors) for one in value))
    hash(value)  # raises TypeError for anything that cannot be compared
    return (type(value), value)


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a value with other tensors, in the order of :func:`_key`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: _replaced(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **own)
    if isinstance(value, Mapping):
        return {name: _replaced(one, tensors) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(one, tensors) for one in value)
    return value
