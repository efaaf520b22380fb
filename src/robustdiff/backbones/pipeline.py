"""Diffusers pipeline folders, read and written.

A folder is ``unet/`` and ``scheduler/``, each a JSON configuration and for the network its weights, with
``model_index.json`` beside them, which says the classes; the oldest ones have all files in one folder. It is read here
and not by ``DiffusionPipeline.from_pretrained``, so that no class is imported and no code run because a file names it,
so that weights saved in other ways than ``save_pretrained``'s are read as well, and so that all that does not fit is
one line that says why.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers.schedulers
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMPipeline, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from robustdiff.backbones.adm import AdmUNet2DModel
from robustdiff.errors import InputError
from robustdiff.weights import check_weights, read_state, strip_prefixes

__all__ = ["PRETRAINED", "downsampling", "load_pipeline", "save_pipeline", "size_of"]

PRETRAINED = files("robustdiff.backbones") / "pretrained"
"""Where the models shipped with the package are."""

_UNETS: dict[tuple[str, str], type[UNet2DModel]] = {
    ("diffusers", "UNet2DModel"): UNet2DModel,
    (AdmUNet2DModel.__module__, "AdmUNet2DModel"): AdmUNet2DModel,
    ("robustdiff.models.adm", "AdmUNet2DModel"): AdmUNet2DModel,  # where it was before
}

_SUPPORTED = "only pipelines of a pixel-space UNet2DModel and a scheduler are supported"

# Components of other pipelines, by a part of their name, and what they mean.
_OTHERS = {
    "text_encoder": "the model is conditioned on text",
    "vqvae": "the model works on a VQ-VAE's latents, not on pixels",
    "vae": "the model works on a VAE's latents, not on pixels",
    "image_encoder": "the model is conditioned on images",
    "transformer": "the model is a transformer",
}

# Fields that are in a configuration without being its class's: of the moving average that diffusers' EMAModel saves
# with a UNet, and of schedulers of its first releases, where they only named an array library.
_OF_EMA = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
_OF_OLD = {"tensor_format"}

# Up to diffusers 0.16, in attention blocks.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?"  # variant, kind, index
)

_JSON_BYTES = 2**24
_LARGEST_SIZE = 2**14
_LARGEST_T = 10**5
_LARGEST_INTEGER = 10**6


def load_pipeline(path: str | Path, size: int | None = None) -> tuple[UNet2DModel, Any]:
    """Load the network and the scheduler of a run, of a pipeline folder, or of a model shipped with the package.

    Weights are read from safetensors, or else from ``.bin``, tensors only; whole or in shards; or from a variant such
    as ``fp16`` where there are no others. They are loaded in float32 whatever their type, because training needs it.

    Arguments:
        path: The run, the folder, or the name of the shipped model.
        size: The side of the images in pixels, for a network whose configuration does not say it. Such networks are
            convolutional, so that another size than the configuration's can be asked for, if the network can halve it
            as often as it does.

    Returns:
        The network in eval mode, on the CPU, and the scheduler. Without a size, the network's ``config.sample_size`` is
        None where the folder does not say it.

    Raises:
        InputError: If there is none, or it cannot be read, or it is not an unconditional or class-conditional UNet on
            pixels, or its weights do not fit it, or are not finite.
    """
    folder = _pipeline_folder(path)
    unet, scheduler = _classes(folder)
    return (
        _load_unet(_component(folder, "unet"), unet, size),
        _load_scheduler(_component(folder, "scheduler") / "scheduler_config.json", scheduler),
    )


def save_pipeline(folder: Path, unet: UNet2DModel, scheduler: Any) -> None:
    """Write a pipeline folder; the caller sees to it that it appears whole.

    Parameters may be in any memory format, such as ``torch.channels_last``; they are written in their shapes' order.
    """
    with torch.device("meta"):
        contiguous = type(unet).from_config(unet.config)
    contiguous.load_state_dict({name: value.contiguous() for name, value in unet.state_dict().items()}, assign=True)
    kind = ConsistencyModelPipeline if isinstance(scheduler, CMStochasticIterativeScheduler) else DDPMPipeline
    kind(contiguous, scheduler).save_pretrained(folder, safe_serialization=True)


def size_of(unet: UNet2DModel) -> tuple[int, int] | None:
    """Return the (height, width) of a network's images, if its configuration says it."""
    size = unet.config.sample_size
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def downsampling(unet: UNet2DModel) -> int:
    """Return what the sides of a network's images are multiples of, 2 to the number of its downsamplings."""
    return 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in unet.down_blocks)


