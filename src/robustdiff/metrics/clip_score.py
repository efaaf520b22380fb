r"""The CLIP score (Hessel et al., EMNLP 2021, arXiv 2104.08718): how well images fit the captions they were made for.

For the embeddings v of an image and c of its caption under CLIP (Radford et al., ICML 2021, arXiv 2103.00020),

    CLIP score = 100 · cos(v, c) ∈ [−100, 100]

and the score of a set is the mean over its images. This is the number that papers on text-to-image models report.
Hessel et al. scale by 2.5 instead of 100 and take max(cos, 0); here negative values stay, so that the mean is unbiased
and differences between models are differences of means. Scores can be compared only under the same CLIP.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from robustdiff.encoders import check_model_type, load_encoder, load_part, transformers_class
from robustdiff.errors import InputError, first_line, printable
from robustdiff.loading import read_config, shown
from robustdiff.metrics.bootstrap import Array, block_of, block_weights
from robustdiff.metrics.metric import METRICS, Batch, Metric, Need, Number
from robustdiff.metrics.reference import Reference

__all__ = ["ClipScore", "load_clip_pair", "prepare"]

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "weights"
_BLOCKS = 1000
_LARGEST_SIDE = 4096
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")


@METRICS.register("clip-score")
class ClipScore(Metric):
    """The mean of 100·cos between the CLIP embeddings of each image and of its caption.

    The score of every image is kept, and replicates resample images: over 1000 blocks, or, with fewer images, each by
    itself. CLIP runs in float32, and captions longer than its context are cut, with a warning.

    Args:
        real: Not used.
        device: The device of CLIP.
        folder: The folder of a ``CLIPModel`` of transformers, with its tokenizer and image processor, or the name of
            one that comes with this package. Nothing is fetched from the network, and weights are read from
            safetensors.

    Raises:
        InputError: If transformers is not installed, or the folder is not a CLIP or lacks a part.
    """

    numbers = (Number("clip_score", "CLIP score", ".2f", "higher"),)
    needs: ClassVar[Need] = "captions"
    takes: ClassVar[str | None] = "the folder of a CLIP model"

    def __init__(
        self, real: Reference | None = None, device: torch.device | str = "cpu", folder: str | Path = ""
    ) -> None:
        self._model, self._tokenizer, self._processor = load_clip_pair(folder)
        self._model.to(device)
        self._warned = False
        super().__init__(real, device)

    def reset(self) -> None:
        self._index: list[NDArray[np.int64]] = []
        self._scores: list[Array] = []

    def update(self, batch: Batch) -> None:
        if batch.captions is None:
            raise InputError("clip-score compares images with their captions, and these images have none: give them")
        self._index.append(batch.start + np.arange(len(batch.images), dtype=np.int64))
        self._scores.append(self.scores(batch.images, batch.captions))

    @torch.no_grad()
    def scores(self, images: torch.Tensor, captions: Sequence[str]) -> Array:
        """Return the score of each image, float64 (B,).

        Args:
            images: uint8 (B, C, H, W) with C = 1 or 3.
            captions: The B captions.

        Raises:
            InputError: If the images have another number of channels.
        """
        pixels = prepare(self._processor, images).to(self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            # The model's own forward, since the type that get_text_features returns depends on the version.
            output = self._model(pixel_values=pixels, **self._tokens(captions))
        images, texts = (found.cpu().double() for found in (output.image_embeds, output.text_embeds))
        cosines: Array = (images * texts).sum(dim=-1).numpy()
        return 100 * cosines

    def _tokens(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        length = self._model.config.text_config.max_position_embeddings
        texts = list(captions)
        if not self._warned:
            longer = self._tokenizer(texts, truncation=True, max_length=length + 1).input_ids
            cut = [text for text, ids in zip(texts, longer, strict=True) if len(ids) > length]
            if cut:
                self._warned = True
                text = printable(cut[0][:100])
                logger.warning("clip-score: captions are cut after %d tokens, such as %r", length, text)
        given = self._tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        given = given.to(self.device)
        return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the arrays ``index``, int64 (n,), and ``scores``, float64 (n,), in the order of the index.

        Raises:
            ValueError: If an index was added twice.
        """
        index = np.concatenate([np.empty(0, np.int64), *self._index])
        scores = np.concatenate([np.empty(0), *self._scores])
        order = np.argsort(index, kind="stable")
        if len(np.unique(index)) < len(index):
            raise ValueError("the same image index came twice; give each batch and each process its own")
        self._index, self._scores = [index[order]], [scores[order]]
        return {"index": index[order], "scores": scores[order]}

    def merge_state(self, state: Any) -> None:
        self._index.append(state["index"])
        self._scores.append(state["scores"])

    def result(self) -> dict[str, float | None]:
        scores = self.state()["scores"]
        if len(scores) == 0:
            raise InputError("no images: the mean of nothing is not defined; update first")
        return {"clip_score": float(scores.mean())}

    @property
    def blocks(self) -> int:
        return len(np.unique(block_of(self.state()["index"], _BLOCKS)))

    def replicates(self) -> dict[str, Array]:
        state = self.state()
        block = np.unique(block_of(state["index"], _BLOCKS), return_inverse=True)[1]
        if self.blocks < 2:
            return {}
        weights = block_weights(self.blocks)
        return {"clip_score": (weights @ np.bincount(block, state["scores"])) / (weights @ np.bincount(block))}


