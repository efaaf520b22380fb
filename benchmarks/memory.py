"""Compute and measure the GPU memory that adversarial training of Stable Diffusion and Flux takes.

Networks of the published sizes with random weights are trained by the trainer itself (objective, free adversary with
K = 3, optimiser, moving average) on random latents and embeddings. Neither the VAE nor the text encoders are there:
with `codec.cache` and captions they are off the GPU during training as well. For each setting the JSON has the largest
number of bytes allocated by torch during an update, the bytes between updates, the seconds per update, and the
arithmetic for it.

    python benchmarks/memory.py --out benchmarks/results/memory.json      # on a GPU: two minutes at most
    python benchmarks/memory.py --arithmetic                              # the table of docs/memory.md, on any machine
"""

import argparse
import gc
import importlib.util
import json
import platform
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from robustdiff.backbones.flux import Flux
from robustdiff.backbones.frozen import FrozenWeights
from robustdiff.backbones.lora import Adapter, LoraSection, inject
from robustdiff.backbones.model import Model
from robustdiff.backbones.stable_diffusion import StableDiffusion
from robustdiff.conditions.condition import Condition
from robustdiff.data.dataset import Batch, ImageDataset
from robustdiff.errors import first_line
from robustdiff.recipe import Recipe
from robustdiff.training.build import Built
from robustdiff.training.trainer import Trainer

K = 3
BATCHES = 2  # that are timed, after one that is not

_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Embeddings(Condition):
    """Random embeddings in place of captions: the same for every sample, with these shapes."""

    def __init__(self, shapes):
        self.shapes = shapes
        self.rows = {}

    def to(self, device):
        generator = torch.Generator(device).manual_seed(0)
        self.rows = {n: torch.randn(1, *s, device=device, generator=generator) for n, s in self.shapes.items()}
        return self

    def batch(self, labels, captions, dropped, geometry=None):
        return {name: row.expand(self.size, *row.shape[1:]) for name, row in self.rows.items()}

    def empty(self):
        return self.rows

    def check(self, num_classes, captions, path):
        return None


class RandomLatents(ImageDataset):
    """Random numbers in place of latents, with a batch of them."""

    def __init__(self, shape, count):
        super().__init__("random", shape, None)
        self.images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        return Batch(self.images[torch.as_tensor(indices)])


@dataclass(frozen=True)
class Network:
    """A network by its configuration, as published, and what it is called with."""

    family: type
    kind: type
    config: dict
    tiny: dict
    scheduler: object
    latents: tuple
    condition: dict


NETWORKS = {
    "SD 1.5": Network(
        StableDiffusion,
        UNet2DConditionModel,
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "attention_head_dim": 2},
        DDPMScheduler(**_STABLE_DIFFUSION),
        (4, 64, 64),
        {"encoder_hidden_states": (77, 768)},
    ),
    "SDXL": Network(
        StableDiffusion,
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "block_out_channels": (8, 8, 8),
            "norm_num_groups": 4,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 2,
        },
        DDPMScheduler(**_STABLE_DIFFUSION),
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)},
    ),
    "Flux": Network(
        Flux,
        FluxTransformer2DModel,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "axes_dims_rope": (2, 2, 4),
        },
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        (16, 64, 64),
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)},
    ),
}


@dataclass(frozen=True)
class Setting:
    """A training: all weights in float32 under bfloat16 autocast, or a LoRA of weights in bfloat16 or fewer bits."""

    network: str
    rank: int | None = None
    batch_size: int = 1
    checkpointing: bool = True
    ema: bool = True
    optimizer: str = "adamw"
    quantize: str | None = None

    @property
    def name(self):
        kind = "full" if self.rank is None else f"LoRA of rank {self.rank}"
        parts = [
            f"{self.network} {kind}",
            "" if self.ema else "no EMA",
            "" if self.optimizer == "adamw" else "8-bit AdamW",
        ]
        parts.append("" if self.quantize is None else f"base in {self.quantize}")
        return ", ".join(part for part in parts if part)


