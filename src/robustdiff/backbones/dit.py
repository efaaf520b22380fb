"""Class-conditional ``DiTTransformer2DModel`` of diffusers on the latents of a VAE (DiTPipeline).

DiT is the transformer of Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, arXiv 2212.09748. Its
last class is the null class. With a learned variance it has 2C output channels.

DiTPipeline takes the class 1000 for the null class. A network of K < 1000 classes is therefore stored with the
embeddings of 1000, of which those from K on are the null class's, and with K as ``_num_classes`` in its configuration.
They are cut off when the network is loaded. (diffusers preserves fields that begin with an underscore, and ignores
them.)

In training, the label embedding of diffusers drops labels at random, independently in each block. This is disabled
here: the condition drops labels, once for the whole network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustdiff.backbones.backbone import BACKBONES, Backbone, BackboneSection
from robustdiff.codecs.codec import Codec, Shape
from robustdiff.codecs.vae import VAE, check_latent_channels, check_unshifted, pipeline_vae
from robustdiff.conditions.condition import Condition
from robustdiff.conditions.labels import Labels
from robustdiff.errors import InputError
from robustdiff.loading import (
    Components,
    Place,
    check_depth,
    check_forward,
    component,
    load_network,
    read_config,
    shown,
)
from robustdiff.section import MOST_PARAMETERS, Fraction, Width

__all__ = ["DiT", "DiTSection", "exported", "load_transformer"]

_Network = TypeVar("_Network", bound=nn.Module)

_NULL_CLASS = 1000  # of DiTPipeline
_EMBEDDINGS = "class_embedder.embedding_table.weight"

_LARGEST_SIZE = 512  # in latents: 4096 pixels with a VAE of factor 8


class DiTSection(BackboneSection):
    """A new DiT, initialised as in the paper so that each block is the identity."""

    name: Literal["dit"] = "dit"
    condition_dropout: Fraction = Field(
        0.1, description="fraction of labels replaced by the null class, for classifier-free guidance; 0: none"
    )
    layers: int = Field(12, ge=1, le=256, description="number of transformer blocks")
    heads: int = Field(6, ge=1, le=256, description="number of attention heads")
    head_width: Width = Field(64, description="channels of an attention head")
    patch: int = Field(2, ge=1, le=64, description="side of a patch, which is one token")

    @model_validator(mode="after")
    def _bounded(self) -> DiTSection:
        # Parameters of a block over width²: attention 4, feed-forward layers 8, modulation 6, time embedding 1.
        size = self.layers * 19.0 * (self.heads * self.head_width) ** 2
        if size > MOST_PARAMETERS:
            raise ValueError(
                f"model.layers, model.heads and model.head_width make a network of some {size:.0e} parameters, and at "
                f"most {MOST_PARAMETERS:.0e} are made: choose smaller ones"
            )
        if self.heads * self.head_width % 4:
            raise ValueError("model.heads times model.head_width must be a multiple of 4, for the positions")
        return self

    def build(self, shape: Shape, num_classes: int | None, learned_variance: bool) -> DiT:
        """Create a new DiT for inputs of one shape.

        Raises:
            InputError: If the shape is not square, its side is not a multiple of the patch, or there are no labels.
        """
        channels, height, width = shape
        if height != width or height % self.patch:
            raise InputError(
                f"a DiT with model.patch={self.patch} cannot take {height}×{width}: set data.size so that it takes a "
                "square of whole patches"
            )
        if num_classes is None:
            raise InputError("model=dit needs labels, and this data has none: choose data that has them")
        network = DiTTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_width,
            in_channels=channels,
            out_channels=2 * channels if learned_variance else channels,
            num_layers=self.layers,
            sample_size=height,
            patch_size=self.patch,
            num_embeds_ada_norm=num_classes,
        )
        _initialise(network)
        return DiT(network)


def _initialise(network: DiTTransformer2DModel) -> None:
    """Initialise a network as the reference implementation of DiT does."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.pos_embed.proj.weight.view(len(network.pos_embed.proj.weight), -1))
    nn.init.zeros_(network.pos_embed.proj.bias)
    for block in network.transformer_blocks:
        embedding = block.norm1.emb
        nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (network.proj_out_1, network.proj_out_2):
        nn.init.zeros_(layer.weight)


