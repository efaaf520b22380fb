"""HTML by which results show themselves in notebooks (the method ``_repr_html_`` of their classes).

All text is escaped, since names come from files and the command line.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustdiff.errors import printable

__all__ = ["html_image", "html_table"]


def _escaped(text: object) -> str:
    return html.escape(printable(str(text)))


def html_table(caption: str, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as HTML; the first column heads the rows."""
    head = "".join(f'<th scope="col">{_escaped(name)}</th>' if name else "<td></td>" for name in heading)
    body = "".join(
        f'<tr><th scope="row">{_escaped(first)}</th>{"".join(f"<td>{_escaped(value)}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table><caption>{_escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_image(pixels: NDArray[np.uint8], alt: str) -> str:
    """Return an image, uint8 (H, W, 1) or (H, W, 3), as HTML that holds it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{_escaped(alt)}">' + (
        f"<figcaption>{_escaped(alt)}</figcaption></figure>"
    )
