"""Make src/robustdiff/data/emoji.webp and emoji.json from Noto's emoji.

    npm pack emoji-datasource-google@16.0.0 @iconify-json/noto@1.2.9
    python scripts/make_emoji.py --images emoji-datasource-google-16.0.0.tgz --names iconify-json-noto-1.2.9.tgz

The images are the 64-pixel ones of emoji-datasource-google, in the order of the Unicode consortium's list; the names
are CLDR's, from @iconify-json/noto. Flags, components (skin tones and hair), variants of a skin tone and images that
equal an earlier one are left out.

`emoji.webp` is a lossless picture of all of them, 48 in a row, in which pixels of alpha 0 are black. `emoji.json` lists
them in the same order. UNSEEN of them, drawn with seed 0, are marked as held out entirely; every other one holds out
one background, and the backgrounds are held out equally often.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustdiff.files import atomic_write

FOLDER = Path(__file__).parents[1] / "src/robustdiff/data"
COLUMNS = 48
UNSEEN = 64
BACKGROUNDS = {
    "white": (255, 255, 255),
    "light grey": (200, 203, 208),
    "black": (20, 20, 24),
    "pale pink": (250, 196, 208),
    "pale yellow": (252, 240, 170),
    "pale green": (190, 232, 186),
    "pale blue": (178, 214, 248),
    "lavender": (210, 194, 244),
    "orange": (246, 152, 62),
    "teal": (32, 140, 140),
    "navy": (30, 44, 104),
    "maroon": (116, 28, 44),
}


def pixels(data: bytes) -> NDArray[np.uint8]:
    """Return an image as uint8 (64, 64, 4), with black where alpha is 0."""
    rgba = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
    rgba[rgba[..., 3] == 0] = 0
    return rgba


def phrase(name: str, category: str) -> str:
    """Return a name with an article where it is the name of one thing: "a red apple", "an anchor", "eyes"."""
    last = name.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us"))
    if plural or category == "Symbols" or name[0].isdigit():
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def read(images: Path, names: Path) -> tuple[list[NDArray[np.uint8]], list[dict[str, Any]]]:
    """Return the pixels and the entries of all emoji that are kept."""
    with tarfile.open(names) as archive:
        titles = json.load(archive.extractfile("package/chars.json"))  # type: ignore[arg-type]
    kept: list[NDArray[np.uint8]] = []
    entries: list[dict[str, Any]] = []
    known: set[bytes] = set()
    with tarfile.open(images) as archive:
        listed = json.load(archive.extractfile("package/emoji.json"))  # type: ignore[arg-type]
        members = {member.name: member for member in archive.getmembers()}
        for emoji in sorted(listed, key=lambda emoji: emoji["sort_order"]):
            category = emoji["category"]
            if category in ("Flags", "Component") or not emoji["has_img_google"]:
                continue
            rgba = pixels(archive.extractfile(members[f"package/img/google/64/{emoji['image']}"]).read())  # type: ignore[union-attr]
            if rgba.tobytes() in known:
                continue
            known.add(rgba.tobytes())
            kept.append(rgba)
            code = emoji["unified"].lower()
            title = titles[code] if code in titles else titles[code.replace("-fe0f", "")]
            name = title.replace("-", " ")
            group = category.lower().replace("&", "and")
            entries.append({"code": code, "name": name, "phrase": phrase(name, category), "group": group})
    return kept, entries


def hold_out(entries: list[dict[str, Any]]) -> None:
    """Mark the entries that are held out, and the background that each of the others holds out."""
    order = np.random.default_rng(0).permutation(len(entries)).tolist()
    colours = list(BACKGROUNDS)
    for position, index in enumerate(order):
        unseen = position < UNSEEN
        entries[index]["held_out"] = "all" if unseen else colours[position % len(colours)]


def atlas(images: list[NDArray[np.uint8]]) -> Image.Image:
    """Return the images in rows of COLUMNS, the last row filled with transparent ones."""
    rows = -(-len(images) // COLUMNS)
    tiles = np.zeros((rows * COLUMNS, 64, 64, 4), np.uint8)
    tiles[: len(images)] = images
    grid = tiles.reshape(rows, COLUMNS, 64, 64, 4).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(rows * 64, COLUMNS * 64, 4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="emoji-datasource-google's archive")
    parser.add_argument("--names", type=Path, required=True, help="@iconify-json/noto's archive")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder of the two files")
    arguments = parser.parse_args()
    images, entries = read(arguments.images, arguments.names)
    hold_out(entries)
    with atomic_write(arguments.output / "emoji.webp") as file:
        atlas(images).save(file, "WEBP", lossless=True, quality=100, method=4, exact=True)
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    text = f'{{"backgrounds": {json.dumps(BACKGROUNDS)},\n "emoji": [\n  {lines}\n]}}\n'
    with atomic_write(arguments.output / "emoji.json") as file:
        file.write(text.encode())
    print(f"{len(images)} emoji, {(arguments.output / 'emoji.webp').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
