"""Measure what each choice of kernels gives on a GPU: forward and backward, and forward alone, of one network.

The network is that of ADM's CIFAR-10 checkpoints (dropout 0.3), untrained, on random images of 3×32×32, in bf16.
Each variant is recorded as a CUDA graph and replayed, so that launches cost nothing, except where it says eager:

    layout        channels-last or contiguous activations
    blocks        diffusers' own, or those of `robustdiff.backbones.fused_norm`, with its norm of PyTorch's operations
                  ("own blocks"), compiled by torch.compile ("compiled norms") or in one kernel ("fused norms")
    cudnn search  convolutions by measurement instead of heuristics
    bf16 weights  no weight is cast by autocast
    compiled      each residual block by torch.compile

Errors are those of the output and of the gradient with regard to all parameters and the images, without dropout,
against float32 with diffusers' blocks: ‖v − v_ref‖ / ‖v_ref‖.

    python benchmarks/gpu_kernels.py --out benchmarks/results/gpu_kernels.json --profiles profiles
"""

import copy
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers.models.resnet import ResnetBlock2D
from interleaved import command_line, publish, quartiles
from torch import nn
from torch.nn import functional as F

from robustdiff.backbones import fused_norm
from robustdiff.backbones.adm import AdmFlags, build_adm
from robustdiff.backbones.adm.flags import PRESETS
from robustdiff.backbones.fused_norm import fuse_norms, group_norm, torch_group_norm

TINY = AdmFlags(image_size=32, num_channels=32, num_res_blocks=1, learn_sigma=True, attention_resolutions="8")
CALLS = 5  # in a round
LONGEST = 100  # seconds of a process of its own


def compiled_norm():
    """The norm of PyTorch's operations by torch.compile, once for each shape."""

    @torch.compile(dynamic=False)
    def of_tensors(x, weight, bias, modulation, groups, eps, silu, dtype):
        result = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
            result = result * (1 + scale) + shift
        return (F.silu(result) if silu else result).to(dtype)

    def norm(module, x, modulation=None, silu=True):
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        return of_tensors(x, module.weight, module.bias, modulation, module.num_groups, module.eps, silu, dtype)

    return norm


@dataclass
class Variant:
    """Say how the network is run, and prepare it."""

    norm: object = None
    eager: bool = False
    contiguous: bool = False
    search: bool = False
    bf16: bool = False
    compiled: bool = False
    profiled: bool = False

    def prepare(self, network):
        network = copy.deepcopy(network)
        if self.norm is not None:
            fuse_norms(network, self.norm() if self.norm is compiled_norm else self.norm)
        if self.bf16:
            network = network.to(torch.bfloat16)
        if not self.contiguous:
            network = network.to(memory_format=torch.channels_last)
        for module in network.modules() if self.compiled else ():
            if isinstance(module, ResnetBlock2D):
                module.compile(fullgraph=True, dynamic=False)
        return network


# By importance, since the time may be short.
VARIANTS = {
    "eager channels-last": Variant(eager=True),
    "channels-last": Variant(profiled=True),
    "fused norms": Variant(group_norm, profiled=True),
    "own blocks": Variant(torch_group_norm),
    "fused norms, cudnn search": Variant(group_norm, search=True, profiled=True),
    "compiled norms": Variant(compiled_norm),
    "fused norms, bf16 weights": Variant(group_norm, bf16=True),
    "contiguous": Variant(contiguous=True),
    "eager contiguous": Variant(eager=True, contiguous=True),
    "own blocks, compiled": Variant(torch_group_norm, compiled=True),
    "fused norms, compiled": Variant(group_norm, compiled=True),
    "channels-last, compiled": Variant(compiled=True),
}


def recorded(call, eager):
    """The call, or the replay of its CUDA graph, and the seconds until it was there."""
    start = time.perf_counter()
    if eager:
        call()
        return call, time.perf_counter() - start
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph.replay, time.perf_counter() - start


def speed(call, images, rounds, synchronize):
    """Images per second in each round, with their quartiles."""
    seconds = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        synchronize()
        seconds.append((time.perf_counter() - start) / CALLS)
    return quartiles(images / np.array(seconds[1:]))


