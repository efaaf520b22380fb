"""Frozen weights in few bits: their values, the gradient of the input, what is loaded, and what is refused."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustdiff.backbones.frozen import FrozenWeights, Int8Linear
from robustdiff.backbones.lora import LoraSection, adapter_of
from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError

pytest.importorskip("peft")
pytest.importorskip("transformers")

# The sixteen values of NF4 (Dettmers et al., 2023, Appendix E).
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip

# Widths of whole blocks of 64 for nf4.
WIDE: dict[str, dict[str, Any]] = {
    "flux": {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
    "sd": {"block_out_channels": (64, 64), "attention_head_dim": 32},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, make_sd_pipeline: Any, make_flux_pipeline: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "flux": make_flux_pipeline(folder / "flux", **WIDE["flux"]),
        "sd": make_sd_pipeline(folder / "sd", **WIDE["sd"]),
    }


def quantizations(*others: str | None) -> Any:
    """The types, that of bitsandbytes where it is installed."""
    nf4 = pytest.param("nf4", marks=pytest.mark.skipif(not _installed(), reason="bitsandbytes is not installed"))
    return pytest.mark.parametrize("quantize", [*others, "int8", nf4])


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def nearest(weight: torch.Tensor, quantize: str | None) -> torch.Tensor:
    """A weight as it is after quantisation, computed by its definition."""
    if quantize == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    assert quantize == "nf4"
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (NF4[((blocks / scale)[..., None] - NF4).abs().argmin(-1)] * scale).reshape(weight.shape)


def layer(weight: torch.Tensor, quantize: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A linear layer with this weight and a bias, as it is loaded."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    frozen = FrozenWeights(dtype, quantize)
    frozen(network, "0.weight", weight)
    frozen(network, "0.bias", torch.linspace(-1, 1, len(weight)))
    return network


@quantizations()
def test_a_layer_computes_with_the_nearest_weights_and_so_does_its_gradient(quantize: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator)
    network, bias = layer(weight, quantize), torch.linspace(-1, 1, 48)
    held = (network(torch.eye(128)) - bias).T
    # The scales of nf4 are themselves rounded to 8 bits, to about 1 % of the largest.
    torch.testing.assert_close(held, nearest(weight, quantize), rtol=0, atol=1e-5 if quantize == "int8" else 0.03)
    x = torch.randn(2, 5, 128, generator=generator, requires_grad=True)
    y = network(x)
    torch.testing.assert_close(y, F.linear(x.detach(), held, bias), rtol=1e-5, atol=1e-4)
    direction = torch.randn(y.shape, generator=generator)
    (gradient,) = torch.autograd.grad((y * direction).sum(), x)
    torch.testing.assert_close(gradient, direction @ held, rtol=1e-5, atol=1e-4)
    assert (gradient - direction @ weight).abs().max() > 1e-2


@quantizations()
def test_a_pass_without_gradients_leaves_those_of_later_passes(quantize: str) -> None:
    network = layer(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), quantize)
    x = torch.randn(3, 64, requires_grad=True)
    (before,) = torch.autograd.grad(network(x).sum(), x)
    with torch.no_grad():
        first = network.eval()(x)
    assert torch.equal(first, network.train()(x))
    (after,) = torch.autograd.grad(network(x).sum(), x)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_makes_up_for_the_rounding_of_its_scales(dtype: torch.dtype) -> None:
    weight = torch.randn(32, 100, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    int8 = Int8Linear(weight, None, dtype)
    held = int8.weight.float() * int8.scale.float()
    assert int8.weight.dtype == torch.int8
    assert ((held - weight).abs() <= 0.51 * int8.scale.float()).all()
    assert int8(torch.randn(2, 100)).dtype == dtype


def test_checkpointing_keeps_integers_and_no_dequantised_weight() -> None:
    int8 = Int8Linear(torch.randn(8, 16), None, torch.float32)
    kept: list[torch.Tensor] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        int8(torch.randn(2, 16, requires_grad=True))
    assert {(value.dtype, tuple(value.shape)) for value in kept} == {(torch.int8, (8, 16)), (torch.float32, (8, 1))}


def call(model: Model, x: torch.Tensor) -> torch.Tensor:
    condition = model.condition.batch(None, ["a red shoe", "blue"], None)
    out = model(x, torch.tensor([0.25, 0.5]) * len(model.process), **condition)
    return out if isinstance(out, torch.Tensor) else out.sample


def dequantized(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a quantised network by the names of the whole one."""
    values = {}
    for name, module in network.named_modules():
        if isinstance(module, Int8Linear):
            values[f"{name}.weight"] = module.weight.float() * module.scale.float()
        elif type(module).__name__ == "Linear4bit":
            functional: Any = sys.modules["bitsandbytes"].functional
            weight: Any = module.weight
            values[f"{name}.weight"] = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return values


