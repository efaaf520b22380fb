"""Components of diffusers pipeline folders, loaded without running code that a file names.

A pipeline folder has a folder for each component, with a JSON configuration and, for a network, its weights, and the
file ``model_index.json`` with the classes of the components; the oldest pipelines have all files in one folder. This
module is used instead of ``from_pretrained`` so that no class is imported and no code is run because a file names it,
weights not written by ``save_pretrained`` are read as well, and every error is reported in one line.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import diffusers.schedulers
import torch
from accelerate import init_empty_weights
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from robustdiff.errors import InputError, first_line
from robustdiff.weights import check_weights, read_state, strip_prefixes

__all__ = [
    "Components",
    "Place",
    "check_depth",
    "check_forward",
    "class_parameters",
    "component",
    "load_network",
    "load_scheduler",
    "quietly",
    "read_config",
    "read_index",
    "shown",
]

Components = Mapping[str, tuple[str, str]]
"""The components of a pipeline by name: (library, class)."""

Place = Callable[[nn.Module, str, Tensor], None]
"""A function that places a weight, in float32 on the CPU, into a network on the meta device by its name."""

_Network = TypeVar("_Network", bound=nn.Module)

# What each check has accepted: a study loads a network for each of its cells, and a trial call takes half of the time.
_ACCEPTED: WeakKeyDictionary[Callable[..., None], set[tuple[type, str]]] = WeakKeyDictionary()

# Fields of a configuration that are not arguments of its class: fields that diffusers' EMAModel saves with a network,
# and the name of an array library in schedulers of the first releases.
_OF_EMA = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
_OF_OLD = {"tensor_format"}
# The version that saved a network. By it diffusers' pipelines set the size of old Stable Diffusions to 512 pixels.
_OF_SAVING = {"_diffusers_version"}

_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?"  # variant, kind, index
)

# Names in attention blocks up to diffusers 0.16.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_JSON_BYTES = 2**24
_LARGEST_T = 10**5
_LARGEST_INTEGER = 10**6


def component(folder: Path, name: str) -> Path:
    """Return the folder of a component: the pipeline folder itself in the oldest pipelines, which hold its files."""
    file = "scheduler_config.json" if name == "scheduler" else "config.json"
    return folder if (folder / file).is_file() and not (folder / name).is_dir() else folder / name


def read_index(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the components listed in the ``model_index.json`` of a pipeline folder.

    Raises:
        InputError: If the file is missing or malformed, or the pipeline has custom code.
    """
    path = folder / "model_index.json"
    index = read_config(path)
    if not isinstance(index.get("_class_name", ""), str):
        raise InputError(f"{path}: the pipeline has code of its own, which is not run: give a pipeline of diffusers")
    components: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if name.startswith("_") or value is None or value == [None, None]:
            continue
        if isinstance(value, bool | dict):  # a setting of the pipeline
            components[name] = (path.name, shown(value))
            continue
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)):
            raise InputError(f"{path}: {name} is {shown(value)}, not a library and a class: save the pipeline again")
        components[name] = (value[0], value[1])
    return components


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: The file is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing'}: save the model again")
    if path.stat().st_size > _JSON_BYTES:
        raise InputError(f"{path} has more than {_JSON_BYTES >> 20} MiB, too much for a configuration: save it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = first_line(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(f"{path} is not JSON ({reason}): download it or save the model again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {shown(value)}, not a JSON object: download it or save the model again")
    return value


def shown(value: Any) -> str:
    """Return a value from a file as JSON, truncated for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"


def load_scheduler(folder: Path, components: Components) -> Any:
    """Return the scheduler of a pipeline folder.

    Raises:
        InputError: If the scheduler is missing, is not a scheduler of diffusers, or its configuration is malformed.
    """
    index = folder / "model_index.json"
    if "scheduler" not in components:
        raise InputError(f"{index} names no scheduler: save the pipeline with the one that it was trained with")
    library, name = components["scheduler"]
    # Only names that diffusers exports are imported.
    known = library == "diffusers" and name.endswith("Scheduler") and name in dir(diffusers.schedulers)
    kind = getattr(diffusers.schedulers, name) if known else None
    if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
        raise InputError(
            f"{index}: scheduler is {name} of {library}, which is no scheduler of the installed diffusers: save the "
            "pipeline with one of diffusers' schedulers, or update diffusers"
        )
    return _scheduler(component(folder, "scheduler") / "scheduler_config.json", kind)


def _scheduler(path: Path, kind: type[SchedulerMixin]) -> Any:
    defaults = class_parameters(kind)
    # A null is ignored if the default of the class is not None.
    config = {
        name: value
        for name, value in read_config(path).items()
        if name not in _OF_OLD and (value is not None or defaults.get(name) is None)
    }
    T = config.get("num_train_timesteps")
    if T is not None and not (type(T) is int and 1 <= T <= _LARGEST_T):
        raise InputError(f"{path}: num_train_timesteps={shown(T)} is not a number of times from 1 to {_LARGEST_T}")
    for name, default in defaults.items():
        if isinstance(default, int | float) and isinstance(config.get(name), list):
            raise InputError(f"{path}: {name}={shown(config[name])} is a list, where {kind.__name__} has {default!r}")
    betas = config.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, list)
        and 1 <= len(betas) <= _LARGEST_T
        and all(type(beta) in (int, float) and 0 <= beta <= 1 for beta in betas)
    ):
        raise InputError(f"{path}: trained_betas={shown(betas)} is not a list of 1 to {_LARGEST_T} numbers in [0, 1]")
    scheduler = _from_config(kind, config, path, defaults)
    # A configuration also has the fields of schedulers from which it was converted.
    others = [kind, DDPMScheduler, *getattr(scheduler, "compatibles", []), *DDPMScheduler().compatibles]
    _check_names(config, {name for other in others for name in class_parameters(other)}, path, kind)
    return scheduler


def check_depth(layers: int, tensors: int, what: str, path: Path) -> None:
    """Check that a configuration has no more layers than its weights can be of, before the layers are created.

    Args:
        layers: The least number of tensors in the weights of that many layers.
        tensors: The number of tensors in the weights.
        what: The settings, for messages.
        path: The file of the configuration, for messages.

    Raises:
        InputError: If there are more.
    """
    if layers > tensors:
        raise InputError(
            f"{path}: {what} do not fit the weights beside it, of {tensors} tensors: give the two that belong together"
        )


def check_forward(
    call: Callable[[Tensor, Tensor], Any],
    shape: tuple[int, ...],
    path: Path,
    *,
    doubled: bool = False,
    remedy: str = "correct it",
) -> None:
    """Call a network on the meta device, which computes shapes only, and check the shape of its output.

    Args:
        call: A function of a point (1, *shape) and a time (1,) that calls the network and returns diffusers' output.
        shape: The shape of a point, without the batch.
        path: The file of the network's configuration, for messages.
        doubled: Whether the output may have twice the channels of the point, for a learned variance.
        remedy: The remedy in the message.

    Raises:
        InputError: If the call fails, or the output has another shape.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            x = torch.empty(1, *shape)
            output = tuple(call(x, torch.zeros(1)).sample.shape[1:])
        if output != shape and not (doubled and output == (2 * shape[0], *shape[1:])):
            raise ValueError(f"its output has the shape {output}")
        if not x.numel():
            raise ValueError("it has no channels")
    except Exception as error:  # the network can be created from the configuration, but not called
        given, reason = "×".join(map(str, shape)), first_line(error)
        raise InputError(f"{path}: the network cannot be called with {given} ({reason}): {remedy}") from None


def load_network(
    folder: Path,
    kind: type[_Network],
    *,
    parameters: Mapping[str, Any] | None = None,
    prepare: Callable[[dict[str, Any], int, Path], None] = lambda config, tensors, path: None,
    check: Callable[[_Network, Path], None] = lambda network, path: None,
    adapt: Callable[[dict[str, Tensor], Path], dict[str, Tensor]] = lambda state, source: state,
    aliases: Collection[str] = (),
    place: Place | None = None,
) -> _Network:
    """Load a network of diffusers from a folder with ``config.json`` and weights, in float32 and eval mode, on the CPU.

    Weights are read from safetensors, or else from tensors in ``.bin``, in one file or in shards. A variant such as
    ``fp16`` is read only if there are no other weights. The network is first created on the meta device, and loads the
    weights if their names and shapes match.

    Args:
        kind: The class of the network.
        parameters: The arguments of the class by name, with their defaults; by default those of ``kind``.
        prepare: A function of the configuration, the number of tensors in the weights and the path of the
            configuration. It may change the configuration, or raise InputError before memory is allocated.
        check: A function of the network on the meta device and the path of the configuration. It may raise InputError.
            It is not called again for a class and a configuration that it has accepted in this process.
        adapt: A function of the weights by name and their file, which returns the weights that the network is to have.
            It may raise InputError.
        aliases: The other names of the class in configurations.
        place: A function that places each weight in turn, in another type, so that the network is never in memory in
            float32. It gets them in the order of the network's state.

    Raises:
        InputError: If a file is missing or malformed, the weights do not fit the network, or a weight is not finite.
    """
    path = folder / "config.json"
    config = {name: value for name, value in read_config(path).items() if name not in _OF_EMA | _OF_SAVING}
    if config.get("_class_name", kind.__name__) not in (kind.__name__, *aliases):
        raise InputError(
            f"{path} describes a {shown(config['_class_name'])}, and model_index.json a {kind.__name__}: save the "
            "pipeline again"
        )
    parameters = class_parameters(kind) if parameters is None else parameters
    # The class of another name had more, which are off for networks of this kind.
    _check_names(config, set(parameters), path, kind, off=(None, False) if aliases else (None,))
    source, state = _read_weights(folder)
    prepare(config, len(state), path)
    with torch.device("meta"):
        network: _Network = _from_config(kind, config, path, parameters)
    accepted, described = _ACCEPTED.setdefault(check, set()), (kind, json.dumps(config, sort_keys=True))
    if described not in accepted:
        check(network, path)
        accepted.add(described)
    expected = {name: value.shape for name, value in network.state_dict().items()}
    state = {_new_name(name, expected): v for name, v in strip_prefixes(state, source).items()}
    state = adapt(state, source)
    _check_fit(state, expected, source, path)
    if place is None:
        network.load_state_dict(check_weights(state, source, torch.float32), assign=True)
    else:
        for name in expected:
            place(network, name, check_weights({name: state.pop(name)}, source, torch.float32)[name])
    unsaved = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if unsaved:  # buffers that the constructor computes, such as positions
        with init_empty_weights(include_buffers=False):
            buffers = dict(_from_config(kind, config, path, parameters).named_buffers())
        for name in unsaved:
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, buffers[name].to(torch.float32))
    return network.eval()


