r"""Low-rank adapters (LoRA) of a frozen network: W x ↦ W x + (α/r) B A x, for any family of networks.

A (r × inputs) is random and B (outputs × r) is zero at the start, so that training begins at the base model exactly
(Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022, arXiv 2106.09685). peft injects the layers. Only
A and B have gradients as parameters; the gradient of δ, the perturbation of the input, passes through the frozen W.

A model with an adapter is saved without its base, as a folder with

    pytorch_lora_weights.safetensors   A and B in float32, with α: the file that diffusers' load_lora_weights reads (of
                                       Stable Diffusion, latent consistency models and Flux; other pipelines have none)
    adapter.json                       the base model, by path and fingerprint, and the settings of the adapter
    scheduler/                         the scheduler, which defines the process that the adapter was trained for

kohya's format, which other programs read, has the same matrices as ``lora_down`` and ``lora_up`` with an ``alpha`` for
each layer, under names in which underscores replace the dots.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from robustdiff.errors import InputError, first_line, installing, printable
from robustdiff.files import atomic_write, read_record
from robustdiff.section import Fraction, Section, Text
from robustdiff.weights import check_weights, read_state

__all__ = [
    "RECORD",
    "WEIGHTS",
    "Adapter",
    "LoraSection",
    "adapter_of",
    "disabled",
    "inject",
    "merge",
    "read_adapter",
    "read_weights_into",
    "save_adapter",
    "save_kohya",
]

RECORD = "adapter.json"
"""The name of the file that describes an adapter."""

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name of the file with an adapter's weights, as diffusers names it."""

# The projections of attention in diffusers' networks, the last four for the tokens of the text in SD3 and Flux.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

_Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_NAME = "default"  # peft's name of the adapter within the network


class LoraSection(Section):
    """The section ``model.lora`` of a recipe: an adapter of a pretrained network, the only part that is trained."""

    rank: int = Field(4, ge=1, le=4096, description="the rank r of the updates of weights")
    alpha: float | None = Field(
        None, gt=0, le=1e6, description="the update of a weight is scaled by alpha/rank; by default alpha is the rank"
    )
    targets: tuple[Text, ...] | None = Field(
        None,
        max_length=1024,
        description="layers with an adapter, by the ends of their names; by default the projections of attention",
    )
    dropout: Fraction = Field(0.0, description="dropout of the adapter's input in training")

    @model_validator(mode="before")
    @classmethod
    def _has_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict | LoraSection):
            raise ValueError("give its fields, such as model.lora.rank=16")
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _is_a_list(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, list | tuple) and value):
            raise ValueError("give a list of names, such as [to_q, to_v], or leave it out")
        return value

    @property
    def scaled(self) -> float:
        """The value of α."""
        return float(self.rank) if self.alpha is None else self.alpha


class Adapter(BaseModel):
    """The description of an adapter, stored as ``adapter.json``.

    Attributes:
        base: The path of the base model, or the name of a shipped one.
        fingerprint: The sha256 of the base model's weights in float32.
        lora: The settings, with the names of the targets.
        scheduler: The class of the scheduler.
        size: The (height, width) of the network's input; None if the network does not fix it.
        classes: The number of classes, without the null class; None if the condition is not a class.
        guidance: The scale of guidance of the training; None if the network takes none.
        guidance_range: The scales of guidance of the training, if the network embeds them; None if it does not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Text
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    lora: LoraSection
    scheduler: Text
    size: tuple[int, int] | None = None
    classes: int | None = Field(None, ge=1, le=10**6)
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)
    guidance_range: tuple[_Scale, _Scale] | None = None


# -- networks with an adapter ---------------------------------------------------------------------------------


def inject(network: nn.Module, lora: LoraSection, path: str, seed: int | None = None) -> LoraSection:
    """Freeze a network in place and add an adapter to it.

    Args:
        network: A network on the CPU, with weights in any type. The adapter's are in float32, since updates of the size
            of a learning rate would be rounded away in bfloat16.
        lora: The settings.
        path: The name of the model in messages.
        seed: The seed of the matrices A, which depend on nothing else; None leaves A and B without memory, on the meta
            device, for weights to be loaded into.

    Returns:
        The settings with the names of the targets.

    Raises:
        InputError: If peft is not installed, a target is no layer of the network, or a layer takes no adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:  # also that of a peft which is too old for the installed transformers
        raise InputError(f"a LoRA needs peft: {installing('lora')}; {first_line(error)[:200]}") from None
    targets = _targets(network, lora.targets, path)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.scaled, lora_dropout=lora.dropout, target_modules=list(targets), bias="none"
    )
    network.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, network, adapter_name=_NAME, low_cpu_mem_usage=seed is None)
    except ValueError as error:  # such as a convolution in groups that the rank does not divide into
        raise InputError(f"model.lora does not suit the model {path}: {first_line(error)}") from None
    for parameter in adapter_of(dict(network.named_parameters())).values():
        parameter.data = parameter.data.float()  # peft makes them in the type of the frozen weight
    return lora.model_copy(update={"targets": targets})