# The most interesting first, in case the time ends.
MEASURED = [
    Setting("SD 1.5", batch_size=4),
    Setting("Flux", rank=16),
    Setting("SD 1.5", batch_size=1),
    Setting("SD 1.5", batch_size=4, checkpointing=False),
    Setting("SD 1.5", batch_size=4, ema=False),
    Setting("SDXL", rank=16),
    Setting("SD 1.5", rank=16, batch_size=4),
    Setting("SD 1.5", batch_size=4, optimizer="adamw8bit"),
    Setting("SD 1.5", batch_size=1, checkpointing=False),
    Setting("SD 1.5", batch_size=1, ema=False),
    Setting("SD 1.5", rank=16, batch_size=4, checkpointing=False),
    Setting("SDXL", rank=16, checkpointing=False),
    Setting("SDXL", rank=16, quantize="int8"),
    Setting("Flux", rank=16, quantize="nf4"),
    Setting("Flux", rank=16, quantize="int8"),
]

COMPUTED = [
    Setting("SD 1.5"),
    Setting("SD 1.5", ema=False),
    Setting("SD 1.5", optimizer="adamw8bit"),
    Setting("SD 1.5", rank=16),
    Setting("SD 1.5", rank=16, quantize="int8"),
    Setting("SDXL"),
    Setting("SDXL", optimizer="adamw8bit", ema=False),
    Setting("SDXL", rank=16),
    Setting("SDXL", rank=16, quantize="int8"),
    Setting("SDXL", rank=16, quantize="nf4"),
    Setting("Flux", rank=16),
    Setting("Flux", rank=16, quantize="int8"),
    Setting("Flux", rank=16, quantize="nf4"),
]


def needs_bitsandbytes(setting):
    return setting.optimizer == "adamw8bit" or setting.quantize == "nf4"


def create(setting, device, tiny=False):
    """Return a network on a device, with random weights, and an adapter if there is one, and the adapter's settings."""
    network = NETWORKS[setting.network]
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if setting.rank is None else torch.bfloat16)
    quantized = setting.quantize is not None and str(device) != "meta"
    try:
        with torch.device("meta" if quantized else device):
            created = network.kind(**{**network.config, **(network.tiny if tiny else {})})
    finally:
        torch.set_default_dtype(held)
    if quantized:  # on the CPU first, as when it is loaded: minutes for Flux
        frozen = FrozenWeights(torch.bfloat16, setting.quantize)
        for name, value in created.state_dict().items():
            frozen(created, name, torch.randn(value.shape) / 50)
        created.to(device)
    lora = None
    if setting.rank is not None:
        seed = None if str(device) == "meta" else 0
        lora = inject(created, LoraSection(rank=setting.rank), setting.network, seed)
        for parameter in created.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return created, lora


def count(network):
    """Return the numbers of trained parameters, of frozen ones, and of those, the weights of linear layers.

    The network may be on the meta device, and is not quantised. The inputs of all linear layers of these networks are
    multiples of 64, so that nf4 quantises all of them.
    """
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    linear = sum(m.weight.numel() for m in network.modules() if type(m) is nn.Linear and not m.weight.requires_grad)
    return trained, sum(p.numel() for p in network.parameters()) - trained, linear


