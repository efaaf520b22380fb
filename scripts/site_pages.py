"""Make the pages of the documentation that nobody writes: a hook of mkdocs, and python scripts/site_pages.py

The command writes two files in docs/reference, which a test compares: recipe.md, whose fields come from their pydantic
descriptions, and command-line.md, from typer. The hook, named in mkdocs.yml, adds the notebook to the site, from its
cells, and CONTRIBUTING.md, SECURITY.md and CHANGELOG.md of the root. Links of a page to files outside docs are adapted.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from robustdiff.section import Section

ROOT = Path(__file__).resolve().parent.parent
OF_ROOT = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOK = "notebooks/first-steps.ipynb"


class NoUnderscores(Extension):
    """Leave underscores alone: x_t and x_{t−1} are names, and emphasis has asterisks."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.delimiters.remove("_")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read formulas as they are written."""
    config.markdown_extensions.append(NoUnderscores())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the pictures of the notebook."""
    made = notebook_page(NOTEBOOK)
    made |= {page: (ROOT / name).read_text(encoding="utf-8") for name, page in OF_ROOT.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt the links to files outside docs: to a page of the site if it has one, and else to the name of the file."""
    of_root = {page: name for name, page in OF_ROOT.items()}
    path = page.file.src_uri
    folder = ROOT if path in of_root else (ROOT / "docs" / path).parent

    def adapt(link: re.Match[str]) -> str:
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        if "://" in target:
            return link[0]
        full = (folder / target).resolve()
        name = full.relative_to(ROOT).as_posix()
        to = OF_ROOT.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if to is not None:
            return f"[{text}]({os.path.relpath(to, os.path.dirname(path) or '.')}{anchor})"
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    return re.sub(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", adapt, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the names that docstrings give in roles (:class:`Name`) as code."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]+)</code>", r"<code>\1</code>", content)


# ------------------------------------------------------------------------------------------------------- the reference


def reference_pages() -> dict[str, str]:
    """Return the pages that are files in docs/reference, by their names."""
    return {"recipe.md": recipe_page(), "command-line.md": command_line_page()}


def recipe_page() -> str:
    """Return the page of the recipe's fields, with the sections of everything that is registered."""
    from robustdiff.backbones.backbone import SECTIONS
    from robustdiff.codecs.codec import CODECS
    from robustdiff.data.registry import DATASETS, DataConfig
    from robustdiff.objectives.objective import OBJECTIVES
    from robustdiff.perturbation import ADVERSARIES
    from robustdiff.recipe import Recipe, shipped_recipes

    kinds: dict[str, Mapping[str, type[Section]]] = {
        "model": SECTIONS,
        "codec": CODECS,
        "objective": OBJECTIVES,
        "adversary": ADVERSARIES,
    }
    lines = [
        "# Fields of a recipe",
        "",
        "A recipe is a YAML file with these fields, which have defaults. A nested field is named with dots on the "
        "command line, `--set adversary.step_size=0.5`; a section may be given by its name alone, `adversary: none`. "
        "A field that is unknown, out of its range or without effect is refused before anything is written.",
        "",
        f"The recipes that come with the package are named without a path: {_code(shipped_recipes())}.",
        "",
        "## The recipe itself",
        "",
        *_table(Recipe, skip={*kinds, *dict(_sections(Recipe))}),
    ]
    for field, info in Recipe.model_fields.items():
        section = dict(_sections(Recipe)).get(field)
        if field not in kinds and section is None:
            continue
        lines += ["", f"## {field}", ""]
        if info.description:
            lines += [f"{info.description[:1].upper()}{info.description[1:]}.", ""]
        if field not in kinds:
            assert section is not None
            lines += [_first_line(section), "", *_table(section), *_nested(section, field)]
            if section is DataConfig:
                lines += ["", f"The datasets are {_code(DATASETS)}; `hf:NAME` is one of the Hugging Face Hub."]
                lines += ["A dataset adds options of its own: see [the how-to](../own-data.md)."]
            continue
        shown: set[type[BaseModel]] = set()
        for name, kind in kinds[field].items():
            lines += ["", f"### {field}: {name}", "", _first_line(kind), "", *_table(kind)]
            lines += _nested(kind, field, shown)
    return "\n".join(lines) + "\n"


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0].replace("``", "`")


