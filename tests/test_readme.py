"""The Python of README and docs runs as printed, and the files that the README names exist."""

import argparse
import re

import pytest
import timm
import torch

from sit_atconv.models import attnet
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [README, *((ROOT / "docs" / name).read_text() for name in ("getting-started.md", "evaluation.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a page", "exec"), {})


def test_the_blocks_about_attnet_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = attnet.official_state_dict(timm.create_model("attnet_xxs"))
    torch.save({"model": weights, "args": argparse.Namespace(lr=4e-3)}, "checkpoint.pth")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attnet.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec(compile("".join(blocks), "docs/attnet.md", "exec"), {})


def test_files_named_exist():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL)[1].splitlines()
    top = [name for line in tree if line[0] != " " for name in re.findall(r"[\w./-]+/", line.split("  ")[0])]
    names = [*top, *(f"sit_atconv/{line.split()[0]}" for line in tree if line.startswith("  "))]
    names += re.findall(r"\]\(((?!http)[\w./-]+)\)", README)
    assert len(names) > 20 and len(tree) <= 30
    assert [name for name in names if not (ROOT / name).exists()] == []
