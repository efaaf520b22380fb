"""The moving average: its recursion, the weights of "auto", its swap with the parameters, its state."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.integrate import quad
from torch import nn

from robustdiff.backbones.model import load_model
from robustdiff.data import load_dataset, to_unit
from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.process import DiffusionProcess
from robustdiff.training.ema import EMA, EXPONENT, sufficient_decay
from robustdiff.training.run import train


@pytest.fixture
def parameters():
    return [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]


def test_follows_its_recursion_from_the_first_parameters(parameters):
    ema = EMA(parameters, 0.75)
    expected = [p.detach().clone().double() for p in parameters]
    for step in range(5):
        with torch.no_grad():
            for p in parameters:
                p.add_(step + 1)
        ema.update()
        expected = [0.75 * e + 0.25 * p.detach().double() for e, p in zip(expected, parameters, strict=True)]
    for average, value in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=0)


def test_applied_swaps_the_average_in_and_the_same_bits_back_even_after_an_error(parameters):
    ema = EMA(parameters, 0.5)
    with torch.no_grad():
        parameters[0].mul_(1 / 3)
    before = parameters[0].detach().clone()
    inside = []

    def fail():
        with ema.applied():
            inside.append(parameters[0].detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(inside[0], torch.tensor([1.0, 2.0]))
    assert torch.equal(parameters[0], before)
    assert parameters[0].requires_grad
    assert parameters[0].grad_fn is None


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(parameters, decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(parameters, decay)


# -- auto -----------------------------------------------------------------------------------------------------


def test_the_exponent_is_that_of_the_paper():
    """σ_rel is the standard deviation of the density ∝ τ^γ on [0, 1]."""
    assert pytest.approx(6.94, abs=0.005) == EXPONENT
    moments = [quad(lambda tau, k=k: tau ** (EXPONENT + k), 0, 1)[0] for k in range(3)]
    mean = moments[1] / moments[0]
    assert (moments[2] / moments[0] - mean**2) ** 0.5 == pytest.approx(0.10)


def test_auto_weighs_each_update_as_the_power_function():
    """With θ_t the t-th unit vector, θ̄_T holds the weight of each update, and its first entry that of the start."""
    updates = 400
    parameter = nn.Parameter(torch.zeros(updates + 1, dtype=torch.float64))
    with torch.no_grad():
        parameter[0] = 1
    ema = EMA([parameter], "auto")
    for t in range(1, updates + 1):
        with torch.no_grad():
            parameter.zero_()
            parameter[t] = 1
        ema.update()
        if t == 1:
            assert torch.equal(ema.average[0], parameter), "nothing of the start is left"
    weights = ema.average[0].numpy()
    # ∏_{u>s} (1 − 1/u)^{γ+1} telescopes to (s/T)^{γ+1}: the weight of update s is a difference of two such powers.
    ends = (np.arange(updates + 1) / updates) ** (EXPONENT + 1)
    np.testing.assert_allclose(weights[1:], np.diff(ends), rtol=1e-9, atol=1e-15)
    assert weights[0] == 0
    times = np.arange(updates + 1) / updates
    assert np.sqrt(weights @ times**2 - (weights @ times) ** 2) == pytest.approx(0.10, rel=0.01)


@pytest.mark.parametrize("fields", [{"adversary": "free"}, {"adversary": "free", "objective": {"name": "consistency"}}])
def test_an_interrupted_auto_run_is_the_uninterrupted_one(tiny, outcome, fields):
    whole, cut = (tiny(name, ema="auto", steps=9, **fields) for name in ("whole", "cut"))
    train(whole, cpu=True)
    train(cut.model_copy(update={"steps": 3}), cpu=True)
    train(cut, resume=True, cpu=True)
    first, second = outcome(whole), outcome(cut)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def _loss(unet, scheduler):
    """The mean loss over all digits, at the same times and noise for all networks."""
    objective = DenoisingObjective(DiffusionProcess.from_scheduler(scheduler))
    images, _ = load_dataset("digits").__getitems__(range(1797))[:2]
    draw = objective.draw(to_unit(images), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(objective(unet.eval(), draw)["loss"].mean())


def test_a_short_run_that_does_not_speak_of_ema_exports_a_model_as_good_as_its_parameters(tiny):
    recipe = tiny(steps=100)
    recipe = type(recipe).model_validate(recipe.model_dump(exclude={"ema"}))
    assert recipe.ema == "auto"
    train(recipe, cpu=True)
    loaded = load_model(recipe.output)
    unet, scheduler = loaded.network, loaded.scheduler
    exported = _loss(unet, scheduler)
    unet.load_state_dict(load_file(Path(recipe.output) / "checkpoints/step-00000100/model.safetensors"))
    assert exported < 1.02 * _loss(unet, scheduler)


# -- what is said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 58, 59, 300, 1200, 20_000, 1_000_000])
def test_the_proposed_decay_leaves_at_most_5_percent_and_not_much_less(steps):
    decay = sufficient_decay(steps)
    assert 0.04 < decay**steps <= 0.05
    assert EMA([], decay).decay == decay


def test_a_decay_that_keeps_the_start_is_said_when_starting_and_when_resuming(robustdiff, tiny, tmp_path, caplog):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(tiny(ema=0.999, steps=3).model_dump_json())))
    said = "ema 0.999 leaves {} % of the starting weights in the exported model of {} updates: set ema=auto, or ema={}"
    for arguments, expected in (
        ((), said.format(100, 3, 0.36)),
        (("--resume", "--set", "steps=30"), said.format(97, 30, 0.9)),
    ):
        caplog.clear()
        assert robustdiff("train", recipe, "--cpu", *arguments).code == 0
        (line,) = [record.getMessage() for record in caplog.records if "ema" in record.getMessage()]
        assert line.startswith(expected)
        assert line.endswith("at most 5 %")
    caplog.clear()
    assert robustdiff("train", recipe, "--cpu", "--resume", "--set", "steps=30").code == 0
    (message,) = caplog.messages
    assert message.endswith("was finished already"), "a finished run is not trained"


@pytest.mark.parametrize("ema", [0.3, 0, "auto"])
def test_a_decay_that_does_not_is_not_spoken_of(tiny, caplog, ema):
    train(tiny(ema=ema, steps=3), cpu=True)
    assert not caplog.records


def test_a_step_that_was_not_made_leaves_the_average(parameters):
    ema, reference = EMA(parameters, 0.75), EMA(parameters, 0.75)
    with torch.no_grad():
        for p in parameters:
            p.add_(1 / 3)
    ema.update(torch.tensor(False))
    assert torch.equal(ema.average[0], torch.tensor([1.0, 2.0]))
    ema.update(torch.tensor(True))
    reference.update()
    torch.testing.assert_close(ema.average, reference.average, rtol=1e-6, atol=0)