# The bytes of a frozen weight of a linear layer. nf4 has a scale of 8 bits for 64 weights, and one of 32 bits for 256
# scales. int8 has a scale of 16 bits for each row, which is less than a thousandth of the weights.
QUANTIZED_BYTES = {None: 2, "int8": 1, "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256)}


def arithmetic(setting, trained, frozen, linear):
    """Return the bytes of everything but activations."""
    # bitsandbytes: two bytes for each parameter, and two float32 scales for each block of 256.
    moments = 8 if setting.optimizer == "adamw" else 2 + 8 / 256
    parts = {
        "weights": 4 * trained + 2 * (frozen - linear) + round(QUANTIZED_BYTES[setting.quantize] * linear),
        "gradients": 4 * trained,
        "moments": round(moments * trained),
        "average": 4 * trained if setting.ema else 0,
        "bfloat16 copies": 2 * trained,
    }
    return {"parameters": trained + frozen, "trained": trained, **parts, "sum": sum(parts.values())}


def build(setting, accelerator, tiny):
    """Return a trainer of a setting, on random latents."""
    network, lora = create(setting, accelerator.device, tiny)
    given = NETWORKS[setting.network]
    if setting.checkpointing:
        network.enable_gradient_checkpointing()
    condition = Embeddings(given.condition)
    condition.size = setting.batch_size
    model = Model(given.family(network, condition), given.scheduler)
    if lora is not None:
        model.adapter = Adapter(
            base="random", fingerprint="0" * 64, lora=lora, scheduler=type(given.scheduler).__name__
        )
    values = {
        "model": {"name": "pretrained", "path": "random"},
        "adversary": {"name": "free", "steps": K},
        "steps": 10**6,
        "batch_size": setting.batch_size,
        "precision": "bf16",
        "optimizer": setting.optimizer,
        "ema": 0.999 if setting.ema else 0,
    }
    latents = (given.latents[0], 8, 8) if tiny else given.latents
    built = Built(model, model.process, model.kind.objective())
    return Trainer(Recipe.model_validate(values), accelerator, RandomLatents(latents, 2 * setting.batch_size), built)


def measure(setting, device, tiny):
    """Return the numbers of a setting: the arithmetic, and what an update takes."""
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    cuda = accelerator.device.type == "cuda"
    record = {"name": setting.name, **asdict(setting)}
    try:
        trainer = build(setting, accelerator, tiny)
        record["latents"] = trainer.dataset.shape
        record["arithmetic"] = arithmetic(setting, *count(create(replace(setting, quantize=None), "meta", tiny)[0]))
        updates = trainer.updates()
        for _ in range(K):
            next(updates)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            record["bytes_between_updates"] = torch.cuda.memory_allocated()
        start = time.perf_counter()
        for _ in range(K * BATCHES):
            losses, size, _ = next(updates)
        record["loss"], record["delta_norm"] = float(losses["loss"]), float(size)
        record["seconds_per_update"] = (time.perf_counter() - start) / (K * BATCHES)
        if cuda:
            record["largest_bytes"] = torch.cuda.max_memory_allocated()
            record["largest_bytes_reserved"] = torch.cuda.max_memory_reserved()
    except Exception as error:  # the other settings are measured all the same
        traceback.print_exc()
        record["failed"] = f"{type(error).__name__}: {first_line(error)[:200]}"
    accelerator.free_memory()
    return record


def gigabytes(number):
    return f"{number / 1e9:.2f}"


def table():
    """Return the lines of a table of the arithmetic, in Markdown."""
    heads = ["training", "parameters", "trained", "weights", "gradients", "moments", "EMA", "bf16 copies", "sum"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    networks = {(setting.network, setting.rank): setting for setting in COMPUTED}
    counts = {key: count(create(setting, "meta")[0]) for key, setting in networks.items()}
    for setting in COMPUTED:
        numbers = arithmetic(setting, *counts[setting.network, setting.rank])
        cells = [setting.name, f"{numbers['parameters'] / 1e6:,.1f} M", f"{numbers['trained'] / 1e6:,.1f} M"]
        cells += [gigabytes(number) for number in list(numbers.values())[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arithmetic", action="store_true", help="print the table of the arithmetic, and stop")
    parser.add_argument("--seconds", type=float, default=80, help="begin no setting after this time")
    parser.add_argument("--only", type=int, default=len(MEASURED), help="the number of settings, the first ones")
    parser.add_argument("--tiny", action="store_true", help="networks of no use, on the CPU, to see whether this runs")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON, after each setting")
    options = parser.parse_args(arguments)
    if options.arithmetic:
        print("\n".join(table()))
        return
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("there is no GPU: give --arithmetic, or --tiny")
    device = "cpu" if options.tiny else "cuda"
    result = {
        "device": "CPU" if options.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "K": K,
        "tiny": options.tiny,
        "settings": [],
    }
    start = time.perf_counter()
    for setting in MEASURED[: options.only]:
        if options.tiny:
            setting = replace(setting, batch_size=1)
        if time.perf_counter() - start > options.seconds:
            record = {"name": setting.name, **asdict(setting), "failed": f"not begun within {options.seconds:g} s"}
        elif (setting.optimizer == "adamw8bit" or setting.quantize == "nf4") and importlib.util.find_spec(
            "bitsandbytes"
        ) is None:
            record = {"name": setting.name, **asdict(setting), "failed": "bitsandbytes is not installed"}
        else:
            record = measure(setting, device, options.tiny)
            gc.collect()
            torch.cuda.empty_cache()
        result["settings"].append(record)
        what = f"{setting.name}, batch {setting.batch_size}, checkpointing {'on' if setting.checkpointing else 'off'}"
        if "failed" in record:
            print(f"{what}: {record['failed']}", flush=True)
        else:
            largest = record.get("largest_bytes")
            held = "" if largest is None else f"{gigabytes(largest)} GB, "
            print(f"{what}: {held}{record['seconds_per_update']:.3f} s per update", flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