@quantizations()
@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_a_network_and_the_gradient_of_its_input_are_those_of_the_dequantised_weights(
    bases: dict[str, Path], kind: str, quantize: Any
) -> None:
    frozen = FrozenWeights(torch.float32, quantize)
    model, plain = load_model(bases[kind], frozen=frozen), load_model(bases[kind])
    assert frozen.fingerprint == plain.fingerprint()  # that of the files
    before = {name: value.clone() for name, value in plain.network.state_dict().items()}
    values = dequantized(model.network)
    assert len(values) > 10
    assert all((values[name] - before[name]).norm() < 0.2 * before[name].norm() for name in values)
    plain.network.load_state_dict(values, strict=False)
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out, wanted = call(model, x), call(plain, x)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    gradient, expected = (torch.autograd.grad(o.square().sum(), x)[0] for o in (out, wanted))
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-7)


@quantizations(None)
def test_a_base_is_loaded_as_it_is_held_and_its_adapter_in_float32(bases: dict[str, Path], quantize: Any) -> None:
    frozen = FrozenWeights(torch.bfloat16, quantize)
    model = load_model(bases["flux"], frozen=frozen)
    types = {"int8": torch.int8, "nf4": torch.uint8}
    for i, (name, parameter) in enumerate(model.network.named_parameters()):
        layer = model.network.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Linear) or (i == 0 and quantize is None):
            assert parameter.dtype == torch.float32, name
        elif quantize is None or name.endswith(".bias"):
            assert parameter.dtype == torch.bfloat16, name
        else:
            assert parameter.dtype in (types[quantize], torch.bfloat16), name  # widths that are no multiple of 64
    held = {parameter.dtype for parameter in model.network.parameters()}
    assert held == {torch.float32, torch.bfloat16} | ({types[quantize]} if quantize else set())
    model.add_lora(LoraSection(rank=2), 0, frozen.fingerprint)
    assert model.adapter is not None
    assert model.adapter.fingerprint == load_model(bases["flux"]).fingerprint()
    adapter = adapter_of(dict(model.network.named_parameters()))
    assert {parameter.dtype for parameter in adapter.values()} == {torch.float32}
    assert {name for name, p in model.network.named_parameters() if p.requires_grad} == adapter.keys()


def test_a_weight_in_float32_is_gone_when_the_next_one_is_read(bases: dict[str, Path]) -> None:
    read: list[Any] = []

    class Watched(FrozenWeights):
        def __call__(self, network: nn.Module, name: str, value: torch.Tensor) -> None:
            assert not [one for one in read if one() is not None]
            read.append(weakref.ref(value))
            super().__call__(network, name, value)

    load_model(bases["flux"], frozen=Watched(torch.bfloat16, "int8"))
    assert len(read) > 20


def test_a_network_without_layers_to_quantise_is_refused() -> None:
    frozen = FrozenWeights(torch.float32, "int8")
    frozen(nn.Sequential(nn.Conv2d(1, 1, 1, device="meta")), "0.weight", torch.ones(1, 1, 1, 1))
    with pytest.raises(InputError, match=r"model\.quantize: the model base has no linear layers, and others"):
        frozen.check("base")


def test_numbers_beyond_float16_are_refused() -> None:
    network, frozen = nn.Sequential(*(nn.Linear(2, 1, device="meta") for _ in range(2))), FrozenWeights(torch.float16)
    frozen(network, "0.weight", torch.tensor([[1e5, 0]]))  # the first, which is held in float32
    with pytest.raises(InputError, match=r"1\.weight has numbers beyond float16: choose the precision bf16"):
        frozen(network, "1.weight", torch.tensor([[1e5, 0]]))


def test_without_bitsandbytes_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"quantize=nf4 needs bitsandbytes: install the extra quantize"):
        FrozenWeights(torch.bfloat16, "nf4")
    FrozenWeights(torch.bfloat16, "int8")
