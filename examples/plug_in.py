"""Adversarial training in somebody else's loop: three changed lines.

An ordinary diffusers training loop, the same loop with adversarial training (Wang et al., 2025, arXiv 2502.17099,
Algorithm 1), and the same again under accelerate, with microbatches and, on a GPU, bf16. Run it: some seconds on a CPU.

    python examples/plug_in.py
"""

import difflib
import inspect

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from robustdiff import DiffusionProcess, FreeAdversary

# Made once. The adversary moves x_t to where the loss is larger; the process knows which noise is in it there.
noise_scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
process = DiffusionProcess.from_scheduler(noise_scheduler)
adversary = FreeAdversary(steps=3, step_size=0.1)


def plain(unet, optimizer, loader, passes=1):
    losses = []
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (len(x0),))
        noisy = noise_scheduler.add_noise(x0, noise, t)
        for _ in range(passes):
            prediction = unet(noisy, t).sample
            loss = F.mse_loss(prediction, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def adversarial(unet, optimizer, loader):
    losses = []
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (len(x0),))
        noisy = noise_scheduler.add_noise(x0, noise, t)
        for delta in adversary(noisy, t):  # changed: K passes over the batch, the first with delta = 0
            prediction = unet(noisy + delta, t).sample  # changed: at the perturbed point
            loss = F.mse_loss(prediction, process.absorb(noise, t, delta))  # changed: towards the noise that it has
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def adversarial_accelerate(unet, optimizer, loader, microbatches=2):
    """Mixed precision, and an update for every few microbatches, which go through the passes in lockstep.

    Each microbatch so keeps its own delta, and the optimiser steps when all of them have been through a pass.
    """
    # The passes over the last microbatches come after the end of the data, where accelerate would step in each.
    accumulation = GradientAccumulationPlugin(num_steps=microbatches, sync_with_dataloader=False)
    precision = "bf16" if torch.cuda.is_available() else "no"  # few CPUs compute in bf16; for the others it is slow
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_plugin=accumulation)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    losses, draws = [], []
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (len(x0),), device=x0.device)
        draws.append((noise_scheduler.add_noise(x0, noise, t), noise, t))
        if len(draws) < microbatches:
            continue
        for deltas in zip(*(adversary(noisy, t) for noisy, _, t in draws), strict=True):
            for (noisy, noise, t), delta in zip(draws, deltas, strict=True):
                with accelerator.accumulate(unet):
                    prediction = unet(noisy + delta, t).sample
                    loss = F.mse_loss(prediction, process.absorb(noise, t, delta))
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(loss.item())
        draws = []
    return losses


def make(batch_size=64):
    """Return a small network, its optimiser, and the 1,797 digits of scikit-learn as 8×8 images in [-1, 1]."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
    )
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    return unet, optimizer, DataLoader(images, batch_size, shuffle=True, drop_last=True)


def difference(before, after):
    """The unified diff between the bodies of two functions."""
    sources = (inspect.getsource(function).splitlines()[1:] for function in (before, after))
    return "\n".join(difflib.unified_diff(*sources, before.__name__, after.__name__, lineterm="", n=2))


if __name__ == "__main__":
    print(difference(plain, adversarial))
    for loop, batch_size in (plain, 64), (adversarial, 64), (adversarial_accelerate, 32):
        losses = loop(*make(batch_size))
        print(f"{loop.__name__}: {len(losses)} passes, loss {losses[0]:.3f} → {sum(losses[-10:]) / 10:.3f}")
