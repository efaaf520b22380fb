"""Folders import in one direction: each from those before it only, also within functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "robustdiff"

ORDER = [
    {
        "distributed",
        "errors",
        "files",
        "interrupt",
        "notation",
        "notebook",
        "progress",
        "registry",
        "section",
        "workers",
        "yaml_reader",
    },
    {"encoders", "graphs", "kernels", "loading", "weights"},
    {"process", "schedulers"},
    {"perturbation"},
    {"objectives"},
    {"codecs", "conditions"},
    {"data"},
    {"samplers"},
    {"backbones"},
    {"recipe"},
    {"metrics"},
    {"evaluation"},
    {"training"},
    {"mismatch"},
    {"study"},
    {"report"},
    {"demo"},
    {"cli"},
]
"""Folders and modules by the order of their imports; those of one line may import each other."""

RANK = {"__version__": 0, **{name: rank for rank, names in enumerate(ORDER) for name in names}}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that are imported anywhere, except under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node)


def violations(path: Path) -> Iterator[tuple[str, str]]:
    name = path.relative_to(PACKAGE).as_posix()
    own = RANK[name.split("/")[0].removesuffix(".py")]
    for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
        package, _, inner = module.partition(".")
        other = inner.split(".")[0]
        # A name that robustdiff exports may come from any folder: only the last one may import it.
        if package == "robustdiff" and inner and RANK.get(other, len(ORDER) - 1) > own:
            yield name, other


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name[:2] != "__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_order(path: Path) -> None:
    assert set(violations(path)) == set()


def test_the_order_names_all_that_is_there() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__", "__main__"} <= set(RANK)


def test_modules_export_what_others_import():
    exported, taken, modules = {}, set(), set()
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(["robustdiff", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        modules.add(module.rpartition(".")[::2])
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and [*map(ast.unparse, node.targets)] == ["__all__"]:
                exported[module] = set(ast.literal_eval(node.value))
            elif isinstance(node, ast.ImportFrom):
                taken |= {(node.module, alias.name) for alias in node.names}
    assert sorted(one for one in taken - modules if one[0] in exported and one[1] not in exported[one[0]]) == []


def _on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes of a module that are evaluated when it is imported."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)


def test_no_import_needs_what_windows_lacks() -> None:
    lacking = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios"}
    lacking |= {"os.O_NOFOLLOW", "os.O_NONBLOCK", "os.sched_getaffinity", "os.fork", "signal.SIGKILL", "signal.SIGUSR1"}
    named = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in FILES
        for node in _on_import(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [ast.unparse(node)]
            if isinstance(node, ast.Attribute)
            else []
        )
        if name in lacking
    ]
    assert named == []


def test_text_is_read_and_written_in_utf_8():
    """On Windows the default is another encoding."""
    without = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("read_text", "write_text")
        and "encoding" not in {keyword.arg for keyword in node.keywords}
    ]
    assert without == []


def test_float64_is_made_on_the_cpu():
    """A Mac's GPU does not have it, and refuses the conversion on the way as well."""
    before = re.compile(r"\.double\(\).*\.cpu\(\)|\.to\(\"cpu\", torch\.float64|float64\)\.cpu\(\)")
    assert [path.name for path in FILES if before.search(path.read_text(encoding="utf-8"))] == []
