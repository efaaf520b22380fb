"""The 8-bit optimiser: resumed bit for bit, with bitsandbytes where it is installed and with a stand-in elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from robustdiff.errors import InputError
from robustdiff.training.checkpoint import _hash
from robustdiff.training.optimizer import build_optimizer
from robustdiff.training.run import train


class AdamW8bit(torch.optim.Optimizer):
    """A stand-in with the state of bitsandbytes: indices in shared tables, scales of blocks, a count as a number."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.tables = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256) ** 2

    def init_state(self, group, p, gindex, pindex):
        state = self.state[p]
        state["step"] = 0
        small = p.numel() < 4096
        for i, table in enumerate(self.tables, 1):
            state[f"state{i}"] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
            if not small:
                state[f"qmap{i}"] = table
                state[f"absmax{i}"] = torch.zeros(-(-p.numel() // 256))

    @torch.no_grad()
    def step(self, closure=None):
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(group, p, number, index)
                self.update(group, p, self.state[p])

    def update(self, group, p, state):
        state["step"] += 1
        powers = (p.grad, p.grad**2)
        moments = []
        for i, (beta, power) in enumerate(zip(group["betas"], powers, strict=True), 1):
            moment = beta * self.read(state, i).view_as(p) + (1 - beta) * power
            self.write(state, i, moment.reshape(-1))
            moments.append(moment / (1 - beta ** state["step"]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * moments[0] / (moments[1].sqrt() + group["eps"]))

    def read(self, state, i):
        if f"qmap{i}" not in state:
            return state[f"state{i}"]
        values = state[f"qmap{i}"][state[f"state{i}"].reshape(-1).long()]
        return values * state[f"absmax{i}"].repeat_interleave(256)[: len(values)]

    def write(self, state, i, moment):
        if f"qmap{i}" not in state:
            state[f"state{i}"].copy_(moment.view_as(state[f"state{i}"]))
            return
        blocks = torch.nn.functional.pad(moment, (0, -len(moment) % 256)).view(-1, 256)
        state[f"absmax{i}"].copy_(blocks.abs().amax(1))
        unit = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)).reshape(-1)[: len(moment)]
        nearest = torch.bucketize(unit, state[f"qmap{i}"]).clamp(max=255)
        state[f"state{i}"].copy_(nearest.to(torch.uint8).view_as(state[f"state{i}"]))


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def bitsandbytes(request, monkeypatch):
    if request.param == "stand-in":
        module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
        monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    elif importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    return request.param


@pytest.fixture
def eight(tiny):
    """eight(name, field=…): a recipe with networks that have tensors of more than 4096 elements."""

    def recipe(output="run", **fields):
        model = {"channels": [16, 32]}
        return tiny(output, **{"model": model, "optimizer": "adamw8bit", "adversary": "free", "steps": 9, **fields})

    return recipe


def checkpoint_of(recipe):
    return max((Path(recipe.output) / "checkpoints").glob("step-*"))


def test_resuming_is_bit_for_bit_the_run_in_one_go(eight, outcome, bitsandbytes):
    whole, cut = eight("whole"), eight("cut")
    train(whole, cpu=True)
    train(cut.model_copy(update={"steps": 6}), cpu=True)
    train(cut, cpu=True, resume=True)
    first, second = outcome(whole), outcome(cut)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    state = {name.removeprefix("optimizer now/"): v for name, v in second.items() if name.startswith("optimizer now/")}
    assert {value.dtype for name, value in state.items() if name.endswith("/state1")} == {torch.uint8, torch.float32}
    assert {float(value) for name, value in state.items() if name.endswith("/step")} == {9.0}
    assert all(name in state for name in ("qmap1", "qmap2"))


def test_it_trains_nearly_as_in_32_bits(eight, outcome, bitsandbytes):
    recipes = [eight("eight", lr=1e-3), eight("full", optimizer="adamw", lr=1e-3)]
    losses = [train(recipe, cpu=True)["loss"] for recipe in recipes]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(("name", "value"), [("absmax2", -1.0), ("absmax1", float("nan")), ("step", 7.0)])
def test_a_state_out_of_range_is_refused(eight, name, value, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit)))
    recipe = eight(steps=3)
    train(recipe, cpu=True)
    folder = checkpoint_of(recipe)
    state = load_file(folder / "optimizer.safetensors")
    name = next(n for n in state if n.endswith(f"/{name}"))
    save_file({**state, name: torch.full_like(state[name], value)}, folder / "optimizer.safetensors")
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    old = text.split('"optimizer.safetensors": "')[1][:64]
    manifest.write_text(text.replace(old, _hash(folder / "optimizer.safetensors")))
    with pytest.raises(InputError, match="optimizer"):
        train(recipe.model_copy(update={"steps": 6}), cpu=True, resume=True)


def test_without_bitsandbytes_the_remedy_is_said(eight, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="install the extra quantize"):
        train(eight(), cpu=True)


def test_a_version_that_cannot_step_here_is_refused(eight, monkeypatch):
    class Without(AdamW8bit):
        def step(self, closure=None):
            raise NotImplementedError("no kernel for cpu")

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Without)))
    with pytest.raises(InputError, match=r"cannot step on cpu \(no kernel for cpu\): update it"):
        train(eight(), cpu=True)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_it_has_the_settings_of_the_recipe(tiny, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit)))
    recipe = tiny(optimizer=kind, lr=3e-4, betas=(0.8, 0.9), weight_decay=0.1)
    made = build_optimizer(recipe, [torch.nn.Parameter(torch.zeros(2))], torch.device("cpu"))
    assert [made.defaults[name] for name in ("lr", "betas", "weight_decay")] == [3e-4, (0.8, 0.9), 0.1]


def test_channels_last_is_refused(eight):
    with pytest.raises(ValidationError, match="leave channels_last out"):
        eight(channels_last=True)