def prepare(processor: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the input of CLIP's vision model, float32 (B, 3, S, S), for images.

    Args:
        processor: CLIP's image processor.
        images: uint8 (B, C, H, W) with C = 1 or 3.

    Raises:
        InputError: If the images have another number of channels.
    """
    if images.shape[1] not in (1, 3):
        raise InputError(f"CLIP: images of {images.shape[1]} channels; give 1 or 3")
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    given = processor(images=[Image.fromarray(image) for image in pixels], return_tensors="pt")
    return given["pixel_values"].to(torch.float32)


def load_clip_pair(folder: str | Path) -> tuple[Any, Any, Any]:
    """Return the model, float32 on the CPU in eval mode, the tokenizer and the image processor of a CLIP folder.

    Only these classes of transformers are instantiated, whatever the folder names.

    Args:
        folder: The folder, or the name of one that comes with this package.

    Raises:
        InputError: If transformers is not installed, or the folder is not a CLIP or lacks a part.
    """
    shipped = SHIPPED / folder
    is_shipped = "/" not in str(folder) and (shipped / "config.json").is_file()  # ./NAME names another folder
    folder = shipped if is_shipped else Path(folder)
    kind = transformers_class("CLIPModel", "CLIP")
    _check_files(folder)
    tokenizer = load_part(folder, transformers_class("CLIPTokenizer", "CLIP"), "tokenizer of CLIP")
    processor = load_part(folder, _processor_class(), "image processor of CLIP")
    model = load_encoder(folder, kind, "model of CLIP", torch.float32)
    _check_parts(folder, model, tokenizer, processor)
    return model, tokenizer, processor


def _check_files(folder: Path) -> None:
    """Check that a folder is that of a CLIP model, and has a tokenizer and the configuration of an image processor."""
    if not folder.is_dir():
        raise InputError(f"{printable(folder)}: no such folder; give that of a CLIP model, as clip-score=FOLDER")
    check_model_type(folder, "clip", "CLIP")
    words = [{"tokenizer.json"}, {"vocab.json", "merges.txt"}]
    if not any(all((folder / name).is_file() for name in names) for names in words):
        raise InputError(
            f"{printable(folder)} has no tokenizer (tokenizer.json, or vocab.json and merges.txt): download the CLIP "
            "model again, with all of its files"
        )
    names = [name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).is_file()]
    if not names:
        raise InputError(
            f"{printable(folder)} has no preprocessor_config.json, by which images are prepared: download the CLIP "
            "model again, with all of its files"
        )
    config = read_config(folder / names[0])
    config = config.get("image_processor", config) if names[0] == "processor_config.json" else config
    config = config if isinstance(config, dict) else {}
    kind = config.get("image_processor_type", config.get("feature_extractor_type", _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        raise InputError(f"{printable(folder / names[0])} is of {shown(kind)}, not of CLIP's image processor")
    sides = [config.get("size"), config.get("crop_size")]
    numbers = [n for side in sides for n in (side.values() if isinstance(side, dict) else [side]) if n is not None]
    if not all(type(n) is int and 1 <= n <= _LARGEST_SIDE for n in numbers):
        raise InputError(
            f"{printable(folder / names[0])}: size {shown(sides[0])} and crop_size {shown(sides[1])} are not numbers "
            f"of pixels from 1 to {_LARGEST_SIDE}"
        )


def _processor_class() -> Any:
    """Return CLIP's image processor that computes with Pillow and does not need torchvision."""
    import transformers

    # Before transformers had two, the one with Pillow had the plain name.
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def _check_parts(folder: Path, model: Any, tokenizer: Any, processor: Any) -> None:
    """Check that the tokenizer and the image processor are of the model."""
    text, side = model.config.text_config, model.config.vision_config.image_size
    largest = max(tokenizer.get_vocab().values())
    if largest >= text.vocab_size:
        raise InputError(
            f"{printable(folder)}: the tokenizer has the token {largest}, and the model knows {text.vocab_size} "
            "tokens: download the CLIP model again"
        )
    # The model with the number 2 takes the largest token for the last one, as the first releases were saved.
    if text.eos_token_id not in (2, tokenizer.eos_token_id):
        logger.warning(
            "clip-score: in %s captions end in the token %s, and the model looks for %s: all have one embedding",
            printable(folder),
            tokenizer.eos_token_id,
            text.eos_token_id,
        )
    try:
        shape = tuple(processor(images=[Image.new("RGB", (24, 32))], return_tensors="pt")["pixel_values"].shape)
    except Exception as error:  # for a malformed configuration, the processor may raise any error
        raise InputError(
            f"{printable(folder)}: preprocessor_config.json is malformed ({printable(first_line(error)[:300])}): "
            "download the CLIP model again"
        ) from None
    if shape != (1, 3, side, side):
        raise InputError(
            f"{printable(folder)}: the image processor makes {'×'.join(map(str, shape[1:]))}, and the model takes "
            f"3×{side}×{side}: download the CLIP model again"
        )
