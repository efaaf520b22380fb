"""Captions as the condition: the base class of text encoders, with a cache of embeddings in memory and on disk.

A caption is encoded once, on its own, into one row of each tensor that the network takes, such as the embeddings of its
tokens and their mask. Rows are stored exactly, in the type in which the encoder computes them. A stored row is a
safetensors file of all tensors of a caption without their trailing zeros, preceded by an HMAC of its name and contents.

On disk a caption has a file of its own, in a folder for each set of encoders. The name of the folder is an HMAC of the
weights and configurations of the encoders, of the tokenizers and of the settings, and the name of the file is an HMAC
of the caption, both with a key of the user. A change of any of them gives another file, and files of other users are
not read. A file that does not match its HMAC is damaged, and computed again. Files are written atomically, so that an
interrupted computation is continued, and several processes can compute and read embeddings at once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from robustdiff.conditions.condition import Condition
from robustdiff.encoders import load_encoder, load_part, transformers_class
from robustdiff.errors import InputError, RunError, printable
from robustdiff.files import STALE, atomic_write, cache_folder, claim_folder, open_regular, remove_leftovers, user_key
from robustdiff.loading import read_index
from robustdiff.progress import SILENT, Progress
from robustdiff.weights import digest_state

__all__ = ["TextCondition", "load_text_encoder", "load_tokenizer"]

logger = logging.getLogger(__name__)

_BATCH = 32
_MOST_BYTES = 2**32  # size of the cache in memory
_SIGNATURE = 32  # bytes

# Entries of a configuration that do not change what an encoder computes.
_NO_SETTINGS = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}
# Entries of a tokenizer that its calls change.
_OF_CALLS = {"truncation", "padding"}


class TextCondition(Condition):
    """The condition of a network that takes embeddings of captions.

    Encoders are put into eval mode, and their parameters do not require gradients.

    Args:
        tokenizers: The tokenizers of transformers, by their names in a pipeline folder.
        encoders: The text encoders of transformers, by their names in a pipeline folder.
        settings: The other values that the embeddings depend on, such as the number of tokens.

    Raises:
        InputError: If an encoder embeds fewer tokens than its tokenizer, which has the same place in its mapping, has.
    """

    def __init__(self, tokenizers: Mapping[str, Any], encoders: Mapping[str, Any], **settings: object) -> None:
        self.tokenizers, self.encoders, self.settings = dict(tokenizers), dict(encoders), settings
        for (name, tokenizer), encoder in zip(self.tokenizers.items(), self.encoders.values(), strict=True):
            if len(tokenizer) > encoder.config.vocab_size:
                raise InputError(
                    f"{name} has {len(tokenizer)} tokens and its text encoder embeds {encoder.config.vocab_size}: give "
                    "the two that belong together"
                )
            encoder.eval().requires_grad_(False)
        self.device = torch.device("cpu")
        self._encoding_device = self.device
        self._rows: dict[str, bytes] = {}
        self._bytes = 0
        self._unwritable: str | None = None  # why nothing more is kept on disk
        self._warned: set[str] = set()

    @abstractmethod
    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the arguments of the network for texts, without gradients.

        Args:
            texts: The texts, as :meth:`normalise` returned them, at least one.

        Returns:
            Tensors by argument of the network, with one row for each text. The shape of a row is the same for all
            texts, and a row does not depend on the other texts.
        """

    def normalise(self, text: str) -> str:
        """Return a caption as it is encoded; captions that become equal are encoded once."""
        return text

    @property
    def components(self) -> dict[str, Any]:
        return {**self.tokenizers, **self.encoders}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    @property
    def takes_captions(self) -> bool:
        return True

    @property
    def droppable(self) -> bool:
        return True

    def to(self, device: torch.device | str) -> TextCondition:
        """Return the condition, with :meth:`batch` returning its tensors on a device.

        The encoders follow when they first encode there: captions that are cached take no memory for encoders.
        """
        self.device = self._encoding_device = torch.device(device)
        return self

    def park(self) -> None:
        """Move the encoders to the CPU, where captions that are not cached are then encoded.

        Embeddings are still returned on the device of :meth:`to`.
        """
        self._encoding_device = torch.device("cpu")
        for encoder in self.encoders.values():
            encoder.to("cpu")

    def batch(
        self,
        labels: Tensor | None,
        captions: Sequence[str] | None,
        dropped: Tensor | None,
        geometry: Tensor | None = None,
    ) -> dict[str, Any]:
        if captions is None:
            raise InputError("this model is conditioned on captions: give them")
        given = self.embed(captions)
        if dropped is None:
            return given
        empty = self.empty()
        mask = {name: dropped.to(self.device).view(-1, *[1] * (value.dim() - 1)) for name, value in given.items()}
        return {name: torch.where(mask[name], empty[name], value) for name, value in given.items()}

    def empty(self) -> dict[str, Any]:
        return self.embed([""])

    def check(self, num_classes: int | None, captions: bool, path: str) -> None:
        if not captions:
            raise InputError(
                f"the model {path} needs captions, and this data has none: for an imagefolder write them to "
                'metadata.jsonl, {"file_name": …, "text": …} in each line'
            )

    def fingerprint(self) -> str:
        """Return the sha256 of the encoders, the tokenizers and the settings, which all embeddings depend on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{type(self).__name__} {sorted(self.settings.items())}".encode())
        for name, tokenizer in self.tokenizers.items():
            state = {k: v for k, v in json.loads(tokenizer.backend_tokenizer.to_str()).items() if k not in _OF_CALLS}
            state |= {"pad": tokenizer.pad_token_id, "side": tokenizer.padding_side, "cut": tokenizer.truncation_side}
            digest.update(f"{name} {json.dumps(state, sort_keys=True)}\n".encode())
        for name, encoder in self.encoders.items():
            config = {k: v for k, v in encoder.config.to_dict().items() if k not in _NO_SETTINGS}
            digest.update(f"{name} {json.dumps(config, sort_keys=True, default=repr)}\n".encode())
            digest_state(digest, encoder.state_dict())
        return digest.hexdigest()

    # -- embeddings ------------------------------------------------------------------------------------------

    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the arguments of the network for texts, with one row each, on the device, floats in float32.

        Raises:
            InputError: If a text has characters that are no Unicode text.
            RunError: If an embedding is not finite.
        """
        names = [self._normal(text) for text in texts]
        found = {name: self._rows.get(name) or self._read(name) for name in dict.fromkeys(names)}
        packed = {name: row for name, row in found.items() if row is not None}
        missing = [name for name, row in found.items() if row is None]
        for start in range(0, len(missing), _BATCH):
            packed |= self._compute(missing[start : start + _BATCH])
        unpacked = {name: _unpack(row) for name, row in packed.items()}
        rows = [unpacked[name] for name in names]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        on_gpu = self.device.type == "cuda"  # which copies page-locked memory without the host waiting
        if on_gpu:
            stacked = {name: value.pin_memory() for name, value in stacked.items()}
        moved = {name: value.to(self.device, non_blocking=on_gpu) for name, value in stacked.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in moved.items()}

    def prepare(self, texts: Iterable[str], progress: Progress = SILENT) -> None:
        """Compute and cache the embeddings of texts that are neither in memory nor on disk.

        Raises:
            InputError: If a text has characters that are no Unicode text.
            RunError: If an embedding is not finite, or the cache on disk cannot be written and memory has no room.
        """
        names = dict.fromkeys(self._normal(text) for text in texts)
        missing = [name for name in names if name not in self._rows and not self._is_kept(name)]
        if not missing:
            return
        progress.begin("captions", len(missing))
        for start in range(0, len(missing), _BATCH):
            batch, held = missing[start : start + _BATCH], self._bytes
            size = sum(map(len, self._compute(batch).values())) / len(batch)
            more = size * (len(missing) - start)
            if self._unwritable is not None and held + more > _MOST_BYTES:
                raise RunError(
                    f"the embeddings of captions take {_shown(more)} more, memory has room for "
                    f"{_shown(_MOST_BYTES - held)}, and they are not kept on disk ({self._unwritable}): free some "
                    "space, or set ROBUSTDIFF_CACHE to a folder on another disk"
                )
            progress.advance(len(batch))

    def tokens(self, name: str, texts: list[str], length: int, warn: bool = True) -> Any:
        """Return the tokens of texts, padded and cut to a length.

        Args:
            name: The name of the tokenizer.
            texts: The texts.
            length: The length.
            warn: Whether to warn of the first text that is cut.
        """
        tokenizer = self.tokenizers[name]
        if warn and name not in self._warned:
            whole = tokenizer(texts, verbose=False).input_ids
            cut = next((text for text, ids in zip(texts, whole, strict=True) if len(ids) > length), None)
            if cut is not None:
                self._warned.add(name)
                encoder = name.replace("tokenizer", "text_encoder")
                shown = printable(cut[:100])
                logger.warning("captions are cut after %d tokens by %s, such as %r", length, encoder, shown)
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    def _normal(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the caption {printable(text[:100])!r} is not UTF-8: correct it") from None
        return self.normalise(text)

    @torch.no_grad()
    def _compute(self, texts: list[str]) -> dict[str, bytes]:
        """Return the packed rows of texts, and keep them on disk and, up to the limit, in memory."""
        for encoder in self.encoders.values():
            encoder.to(self._encoding_device)
        with torch.autocast(self._encoding_device.type, enabled=False):
            given = {name: value.cpu() for name, value in self.encode(texts).items()}
        for name, value in given.items():
            if not (finite := value.isfinite().flatten(1).all(1)).all():
                text = texts[int((~finite).nonzero()[0])]
                raise RunError(
                    f"{name} of the caption {printable(text[:100])!r} is not finite: take the text encoder in float32"
                )
        rows = {text: _pack({name: value[i] for name, value in given.items()}) for i, text in enumerate(texts)}
        self._write(rows)
        for text, row in rows.items():
            self._remember(text, row)
        return rows

    def _remember(self, text: str, row: bytes) -> None:
        if self._bytes + len(row) <= _MOST_BYTES:
            self._rows[text] = row
            self._bytes += len(row)

    # -- the cache on disk -----------------------------------------------------------------------------------

    @cached_property
    def _key(self) -> bytes:
        return user_key()

    @cached_property
    def _folder(self) -> Path | None:
        """The folder of these encoders in the cache, or None if there is none and it cannot be created."""
        name = hmac.new(self._key, f"1 {self.fingerprint()}".encode(), hashlib.sha256).hexdigest()
        folder = cache_folder() / "captions" / name
        try:
            claim_folder(folder, "a cache of embeddings")
            remove_leftovers(folder, "[0-9a-f]{64}", age=STALE)  # other processes may write now
        except OSError as error:
            self._stop_writing(folder, error)
            return None
        return folder

    def _stop_writing(self, folder: Path, error: OSError) -> None:
        """Keep embeddings in memory only from here on, while those on disk are still read."""
        self._unwritable = f"{printable(folder)}: {error.strerror or error}"
        logger.warning("embeddings of captions are not kept in %s", self._unwritable)

    def _path(self, folder: Path, text: str) -> Path:
        return folder / hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def _sign(self, path: Path, row: bytes) -> bytes:
        return hmac.digest(self._key, f"{path.parent.name}/{path.name} ".encode() + row, "sha256")

    def _is_kept(self, text: str) -> bool:
        return self._folder is not None and self._path(self._folder, text).is_file()

    def _read(self, text: str) -> bytes | None:
        if self._folder is None:
            return None
        path = self._path(self._folder, text)
        try:
            with open_regular(path) as file:
                signature, row = file.read(_SIGNATURE), file.read()
        except FileNotFoundError:
            return None
        if not hmac.compare_digest(signature, self._sign(path, row)):
            logger.warning("%s is damaged, and is computed again", printable(path))
            return None
        self._remember(text, row)
        return row

    def _write(self, rows: Mapping[str, bytes]) -> None:
        folder = self._folder
        if folder is None or self._unwritable is not None:
            return
        try:
            for text, row in rows.items():
                path = self._path(folder, text)
                with atomic_write(path) as file:
                    file.write(self._sign(path, row) + row)
        except OSError as error:  # such as a full disk
            self._stop_writing(folder, error)


def _shown(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _pack(row: Mapping[str, Tensor]) -> bytes:
    """Return the tensors of a caption as a safetensors file, without the zeros at the end of their first dimension."""
    kept, lengths = dict[str, Tensor](), dict[str, str]()
    for name, value in row.items():
        used = value.reshape(len(value), -1).ne(0).any(1).nonzero()
        kept[name] = value[: int(used[-1]) + 1 if len(used) else 0].clone(memory_format=torch.contiguous_format)
        lengths[name] = str(len(value))
    return safetensors.torch.save(kept, lengths)


def _unpack(packed: bytes) -> dict[str, Tensor]:
    """Return the tensors that :func:`_pack` was given."""
    size = int.from_bytes(packed[:8], "little")
    lengths = json.loads(packed[8 : 8 + size])["__metadata__"]
    row: dict[str, Tensor] = {}
    for name, value in safetensors.torch.load(packed).items():
        row[name] = value.new_zeros(int(lengths[name]), *value.shape[1:])
        row[name][: len(value)] = value
    return row


# -- components of transformers ----------------------------------------------------------------------------------


def load_tokenizer(folder: Path, part: str, kinds: Sequence[str]) -> Any:
    """Load a tokenizer of a pipeline folder, from files in the folder alone.

    Args:
        folder: The pipeline folder.
        part: The name of the component, such as "tokenizer".
        kinds: The supported classes of transformers.

    Raises:
        InputError: If transformers is not installed, the component is missing or of another class, or it cannot be
            read.
    """
    return load_part(*_class_of(folder, part, kinds), "tokenizer")


def load_text_encoder(folder: Path, part: str, kinds: Sequence[str]) -> Any:
    """Load a text encoder of a pipeline folder, in its own type (:func:`robustdiff.encoders.load_encoder`).

    Args:
        folder: The pipeline folder.
        part: The name of the component, such as "text_encoder".
        kinds: The supported classes of transformers.

    Raises:
        InputError: If transformers is not installed, the component is missing or of another class, it cannot be read,
            or a weight is missing or not finite.
    """
    return load_encoder(*_class_of(folder, part, kinds), "text encoder")


def _class_of(folder: Path, part: str, kinds: Sequence[str]) -> tuple[Path, Any]:
    """Return the folder of a component and its class, one of the given classes of transformers."""
    transformers_class(kinds[0], "a model that is conditioned on text")  # without it nothing else matters
    components = read_index(folder)
    if part not in components or not (folder / part).is_dir():
        raise InputError(f"{printable(folder)} has no {part}: download the model again, with all of its folders")
    library, kind = components[part]
    if library != "transformers" or kind not in kinds:
        index = printable(folder / "model_index.json")
        raise InputError(f"{index}: {part} is {kind} of {library}, and only {kinds[0]} is supported")
    return folder / part, transformers_class(kind, "a model that is conditioned on text")
