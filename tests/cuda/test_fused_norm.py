"""The fused kernels, and a network that calls them, on a GPU; its interpreter runs them in tests/backbones."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import torch

from robustdiff.backbones.fused_norm import fuse_norms
from robustdiff.backbones.unet2d import UNetSection
from robustdiff.graphs import Recorder

CASES = Path(__file__).with_name("fused_norm.py")


def test_the_kernels_compute_their_definition(gpu, exact, capsys):
    runpy.run_path(str(CASES))["main"](gpu)
    assert "180 cases" in capsys.readouterr().out


def unet(device):
    torch.manual_seed(0)
    section = UNetSection(channels=(32, 64), layers=1, groups=8, attention=(False, True))
    return section.build((3, 16, 16), None, False).network.to(device, memory_format=torch.channels_last)


def test_a_fused_network_is_as_near_to_float32_as_the_other_in_bfloat16(device, exact):
    network = unet(device)
    x = torch.randn(64, 3, 16, 16).to(device, memory_format=torch.channels_last)
    t = torch.randint(1000, (64,)).to(device)

    def gradient(network, autocast):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = network(x, t).sample.float()
        gradients = torch.autograd.grad(output.square().mean(), list(network.parameters()))
        return torch.cat([output.flatten(), *(one.flatten() for one in gradients)])

    fused, expected = fuse_norms(copy.deepcopy(network)), gradient(network, False)

    def error(found):
        return ((found - expected).norm() / expected.norm()).item()

    assert error(gradient(fused, False)) < 1e-5
    assert error(gradient(fused, True)) < 1.5 * error(gradient(network, True))


def test_a_fused_network_is_recorded(device):
    network, x = fuse_norms(unet(device)), torch.randn(4, 3, 16, 16).to(device, memory_format=torch.channels_last)
    t = torch.tensor([1, 2, 3, 4], device=device)

    def call(x, t):
        with torch.no_grad():
            return network(x, t).sample

    recorder = Recorder(call, torch.device(device), "the network")
    found = [recorder(x, t).clone() for _ in range(3)]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-5, atol=1e-6)
