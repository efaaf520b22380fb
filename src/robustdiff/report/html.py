"""The report: one HTML file on runs and a study, with everything that it shows inside it.

The page loads nothing: a Content-Security-Policy allows only its own style sheet and script, by their hashes, and
images in the page. All text is escaped by the template (Jinja2), and control characters are shown as escapes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustdiff import __version__
from robustdiff.errors import InputError, printable
from robustdiff.files import atomic_write, make_folder
from robustdiff.progress import SILENT, Progress
from robustdiff.report.pictures import Gallery, Pictures, gallery, sample_checkpoints
from robustdiff.report.run_sections import (
    cost_table,
    curves,
    evaluation_parts,
    mismatch_tables,
    reproduction,
    settings_tables,
    steps_charts,
    summary,
    watched,
)
from robustdiff.report.runs import Evaluated, Mismatches, RunFiles, read_evaluation, read_mismatch, read_runs
from robustdiff.report.study_section import StudySection, study_section
from robustdiff.study.schema import load_study, shipped_studies

__all__ = ["write_report"]

MOST_BYTES = 10 * 2**20
_FILES = Path(__file__).parent / "template"


def write_report(
    sources: Sequence[str],
    output: Path,
    study_folder: Path | None = None,
    results: Sequence[Path] = (),
    *,
    pictures: Pictures | None = None,
    device: torch.device | str = "cpu",
    on_read: Callable[[str], None] = lambda message: None,
    progress: Progress = SILENT,
) -> int:
    """Write the report of runs, finished or not, and of a study, and sample the runs' checkpoints for its pictures.

    Args:
        sources: Folders of runs, and at most one study: a file that ends in .yaml, or one that comes with the package.
        output: The HTML file.
        study_folder: The study's folder; by default ``studies/NAME``.
        results: Folders that `evaluate` or `mismatch` wrote.
        pictures: The settings of the pictures of the runs' checkpoints; None for no pictures.
        device: The device of the pictures' sampling.
        on_read: A function that is called with a message before data or a checkpoint that a recipe names is read.
        progress: The receiver of the progress.

    Returns:
        The size of the file in bytes.

    Raises:
        InputError: If a source is no run and no study, a file is malformed, a setting does not suit a checkpoint, or
            the page has more than 10 MB. Nothing is written then.
    """
    if output.suffix != ".html":
        raise InputError(f"{printable(output)}: give a file that ends in .html")
    files = [source for source in sources if _is_study(source)]
    if len(files) > 1:
        raise InputError(f"{printable(files[1])}: a report has at most one study: make another report of it")
    if study_folder is not None and not files:
        raise InputError("the folder of a study is given, and no study file: name the file, or leave the folder out")
    runs = read_runs([source for source in sources if source not in files])
    if pictures is not None and not (runs and pictures.num):
        _check_unused(pictures)
        pictures = None
    evaluated, mismatches = _read_results(results, runs)
    study: StudySection | None = None
    of_study = [files[0], str(study_folder or Path("studies") / Path(files[0]).stem)] if files else []
    if of_study:
        study = study_section(load_study(of_study[0]), Path(of_study[1]))
    shown, notes = None, list[str]()
    if pictures is not None:
        found = sample_checkpoints(runs, pictures, device=device, on_read=on_read, progress=progress)
        notes = found.notes
        if found.images:
            note = f"Sampled for this report: {pictures.num} images of each checkpoint from the same noise, seed "
            shown = gallery(found.images, f"{note}{pictures.seed}.", found.captions)
    own = [*sources, "--output", str(output)]
    own += [] if study_folder is None else ["--folder", str(study_folder)]
    own += [word for folder in results for word in ("--results", str(folder))]
    if pictures is not None and shown is not None:  # as they were chosen here, whatever the defaults are then
        own += _picture_options(replace(pictures, samplers=shown.samplers, steps=shown.steps))
    commands = reproduction(runs, of_study, own)
    page = _render(runs, study, evaluated, mismatches, shown, notes, commands)
    if len(page) > MOST_BYTES:
        raise InputError(
            f"{printable(output)} would have {len(page) / 2**20:.1f} MB, and a report has at most {MOST_BYTES >> 20}: "
            "give fewer runs, or a smaller --num"
        )
    make_folder(output.parent)
    with atomic_write(output) as file:
        file.write(page)
    return len(page)


def _check_unused(pictures: Pictures) -> None:
    """Check that no settings are given for pictures that are not made."""
    chosen = {
        "sampler": pictures.samplers,
        "steps": pictures.steps,
        "guidance": pictures.guidance is not None,
        "prompt": pictures.prompts,
    }
    if unused := [name for name, value in chosen.items() if value]:
        raise InputError(f"--{unused[0]} is for the pictures of runs, and the report has none: leave it out")


def _picture_options(pictures: Pictures) -> list[str]:
    """Return the options that make the pictures again."""
    options = ["--num", str(pictures.num), "--seed", str(pictures.seed), "--sampler", ",".join(pictures.samplers)]
    options += ["--steps", ",".join(map(str, pictures.steps))]
    options += [] if pictures.guidance is None else ["--guidance", f"{pictures.guidance:g}"]
    return [*options, *(word for prompt in pictures.prompts for word in ("--prompt", prompt))]


def _is_study(source: str) -> bool:
    """Return whether a source is a study: a YAML file, or the name of a study that comes with the package."""
    if Path(source).suffix in (".yaml", ".yml"):
        return True
    return "/" not in source and not Path(source).exists() and source in shipped_studies()


def _read_results(
    folders: Sequence[Path], runs: Sequence[RunFiles]
) -> tuple[dict[str, Evaluated], dict[str, Mismatches]]:
    """Return what `evaluate` and `mismatch` wrote into folders, and the mismatches of runs, by name."""
    evaluated: dict[str, Evaluated] = {}
    mismatches = {run.name: run.mismatch for run in runs if run.mismatch is not None}
    for folder in folders:
        one, other = read_evaluation(folder), read_mismatch(folder)
        if one is None and other is None:
            raise InputError(
                f"{printable(folder)} has no result.json and no mismatch.json: give a folder that robustdiff evaluate "
                "or mismatch wrote by --output"
            )
        if one is not None:
            evaluated[str(folder)] = one
        if other is not None:
            mismatches[str(folder)] = other
    return evaluated, mismatches


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shown(value: Any) -> Any:
    """Return a value for the page: text without control characters, unless it is of the template's own making."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _render(
    runs: Sequence[RunFiles],
    study: StudySection | None,
    evaluated: dict[str, Evaluated],
    mismatches: dict[str, Mismatches],
    pictures: Gallery | None,
    notes: list[str],
    commands: list[str],
) -> bytes:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("robustdiff.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, js = ((_FILES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    titles = [*(run.name for run in runs), *([study.title] if study else [])]
    charts, charts_note = steps_charts(runs)
    page = environment.get_template("report.html").render(
        title=", ".join(titles) or ", ".join(map(str, [*evaluated, *mismatches])),
        version=__version__,
        css=Markup(css),
        js=Markup(js),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(js)}; "
        "base-uri 'none'; form-action 'none'",
        runs=runs,
        summaries=[summary(run) for run in runs],
        steps_charts=charts,
        steps_note=charts_note,
        watches=[found for run in runs if (found := watched(run, len(runs))) is not None],
        curves=curves(runs),
        gallery=pictures,
        gallery_notes=notes,
        study=study,
        evaluations=[evaluation_parts(name, found) for name, found in evaluated.items()],
        mismatches=mismatch_tables(mismatches),
        costs=cost_table(runs) if runs else None,
        settings=settings_tables(runs) if runs else [],
        recipes=[(run.name, run.recipe.to_yaml().splitlines()) for run in runs],
        commands=commands,
    )
    return page.encode("utf-8", "backslashreplace")
