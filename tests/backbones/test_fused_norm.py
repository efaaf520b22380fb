"""Fused norms against their definition in float64, and networks with them against diffusers' own."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from robustdiff.backbones import channels_last
from robustdiff.backbones.adm import AdmFlags, build_adm
from robustdiff.backbones.fused_norm import fuse_norms, group_norm, torch_group_norm
from robustdiff.backbones.unet2d import UNetSection

SMALL = {"num_channels": 32, "num_res_blocks": 1, "image_size": 32, "num_head_channels": 16}


def built(**flags):
    """A small ADM network in float64, none of whose parameters is zero."""
    torch.manual_seed(0)
    network = build_adm(AdmFlags(**SMALL, attention_resolutions="16,8", **flags)).double()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def values(network, x, t):
    """The output and all gradients."""
    torch.manual_seed(1)
    output = network(x, t).sample
    return output, *torch.autograd.grad(output.square().sum(), [x, *network.parameters()])


def inputs():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(), torch.tensor([3, 500])


@pytest.mark.parametrize("use_scale_shift_norm", [True, False])
@pytest.mark.parametrize("resblock_updown", [True, False])
def test_a_network_with_fused_norms_is_the_same_network(use_scale_shift_norm, resblock_updown):
    network = built(use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown)
    fused = fuse_norms(copy.deepcopy(network))
    assert list(fused.state_dict()) == list(network.state_dict())
    found, expected = values(fused, *inputs()), values(network, *inputs())
    scale = max(one.abs().max() for one in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13 * scale)


def test_all_norms_of_an_adm_network_and_of_a_new_unet_are_fused():
    """Counted by the calls of the function that is given; the new UNet is that of ``fashion-16``'s kind."""
    section = UNetSection(channels=(8, 16), layers=1, groups=4, attention=(False, True), head_width=8)
    for network in (built(), section.build((3, 32, 32), None, False).network.double()):
        called = []

        def norm(module, *arguments, called=called, **others):
            called.append(module)
            return torch_group_norm(module, *arguments, **others)

        norms = {module for module in network.modules() if isinstance(module, nn.GroupNorm)}
        fuse_norms(network, norm)(*inputs())
        assert len(called) == len(norms)
        assert set(called) == norms


def test_fused_networks_are_copied_pickled_and_fused_twice():
    fused = fuse_norms(built(), torch_group_norm)
    expected = fused(*inputs()).sample
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse_norms(copy.deepcopy(fused))):
        torch.testing.assert_close(other(*inputs()).sample, expected, rtol=0, atol=0)


def test_activations_keep_their_layout_in_large_batches():
    """Check the layout where diffusers' blocks make activations contiguous, from 64 images on."""
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=4, groups=2, up=True).double()
    fused = fuse_norms(copy.deepcopy(block))
    x = torch.randn(64, 8, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    temb = torch.randn(64, 4, dtype=torch.float64)
    strides = []
    fused.conv2.register_forward_pre_hook(lambda module, arguments: strides.append(arguments[0].stride()))
    torch.testing.assert_close(fused(x, temb), block(x, temb), rtol=1e-12, atol=1e-12)
    assert strides == [(16 * 64, 1, 16 * 8, 16)]


def test_other_blocks_are_left_alone():
    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=2, non_linearity="relu")
    network = built(dropout=0.1)
    attention = next(module for module in network.modules() if hasattr(module, "set_processor"))

    class Other(AttnProcessor2_0):
        pass

    attention.set_processor(other := Other())
    assert type(fuse_norms(block)) is ResnetBlock2D
    fuse_norms(network)
    assert attention.processor is other


def test_products_of_adapters_are_called():
    """A projection that is no ``nn.Linear`` any more, such as one with a LoRA, is called and not replaced."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + x

    network = built()
    for module in network.modules():
        if hasattr(module, "to_q"):
            module.to_q = Adapted(module.to_q)
    fused = fuse_norms(copy.deepcopy(network))
    torch.testing.assert_close(fused(*inputs()).sample, network(*inputs()).sample, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_under_autocast_the_result_is_what_the_next_convolution_takes(silu, modulated):
    norm, x = nn.GroupNorm(2, 8), torch.randn(3, 8, 4, 4)
    modulation = torch.randn(3, 16) if modulated else None
    assert group_norm(norm, x, modulation, silu).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = group_norm(norm, x, modulation, silu)
    assert found.dtype == torch.bfloat16
    expected = F.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
    if modulation is not None:
        expected = expected * (1 + modulation[:, :8, None, None]) + modulation[:, 8:, None, None]
    torch.testing.assert_close(found, (F.silu(expected) if silu else expected).bfloat16())


@pytest.mark.skipif(channels_last.triton is None, reason="triton is not installed, as beside PyTorch for CPUs")
def test_the_kernels_compute_their_definition():
    """Under Triton's interpreter, which is chosen when Triton is imported: in a process of its own."""
    script = Path(__file__).parents[1] / "cuda" / "fused_norm.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script, "cpu"], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter is older than this NumPy")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "180 cases" in done.stdout
