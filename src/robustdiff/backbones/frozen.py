r"""Weights that are not trained, of a LoRA's base, of a teacher and in sampling, held in few bits.

A weight W of a linear layer or a convolution is only ever multiplied by, so that its memory can be reduced to

- 2 bytes each in bfloat16 or float16, to which autocast would convert it for each product: results are the same;
- ``int8``, 1 byte each: W_ij ≈ s_i q_ij with integers |q_ij| ≤ 127 and one scale s_i = max_j |W_ij| / 127 for each row;
- ``nf4``, about 4.13 bits each: the 4-bit NormalFloat of Dettmers et al., "QLoRA: Efficient Finetuning of Quantized
  LLMs", NeurIPS 2023, arXiv 2305.14314, with a scale for each block of 64, itself in 8 bits, by bitsandbytes.

int8 and nf4 are for linear layers alone; convolutions and biases then have 2 bytes. Normalisations and embeddings stay
in float32. Products are of the dequantised weight Ŵ, y = x Ŵᵀ + b, and the gradient of the input is exactly that of
this function, ∂L/∂x = ∂L/∂y Ŵ, so that the ascent in δ is that of the network which is there. (LLM.int8(),
bitsandbytes' layer of 8 bits, rounds x as well and keeps it outside of autograd, where gradient checkpointing does not
free it.)

Weights are converted one tensor at a time. The fingerprint of the base is that of the weights in its files, in float32:
it is the same however they are held.
"""

from __future__ import annotations

import hashlib
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustdiff.errors import InputError, first_line, installing
from robustdiff.weights import update_digest

__all__ = ["AUTOCAST", "FrozenWeights", "Int8Linear", "Quantization", "hold"]

Quantization = Literal["int8", "nf4"]
"""The types of ``model.quantize``."""

AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose weights and biases autocast converts."""

_BLOCK = 64  # weights with one scale in nf4; the CPU kernels of bitsandbytes take whole blocks in a row only


class FrozenWeights:
    """Place weights into a network on the meta device as they are to be held.

    An instance is the argument ``place`` of :func:`robustdiff.loading.load_network`, for one network. If ``dtype`` has
    2 bytes, the network can be called under autocast in that type alone.

    Args:
        dtype: The floating-point type of the weights of linear layers and convolutions that are not quantised, and of
            products with those that are.
        quantize: The type of the weights of linear layers; None leaves them in ``dtype``.

    Raises:
        InputError: If bitsandbytes is needed and is not installed.
    """

    def __init__(self, dtype: torch.dtype, quantize: Quantization | None = None) -> None:
        self.dtype, self.quantize = dtype, quantize
        self._bitsandbytes = _bitsandbytes() if quantize == "nf4" else None
        self._digest, self._layers, self._first = hashlib.sha256(), 0, True

    @property
    def fingerprint(self) -> str:
        """The sha256 of the weights that were placed, in float32 and in their order."""
        return self._digest.hexdigest()

    def __call__(self, network: nn.Module, name: str, value: Tensor) -> None:
        """Place one weight or buffer.

        Args:
            network: The network, on the meta device.
            name: The name of the weight. They come in the order of the network's state.
            value: The value, in float32 on the CPU.

        Raises:
            InputError: If the value has numbers beyond the type in which it is held.
        """
        update_digest(self._digest, value)
        self._place(network, name, value)

    def _place(self, network: nn.Module, name: str, value: Tensor) -> None:
        path, _, last = name.rpartition(".")
        owner = network.get_submodule(path)
        if last in dict(owner.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(owner, last, value)
            return
        # The first parameter stays, since diffusers takes the type of a network from it.
        held = value.to(self.dtype) if isinstance(owner, AUTOCAST) and not self._first else value
        self._first = False
        if not held.isfinite().all():
            raise InputError(f"{name} has numbers beyond {str(self.dtype)[6:]}: choose the precision bf16")
        if self.quantize is None or last != "weight" or type(owner) is not nn.Linear:
            setattr(owner, last, nn.Parameter(held, requires_grad=False))
        elif self.quantize == "int8":
            self._replace(network, path, Int8Linear(value, owner.bias, self.dtype))
        elif value.shape[1] % _BLOCK == 0:
            self._replace(network, path, self._nf4(owner, held))
            network.__dict__["is_loaded_in_4bit"] = True  # by which peft looks for such layers
        else:
            owner.weight = nn.Parameter(held, requires_grad=False)

    def _replace(self, network: nn.Module, path: str, layer: nn.Module) -> None:
        network.set_submodule(path, layer)
        self._layers += 1

    def _nf4(self, layer: nn.Linear, weight: Tensor) -> Any:
        """Return a linear layer of bitsandbytes with a weight in 4 bits, on the CPU, and the bias of a layer."""
        settings = {"compress_statistics": True, "quant_type": "nf4"}
        library: Any = self._bitsandbytes
        with torch.device("meta"):
            quantized = library.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=self.dtype, **settings
            )
        # A GPU quantises 12 billion weights in seconds, and a CPU in minutes.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        quantized.weight = library.nn.Params4bit(weight, requires_grad=False, **settings).to(device).to("cpu")
        quantized.bias = layer.bias
        # On CPUs with AVX512-BF16, a pass without gradients would pack the weight so that it has none afterwards.
        quantized.support_avx512bf16_for_cpu = False
        return quantized

    def check(self, path: str) -> None:
        """Check that a network had layers to quantise.

        Args:
            path: The name of the model in messages.

        Raises:
            InputError: If it had none.
        """
        if self.quantize is not None and self._layers == 0:
            inputs = f" of a multiple of {_BLOCK} inputs" if self.quantize == "nf4" else ""
            raise InputError(
                f"model.quantize: the model {path} has no linear layers{inputs}, and others are not quantised: leave "
                "it out"
            )


def hold(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a network, in float32 on the CPU, to what :class:`FrozenWeights` makes of them.

    Raises:
        InputError: If a weight has numbers beyond the type.
    """
    frozen, state = FrozenWeights(dtype), network.state_dict()
    for name in list(state):
        frozen._place(network, name, state.pop(name))


def _bitsandbytes() -> Any:
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise InputError(
            f"model.quantize=nf4 needs bitsandbytes: {installing('quantize')}; {first_line(error)[:200]}"
        ) from None


class Int8Linear(nn.Linear):
    """A linear layer whose frozen weight is held in 8 bits, with a scale for each row.

    Args:
        weight: The weight, with shape (outputs, inputs).
        bias: The bias, with shape (outputs,), or None.
        dtype: The type of the products and of the output.

    Attributes:
        weight: The integers, in int8.
        scale: The scales, with shape (outputs, 1), in the type of the products.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        outputs, inputs = weight.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        # Rounded to the type of the products first, so that the integers make up for it.
        scale = (weight.abs().amax(1, keepdim=True) / 127).to(dtype).clamp_min(torch.finfo(dtype).tiny)
        self.weight = nn.Parameter((weight / scale.float()).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x.to(self.scale.dtype), self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x Ŵᵀ, for whose gradient the integers are kept, and not Ŵ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype) * scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ (weight.to(gradient.dtype) * scale), None, None