class Bench:
    """The network, its images, and the passes."""

    def __init__(self, tiny, batch_size, rounds, profiles):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch_size, self.rounds, self.profiles = batch_size, rounds, profiles
        self.synchronize = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        set_seed(0)
        self.network = build_adm(TINY if tiny else PRESETS["cifar10-adm"]).to(self.device)
        for parameter in self.network.parameters():  # zeros are no measure, and a network of zeros hides errors
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        self.x = torch.randn(2 * batch_size, 3, 32, 32, device=self.device)
        self.t = torch.randint(1000, (2 * batch_size,), device=self.device)

    def run(self, name):
        """Measure a variant, and yield what is found so far."""
        variant = VARIANTS[name]
        torch.backends.cudnn.benchmark = variant.search
        network, found = variant.prepare(self.network).train(), {}
        x = self._images(variant, self.batch_size).requires_grad_()
        t = self.t[: self.batch_size]

        def train():
            network.zero_grad()
            x.grad = None
            with torch.autocast(self.device, torch.bfloat16):
                output = network(x, t).sample
            output.float().square().mean().backward()

        call, found["preparation_seconds"] = recorded(train, variant.eager)
        found["training"] = speed(call, self.batch_size, self.rounds, self.synchronize)
        yield found
        if variant.profiled and self.profiles is not None and self.device == "cuda":
            self._profile(call, name)
        del call
        network.zero_grad()
        found["errors"] = self._errors(network, variant, x, t)
        network.zero_grad()
        network.eval()
        x, t = self._images(variant, 2 * self.batch_size), self.t

        @torch.inference_mode()
        def sample():
            with torch.autocast(self.device, torch.bfloat16):
                network(x, t)

        call, found["sampling_preparation_seconds"] = recorded(sample, variant.eager)
        found["forward"] = speed(call, 2 * self.batch_size, self.rounds, self.synchronize)
        yield found

    def _images(self, variant, size):
        layout = torch.contiguous_format if variant.contiguous else torch.channels_last
        return self.x[:size].clone().contiguous(memory_format=layout)

    def _values(self, network, x, t, autocast):
        """The output, and the gradients as one vector, without dropout."""
        rates = [(module, module.p) for module in network.modules() if isinstance(module, nn.Dropout)]
        for module, _ in rates:
            module.p = 0.0
        leaves = [*network.parameters(), x]
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
            output = network(x, t).sample.float()
        gradients = torch.autograd.grad(output.square().mean(), leaves)
        for module, rate in rates:
            module.p = rate
        return {"output": output.detach(), "gradient": torch.cat([one.float().flatten() for one in gradients[:-1]])} | {
            "input_gradient": gradients[-1]
        }

    def _errors(self, network, variant, x, t):
        if not hasattr(self, "_reference"):
            tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
            self._reference = self._values(copy.deepcopy(self.network).train(), x, t, autocast=False)
            torch.backends.cudnn.allow_tf32 = tf32
        found = self._values(network, x, t, autocast=True)
        return {
            name: {
                "relative": ((found[name] - value).norm() / value.norm()).item(),
                "norm_ratio": (found[name].norm() / value.norm()).item(),
            }
            for name, value in self._reference.items()
        }

    def _profile(self, call, name):
        """Write which kernels three calls spend their time in."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(3):
                call()
            self.synchronize()
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90)
        self.profiles.mkdir(parents=True, exist_ok=True)
        (self.profiles / f"{name}.txt").write_text(table)
        print(table)


def apart(name, options, limit):
    """Measure a variant in a process of its own, which is ended after some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--only", name, "--out", str(out), "--rounds", str(options.rounds)]
        command += ["--batch-size", str(options.batch_size), *(["--tiny"] if options.tiny else [])]
        error = None
        try:
            ended = subprocess.run(command, timeout=limit, capture_output=True, text=True)
            if ended.returncode:
                error = ended.stderr[-500:]
        except subprocess.TimeoutExpired:
            error = f"ended after {limit:.0f} s"
        found = json.loads(out.read_text())["variants"].get(name, {}) if out.exists() else {}
        return found | ({} if error is None or found.get("error") else {"error": error})


