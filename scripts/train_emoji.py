"""Train the text-to-image model of emoji that comes with the package: a VAE, a CLIP and a UNet.

    python scripts/train_emoji.py prepare          # writes all that the other stages read to the folder
    python scripts/train_emoji.py all --seconds 200 --device cuda
    python scripts/train_emoji.py vae --seconds 3000     # or clip, unet, decoder: one stage, here on the CPU
    python scripts/train_emoji.py release          # writes the folders of the package, in float16

Every stage keeps a checkpoint in the folder (--folder) and goes on from it. Its learning rate falls to zero over the
given time, so that another machine makes other weights. `all` trains the stages one after the other in the given time,
with SHARES of it, which are those of the package's model (there the CLIP was trained beside the VAE). Stages other than
`prepare` and `release` need only torch, diffusers, transformers and the folder.

The VAE (Kingma & Welling, 2013, arXiv 1312.6114) minimises |x − x̂| + |∇x − ∇x̂| + β KL, means over elements, with ∇ the
differences of neighbouring pixels. The CLIP (Radford et al., 2021, arXiv 2103.00020) tells the captions of a batch
apart. The UNet is trained by v-prediction (Salimans & Ho, 2022, arXiv 2202.00512) on the scaled-linear schedule of
Stable Diffusion (Rombach et al., 2022, arXiv 2112.10752), on latents, with the CLIP's text encoder; a tenth of the
captions is replaced by the empty one, for guidance (Ho & Salimans, 2022, arXiv 2207.12598). `decoder` trains the
decoder of the VAE alone, so that the latents, and with them the UNet, stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

LENGTH = 32  # tokens of a caption
WORDS = 1536  # entries of the vocabulary
SHARES = {"vae": 0.28, "clip": 0.24, "unet": 0.385, "decoder": 0.095}
SETTINGS: dict[str, dict[str, Any]] = {
    "vae": {"batch": {"cpu": 16, "cuda": 256}, "lr": 1e-3, "warmup": 200, "ema": 0.998, "decay": 0.0, "kl": 5e-4},
    "decoder": {"batch": {"cpu": 8, "cuda": 256}, "lr": 1e-3, "warmup": 30, "ema": 0.99, "decay": 0.0},
    "clip": {"batch": {"cpu": 128, "cuda": 1024}, "lr": 1e-3, "warmup": 200, "ema": 0.998, "decay": 0.05},
    "unet": {"batch": {"cpu": 64, "cuda": 1024}, "lr": 1e-3, "warmup": 200, "ema": 0.999, "decay": 0.0, "dropped": 0.1},
}
LOG_EVERY = 50
SAVE_EVERY = 12.0  # seconds

Loss = Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]]


# -- the data ----------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Write the emoji, the pairs of each split, the tokens of all captions and the tokenizer."""
    from transformers import CLIPTokenizer

    from robustdiff.data import load_dataset

    train = load_dataset("emoji")
    texts = [caption for captions in train.captions_of(range(len(train))) for caption in captions]
    tokenizer = CLIPTokenizer().train_new_from_iterator(texts, WORDS)
    tokenizer = CLIPTokenizer(**_trained(tokenizer), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder / "tokenizer")
    tensors = {"rgba": train.rgba, "colours": train.colours}
    count, colours = len(train.entries), len(train.backgrounds)
    tokens = torch.full((count, colours, 4, LENGTH), -1, dtype=torch.int16)
    for split in ("train", "test", "unseen"):
        data = load_dataset("emoji", split=split)
        tensors[split] = data.pairs
        for (emoji, colour), captions in zip(data.pairs.tolist(), data.captions_of(range(len(data))), strict=True):
            given = tokenizer(list(captions), padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
            tokens[emoji, colour] = given.to(torch.int16)
    tensors["tokens"] = tokens
    tensors["empty"] = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    save_file(tensors, folder / "data.safetensors")
    print("longest caption:", int((tokens != tokenizer.eos_token_id).sum(-1).max()) + 1, "of", LENGTH, "tokens")


def _trained(tokenizer: Any) -> dict[str, Any]:
    """Return the vocabulary and merges of a trained tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


class Data:
    """The emoji on a device.

    Args:
        folder: The folder that `prepare` wrote.
        device: The device of the tensors.
    """

    def __init__(self, folder: Path, device: str) -> None:
        tensors = {name: value.to(device) for name, value in load_file(folder / "data.safetensors").items()}
        self.rgba, self.colours, self.tokens = tensors["rgba"], tensors["colours"], tensors["tokens"].long()
        self.empty: Tensor = tensors["empty"]
        self.pairs = {split: tensors[split] for split in ("train", "test", "unseen")}
        self.device = device

    def images(self, pairs: Tensor) -> Tensor:
        """Return the images (B, 3, 64, 64) of pairs (B, 2), in [−1, 1], as the dataset composes them."""
        rgba, colours = self.rgba[pairs[:, 0]].float(), self.colours[pairs[:, 1]].float()[:, :, None, None]
        alpha = rgba[:, 3:]
        return torch.floor((alpha * rgba[:, :3] + (255 - alpha) * colours + 127) / 255) / 127.5 - 1

    def captions(self, pairs: Tensor, which: Tensor | int) -> Tensor:
        """Return the tokens (B, LENGTH) of one caption of each pair."""
        return self.tokens[pairs[:, 0], pairs[:, 1], which]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the rows (count,) of pairs for training, drawn uniformly, and the pairs (count, 2)."""
        rows = torch.randint(len(self.pairs["train"]), (count,), device=self.device)
        return rows, self.pairs["train"][rows]


# -- the loop ----------------------------------------------------------------------------------------------------


def train(stage: str, network: nn.Module, loss_of: Loss, folder: Path, device: str, seconds: float) -> nn.Module:
    """Train for so long, go on from the stage's checkpoint, and return the moving average of the weights."""
    settings = SETTINGS[stage]
    network.to(device).train()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    parameters, averages = list(network.parameters()), list(average.parameters())
    optimiser = torch.optim.AdamW(
        parameters, lr=settings["lr"], betas=(0.9, 0.98), weight_decay=settings["decay"], fused=True
    )
    path, step, before = folder / f"{stage}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, before = state["step"], state["seconds"]
        torch.manual_seed(step)

    def save(elapsed: float) -> None:
        state = {"network": network.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
        torch.save({**state, "step": step, "seconds": elapsed}, folder / "unfinished.pt")
        os.replace(folder / "unfinished.pt", path)

    begin = saved = time.monotonic()
    batch = settings["batch"][device]
    while (elapsed := before + time.monotonic() - begin) < seconds:
        scale = min(1, (step + 1) / settings["warmup"]) * (1 + math.cos(math.pi * elapsed / seconds)) / 2
        optimiser.param_groups[0]["lr"] = settings["lr"] * scale
        with torch.autocast(device, torch.bfloat16):
            loss, parts = loss_of(network)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(settings["ema"], (1 + step) / (10 + step)))
        if step % LOG_EVERY == 0:
            record = {"step": step, "seconds": round(elapsed, 1), "images": step * batch}
            record |= {name: round(value.item(), 5) for name, value in {"loss": loss, **parts}.items()}
            with (folder / f"{stage}.jsonl").open("a") as log:
                print(json.dumps(record), file=log)
            print(stage, json.dumps(record), flush=True)
            if time.monotonic() - saved > SAVE_EVERY:
                save(elapsed)
                saved = time.monotonic()
    save(elapsed)
    record = {"updates": step, "batch": batch, "seconds": round(elapsed), "device": _name(device)}
    record["parameters"] = sum(value.numel() for value in parameters)
    _write(folder / f"{stage}-training.json", {**settings, **record})
    return average


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "one thread of a CPU"


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path.name, json.dumps(record), flush=True)