def class_parameters(kind: type) -> dict[str, Any]:
    """Return the arguments of a class by name, with their defaults."""
    arguments = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return {p.name: p.default for p in arguments if p.name != "self" and p.kind is not p.VAR_KEYWORD}


def _check_names(
    config: Mapping[str, Any], known: set[str], path: Path, kind: type, off: Collection[Any] = (None,)
) -> None:
    for name, value in config.items():
        if name not in known and not name.startswith("_") and not any(value is one for one in off):
            raise InputError(
                f"{path}: {kind.__name__} of the installed diffusers has no {name} (={shown(value)}): update "
                "diffusers, or remove the field if the model was trained without it"
            )


def _from_config(kind: Any, config: Mapping[str, Any], path: Path, defaults: Mapping[str, Any]) -> Any:
    """Return an instance of a diffusers class from an untrusted configuration."""
    for name, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and abs(number) > _LARGEST_INTEGER:
                raise InputError(f"{path}: {name}={shown(value)} is beyond {_LARGEST_INTEGER}: correct it")
    for name, default in defaults.items():
        if not _like(config.get(name), default):
            raise InputError(
                f"{path}: {name}={shown(config[name])} is not of the type of {kind.__name__}'s default, {default!r}"
            )
    with quietly():
        try:
            # diffusers would import the class named in the configuration.
            return kind.from_config({**config, "_class_name": kind.__name__})
        except Exception as error:  # the classes check few of their arguments, and may raise any error
            raise InputError(f"{path} does not describe a {kind.__name__}: {first_line(error)}") from None