def _pipeline_folder(path: str | Path) -> Path:
    """Return a run, a pipeline folder, or the name of a shipped model, as a folder with ``model_index.json``."""
    given = Path(path)
    for candidate in (given, given / "model", Path(str(PRETRAINED / str(path)))):
        if (candidate / "model_index.json").is_file():
            return candidate
    shipped = ", ".join(sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())) if PRETRAINED.is_dir() else "none"
    if (given / "recipe.yaml").is_file():
        raise InputError(f"{path} is a run that is not finished: go on with it by robustdiff train … --resume")
    if given.is_file():
        raise InputError(
            f"{path} is a file: give a run or a folder with model_index.json (robustdiff convert makes one of a "
            "guided-diffusion checkpoint)"
        )
    for network in (given / "unet_ema", given / "unet", given):
        if (network / "config.json").is_file():
            raise InputError(
                f"{path} has a network but no model_index.json and no scheduler, which says the noise that it was "
                f"trained with; make a pipeline of it by DDPMPipeline(UNet2DModel.from_pretrained('{network}'), "
                "DDPMScheduler(…)).save_pretrained('FOLDER')"
            )
    hint = ""
    if not given.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        hint = f"; if this is a model of the Hugging Face Hub, download it first: hf download {path} --local-dir FOLDER"
    raise InputError(
        f"no model at {path}: give a run, a folder with model_index.json, or a shipped model ({shipped}){hint}"
    )


def _component(folder: Path, name: str) -> Path:
    """Return where a component is; diffusers' first pipelines have all in one folder."""
    return folder / name if (folder / name).is_dir() else folder


def _classes(folder: Path) -> tuple[type[UNet2DModel], type[SchedulerMixin]]:
    """Return the classes that ``model_index.json`` names, if they are among those that are known here."""
    path = folder / "model_index.json"
    index = _read_json(path)
    if not isinstance(index.get("_class_name", ""), str):
        raise InputError(f"{path}: the pipeline has code of its own, which is not run; {_SUPPORTED}")
    components: dict[str, tuple[Any, Any]] = {}
    for name, value in index.items():
        if name.startswith("_") or value is None or value == [None, None]:
            continue
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)):
            raise InputError(f"{path}: {name} is {_shown(value)}, not a library and a class; {_SUPPORTED}")
        components[name] = (value[0], value[1])
    for part, reason in _OTHERS.items():
        for name, (library, kind) in components.items():
            if name.startswith(part):
                raise InputError(f"{path}: {name} is {kind} of {library}: {reason}; {_SUPPORTED}")
    for name in ("unet", "scheduler"):
        if name not in components:
            raise InputError(f"{path} names no {name}; {_SUPPORTED}")
    library, kind = components["unet"]
    if (library, kind) not in _UNETS:
        raise InputError(f"{path}: unet is {kind} of {library}, not UNet2DModel of diffusers; {_SUPPORTED}")
    unet = _UNETS[library, kind]
    library, kind = components["scheduler"]
    # The name is looked up among those that diffusers exports before anything is imported by it.
    known = library == "diffusers" and kind.endswith("Scheduler") and kind in dir(diffusers.schedulers)
    scheduler = getattr(diffusers.schedulers, kind) if known else None
    if not (inspect.isclass(scheduler) and issubclass(scheduler, SchedulerMixin)):
        raise InputError(
            f"{path}: scheduler is {kind} of {library}, which is no scheduler of the installed diffusers: save the "
            "pipeline with one of diffusers' schedulers, or update diffusers"
        )
    for name, (library, kind) in components.items():
        if name not in ("unet", "scheduler"):
            raise InputError(f"{path}: {name} is {kind} of {library}, which is not supported; {_SUPPORTED}")
    return unet, scheduler


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: It is missing, or too large, or not one.
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
        reason = str(error).splitlines()[0] if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(f"{path} is not JSON ({reason}): download it or save the model again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {_shown(value)}, not a JSON object: download it or save the model again")
    return value


