"""The prose of the package, README and docs follows the project's rules for plain English."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for folder in ("sit_atconv", "sample", "eval", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.yaml")])
LONGEST = 100  # characters of a docstring's first line
OPENERS = {
    "Of",
    "What",
    "How",
    "Whether",
    "Beside",
    "Which",
    "Where",
    "Whose",
    "Who",
    "That",
    "From",
    "With",
    "In",
    "By",
}
INSTEAD = {  # avoided: the field's word for it
    r"(goes|go|went|gone|going) on\b": "resume, continue",
    r"mirror(ed)? images?\b": "horizontal flip",
    r"afresh\b": "from scratch, again",
    r"mend(s|ed|ing)?\b": "fix",
    r"for good\b": "permanently",
    r"(cannot|can't|could not|can) be had\b": "not available",
    r"(lies|lie|lay|lain)\b": "is, are",
    r"(said|say|says|saying) aloud\b": "reported, printed",
}


def named(path):
    return str(path.relative_to(ROOT))


def docstrings(path):
    """Yields each documented node of a file with the first line of its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text.split("\n")[0]


def is_property(node):
    return any(isinstance(mark, ast.Name) and "property" in mark.id for mark in node.decorator_list)


def fault(node, line):
    """Returns what is wrong with the first line of a docstring, or None."""
    opener = re.split(r"[^\w'-]", line)[0]
    if len(line) > LONGEST:
        return f"{len(line)} characters, more than {LONGEST}"
    if not re.search(r"[.:?]$", line):
        return "the first line is not one whole sentence"
    if opener in OPENERS:
        return f"opens with {opener}"
    if not line[0].isupper() and not line.startswith("`"):
        return "opens with a small letter"
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node)
    if is_function and not re.fullmatch(r"[A-Z][a-z-]+s", opener) and not line.startswith("True if "):
        return "a function's docstring starts with a verb (Returns, Reads, ...) or with 'True if'"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_docstrings_open_with_one_plain_sentence(path):
    faults = [
        f"{named(path)}:{node.body[0].lineno}: {wrong}: {line}"
        for node, line in docstrings(path)
        if (wrong := fault(node, line))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=named)
def test_the_fields_words_are_used(path):
    found = [
        f"{named(path)}:{number}: write {word!r}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for avoided, word in INSTEAD.items()
        if re.search(r"\b" + avoided, line, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ('def f():\n    "Returns the mean."', False),
        ('def f():\n    "True if the folder is empty."', False),
        ('def f():\n    "Of several averages the first."', True),
        ('def f():\n    "The mean of all."', True),
        ('def f():\n    "Returns the mean"', True),
        ('def f():\n    "Returns ' + "the mean " * 20 + '."', True),
        ('class A:\n    "Deterministic batch order."', False),
        ('class A:\n    "What is left."', True),
    ],
)
def test_the_rule_can_fail(code, wrong):
    node = ast.parse(code).body[0]
    assert bool(fault(node, ast.get_docstring(node).split("\n")[0])) is wrong