def _like(value: Any, default: Any) -> bool:
    """Return whether a JSON value has the type of a default; without a default, the class itself checks the value."""
    if value is None or value == default:
        return True
    match default:
        case bool():
            return isinstance(value, bool)
        case int() | float():
            numbers = value if isinstance(value, list) else [value]  # one for all levels, or one for each
            return all(type(v) is int or (type(v) is float and math.isfinite(v)) for v in numbers)
        case str():
            return isinstance(value, str)
        case tuple() | list():
            kind = type(default[0]) if default else int  # an empty default is a list of layers
            return isinstance(value, list) and all(type(v) is kind for v in value) and (len(value) > 0 or not default)
    return True


@contextmanager
def quietly() -> Iterator[None]:
    """Silence warnings and progress bars of diffusers and transformers, and warnings of torch, within a block.

    The warnings repeat an error, recommend other configurations, or miss packages that are not needed.
    """
    libraries: list[Any] = [diffusers_logging]
    if "transformers" in sys.modules:  # it is an extra, and imported by diffusers itself if it is installed
        libraries.append(import_module("transformers.utils.logging"))
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, verbosity, bar in before:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def _new_name(name: str, expected: Mapping[str, Any]) -> str:
    """Return the current name of a tensor that diffusers has renamed."""
    if name in expected:
        return name
    *block, layer, kind = name.split(".") if name.count(".") else ("", name)
    renamed = ".".join([*block, _OLD_NAMES.get(layer, layer), kind])
    return renamed if renamed in expected else name


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path, path: Path) -> None:
    """Check that weights have the names and shapes of a network's parameters and buffers."""
    missing = [name for name in expected if name not in state]
    more = [name for name in state if name not in expected]
    if missing or more:
        parts = [f"lacks {len(missing)} of its {len(expected)} tensors ({missing[0]} first)"] if missing else []
        parts += [f"has {len(more)} that it has not ({more[0]} first)"] if more else []
        raise InputError(f"{source} is not of the network in {path}: it {' and '.join(parts)}; save the model again")
    wrong = [name for name, shape in expected.items() if state[name].shape != shape]
    if wrong:
        raise InputError(
            f"{source} is not of the network in {path}: {wrong[0]} is {tuple(state[wrong[0]].shape)} where it has "
            f"{tuple(expected[wrong[0]])}, as are {len(wrong) - 1} others; give the two that belong together"
        )


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file of a network's weights, or the index of its shards, and the tensors by name."""
    found: dict[str, list[tuple[bool, bool, str]]] = {}  # by variant: (not safetensors, in shards, name)
    for name in sorted(entry.name for entry in folder.iterdir()):
        if match := _WEIGHTS.fullmatch(name):
            variant = match[1] or match[4] or ""
            found.setdefault(variant, []).append((match[2] == "bin", match[3] is not None, name))
    if not found:
        raise InputError(
            f"{folder} has no weights: it lacks diffusion_pytorch_model.safetensors (or .bin, or the .index.json of "
            "shards); download the model again, or save it by save_pretrained"
        )
    if "" not in found and len(found) > 1:
        raise InputError(
            f"{folder} has the variants {', '.join(found)} of its weights and none without a name: rename one of "
            "them to diffusion_pytorch_model.safetensors"
        )
    _, sharded, name = min(found[""] if "" in found else next(iter(found.values())))
    path = folder / name
    return path, _read_shards(path) if sharded else read_state(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of a network by the index of its shards."""
    places = read_config(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{index} has no weight_map of names to files: download the model again")
    state: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        path = index.parent / file
        if Path(file).name != file or not path.resolve().is_relative_to(_root(index.parent)):
            raise InputError(f"{index} names {shown(file)}, which is outside its folder: download the model again")
        shard = read_state(path)
        named = {name for name, place in places.items() if place == file}
        if different := sorted(named ^ set(shard)):
            raise InputError(f"{path} and {index.name} differ about {different[0]}: download the model again")
        state |= shard
    return {name: state[name] for name in places}


def _root(folder: Path) -> Path:
    """Return the folder that links must not leave: the model's folder in the Hub's cache, or else the folder itself."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder
