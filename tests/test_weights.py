"""Files of weights: opened and stripped of prefixes, or refused in one line, and never run."""

from __future__ import annotations

import argparse
import logging
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustdiff.errors import InputError
from robustdiff.weights import check_weights, read_file, read_weights, strip_prefixes

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.zeros(2)}
OTHER = {name: value + 1 for name, value in STATE.items()}
RECURSIVE: dict = {}
RECURSIVE["model"] = RECURSIVE


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


def assert_state(got, expected=STATE) -> None:
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "held",
    [
        STATE,
        {name: nn.Parameter(value) for name, value in STATE.items()},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("model._orig_mod.module."),
        {"_orig_mod.conv.weight": STATE["conv.weight"], "conv.bias": STATE["conv.bias"]},
        {"conv._orig_mod.weight": STATE["conv.weight"], "conv._fsdp_wrapped_module.bias": STATE["conv.bias"]},
        {"n_averaged": torch.tensor(3), **prefixed("module.")},  # torch.optim.swa_utils.AveragedModel
        {"state_dict": STATE, "step": 3},
        {"model": prefixed("module."), "optimizer": {"state": {}, "param_groups": []}},
        {"model": STATE, "ema": None},
        {"model": STATE, "ema": {}},
        {"state": {"net": STATE}},
        {"ema": {"decay": 0.99, "shadow": STATE}, "model": OTHER},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_in_what_training_scripts_save(tmp_path, held, legacy):
    torch.save(held, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert_state(read_weights(tmp_path / "w.pt"))


@pytest.mark.parametrize("average", ["ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "state_dict_ema"])
def test_the_moving_average_is_preferred_and_said(tmp_path, caplog, average):
    torch.save({"model": OTHER, average: STATE, "step": 3}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        assert_state(read_weights(tmp_path / "w.pt"))
    [message] = caplog.messages
    assert message == f"{tmp_path / 'w.pt'} holds model and {average}: read {average}, the moving average"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_safetensors_are_known_by_what_they_hold(tmp_path, name):
    save_file(STATE, tmp_path / name)
    got = read_weights(tmp_path / name)
    assert_state(dict(sorted(got.items())), dict(sorted(STATE.items())))


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (Evil(), ["without running code", "system"]),
        ({"model": STATE, "hook": Evil()}, ["without running code", "system"]),
        (nn.Linear(2, 2), ["torch.nn.modules.linear.Linear", "state_dict()"]),
        ({"model": STATE, "args": argparse.Namespace(lr=1)}, ["argparse.Namespace", "state_dict()"]),
        (torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(), ["optimiser"]),
        ({"ema": {"shadow_params": [*STATE.values()], "decay": 0.9}, "model": STATE}, ["shadow_params", "list"]),
        ({"shadow_params": [*STATE.values()]}, ["shadow_params", "list"]),
        ([*STATE.values()], ["list", "state_dict()"]),
        (STATE["conv.bias"], ["Tensor", "state_dict()"]),
        (3, ["int"]),
        ({}, ["empty dict"]),
        ({0: STATE["conv.bias"]}, ["no dict of weights by name"]),
        ({"step": 3, "lr": 0.1}, ["step, lr"]),
        ({**STATE, "epoch": 3}, ["no dict of weights by name"]),
        (RECURSIVE, ["no dict of weights by name"]),
        ({**STATE, "_orig_mod.conv.bias": STATE["conv.bias"]}, ["conv.bias and _orig_mod.conv.bias"]),
        ({**STATE, "num_batches": torch.tensor(3)}, ["num_batches", "int64"]),
        ({**STATE, "mask": torch.ones(2, dtype=torch.bool)}, ["mask", "bool"]),
        ({**STATE, "c": torch.zeros(2, dtype=torch.complex64)}, ["c is complex64"]),
        ({**STATE, "q": torch.zeros(2).to(torch.float8_e4m3fn)}, ["q is float8_e4m3fn"]),
        ({**STATE, "s": torch.eye(2).to_sparse()}, ["s is sparse"]),
        ({**STATE, "x": torch.zeros(1).expand(4)}, ["x is an expanded view", "(4,)"]),
        ({**STATE, "x": torch.zeros(7).as_strided((4, 4), (1, 1))}, ["x is an expanded view"]),
        ({**STATE, "n": torch.tensor([0.0, torch.nan])}, ["n has values that are not finite"]),
        ({**STATE, "n": torch.tensor([torch.inf]).half()}, ["n has values that are not finite"]),
    ],
)
def test_what_is_not_weights_is_one_line(tmp_path, monkeypatch, held, words):
    monkeypatch.chdir(tmp_path)
    torch.save(held, "w.pt")
    with pytest.raises(InputError) as error:
        read_weights("w.pt")
    message = str(error.value)
    assert message.startswith("w.pt")
    assert "\n" not in message
    assert "weights_only" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "folder", "link", "empty", "text", "half", "pickle", "lfs", "header"])
def test_damaged_files_are_one_line(tmp_path, monkeypatch, name, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if name == "w.pt":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif damage != "missing":
        contents = {
            "empty": b"",
            "text": b"<!DOCTYPE html><html></html>",
            "half": whole[: len(whole) // 2],
            "pickle": pickle.dumps(Evil()),
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
            "header": (2**40).to_bytes(8, "little") + b"{}",
        }
        path.write_bytes(contents[damage])
    with pytest.raises(InputError) as error:
        read_file(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_part_of_a_network_keeps_its_names():
    state = {"down.0.weight": torch.zeros(1), "down.1.weight": torch.zeros(1)}
    assert list(strip_prefixes(state, "w.pt")) == list(state)


def test_what_is_not_finite_in_the_type_asked_for_is_refused():
    state = {"w": torch.tensor([1e300], dtype=torch.float64)}
    assert torch.equal(check_weights(state, "w.pt")["w"], state["w"])
    with pytest.raises(InputError, match=r"w has values that are not finite in float32"):
        check_weights(state, "w.pt", torch.float32)


def test_copies_are_contiguous_and_do_not_share_memory():
    value = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    copy = check_weights({"w": value}, "w.pt", torch.float32)["w"]
    assert copy.is_contiguous()
    assert copy.data_ptr() != value.data_ptr()
