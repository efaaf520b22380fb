"""The part of the HTML page on a study: its page (:mod:`robustdiff.report.page`) with charts that show their numbers.

The page's Markdown is rendered without links, images and HTML of its own, which text from files could hold. Its figures
of FID and of samples are replaced by interactive ones; the others are embedded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from robustdiff.files import scratch_folder
from robustdiff.report.charts import Chart, Point, Series, draw
from robustdiff.report.figures import samples_name
from robustdiff.report.levels import fid_interval
from robustdiff.report.page import page_parts, read_picture
from robustdiff.report.pictures import Gallery, encode, gallery_of_rows
from robustdiff.study.analysis import levels, values
from robustdiff.study.schema import Study
from robustdiff.study.store import Results, read_results

__all__ = ["Block", "StudySection", "study_section"]

_FIGURE = re.compile(r"!\[(?P<caption>.*)\]\((?P<path>.*)\)")
_DETAILS = {
    "<details><summary>All cells</summary>": Markup("<details><summary>All cells</summary>"),
    "</details>": Markup("</details>"),
}


@dataclass(frozen=True)
class Block:
    """A part of the page: rendered text, charts, a gallery, or an embedded figure with its caption."""

    text: str = ""  # of the renderer, which escapes
    charts: tuple[Chart, ...] = ()
    gallery: Gallery | None = None
    figure: str = ""
    caption: str = ""
    width: int = 0


@dataclass(frozen=True)
class StudySection:
    """A study: its title, its parts, its headings by their anchors, and the steps that the gallery begins with."""

    title: str
    blocks: list[Block]
    headings: dict[str, str]
    middle: int


def _renderer() -> MarkdownIt:
    """Return a renderer of headings, paragraphs, lists, tables, emphasis and code alone."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])

    def table_open(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        caption = escape(env["caption"])
        region = f'<div class="scroll" tabindex="0" role="group" aria-label="{caption}">'
        return f"{region}<table><caption><span>{caption}</span></caption>"

    def cell(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        first = tokens[index - 1].type == "tr_open"
        if tokens[index].type == "th_open":
            return '<th scope="col">' if tokens[index + 1].content else "<td>"
        return '<th scope="row">' if first else "<td>"

    def cell_end(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        heading = tokens[index].type == "th_close"
        filled = tokens[index - 1].content if heading else tokens[index - 3].type == "tr_open"
        return "</th>" if filled else "</td>"

    markdown.add_render_rule("table_open", table_open)
    markdown.add_render_rule("table_close", lambda *_: "</table></div>")
    for kind in ("th", "td"):
        markdown.add_render_rule(f"{kind}_open", cell)
        markdown.add_render_rule(f"{kind}_close", cell_end)
    return markdown


def _fid_charts(results: Results) -> tuple[Chart, ...]:
    """Return the charts of FID against steps, one for each sampler, a line for each method and reference.

    Methods with one number of steps are left out, unless all have one.
    """
    charts = []
    counts = {m: len({steps for method, _, _, steps in results.cells if method == m}) for m in results.methods}
    methods = [method for method in results.methods if counts[method] > 1 or max(counts.values()) == 1]
    for sampler in results.samplers:
        series = []
        for method in methods:
            points = []
            for steps in results.steps:
                if found := values(results, method, sampler, steps):
                    ends = (min(found), max(found)) if len(found) > 1 else None
                    points.append(Point(steps, float(np.mean(found)), ends))
            series.append(Series(method, points))
        beside: dict[str, list[Point]] = {}
        for (name, own, steps), record in levels(results, beside=True).items():
            if own == sampler:
                beside.setdefault(name, []).append(Point(steps, record["numbers"]["fid"], fid_interval(record)))
        series += [Series(f"{name}, as it is", points) for name, points in beside.items()]
        title = f"FID against steps, {sampler}: mean and range over seeds"
        y_title = "FID (lower is better)"
        series = [one for one in series if one.points]
        charts.append(
            draw(title, "steps", y_title, series, show=lambda v: f"{v:.2f}", log_x=True, log_y=True, only_steps=True)
        )
    return tuple(charts)


def _replacements(results: Results) -> dict[str, Block]:
    """Return what stands for figures of the page, by their names."""
    found = {"fid": Block(charts=_fid_charts(results))}
    rows = {
        (sampler, steps, method): read_picture(path)
        for (method, sampler, steps), path in results.pictures.items()
        if sampler in results.samplers
    }
    middle = results.middle_steps
    shown = [s for s in results.samplers if any((s, middle, method) in rows for method in results.study.methods)]
    for sampler in shown:  # the page has a figure for each, and one gallery has all
        found[samples_name(sampler)] = Block()
    if shown:
        note = "All methods, first seed. Image i of each network starts from the same noise."
        found[samples_name(shown[0])] = Block(gallery=gallery_of_rows(rows, note))
    return found


def study_section(study: Study, folder: Path) -> StudySection:
    """Return the part of the page on a study, from its folder.

    Raises:
        InputError: If the baseline has no cells, or a file is damaged.
    """
    results = read_results(study, folder)
    markdown, replaced = _renderer(), _replacements(results)
    blocks, headings = [], dict[str, str]()
    with scratch_folder() as scratch:
        figures = scratch / "figures"
        heading = study.title
        for part in page_parts(results, figures)[1:]:
            figure = _FIGURE.fullmatch(part)
            if part in _DETAILS:
                blocks.append(Block(_DETAILS[part]))
            elif figure is not None:
                path = figures / Path(unquote(figure["path"])).name
                blocks.append(replaced.get(path.stem) or _embedded(path, figure["caption"]))
            else:
                if part.startswith("## "):
                    heading = part.removeprefix("## ")
                    headings[f"study-{len(headings)}"] = heading
                blocks.append(Block(_rendered(markdown, part, heading, f"study-{len(headings) - 1}")))
    return StudySection(study.title, blocks, headings, results.middle_steps)


def _embedded(path: Path, caption: str) -> Block:
    """Return a figure of the page, which is drawn with 1.5 pixels for each of a screen's."""
    pixels = read_picture(path)
    return Block(figure=encode(pixels, lossless=True), caption=caption, width=pixels.shape[1] * 2 // 3)


def _rendered(markdown: MarkdownIt, part: str, heading: str, anchor: str) -> Markup:
    """Return a part of the page as HTML, with its headings one level lower."""
    first = part.split("\n", 1)[0].strip("|").split("|", 1)[0].strip() if part.startswith("|") else ""
    tokens = markdown.parse(part)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{int(token.tag[1]) + 1}"
            if token.nesting == 1:
                token.attrSet("id", anchor)
    caption = f"{heading}: {first}" if first else heading
    return Markup(markdown.renderer.render(tokens, markdown.options, {"caption": caption}))
