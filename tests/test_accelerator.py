"""Accelerators take compilation and accumulation from recipes alone, and the device that was asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from robustdiff import distributed
from robustdiff.distributed import make_accelerator
from robustdiff.errors import InputError
from robustdiff.section import native_precision


@pytest.fixture(autouse=True)
def no_state_of_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_accelerate_config_says_of_compilation_and_accumulation_is_not_taken(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(cpu=True)
    assert accelerator.gradient_accumulation_steps == 1
    network = torch.nn.Linear(1, 1)
    assert accelerator.prepare(network) is network


@pytest.mark.parametrize(("flag", "name"), [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_other_ways_of_sharing_a_network_are_refused(monkeypatch, flag, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{flag}", "true")
    with pytest.raises(InputError, match=f"launched with {name}: launch them with --multi_gpu or --use_fsdp"):
        make_accelerator()


def test_a_process_that_uses_a_gpu_is_not_asked_for_the_cpu(monkeypatch):
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: SimpleNamespace(device=torch.device("cuda", 1)))
    with pytest.raises(InputError, match="this process uses cuda:1 through accelerate already: for the CPU, start"):
        make_accelerator(cpu=True)
    assert make_accelerator().device.index == 1


def test_the_precision_of_the_cpu_is_not_that_of_a_gpu_beside_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert native_precision() == "bf16"
    assert native_precision(cpu=True) == "fp32"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert native_precision() == "fp32"


@pytest.mark.parametrize("words", [["--cpu", "--precision", "auto"], ["--precision", "auto", "--cpu"], []])
def test_commands_take_the_precision_of_their_device(monkeypatch, robustdiff, tmp_path, words):
    asked = []
    monkeypatch.setattr("robustdiff.section.native_precision", lambda cpu=False: asked.append(cpu) or "fp32")
    settings = ["--set", "steps=1", "--set", "precision=auto", "--set", "batch_size=3", "--set", f"output={tmp_path}/a"]
    assert robustdiff("train", "digits", *settings, "--cpu").code == 0
    assert asked == [True]
    outcome = robustdiff("sample", tmp_path / "a", "--num", 1, "--steps", 2, *words, "--output", tmp_path / "x.npz")
    assert outcome.code == 0
    assert asked == [True] * (2 if words else 1)