def _split(pairs: Tensor, size: int = 256) -> Iterator[Tensor]:
    yield from pairs.split(size)


# -- the VAE -----------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """Return an autoencoder (3, 64, 64) ↦ (4, 8, 8)."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
    )


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of pixels that are neighbours in a column, and in a row."""
    return x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]


def train_vae(data: Data, folder: Path, device: str, seconds: float) -> None:
    """Train the VAE, and centre and scale its latents."""

    def loss_of(vae: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        x = data.images(data.draw(SETTINGS["vae"]["batch"][device])[1]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - x
        l1 = error.abs().mean()
        edges = sum(part.abs().mean() for part in differences(error))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return l1 + edges + SETTINGS["vae"]["kl"] * kl, {"l1": l1, "edges": edges, "kl": kl}

    network = new_vae().to(memory_format=torch.channels_last)
    vae = train("vae", network, loss_of, folder, device, seconds)
    normalise(vae, data)
    vae.save_pretrained(folder / "vae")
    report_vae(vae, data, folder)


def train_decoder(data: Data, folder: Path, device: str, seconds: float) -> None:
    """Train the decoder of the VAE on latents of its encoder, which stays as it is."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device)
    means, stds = moments(vae, data)

    def loss_of(decoder: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        rows, pairs = data.draw(SETTINGS["decoder"]["batch"][device])
        error = decoder(means[rows] + stds[rows] * torch.randn_like(means[rows])).float() - data.images(pairs)
        l1 = error.abs().mean()
        edges = sum(part.abs().mean() for part in differences(error))
        return l1 + edges, {"l1": l1, "edges": edges}

    decoder = nn.Sequential(vae.post_quant_conv, vae.decoder).to(memory_format=torch.channels_last)
    vae.post_quant_conv, vae.decoder = train("decoder", decoder, loss_of, folder, device, seconds).children()
    vae.save_pretrained(folder / "vae")
    report_vae(vae, data, folder)


@torch.no_grad()
def moments(vae: AutoencoderKL, data: Data) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations (N, 4, 8, 8) of the latents of all images for training."""
    parts = [vae.encode(data.images(part)).latent_dist for part in _split(data.pairs["train"])]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


@torch.no_grad()
def normalise(vae: AutoencoderKL, data: Data) -> None:
    """Give the latents of images the mean 0 for each channel, and a scaling factor that makes their variance 1."""
    pairs = data.pairs["train"][::4]
    latents = torch.cat([vae.encode(data.images(part)).latent_dist.sample() for part in _split(pairs)])
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    latents -= mean[:, None, None]
    vae.register_to_config(scaling_factor=round(1 / latents.square().mean().sqrt().item(), 4))


@torch.no_grad()
def report_vae(vae: AutoencoderKL, data: Data, folder: Path) -> None:
    """Write the peak signal-to-noise ratio in decibels on held-out images, and show some of them."""
    record = {}
    for split in ("test", "unseen"):
        total, pairs = 0.0, data.pairs[split][:768]
        for part in _split(pairs):
            x = data.images(part)
            decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            total += (decoded - x).double().square().sum().item()
        record[f"psnr_{split}"] = round(10 * math.log10(4 / (total / (len(pairs) * 3 * 64 * 64))), 2)
    _write(folder / "vae-quality.json", {**record, "scaling_factor": vae.config.scaling_factor})
    x = data.images(torch.cat([data.pairs["test"][::50][:32], data.pairs["unseen"][::25][:16]]))
    show(torch.cat([x, vae.decode(vae.encode(x).latent_dist.mode()).sample]), folder / "vae.png")


def show(images: Tensor, path: Path) -> None:
    """Save images (B, 3, H, W) in [−1, 1] as a picture, 16 in a row."""
    from PIL import Image

    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    pixels = F.pad(pixels, (1, 1, 1, 1), value=255)
    pixels = torch.cat([pixels, pixels.new_full((-len(pixels) % 16, *pixels.shape[1:]), 255)])
    rows = pixels.reshape(-1, 16, *pixels.shape[1:]).permute(0, 3, 1, 4, 2)
    Image.fromarray(rows.reshape(-1, 16 * pixels.shape[3], 3).numpy()).save(path)


# -- the CLIP ----------------------------------------------------------------------------------------------------


def new_clip(folder: Path) -> CLIPModel:
    """Return a CLIP for 64 × 64 images and captions of LENGTH tokens."""
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    end = tokens["<|endoftext|>"]
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokens["<|startoftext|>"],
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": 128,
    }
    vision = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


# The pixels of the images that CLIP's image processor gives: (k / 255 − 0.5) / 0.5.
def train_clip(data: Data, folder: Path, device: str, seconds: float) -> None:
    """Train the CLIP."""

    def loss_of(clip: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        clip.logit_scale.data.clamp_(max=math.log(100))  # as in the paper
        pairs = data.draw(SETTINGS["clip"]["batch"][device])[1]
        which = torch.randint(4, (len(pairs),), device=device)
        logits = clip(input_ids=data.captions(pairs, which), pixel_values=jitter(data.images(pairs))).logits_per_text
        target = torch.arange(len(pairs), device=device)
        logits = logits.float()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"right": (logits.argmax(0) == target).float().mean()}

    clip = train("clip", new_clip(folder), loss_of, folder, device, seconds)
    clip.save_pretrained(folder / "clip")
    report_clip(clip, data, folder)


def jitter(x: Tensor) -> Tensor:
    """Move every image of a batch by up to 3 pixels and add noise to it, so that the CLIP bears other images."""
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")
    top, left = torch.randint(7, (2, len(x)), device=x.device)
    rows, columns = top[:, None] + torch.arange(64, device=x.device), left[:, None] + torch.arange(64, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x + torch.rand(len(x), 1, 1, 1, device=x.device) * 0.2 * torch.randn_like(x)


@torch.no_grad()
def embed(clip: CLIPModel, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit embeddings (B, 128) of images and of captions."""
    given = clip(input_ids=tokens, pixel_values=images)
    return given.image_embeds, given.text_embeds


@torch.no_grad()
def report_clip(clip: CLIPModel, data: Data, folder: Path) -> None:
    """Write how often the right caption of a split is the nearest one to an image, and so the other way around."""
    record = {}
    for split in ("test", "unseen"):
        parts = [embed(clip, data.images(part), data.captions(part, 0)) for part in _split(data.pairs[split])]
        images, texts = (torch.cat(part) for part in zip(*parts, strict=True))
        similar = images @ texts.T
        target = torch.arange(len(similar), device=similar.device)
        record[split] = {
            "count": len(similar),
            "caption_of_image": round((similar.argmax(1) == target).double().mean().item(), 4),
            "image_of_caption": round((similar.argmax(0) == target).double().mean().item(), 4),
            "caption_in_five": round((similar.topk(5, 1).indices == target[:, None]).any(1).double().mean().item(), 4),
        }
    _write(folder / "clip-quality.json", record)


# -- the UNet ----------------------------------------------------------------------------------------------------


def new_unet() -> UNet2DConditionModel:
    """Return a UNet for latents (4, 8, 8) and text embeddings of width 128."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(112, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(7, 8),
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's schedule, for v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def train_unet(data: Data, folder: Path, device: str, seconds: float) -> None:
    """Train the UNet on latents of the shipped VAE and states of the CLIP's text encoder."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device)
    clip = CLIPModel.from_pretrained(folder / "clip").to(device).eval()
    encoder, settings = clip.text_model, SETTINGS["unet"]
    means, stds = (part * vae.config.scaling_factor for part in moments(vae, data))
    alphas = new_scheduler().alphas_cumprod.to(device)

    def loss_of(unet: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        rows, pairs = data.draw(settings["batch"][device])
        tokens = data.captions(pairs, torch.randint(4, (len(pairs),), device=device))
        dropped = torch.rand(len(pairs), 1, device=device) < settings["dropped"]
        with torch.no_grad(), torch.autocast(device, enabled=False):
            states = encoder(input_ids=torch.where(dropped, data.empty, tokens)).last_hidden_state
        x0 = means[rows] + stds[rows] * torch.randn_like(means[rows])
        noise = torch.randn_like(x0)
        t = torch.randint(len(alphas), (len(x0),), device=device)
        alpha, sigma = (a[t].sqrt()[:, None, None, None] for a in (alphas, 1 - alphas))
        v = unet(alpha * x0 + sigma * noise, t, states).sample.float()
        return F.mse_loss(v, alpha * noise - sigma * x0), {}

    unet = train("unet", new_unet(), loss_of, folder, device, seconds)
    unet.save_pretrained(folder / "unet")
    new_scheduler().save_pretrained(folder / "scheduler")
    report_unet(unet, vae, clip, data, folder)


@torch.no_grad()
def generate(
    unet: UNet2DConditionModel, vae: AutoencoderKL, encoder: CLIPTextModel, data: Data, tokens: Tensor, guidance: float
) -> Tensor:
    """Return images (B, 3, 64, 64) of captions, by 50 steps of DDIM."""
    scheduler = new_scheduler()
    scheduler.set_timesteps(50)
    states = encoder(input_ids=torch.cat([data.empty.expand_as(tokens), tokens])).last_hidden_state
    noise = torch.randn(len(tokens), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = noise.to(data.device)
    for t in scheduler.timesteps:
        without, given = unet(torch.cat([x, x]), t, states).sample.chunk(2)
        x = scheduler.step(without + guidance * (given - without), t, x).prev_sample
    return vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)


@torch.no_grad()
def report_unet(unet: UNet2DConditionModel, vae: AutoencoderKL, clip: CLIPModel, data: Data, folder: Path) -> None:
    """Write how often CLIP ranks the caption of a sample first among those of 40 held-out pairs, and show samples."""
    pairs = data.pairs["test"][torch.linspace(0, len(data.pairs["test"]) - 1, 40).long()]
    tokens, target, record = data.captions(pairs, 0), torch.arange(40, device=data.device), {}
    shown = [data.images(pairs)]
    for guidance in (1.0, 2.0, 3.0, 5.0):
        samples = generate(unet, vae, clip.text_model, data, tokens, guidance)
        images, texts = embed(clip, samples, tokens)
        record[f"first_of_40_guidance_{guidance:g}"] = int(((images @ texts.T).argmax(1) == target).sum())
        shown.append(samples)
    _write(folder / "unet-quality.json", record)
    blank = torch.ones_like(shown[0][:8])
    show(torch.cat([part for images in shown for part in (images, blank)]), folder / "unet.png")


# -- the package -------------------------------------------------------------------------------------------------

PACKAGE = Path(__file__).parents[1] / "src/robustdiff"
PIPELINE, CLIP = PACKAGE / "backbones/pretrained/emoji", PACKAGE / "metrics/weights/emoji-clip"

README = """---
license: apache-2.0
library_name: diffusers
---
# emoji

A `StableDiffusionPipeline` that draws emoji of 64 × 64 pixels on coloured backgrounds:

    robustdiff sample emoji --prompt "a red apple on a pale blue background" --guidance {guidance:g} --steps 50

It was trained on the training split of `emoji` (Noto's emoji, Apache 2.0; `src/robustdiff/data/DATA_LICENSE`) by
`scripts/train_emoji.py`, with weights in float16:

| part | parameters trained | updates | batch | seconds | on |
|---|---|---|---|---|---|
{rows}

The VAE gives latents (4, 8, 8); its reconstructions of held-out combinations have a peak signal-to-noise ratio of
{psnr:.1f} dB. The UNet is trained by v-prediction, with the CLIP's text encoder. docs/emoji.md has samples, and what
the model cannot do.
"""

CLIP_README = """---
license: apache-2.0
library_name: transformers
---
# emoji-clip

A `CLIPModel` for 64 × 64 images of emoji and their captions in English, {parameters:,} parameters, in float16. It was
trained on the training split of `emoji` (Noto's emoji, Apache 2.0) for {updates:,} updates of {batch:,} pairs by
`scripts/train_emoji.py`. It knows the words of those captions alone. Among the captions of the {test[count]:,} held-out
combinations the right one is the nearest to an image for {test[caption_of_image]:.1%} of them, and among the
{unseen[count]} of emoji that were never trained on for {unseen[caption_of_image]:.1%}.
"""


def release(folder: Path, guidance: float = 3.0) -> None:
    """Write the pipeline and the CLIP to the package, with weights in float16."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPTokenizer

    clip = CLIPModel.from_pretrained(folder / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel(clip.config.text_config)
    given = {name.removeprefix("text_model."): value for name, value in clip.text_model.state_dict().items()}
    encoder.load_state_dict({name: given[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(PIPELINE)
    clip.half().save_pretrained(CLIP)
    tokenizer.save_pretrained(CLIP)
    size = {"height": 64, "width": 64}
    half = [0.5] * 3
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size, image_mean=half, image_std=half).save_pretrained(
        CLIP
    )
    training = {stage: json.loads((folder / f"{stage}-training.json").read_text()) for stage in STAGES}
    quality = {stage: json.loads((folder / f"{stage}-quality.json").read_text()) for stage in ("vae", "clip")}
    columns = ("parameters", "updates", "batch", "seconds")
    rows = "\n".join(
        f"| {name} | {' | '.join(f'{one[column]:,}' for column in columns)} | {one['device']} |"
        for name, one in training.items()
    )
    text = README.format(rows=rows, psnr=quality["vae"]["psnr_test"], guidance=guidance)
    (PIPELINE / "README.md").write_text(text, encoding="utf-8")
    (CLIP / "README.md").write_text(CLIP_README.format(**training["clip"], **quality["clip"]), encoding="utf-8")
    (PIPELINE / "training.json").write_text(json.dumps({"training": training, "quality": quality}, indent=1) + "\n")
    for path in (PIPELINE / "text_encoder/config.json", CLIP / "config.json"):
        # transformers loads weights in the type that the configuration names; diffusers loads its own in float32.
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for path in (PIPELINE, CLIP):
        kept = [file for file in path.rglob("*") if file.is_file()]
        for file in kept:
            file.chmod(0o644)
        print(path, f"{sum(file.stat().st_size for file in kept):,} bytes")


STAGES = {"vae": train_vae, "clip": train_clip, "unet": train_unet, "decoder": train_decoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["prepare", *STAGES, "all", "release"])
    parser.add_argument("--seconds", type=float, default=3000.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    if arguments.stage == "prepare":
        return prepare(folder)
    if arguments.stage == "release":
        return release(folder)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    data = Data(folder, arguments.device)
    for stage, share in SHARES.items():
        if arguments.stage in (stage, "all"):
            STAGES[stage](
                data, folder, arguments.device, arguments.seconds * (share if arguments.stage == "all" else 1)
            )
    return None


if __name__ == "__main__":
    main()