def _shown(value: Any) -> str:
    """Return a value from a file as JSON, cut to what fits in a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _load_scheduler(path: Path, kind: type[SchedulerMixin]) -> Any:
    defaults = _parameters(kind)
    # A null where the class has a default of another kind says nothing.
    config = {
        name: value
        for name, value in _read_json(path).items()
        if name not in _OF_OLD and (value is not None or defaults.get(name) is None)
    }
    T = config.get("num_train_timesteps")
    if T is not None and not (type(T) is int and 1 <= T <= _LARGEST_T):
        raise InputError(f"{path}: num_train_timesteps={_shown(T)} is not a number of times from 1 to {_LARGEST_T}")
    for name, default in defaults.items():
        if isinstance(default, int | float) and isinstance(config.get(name), list):
            raise InputError(f"{path}: {name}={_shown(config[name])} is a list, where {kind.__name__} has {default!r}")
    betas = config.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, list)
        and 1 <= len(betas) <= _LARGEST_T
        and all(type(beta) in (int, float) and 0 <= beta <= 1 for beta in betas)
    ):
        raise InputError(f"{path}: trained_betas={_shown(betas)} is not a list of 1 to {_LARGEST_T} numbers in [0, 1]")
    scheduler = _from_config(kind, config, path, defaults)
    # A configuration also keeps what schedulers that it was converted from had.
    others = [kind, DDPMScheduler, *getattr(scheduler, "compatibles", []), *DDPMScheduler().compatibles]
    _check_names(config, {name for other in others for name in _parameters(other)}, path, kind)
    return scheduler


def _load_unet(folder: Path, kind: type[UNet2DModel], size: int | None) -> UNet2DModel:
    """Return the network of a folder with ``config.json`` and weights.

    It is made without memory first, and gets the weights if their shapes are those that it has.
    """
    path = folder / "config.json"
    config = {name: value for name, value in _read_json(path).items() if name not in _OF_EMA}
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise InputError(f"{path} describes a {_shown(config['_class_name'])}, not a {kind.__name__}; {_SUPPORTED}")
    parameters = {**_parameters(UNet2DModel), **_parameters(kind)}
    _check_names(config, set(parameters), path, kind)
    config["sample_size"] = _checked_size(config.get("sample_size"), size, path)
    source, state = _read_unet_weights(folder)
    blocks = config.get("down_block_types")
    levels, layers = len(blocks) if isinstance(blocks, list) else 0, config.get("layers_per_block", 0)
    if isinstance(layers, int) and max(levels, 1) * max(layers, 1) > len(state):  # before so many layers are made
        raise InputError(
            f"{path}: {levels} levels of layers_per_block={_shown(layers)} do not fit {source}, of {len(state)} "
            "tensors: give the two that belong together"
        )
    with torch.device("meta"):
        unet: UNet2DModel = _from_config(kind, config, path, parameters)
    _check_conditioning(unet, path)
    expected = {name: value.shape for name, value in unet.state_dict().items()}
    state = {_new_name(name, expected): value for name, value in strip_prefixes(state, source).items()}
    _check_fit(state, expected, source, path)
    _check_forward(unet, path)
    unet.load_state_dict(check_weights(state, source, torch.float32), assign=True)
    if unsaved := [name for name, buffer in unet.named_buffers() if buffer.is_meta]:
        raise InputError(f"{path}: the block of {unsaved[0]} is not supported: use those of UNet2DModel's defaults")
    return unet.eval()


def _parameters(kind: type) -> dict[str, Any]:
    """Return the arguments of a class by name, with their defaults."""
    arguments = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return {p.name: p.default for p in arguments if p.name != "self" and p.kind is not p.VAR_KEYWORD}


def _check_names(config: Mapping[str, Any], known: set[str], path: Path, kind: type) -> None:
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value is not None:
            raise InputError(
                f"{path}: {kind.__name__} of the installed diffusers has no {name} (={_shown(value)}): update "
                "diffusers, or remove the field if the model was trained without it"
            )


def _from_config(kind: Any, config: Mapping[str, Any], path: Path, defaults: Mapping[str, Any]) -> Any:
    """Return an instance of a class of diffusers' from a configuration of unknown origin."""
    for name, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and abs(number) > _LARGEST_INTEGER:
                raise InputError(f"{path}: {name}={_shown(value)} is beyond {_LARGEST_INTEGER}: correct it")
    for name, default in defaults.items():
        if not _like(config.get(name), default):
            raise InputError(
                f"{path}: {name}={_shown(config[name])} is not of the type of {kind.__name__}'s default, {default!r}"
            )
    with _quietly():
        try:
            # diffusers imports the class that is named there.
            return kind.from_config({**config, "_class_name": kind.__name__})
        except Exception as error:  # the classes check few of their arguments: what they raise is anything
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise InputError(f"{path} does not describe a {kind.__name__}: {reason}") from None


