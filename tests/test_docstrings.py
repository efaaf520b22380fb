"""The form of docstrings.

The first line is a verb in the imperative for public functions, and a plain statement everywhere. Descriptions of
arguments and attributes are noun phrases.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "robustdiff"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

CLAUSES = {"What", "How", "Where", "Whether", "Of", "Who", "Which", "When"}

CLAUSE = re.compile(r"^ +\w+: (?:What|How|Where|Of|Who|Which)\b.*", re.MULTILINE)
"""A description of an argument or attribute that is a clause. "Whether" is allowed, for booleans."""

VERBS = """
Absorb Accept Accumulate Add Adjust Advance Allow Append Apply Assemble Assert Assign Attach Average Begin Bootstrap
Bring Build Call Cast Change Check Choose Clamp Clear Clip Close Collate Collect Combine Compare Compile Compute
Concatenate Condition Consume Continue Convert Copy Correct Count Create Crop Cut Decode Delete Denoise Describe
Diffuse Discard Distil Divide Do Download Draw Drop Embed Encode End Enter Estimate Evaluate Exclude Exit Expand
Explain Export Extract Fetch Fill Filter Find Fine-tune Finish Fit Fix Flatten Follow Format Freeze Gather Generate
Get Give Go Group Guide Handle Hash Hold Ignore Implement Import Include Infer Initialise Insert Install Integrate
Interpolate Invert Iterate Join Keep Label Launch Leave Limit List Load Lock Log Look Make Map Mark Mask Match Measure
Merge Minimise Mix Move Multiply Name Normalise Offer Open Order Pack Pad Parse Pass Perturb Pick Place Plan Plot
Predict Prefix Prepare Print Process Produce Project Propose Put Quote Raise Read Record Reduce Refuse Register
Release Remember Remove Rename Render Repeat Replace Report Represent Request Require Reset Resize Resolve Restore
Resume Return Run Sample Save Say Scale Schedule Search See Select Send Separate Set Shift Show Shuffle Silence Simulate
Skip Solve Sort Split Standardise Start State Step Stop Store Stream Strip Subtract Sum Summarise Take Tell Test Time
Track Train Transform Translate Turn Undo Unpack Unwrap Update Use Validate Verify Wait Warn Watch Weight Work Wrap
Write Yield
"""
"""Words that a function's docstring may begin with; add a verb that is missing."""


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def public(tree: ast.Module) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    """Yield a module and its public classes, functions and methods, with their names."""
    exported = {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }
    yield "module", tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and (
            node.name in exported or not node.name.startswith("_")
        ):
            yield node.name, node
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef) and member.name[0] != "_":
                    yield f"{node.name}.{member.name}", member


def offenders(file: str) -> list[str]:
    found = []
    for name, node in public(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if not (text := ast.get_docstring(node)):
            continue
        line = text.splitlines()[0]
        word = line.split()[0].rstrip(",.:;")
        verb_wanted = isinstance(node, ast.FunctionDef) and not is_property(node)
        if word in CLAUSES or (verb_wanted and word not in VERBS.split()):
            found.append(f"{name}: {line}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_first_lines(file: str) -> None:
    assert offenders(file) == []


@pytest.mark.parametrize("file", FILES)
def test_descriptions(file: str) -> None:
    nodes = ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    assert CLAUSE.findall("\n".join(texts)) == []
