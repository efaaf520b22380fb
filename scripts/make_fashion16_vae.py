"""Train src/robustdiff/codecs/pretrained/fashion-16-vae, the small VAE that comes with the package.

    python scripts/make_fashion16_vae.py [--minutes 11] [--seed 0] [--output FOLDER]

The loss is that of a VAE (Kingma & Welling, 2013, arXiv 1312.6114) per element, ‖x − x̂‖² + β KL, on fashion-16's
60,000 training images, with an exponential moving average of the weights. The learning rate falls to zero over the
given time, so that another machine makes another VAE. Afterwards the mean of the latents is moved into the biases of
the two 1 × 1 convolutions around them, which changes no reconstruction, and ``scaling_factor`` is one over their
standard deviation.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robustdiff.data import load_dataset, to_unit

OUTPUT = Path(__file__).parents[1] / "src/robustdiff/codecs/pretrained/fashion-16-vae"
BETA = 1e-3
BATCH = 32
LR = 2e-3
WARMUP = 200

README = """# fashion-16-vae

An `AutoencoderKL` of diffusers for 16 × 16 grey images, {parameters:,} parameters: (1, 16, 16) is encoded as
(4, 8, 8).
It was trained on the 60,000 training images of fashion-16 (Fashion-MNIST averaged over 2 × 2 blocks; Xiao, Rasul and
Vollgraf, arXiv 1708.07747) for {steps:,} updates of {batch} images, by `scripts/make_fashion16_vae.py` with seed
{seed}, on one thread of a CPU. `scaling_factor` is one over the standard deviation of the training set's latents.

On the 10,000 test images, decoded from the mean of the posterior and rounded to 8 bits: the root mean square error is
{rmse:.2f} grey levels of 255 (PSNR {psnr:.1f} dB). Decoded from samples of the posterior it is {sampled:.2f}.

Fashion-MNIST is under the MIT licence, in `src/robustdiff/data/DATA_LICENSE`.
"""


def images_of(split: str) -> Tensor:
    """Return the images of a split in [−1, 1], (N, 1, 16, 16)."""
    dataset = load_dataset("fashion-16", split=split)
    return to_unit(dataset.__getitems__(range(len(dataset)))[0])


def train(vae: AutoencoderKL, images: Tensor, seconds: float) -> tuple[AutoencoderKL, int]:
    """Train for so long, and return the moving average with the number of updates."""
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimiser = torch.optim.Adam(vae.parameters(), lr=LR, betas=(0.9, 0.99))
    begin, step = time.monotonic(), 0
    while (done := (time.monotonic() - begin) / seconds) < 1:
        optimiser.param_groups[0]["lr"] = LR * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * done)) / 2
        x = images[torch.randint(len(images), (BATCH,))]
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimiser.zero_grad()
        (error + BETA * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(vae)
        step += 1
        if step % 200 == 0:
            print(f"{step:6d}  {done:4.0%}  mse {error.item():.5f}  kl {kl.item():.3f}", flush=True)
    return average.module.eval(), step


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Give the latents of images the mean 0 for each channel, and a scaling factor that makes their variance 1."""
    latents = torch.cat([vae.encode(x).latent_dist.sample() for x in images.split(1000)])
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    latents -= mean[:, None, None]
    print("mean of each channel:", mean.tolist(), "std of each channel:", latents.std((0, 2, 3)).tolist())
    vae.register_to_config(scaling_factor=round(1 / latents.square().mean().sqrt().item(), 4))


@torch.no_grad()
def rmse(vae: AutoencoderKL, images: Tensor, sample: bool) -> float:
    """Return the root mean square error of reconstructions in grey levels, rounded to 8 bits."""
    total = 0.0
    for x in images.split(1000):
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample() if sample else posterior.mode()).sample
        pixels = ((decoded + 1) * 127.5).round().clamp(0, 255)
        total += (pixels - (x + 1) * 127.5).double().square().sum().item()
    return math.sqrt(total / images.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        mid_block_add_attention=False,
    )
    images, test = images_of("train"), images_of("test")
    vae, steps = train(vae, images, 60 * arguments.minutes)
    normalise(vae, images)
    vae.save_pretrained(arguments.output)
    error = rmse(vae, test, sample=False)
    (arguments.output / "README.md").write_text(
        README.format(
            parameters=sum(p.numel() for p in vae.parameters()),
            steps=steps,
            batch=BATCH,
            seed=arguments.seed,
            rmse=error,
            psnr=20 * math.log10(255 / error),
            sampled=rmse(vae, test, sample=True),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
