"""The moving average: its recursion, its swap with the parameters, its state."""

import pytest
import torch
from torch import nn

from robustdiff.training.ema import EMA


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


def test_state_goes_round(parameters):
    ema = EMA(parameters, 0.5)
    state = {name: value.clone() + 1 for name, value in ema.state_dict().items()}
    ema.load_state_dict(state)
    assert torch.equal(ema.average[0], torch.tensor([2.0, 3.0]))
    with pytest.raises(KeyError):
        ema.load_state_dict({"00000": state["00000"]})


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(parameters, decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(parameters, decay)


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


def test_the_state_is_contiguous_whatever_the_memory_format():
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    ema = EMA([weight], 0.5)
    assert not ema.average[0].is_contiguous()
    state = ema.state_dict()
    assert state["00000"].is_contiguous()
    ema.average[0].zero_()
    ema.load_state_dict(state)
    assert torch.equal(ema.average[0], weight)
    assert ema.average[0].stride() == weight.stride()