def _like(value: Any, default: Any) -> bool:
    """Return whether a value of JSON is of the kind of a default; None and what has no default is for the class."""
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
            return isinstance(value, list) and all(type(v) is type(default[0]) for v in value) and len(value) > 0
    return True


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence diffusers and torch, where they warn of what is raised as well, or recommend other configurations."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def _checked_size(own: Any, size: int | None, path: Path) -> Any:
    """Return the ``sample_size`` of a network: what is asked for, or else what its configuration says."""
    if size is not None:
        own = size
    sides = own if isinstance(own, list) else [own, own]
    if own is not None and not (len(sides) == 2 and all(type(s) is int and 1 <= s <= _LARGEST_SIZE for s in sides)):
        where = f"{path}: sample_size={_shown(own)}" if size is None else f"size {size}"
        raise InputError(f"{where} is no size of images: give one from 1 to {_LARGEST_SIZE} pixels")
    return tuple(own) if isinstance(own, list) else own


def _check_conditioning(unet: UNet2DModel, path: Path) -> None:
    """Check that a network is called with noisy pixels, a time, and a class at most."""
    config = unet.config
    if config.class_embed_type is not None:
        raise InputError(
            f"{path}: class_embed_type={_shown(config.class_embed_type)} embeds what is not a class label, which is "
            "not supported: give an unconditional model, or one with num_class_embeds alone"
        )
    if config.in_channels < 1 or config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise InputError(
            f"{path}: {config.in_channels} channels in and {config.out_channels} out: the model takes more than noisy "
            "images (super-resolution, inpainting) or predicts other than noise or images, which is not supported"
        )


def _new_name(name: str, expected: Mapping[str, Any]) -> str:
    """Return today's name of a tensor that diffusers had under another."""
    if name in expected:
        return name
    *block, layer, kind = name.split(".") if name.count(".") else ("", name)
    renamed = ".".join([*block, _OLD_NAMES.get(layer, layer), kind])
    return renamed if renamed in expected else name


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path, path: Path) -> None:
    """Check that weights are those that a network has, by name and by shape."""
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


def _check_forward(unet: UNet2DModel, path: Path) -> None:
    """Check that a network without memory can be called at its size, by the shapes alone."""
    channels, multiple = unet.config.in_channels, downsampling(unet)
    height, width = size_of(unet) or (8 * multiple, 8 * multiple)
    labels = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            images = torch.empty(1, channels, height, width, device="meta")
            out = unet(images, torch.zeros(1, device="meta"), class_labels=labels).sample
        reason = None if out.shape[2:] == images.shape[2:] else f"the output is {out.shape[2]}×{out.shape[3]}"
    except Exception as error:  # a configuration that makes a network and not one that can be called
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    if reason is not None:
        remedy = f"the size must be a multiple of {multiple}" if height % multiple or width % multiple else "correct it"
        raise InputError(f"{path}: the network cannot take images of {height}×{width} ({reason}): {remedy}")


def _read_unet_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file with a network's weights, or the index of its shards, and the tensors by name."""
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
    """Return the tensors that the index of a model in several files names."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{index} has no weight_map of names to files: download the model again")
    state: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        path = index.parent / file
        if Path(file).name != file or not path.resolve().is_relative_to(_root(index.parent)):
            raise InputError(f"{index} names {_shown(file)}, which is outside its folder: download the model again")
        shard = read_state(path)
        named = {name for name, place in places.items() if place == file}
        if different := sorted(named ^ set(shard)):
            raise InputError(f"{path} and {index.name} differ about {different[0]}: download the model again")
        state |= shard
    return {name: state[name] for name in places}


def _root(folder: Path) -> Path:
    """Return what a folder's links may not lead out of; in the cache of the Hub that is all that it has of a model."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder
