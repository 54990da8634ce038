"""The Python of README and docs/evaluation.md runs as printed, and what the README names exists."""

import re

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [README, (ROOT / "docs" / "evaluation.md").read_text()]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a page", "exec"), {})


def test_files_named_exist():
    names = re.findall(r"\| `([\w./-]+)` \|", README) + re.findall(r"\]\(((?!http)[\w./-]+)\)", README)
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_module_has_its_line():
    named = re.findall(r"\| `([\w./-]+)` \|", README)
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "sit_atconv").rglob("*.py")]
    assert [path for path in modules if not path.endswith("__init__.py") and path not in named] == []
