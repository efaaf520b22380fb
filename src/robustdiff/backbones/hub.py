"""Pipelines of the Hugging Face Hub, downloaded to its cache, or read from there without a connection.

Only configurations, tokenizers and safetensors of the components in ``model_index.json`` are downloaded, and of a codec
that this package saved beside them. A variant of the weights, such as ``fp16``, is downloaded only for a component
without other weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from robustdiff.errors import InputError, first_line, printable
from robustdiff.loading import read_index

__all__ = ["download", "is_hub_name"]

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NOT_READ = {"safety_checker", "feature_extractor"}
_VARIANTS = ("*.fp16.safetensors", "*.fp16-*", "*.non_ema.safetensors", "*.non_ema-*")


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path has the form "owner/name" of a model of the Hub, and no folder "owner" is there."""
    return _NAME.fullmatch(str(path)) is not None and not Path(path).parent.exists()


def download(name: str, fetch: bool = True) -> Path:
    """Download a pipeline of the Hub to its cache, and return its folder there.

    Without a connection, or with ``HF_HUB_OFFLINE=1``, the folder in the cache is returned as it is.

    Args:
        name: The name, "owner/name".
        fetch: False to read the cache alone, for names that a file gives.

    Raises:
        InputError: If there is no such pipeline, or no access to it, and it is not in the cache.
    """
    folder = _snapshot(name, fetch, ["model_index.json"])
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{printable(name)} of the Hugging Face Hub has no model_index.json: it is no diffusers pipeline"
        )
    parts = [*(part for part in read_index(folder) if part not in _NOT_READ), "codec"]
    kinds = ("json", "txt", "model", "safetensors")
    _snapshot(name, fetch, [f"{part}/*.{kind}" for part in parts for kind in kinds], _VARIANTS)
    # Schedulers and tokenizers have no weights: nothing matches.
    bare = [part for part in parts if not any((folder / part).glob("*.safetensors"))]
    if bare:
        _snapshot(name, fetch, [f"{part}/*.safetensors" for part in bare])
    return folder


def _snapshot(name: str, fetch: bool, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=list(ignored), local_files_only=not fetch
        )
        return Path(folder)
    except RepositoryNotFoundError:
        reason = "the Hugging Face Hub has no model of this name, or it is private: run hf auth login"
    except GatedRepoError:
        reason = f"its authors ask for consent: give it at https://huggingface.co/{name}, and run hf auth login"
    except LocalEntryNotFoundError as error:
        if (partial := getattr(error, "snapshot_path", None)) is not None:  # some of the files are in the cache
            return Path(partial)
        if not fetch:
            raise InputError(
                f"{printable(name)} is not in the Hugging Face Hub's cache, and nothing is downloaded because a file "
                f"names it: run hf download {printable(name)}"
            ) from None
        reason = "the Hugging Face Hub cannot be reached, and its cache does not have the model"
    except Exception as error:  # of the connection, the disk or the name
        reason = f"its download from the Hugging Face Hub failed ({printable(first_line(error)[:300])})"
    raise InputError(f"no folder and no model {printable(name)}: {reason}")