def tiles(limit):
    """Time the fused norm for sizes of its tile on three shapes, for some seconds, and print the best sizes.

    Returns:
        Milliseconds of forward and backward by shape, elements, width and warps.
    """
    start, found, totals, repeats = time.perf_counter(), {}, {}, 10
    chosen = fused_norm.ELEMENTS, fused_norm.WIDTH, fused_norm.WARPS
    shapes = ((128, 32, 32, True), (256, 16, 32, True), (48, 16, 8, False))
    sizes = ((2048, 32, 8), (4096, 64, 8), (2048, 64, 8), (1024, 32, 4), (4096, 32, 8), (4096, 64, 16), (2048, 32, 4))
    for elements, width, warps in (*sizes, (8192, 64, 16), (2048, 128, 8)):
        if time.perf_counter() - start > limit:
            break
        fused_norm.ELEMENTS, fused_norm.WIDTH, fused_norm.WARPS = elements, width, warps
        total = 0.0
        for channels, side, groups, modulated in shapes:
            norm = nn.GroupNorm(groups, channels, device="cuda")
            x = torch.randn(128, channels, side, side, device="cuda", dtype=torch.bfloat16)
            x = x.to(memory_format=torch.channels_last).requires_grad_()
            leaves = {"x": x, "offset": torch.randn(channels, device="cuda").requires_grad_()}
            if modulated:
                leaves["modulation"] = torch.randn(128, 2 * channels, device="cuda").bfloat16().requires_grad_()
            times = []
            for backward in (False, True):

                def call(norm=norm, leaves=leaves, backward=backward):
                    for _ in range(repeats):
                        y = fused_norm.triton_group_norm(norm, **leaves)
                        if backward:
                            torch.autograd.grad(y, (*leaves.values(), norm.weight, norm.bias), y.detach())

                replay, _ = recorded(call, False)
                times.append(1000 / speed(replay, 1, 5, torch.cuda.synchronize)["median"] / repeats)
            name = f"{channels}×{side}×{side}, ELEMENTS={elements} WIDTH={width} WARPS={warps}"
            found[name] = {"forward": times[0], "backward": times[1] - times[0]}
            print(f"{name:52}{times[0]:8.4f} ms{times[1] - times[0]:8.4f} ms", flush=True)
            total += times[1]
        totals[f"ELEMENTS={elements} WIDTH={width} WARPS={warps}"] = total
    fused_norm.ELEMENTS, fused_norm.WIDTH, fused_norm.WARPS = chosen
    print("best", min(totals, key=totals.get), flush=True)
    return found


def line(name, found):
    """A variant in a line."""
    parts = [
        f"{key} {found[key]['median']:8.1f} images/s"
        for key in ("training", "forward")
        if isinstance(found.get(key), dict)
    ]
    if "errors" in found:
        parts.append("errors " + " ".join(f"{value['relative']:.1e}" for value in found["errors"].values()))
    if "preparation_seconds" in found:
        parts.append(f"prepared in {found['preparation_seconds']:.1f} s")
    if "error" in found:
        parts.append(found["error"])
    return f"{name:28}{'  '.join(parts)}"


def table(result):
    """The table of a result, for the documentation: images per second, and the error of the gradient."""
    rows = [
        f"| {name} | {found['training']['median']:,.0f} | {found['forward']['median']:,.0f} "
        f"| {found['errors']['gradient']['relative']:.4f} |"
        for name, found in result["variants"].items()
        if "forward" in found
    ]
    head = ["| | forward and backward | forward alone | error of the gradient |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows]) + "\n"


def measure(options):
    """Measure the variants, and publish after each."""
    start = time.perf_counter()
    torch._dynamo.config.recompile_limit = 256
    bench = Bench(options.tiny, options.batch_size, options.rounds, options.profiles)
    cuda = bench.device == "cuda"
    result = {
        "variants": {},
        "settings": {
            "network": "tiny" if options.tiny else "cifar10-adm",
            "batch_size": options.batch_size,
            "forward_batch_size": 2 * options.batch_size,
            "rounds": options.rounds,
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "torch": torch.__version__,
        },
    }

    def note(name, found):
        result["variants"][name] = found
        publish(result, [line(name, found)], options.out)
        sys.stdout.flush()

    for name in [options.only] if options.only else VARIANTS:
        variant, left, found = VARIANTS[name], options.seconds - (time.perf_counter() - start), {}
        if not cuda and not variant.eager:
            note(name, {"error": "needs a GPU"})
        elif left < 10:
            note(name, {"error": "no time left"})
        elif variant.compiled and not options.only:
            note(name, apart(name, options, min(left, LONGEST)))
        else:
            try:
                for found in bench.run(name):
                    note(name, found)
            except Exception as error:
                note(name, found | {"error": f"{type(error).__name__}: {error}"[:500]})
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def main(arguments=None):
    parser = command_line(__doc__.splitlines()[0], rounds=5, batch_size=128)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to see whether this runs")
    parser.add_argument("--seconds", type=float, default=600, help="start no variant later than this")
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant")
    parser.add_argument("--profiles", type=Path, help="write tables of kernels into this folder")
    parser.add_argument("--tiles", type=float, metavar="SECONDS", help="time sizes of the fused norm's tile instead")
    options = parser.parse_args(arguments)
    if options.tiles is None:
        measure(options)
    elif torch.cuda.is_available():
        publish({"tiles": tiles(options.tiles)}, [], options.out)
    else:
        parser.error("--tiles needs a GPU")


if __name__ == "__main__":
    main()