@BACKBONES.register("dit")
class DiT(Backbone):
    """A ``DiTTransformer2DModel`` on latents.

    Args:
        network: The network.
        names: The names of the classes by number, as in ``model_index.json``; None without names.
    """

    section = DiTSection
    part = "transformer"
    classes: ClassVar[dict[tuple[str, str], type[nn.Module]]] = {
        ("diffusers", "DiTTransformer2DModel"): DiTTransformer2DModel,
        ("diffusers", "Transformer2DModel"): DiTTransformer2DModel,  # before diffusers 0.29
    }
    stores: ClassVar[frozenset[str]] = frozenset({"vae"})
    others: ClassVar[frozenset[str]] = frozenset({"vae", "id2label"})
    square: ClassVar[bool] = True

    def __init__(self, network: Any, names: dict[str, str] | None = None) -> None:
        super().__init__(network)
        self.names = names
        for block in network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @classmethod
    def load(
        cls, folder: Path, components: Components, size: int | None, place: Place | None = None
    ) -> tuple[DiT, Codec]:
        network, codec = load_transformer(folder, components, DiTTransformer2DModel, _check, size, place)
        index = folder / "model_index.json"
        names = read_config(index).get("id2label")
        if names is not None and not (
            isinstance(names, dict) and all(key.isdecimal() and isinstance(name, str) for key, name in names.items())
        ):
            raise InputError(f"{index}: id2label is {shown(names)}, not names of classes: correct it")
        return cls(network, names), codec

    def pipeline(self, network: nn.Module, scheduler: Any, codec: Codec, condition: Condition) -> Any:
        pipeline = DiTPipeline(network, codec.components["vae"], exported(scheduler))
        if self.names is not None:
            pipeline.register_to_config(id2label=self.names)
        return pipeline

    def stored(self, network: nn.Module) -> nn.Module:
        config: Any = network.config
        classes = config.num_embeds_ada_norm
        if classes >= _NULL_CLASS:
            return network
        with torch.device("meta"):
            wide = DiTTransformer2DModel.from_config(config, num_embeds_ada_norm=_NULL_CLASS)
        state = network.state_dict()
        for name, value in state.items():
            if name.endswith(_EMBEDDINGS):
                state[name] = torch.cat([value, value[-1:].expand(_NULL_CLASS - classes, -1)])
        wide.load_state_dict(state, assign=True)
        wide.register_to_config(_num_classes=classes)
        return wide

    def check_codec(self, codec: Codec, path: str) -> None:
        super().check_codec(codec, path)
        check_unshifted(codec, path)

    def condition(self) -> Condition:
        return Labels(self.network.config.num_embeds_ada_norm + 1, null=True)

    @property
    def multiple(self) -> int:
        """The side of the network's patches."""
        return int(self.network.config.patch_size)


def exported(scheduler: Any) -> Any:
    """Return the scheduler for a pipeline without the learned variance: DDIM instead of DDPM, which requires it."""
    if isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in ("learned", "learned_range"):
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    return scheduler


def _prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Check the size of a transformer before it is created."""
    size, patch, layers = (config.get(name, 1) for name in ("sample_size", "patch_size", "num_layers"))
    if not (type(size) is int and type(patch) is int and 1 <= patch <= size <= _LARGEST_SIZE and size % patch == 0):
        raise InputError(
            f"{path}: sample_size={shown(size)} with patch_size={shown(patch)} is no size of latents: it is a number "
            f"of whole patches, up to {_LARGEST_SIZE}"
        )
    if isinstance(layers, int):
        check_depth(layers, tensors, f"num_layers={layers}", path)


def _cut_classes(config: dict[str, Any], path: Path) -> int | None:
    """Set the number of classes of a network that is stored with more, and return it; None for another network."""
    classes, stored = config.pop("_num_classes", None), config.get("num_embeds_ada_norm")
    if classes is None:
        return None
    if not (type(classes) is int and type(stored) is int and 1 <= classes < stored):
        raise InputError(
            f"{path}: _num_classes={shown(classes)} is no number of classes below num_embeds_ada_norm={shown(stored)}: "
            "save the model again"
        )
    config["num_embeds_ada_norm"] = classes
    return classes


def _cut_embeddings(state: dict[str, Tensor], classes: int, source: Path) -> dict[str, Tensor]:
    """Return weights without the embeddings after the null class, all of which must be that of the null class."""
    cut = dict(state)
    for name, value in state.items():
        if name.endswith(_EMBEDDINGS):
            if (
                value.ndim != 2
                or len(value) <= classes
                or not torch.equal(value[classes:], value[classes].expand_as(value[classes:]))
            ):
                raise InputError(
                    f"{source}: {name} has other rows after {classes} classes than that of the null class, against "
                    "_num_classes in config.json: save the model again"
                )
            cut[name] = value[: classes + 1].clone()
    return cut


def _check(network: DiTTransformer2DModel, path: Path) -> None:
    config = network.config
    labels = torch.zeros(1, dtype=torch.long, device="meta")
    check_forward(
        lambda x, t: network(x, timestep=t, class_labels=labels),
        (config.in_channels, config.sample_size, config.sample_size),
        path,
        doubled=True,
    )


def load_transformer(
    folder: Path,
    components: Components,
    kind: type[_Network],
    check: Callable[[_Network, Path], None],
    size: int | None,
    place: Place | None,
) -> tuple[_Network, VAE]:
    """Load the transformer of a pipeline, which has a fixed size, and its VAE.

    Args:
        folder: The pipeline folder.
        components: The components of the pipeline.
        kind: The class of the transformer.
        check: A check of the transformer on the meta device, as for :func:`robustdiff.loading.load_network`.
        size: The requested side of the images in pixels, if any.
        place: The function that places the weights, as for :func:`robustdiff.loading.load_network`.

    Raises:
        InputError: If one of them is missing or cannot be read, or they do not fit each other or the size.
    """
    classes: int | None = None

    def prepare(config: dict[str, Any], tensors: int, path: Path) -> None:
        nonlocal classes
        _prepare(config, tensors, path)
        classes = _cut_classes(config, path)

    def adapt(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
        return state if classes is None else _cut_embeddings(state, classes, source)

    network = load_network(
        component(folder, "transformer"),
        kind,
        aliases=("Transformer2DModel",),
        prepare=prepare,
        adapt=adapt,
        check=check,
        place=place,
    )
    index = folder / "model_index.json"
    codec = pipeline_vae(folder, components)
    check_unshifted(codec, index)
    config: Any = network.config
    check_latent_channels(codec, config.in_channels, index)
    height = codec.decoded_shape((config.in_channels, config.sample_size, config.sample_size))[1]
    if size not in (None, height):
        raise InputError(f"size {size} is not for this model: its positions are those of {height}×{height} pixels")
    return network, codec
