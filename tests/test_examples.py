"""examples/plug_in.py: three lines make a loop adversarial, and nothing else of it changes."""

import importlib.util
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from robustdiff import FreeAdversary

PATH = Path(__file__).parents[1] / "examples" / "plug_in.py"


@pytest.fixture
def plug_in(no_state_of_accelerate):
    spec = importlib.util.spec_from_file_location("plug_in", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def few(loader, n):
    """The first n batches of a loader, as a list."""
    return [x0 for x0, _ in zip(loader, range(n), strict=False)]


def parameters(unet):
    return torch.cat([p.detach().flatten() for p in unet.parameters()]).clone()


@pytest.mark.usefixtures("no_state_of_accelerate")
def test_run_as_a_script_it_shows_exactly_three_changed_lines(capsys):
    runpy.run_path(str(PATH), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    added = [line for line in shown if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in shown if line.startswith("-") and not line.startswith("---")]
    assert len(added) == len(removed) == 3
    assert all("# changed" in line for line in added)
    for name in ("plain", "adversarial", "adversarial_accelerate"):
        (summary,) = [line for line in shown if line.startswith(f"{name}: ")]
        first, last = summary.split("loss ")[1].split(" → ")
        assert float(last) < 0.7 * float(first)


def test_delta_moves_the_points_and_the_parameters_move(plug_in):
    unet, optimizer, loader = plug_in.make(16)
    before, inputs = parameters(unet), []
    unet.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach().clone()))
    losses = plug_in.adversarial(unet, optimizer, few(loader, 2))
    assert len(losses) == len(inputs) == 6
    assert not torch.equal(parameters(unet), before)
    sizes = [(inputs[k] - inputs[0]).flatten(1).norm(dim=1) for k in range(3)]
    assert (sizes[0] == 0).all()
    torch.testing.assert_close(sizes[1], torch.full((16,), 0.1), rtol=1e-3, atol=0)
    assert (sizes[2] > 0.1).all()


def test_with_a_tiny_step_it_is_the_plain_loop_with_k_passes(plug_in, monkeypatch):
    monkeypatch.setattr(plug_in, "adversary", FreeAdversary(steps=3, step_size=1e-30))
    results = {}
    for loop, arguments in ((plug_in.plain, (3,)), (plug_in.adversarial, ())):
        unet, optimizer, loader = plug_in.make(16)
        batches = few(loader, 3)
        torch.manual_seed(1)
        results[loop.__name__] = (loop(unet, optimizer, batches, *arguments), parameters(unet))
    assert results["plain"][0] == results["adversarial"][0]
    assert torch.equal(results["plain"][1], results["adversarial"][1])


def test_under_accelerate_every_pass_over_the_microbatches_is_one_update(plug_in):
    unet, optimizer, loader = plug_in.make(16)
    images = loader.dataset[:96]  # six microbatches: the last two are at the end of the data, a trap for accumulation
    before, updates = parameters(unet), []
    optimizer.register_step_post_hook(lambda *_: updates.append(parameters(unet)))
    losses = plug_in.adversarial_accelerate(unet, optimizer, torch.utils.data.DataLoader(images, 16))
    assert len(losses) == 6 * 3
    assert len(updates) == 3 * 3
    assert all(not torch.equal(a, b) for a, b in pairwise([before, *updates]))