def _code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sections(section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the fields that are sections themselves, with their classes."""
    for name, info in section.model_fields.items():
        for candidate in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, Section) and candidate.model_fields:
                yield name, candidate


def _nested(section: type[BaseModel], path: str, shown: set[type[BaseModel]] | None = None) -> list[str]:
    """Return the tables of the sections within a section, each once."""
    lines, shown = [], set() if shown is None else shown
    for name, inner in _sections(section):
        if inner not in shown:
            shown.add(inner)
            lines += ["", f"### {path}.{name}", "", _first_line(inner), "", *_table(inner)]
            lines += _nested(inner, f"{path}.{name}", shown)
    return lines


def _table(section: type[BaseModel], skip: Collection[str] = ()) -> list[str]:
    schema = section.model_json_schema()
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if name in skip or (name == "name" and "const" in field):
            continue
        required = name in schema.get("required", ())
        default = "required" if required else _default(field.get("default"))
        kind = "a section" if name in dict(_sections(section)) else _type(field)
        rows.append(f"| `{name}` | {kind} | {default} | {field.get('description', '')} |")
    return rows if len(rows) > 2 else ["It has no options."]


def _default(value: Any) -> str:
    if value is None:
        return ""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(field: Mapping[str, Any]) -> str:
    """Return the type and the range of a field, from its JSON schema."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"] if one.get("type") != "null"))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type")
    if kind == "array":
        inner = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_type(inner)}"
    names = {"boolean": "true or false", "string": "text", "object": "a section", None: "value"}
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    parts = [names.get(kind, str(kind))]
    if low is not None:
        parts.append(f"{'>' if 'exclusiveMinimum' in field else '≥'}\u00a0{_number(low)}")
    if high is not None:
        parts.append(f"{'<' if 'exclusiveMaximum' in field else '≤'}\u00a0{_number(high)}")
    return parts[0] + (f", {' and '.join(parts[1:])}" if parts[1:] else "")


def _number(value: float) -> str:
    """Return a bound as it is written: 65,536, and 2⁶³ for what has too many digits."""
    whole = int(value)
    if whole != value or abs(whole) < 10**9:
        return f"{value:,}" if whole != value else f"{whole:,}"
    for base in (10, 2):
        for exponent in range(9, 64):
            if whole == base**exponent:
                return f"{base}" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(exponent))
    return f"{whole:,}"


# ----------------------------------------------------------------------------------------------------- the command line


def command_line_page() -> str:
    """Return the page of the commands, as ``--help`` describes them."""
    from typer.main import get_command

    from robustdiff.cli import app

    group: Any = get_command(app)
    lines = [
        "# The command line",
        "",
        "The exit code is 0 for success, 2 for bad input, with one line on stderr that names it and the remedy, and 1 "
        "for a failure of a run. Ctrl-C saves first.",
    ]
    for name, command in sorted(group.commands.items()):
        context = command.context_class(command, info_name=f"robustdiff {name}")
        lines += ["", f"## {name}", "", f"```text\n{_usage(command.get_usage(context))}\n```", ""]
        lines += [_escape(command.help), "", "| option | |", "|---|---|"]
        for parameter in command.params:
            if record := parameter.get_help_record(context):
                usage, text = (" ".join(part.split()) for part in record)
                lines.append(f"| <code>{_escape(usage)}</code> | {_escape(text)} |")
    return "\n".join(lines) + "\n"


def _usage(text: str) -> str:
    return " ".join(text.split()).removeprefix("Usage: ")


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")


# --------------------------------------------------------------------------------------------------------- the notebook


def notebook_page(path: str) -> dict[str, str | bytes]:
    """Return the page of a notebook with the outputs that it holds, and its pictures, by their paths in the site."""
    cells = json.loads((ROOT / "docs" / path).read_text(encoding="utf-8"))["cells"]
    name = Path(path).name
    pictures: dict[str, str | bytes] = {}
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = path.replace(".ipynb", f"-{len(pictures) + 1}.png")
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({Path(picture).name})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.insert(1, f"[The notebook]({name}){{ download }} as a file.")
    return {path.replace(".ipynb", ".md"): "\n\n".join(parts) + "\n", **pictures}


if __name__ == "__main__":
    for name, text in reference_pages().items():
        (ROOT / "docs" / "reference" / name).write_text(text, encoding="utf-8")
