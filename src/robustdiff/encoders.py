"""Loading of encoders, tokenizers and image processors of transformers from folders, without running their code.

The caller names the class, whatever the folder says, and weights are read from safetensors only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustdiff.errors import InputError, first_line, installing, printable
from robustdiff.loading import quietly, read_config, shown

__all__ = ["check_model_type", "load_encoder", "load_part", "transformers_class"]

_WEIGHTS = re.compile(r"model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def transformers_class(kind: str, user: str) -> Any:
    """Return a class of transformers by its name.

    Args:
        kind: The name.
        user: The part of this package that needs it, for messages.

    Raises:
        InputError: If transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(f"{user} needs transformers: {installing('text')}") from None
    return getattr(transformers, kind)


def check_model_type(folder: Path, kind: str, title: str) -> None:
    """Check that a folder is that of a model of transformers, by its ``config.json``.

    Args:
        folder: The folder.
        kind: The ``model_type`` of such models.
        title: Their name in messages.

    Raises:
        InputError: If it is not.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{printable(folder)} has no config.json: it is not the folder of a {title} model")
    found = read_config(folder / "config.json").get("model_type")
    if found != kind:
        raise InputError(f"{printable(folder)}: config.json is of {shown(found)}, not of a {title} model ({kind})")


def load_part(path: Path, kind: Any, what: str) -> Any:
    """Load a tokenizer or an image processor.

    Args:
        path: The folder.
        kind: The class of transformers.
        what: The word for it in messages, such as "tokenizer".

    Raises:
        InputError: If it cannot be read.
    """
    with _reading(path, what):
        return kind.from_pretrained(str(path), **_LOCAL)


def load_encoder(path: Path, kind: Any, what: str, dtype: Any = "auto") -> Any:
    """Load a model, on the CPU, in eval mode, with parameters that require no gradients.

    A variant of the weights, such as ``fp16``, is read only if there are no others.

    Args:
        path: The folder.
        kind: The class of transformers.
        what: The word for it in messages, such as "text encoder".
        dtype: The type of the weights; by default that which the configuration names, or else that of the file.

    Raises:
        InputError: If it cannot be read, or a weight is missing or not finite.
    """
    names = [entry.name for entry in path.iterdir()]
    variants = {match[1] for name in names if (match := _WEIGHTS.fullmatch(name))}
    variant = None if None in variants or not variants else min(variants)
    with _reading(path, what):
        model, info = kind.from_pretrained(
            str(path), use_safetensors=True, dtype=dtype, output_loading_info=True, variant=variant, **_LOCAL
        )
    if info["missing_keys"]:
        raise InputError(f"{printable(path)} lacks the weights of {min(info['missing_keys'])}: download it again")
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise InputError(f"{printable(path)}: {name} has values that are not finite: download it again")
    return model.eval().requires_grad_(False)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Report any error of transformers in one line, without its progress bars and warnings."""
    with quietly():
        try:
            yield
        except Exception as error:  # for an untrusted file, transformers may raise any error
            reason = printable(first_line(error)[:300])
            raise InputError(
                f"{printable(path)}: the {what} cannot be read ({reason}): download it again; weights must be "
                "safetensors"
            ) from None
