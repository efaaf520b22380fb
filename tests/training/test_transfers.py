"""What a training pass moves between the host and the device: the batch, and nothing else.

The device is torch's "meta": its tensors have no numbers, so that whatever reads one fails, as does an operation on a
tensor of the host and one of the device together. What only makes a GPU wait, a copy above all, is counted.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustdiff.data import load_dataset
from robustdiff.training.build import build_model
from robustdiff.training.trainer import Trainer

META = torch.device("meta")
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal"}


class Transfers(TorchDispatchMode):
    """Record what is read back from the device or copied between it and the host, by the operation's name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs or {}, out)) if isinstance(x, torch.Tensor)]
        name = func.name().partition(".")[0]
        if name not in ("aten::_to_copy", "aten::copy_"):
            tensors = [
                x for x in tensors if x.ndim or x.device == META
            ]  # a number of the host is an argument of a kernel
        devices = {x.device for x in tensors}
        if len(devices) > 1 or (devices == {META} and name in READS):
            self.seen.append(name)
        return out


def test_what_would_be_missed_is_seen():
    host, device = torch.ones(2), torch.ones(2, device=META)
    with Transfers() as transfers:
        host.to(META)
        device.copy_(host)
        device * torch.tensor(2.0)
        device[torch.zeros(2, dtype=torch.int64, device=META)]
        with pytest.raises(RuntimeError):
            device.sum().item()
        with pytest.raises(RuntimeError):
            bool(device.sum() > 0)
        with pytest.raises(RuntimeError):
            device + host
    assert transfers.seen == ["aten::_to_copy", "aten::copy_"]


@pytest.fixture
def on_the_device(monkeypatch):
    """on_the_device(recipe): a trainer whose device is META."""
    monkeypatch.setattr("robustdiff.training.batches.batch_generator", lambda *_: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: nullcontext())
    # Without the fused kernel, which META has not; the number of steps, which the other reads, stays on the host.
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, fused, **k: AdamW(*a, foreach=True, **k))

    def make(recipe):
        accelerator = Accelerator(cpu=True)
        for state in (PartialState(), accelerator.state):
            state.device = META  # the fixture that resets accelerate's state undoes it
        assert accelerator.device == META
        dataset = load_dataset("digits")
        built = build_model(recipe, dataset)
        built.model.network.to(META)
        return Trainer(recipe, accelerator, dataset, built)

    return make


AdamW = torch.optim.AdamW
FREE = {"name": "free", "steps": 2, "radius": {"eta": 0.1, "by_noise": True, "within": [0.1, 50.0]}, "ramp": 4}
CASES = {
    "learned variance": {
        "objective": {"variance": "learned_range", "timesteps": "loss-second-moment"},
        "adversary": FREE,
        "clip": 1.0,
    },
    "flow": {"objective": {"prediction": "flow"}, "process": "flow", "adversary": FREE},
    "edm": {"objective": {"name": "edm", "teacher": "TEACHER"}, "adversary": FREE},
    "edm from edm": {"objective": {"name": "edm", "teacher": "EDM", "levels": 30}, "adversary": {**FREE, "norm": "l1"}},
    "consistency": {"objective": {"name": "consistency", "teacher": "TEACHER"}, "adversary": FREE, "accumulate": 2},
    "student": {
        "objective": {"name": "consistency", "perturb": "student", "times": "log-normal", "weighting": "inverse-gap"},
        "adversary": {**FREE, "norm": "linf"},
    },
    "pgd": {"adversary": {**FREE, "name": "pgd", "radius": {"eta": 0.1, "sampler_steps": 20}}},
    "random": {"adversary": {**FREE, "name": "random"}, "model": {"dropout": 0.1}},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Untrained diffusion models and denoisers of digits, by what a case calls them."""
    from diffusers import DDPMScheduler, EDMEulerScheduler

    from robustdiff.backbones.model import Model
    from robustdiff.backbones.unet2d import UNetSection

    folders = {}
    for name, scheduler in {"TEACHER": DDPMScheduler(1000), "EDM": EDMEulerScheduler()}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        Model.of(UNetSection(channels=[8], layers=1, groups=4).build((1, 8, 8), None, False).network, scheduler).save(
            folders[name]
        )
    return folders


@pytest.mark.parametrize("case", CASES)
def test_a_training_pass_moves_the_batch_to_the_device_and_nothing_else(tiny, on_the_device, teachers, case):
    fields = dict(CASES[case])
    if (teacher := fields.get("objective", {}).get("teacher")) is not None:
        fields["objective"] = {**fields["objective"], "teacher": str(teachers[teacher])}
    fields["model"] = {"channels": [8], **fields.get("model", {})}
    trainer = on_the_device(tiny(steps=100, **fields))
    updates = trainer.updates()
    passes = trainer.adversary.passes
    for _ in range(passes):  # the tables go to the device once
        next(updates)
    with Transfers() as transfers:
        for _ in range(passes):
            next(updates)
    assert transfers.seen == ["aten::_to_copy"] * trainer.recipe.accumulate


@pytest.mark.parametrize("case", ["learned variance", "edm", "consistency"])
def test_a_draw_without_a_generator_is_made_on_the_device(tiny, on_the_device, teachers, case):
    fields = dict(CASES[case])
    if "teacher" in fields["objective"]:
        fields["objective"] = {**fields["objective"], "teacher": str(teachers["TEACHER"])}
    objective = on_the_device(tiny(**fields)).objective
    x0 = torch.zeros(4, 1, 8, 8, device=META)
    objective.draw(x0)
    with Transfers() as transfers:
        draw = objective.draw(x0)
    assert draw.x_t.device == draw.t.device == META
    assert transfers.seen == []