def _targets(network: nn.Module, given: tuple[str, ...] | None, path: str) -> tuple[str, ...]:
    """Return the ends of names of the layers to adapt."""
    modules = dict(network.named_modules())
    found = {
        end: [module for name, module in modules.items() if name == end or name.endswith(f".{end}")]
        for end in (_ATTENTION if given is None else given)
    }
    layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
    ends = (name.split(".")[-2:] if name.rpartition(".")[2].isdigit() else name.split(".")[-1:] for name in layers)
    named = ", ".join(dict.fromkeys(".".join(end) for end in ends))
    if given is None:
        there = tuple(end for end, matches in found.items() if matches)
        if not there:
            raise InputError(
                f"the model {path} has no projections of attention: give model.lora.targets, out of {named}"
            )
        return there
    for end, matches in found.items():
        if not matches:
            raise InputError(
                f"model.lora.targets: the model {path} has no module {printable(end)}: take out of {named}"
            )
        for module in matches:
            if not isinstance(module, nn.Linear | nn.Conv2d):
                raise InputError(
                    f"model.lora.targets: {printable(end)} of the model {path} is a {type(module).__name__}, and a "
                    f"LoRA is of linear layers and two-dimensional convolutions: take out of {named}"
                )
    return given


def adapter_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the adapter in the state of a network, by their names in the network."""
    return {name: value for name, value in state.items() if f".{_NAME}." in name and ".lora_" in name}


def _layers(network: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Turn the adapter of a network off within the block, so that the network is its base."""
    layers = _layers(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for layer in layers.values():
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)
        network.requires_grad_(False)  # peft lets the gradients of an adapter return that was frozen before
        for parameter in trained:
            parameter.requires_grad_(True)


def merge(network: Any) -> None:
    """Add the adapter to the weights of a network, in place, which becomes a network without an adapter.

    The parameters that are trained in a new network of its configuration have gradients again.
    """
    for name, layer in _layers(network).items():
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())
    del network.peft_config
    with torch.device("meta"):
        whole = type(network).from_config(network.config)
    trained = {name: parameter.requires_grad for name, parameter in whole.named_parameters()}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained[name])


# -- files ----------------------------------------------------------------------------------------------------


def _stored(name: str) -> str:
    return name.replace(f".{_NAME}.", ".")


def save_adapter(folder: Path, adapter: Adapter, part: str, state: Mapping[str, Tensor]) -> None:
    """Write ``adapter.json`` and the weights of an adapter into a folder.

    Args:
        part: The name of the network in a pipeline folder.
        state: The tensors of the adapter, by their names in the network.
    """
    # What peft.LoraConfig takes in all versions, by which diffusers creates the adapter.
    config = {
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.scaled,
        "lora_dropout": adapter.lora.dropout,
        "target_modules": list(adapter.lora.targets or ()),
        "bias": "none",
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"{part}.{k}": v for k, v in config.items()})}
    tensors = {f"{part}.{_stored(name)}": value.to("cpu", torch.float32) for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, metadata)
    (folder / RECORD).write_text(adapter.model_dump_json(indent=1), encoding="utf-8")


def read_adapter(folder: Path) -> Adapter:
    """Return the description of an adapter.

    Raises:
        InputError: If ``adapter.json`` is malformed.
        OSError: If it cannot be read.
    """
    return read_record(folder / RECORD, Adapter, "restore it", 2**20)


def read_weights_into(network: nn.Module, part: str, path: Path) -> None:
    """Load the weights of an adapter into a network in which :func:`inject` left it without memory.

    Args:
        part: The name of the network in a pipeline folder.
        path: The file.

    Raises:
        InputError: If the file cannot be read, or does not hold the weights of this adapter.
    """
    state = read_state(path)
    places = {f"{part}.{_stored(name)}": (name, value) for name, value in adapter_of(network.state_dict()).items()}
    if different := sorted(state.keys() ^ places.keys()):
        what = "lacks" if different[0] in places else "has besides"
        raise InputError(f"{path} is not of the adapter in {RECORD}: it {what} {printable(different[0])}; restore both")
    for name, (_, wanted) in places.items():
        if state[name].shape != wanted.shape:
            raise InputError(
                f"{path} is not of the adapter in {RECORD}: {printable(name)} has the shape "
                f"{tuple(state[name].shape)} instead of {tuple(wanted.shape)}; restore both"
            )
    values = {places[name][0]: value for name, value in check_weights(state, path, torch.float32).items()}
    network.load_state_dict(values, strict=False, assign=True)


def save_kohya(path: Path, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Write the adapter of a UNet as one file in kohya's format, atomically.

    Args:
        state: The tensors of the adapter, by their names in the network.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, matrix = _stored(name).partition(".lora_")
        layer = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{layer}.lora_{'down' if matrix.startswith('A') else 'up'}.weight"] = value.to("cpu").contiguous()
        tensors[f"{layer}.alpha"] = torch.tensor(adapter.lora.scaled)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(adapter.lora.rank)}
    metadata |= {"format": "pt", "ss_network_alpha": str(adapter.lora.scaled)}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata))
