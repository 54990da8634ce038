"""The page about training runs: complete in itself, with what the records say."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sit_atconv.studies.pages import read_runs
from tests.conftest import load_command

REPORT = "eval/report.py"


def main(command: str, *argv: object) -> None:
    load_command(command).main([*map(str, argv)])


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """Two runs, one of which was sampled with two numbers of steps and evaluated during training."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = folder / "first <b>run</b>", folder / "second"
    for run in (first, second):
        shutil.copytree(tiny_run, run)
    for steps in (2, 4):
        samples = first / "samples" / f"steps{steps}"
        drawn = ("--ckpt", first, "--num-samples", 60, "--solver", "euler", "--cfg", 1, "--steps", steps)
        main("sample/generate.py", *drawn, "--labels", "balanced", "--no-npz", "--out", samples)
        features = ("--features", folder / "features")
        scored = ("--samples", samples, "--reference", "digits", "--extractor", "digits", *features)
        main("eval/fid.py", *scored, "--metrics", "fid", "copies")
    (first / "quality").mkdir()
    log = {"quality/FD-digits-60": 9.0, "quality/FD-digits-60/error": 0.5}
    (first / "quality" / "step-0000004.json").write_text(json.dumps({"log": log, "protocol": {}}))
    return first, second


class Page(HTMLParser):
    """The elements of a page, its text and its pictures."""

    VOID = ("meta", "img", "path", "use", "rect", "circle", "line", "stop", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.names, self.text, self.attributes = list[str](), list[str](), "", list[tuple]()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything_and_asks_for_nothing(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    main(REPORT, *runs, "--out", out)
    assert f"page: {out}" in capsys.readouterr().out
    text = out.read_text()
    page = Page(text)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in links) and "script" not in page.names
    pictures = [link.partition(",")[2] for link in links if link.startswith("data:")]
    assert len(pictures) == 6  # a preview of each run, two grids, two pictures of nearest images
    assert all(Image.open(io.BytesIO(base64.b64decode(each))).width > 30 for each in pictures)
    assert page.names.count("svg") == 3 and "url(http" not in text  # loss, distances, few steps
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "first <b>run</b>" in page.text and "<b>run" not in text  # names are text
    scores = [str(next(iter(found.scores.values()))) for run in read_runs(runs) for found in run.evaluations.values()]
    assert len(scores) == 2 and all(score in page.text for score in scores)
    assert "row 2 beside row 1: samples.sampler.steps: 2 -> 4" in page.text
    assert "sit_atconv/train.py" in page.text or "python" in page.text  # the commands
    assert "batch size 512" in page.text and "4 of 4" in page.text
    assert out.stat().st_size < 5e6


def test_scores_elsewhere_belong_to_the_run_whose_weights_they_name(runs, tmp_path):
    [record, _] = sorted(runs[0].glob("samples/*/scores-*.json"))
    moved = json.loads(record.read_text())
    moved["subject"]["ckpt"] = str(runs[1] / "checkpoints" / "step-0000004")
    (tmp_path / "scores.json").write_text(json.dumps(moved))
    first, second = read_runs(runs, [tmp_path / "scores.json"])
    assert list(second.evaluations) == [tmp_path / "scores.json"] and len(first.evaluations) == 2


def test_what_is_no_run_is_refused(runs, tmp_path, fails):
    command = load_command(REPORT).main
    assert f"{tmp_path} is not a training run" in fails(command, [tmp_path])
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json is not an evaluation" in fails(command, [runs[1], "--scores", tmp_path / "bad.json"])
    assert "nowhere is not a training run" in fails(command, [tmp_path / "nowhere"])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text(": [")
    assert "damaged/config.yaml is damaged" in fails(command, [tmp_path / "damaged"])
    assert "cannot be written" in fails(command, [runs[1], "--out", tmp_path / "nowhere" / "page.html"])


def test_a_run_without_anything_but_its_options(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {steps: 10}\n")
    main(REPORT, tmp_path / "run")
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "0 of 10" in page.text and "No samples of these runs" in page.text and "not recorded" in page.text
    assert Path(tmp_path / "run" / "report.html").stat().st_size < 2e4
