"""The three changed lines with other schedulers: DDPM-like, Euler-like, flow matching with a shift, EDM.

DPM-Solver, DEIS and UniPC are for sampling alone: train with `DDPMScheduler.from_config(scheduler.config)`.

What differs is how x_t is made of x_0 and noise, and so what the moved noise is: noise + delta / sigma_t. A process
takes sigma_t from the scheduler; `absorb` takes it from the loop. Run it: some seconds on a CPU.

    python examples/schedulers.py
"""

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from robustdiff import DiffusionProcess, FreeAdversary, absorb

adversary = FreeAdversary(steps=3, step_size=0.1)


def update(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def ddpm(unet, optimizer, loader, scheduler):
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, and timesteps that are whole numbers: DDPM, DDIM, PNDM, LCM."""
    process = DiffusionProcess.from_scheduler(scheduler)
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
        noisy = scheduler.add_noise(x0, noise, t)
        for delta in adversary(noisy, t):
            prediction = unet(noisy + delta, t).sample
            yield update(F.mse_loss(prediction, process.absorb(noise, t, delta)), optimizer)


def euler(unet, optimizer, loader, scheduler):
    """x_t = x_0 + σ_t ε, and a network that is given x_t/√(1 + σ_t²): Euler, Euler ancestral, LMS, Heun, KDPM2."""
    process = DiffusionProcess.from_scheduler(scheduler)
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
        noisy = scheduler.add_noise(x0, noise, t)
        sigma = process.levels(t, x0)[1]
        for delta in adversary(noisy, t):
            prediction = unet((noisy + delta) / (1 + sigma**2).sqrt(), t).sample
            yield update(F.mse_loss(prediction, process.absorb(noise, t, delta)), optimizer)


def flow_matching(unet, optimizer, loader, scheduler):
    """x_t = (1 − σ) x_0 + σ ε with σ drawn from the scheduler's own, shifted ones: the process of SD3 and Flux."""
    for x0 in loader:
        noise = torch.randn_like(x0)
        index = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
        t, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
        sigmas = sigma.reshape(-1, 1, 1, 1)
        noisy = (1 - sigmas) * x0 + sigmas * noise
        for delta in adversary(noisy, t):
            prediction = unet(noisy + delta, t).sample
            yield update(F.mse_loss(prediction, absorb(noise, delta, sigma) - x0), optimizer)


def edm(unet, optimizer, loader, scheduler):
    """x_t = x_0 + σ ε with ln σ ~ N(−1.2, 1.2²), and a preconditioned network that predicts the noise of its point."""
    for x0 in loader:
        noise = torch.randn_like(x0)
        sigma = (1.2 * torch.randn(len(x0)) - 1.2).exp()
        sigmas = sigma.reshape(-1, 1, 1, 1)
        noisy = x0 + sigmas * noise
        for delta in adversary(noisy):
            point = noisy + delta
            output = unet(scheduler.precondition_inputs(point, sigmas), scheduler.precondition_noise(sigma)).sample
            denoised = scheduler.precondition_outputs(point, output, sigmas)
            # In ε the weight λ(σ) = (σ² + σ_d²)/(σ σ_d)² of the loss in x_0 becomes (σ² + σ_d²)/σ_d².
            error = (point - denoised) / sigmas - absorb(noise, delta, sigma)
            data = scheduler.config.sigma_data
            yield update(((sigmas**2 + data**2) / data**2 * error**2).mean(), optimizer)


LOOPS = {
    ddpm: DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"),
    euler: EulerDiscreteScheduler(1000),
    flow_matching: FlowMatchEulerDiscreteScheduler(1000, shift=3.0),
    edm: EDMEulerScheduler(),
}


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


if __name__ == "__main__":
    for loop, scheduler in LOOPS.items():
        losses = list(loop(*make(), scheduler))
        name = loop.__name__.replace("_", " ")
        print(f"{name}: {len(losses)} passes, loss {losses[0]:.3f} → {sum(losses[-10:]) / 10:.3f}")
