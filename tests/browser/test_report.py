"""The report of eval/report.py as a browser shows it: from a file, without anything else."""

import re

import pytest

from tests.browser.conftest import LOOKS
from tests.conftest import load_command

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(digits_run, tmp_path_factory):
    """The report of a run, its samples with 6 and 12 steps, and their scores."""
    features = tmp_path_factory.mktemp("features")
    for steps in (6, 12):
        samples = digits_run / "samples" / f"steps{steps}"
        drawn = ["--ckpt", digits_run, "--cfg", 2, "--num-samples", 100, "--steps", steps, "--labels", "balanced"]
        load_command("sample/generate.py").main([*map(str, [*drawn, "--out", samples])])
        scored = ["--samples", samples, "--reference", "digits", "--extractor", "digits", "--features", features]
        load_command("eval/fid.py").main([*map(str, [*scored, "--metrics", "fid", "copies"])])
    load_command("eval/report.py").main([str(digits_run)])
    return digits_run / "report.html"


@pytest.mark.parametrize("scheme, width", LOOKS)
def test_every_look(report, visit, scheme, width, tmp_path):
    visited = visit(report.as_uri(), scheme, width)
    visited.check()
    page = visited.page
    assert page.locator("img").count() == 2 + 2 + 2  # previews, samples, nearest training images
    assert page.locator("svg.chart").count() == 3  # training loss, held-out loss, distance over steps
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    page.screenshot(path=tmp_path / f"report-{scheme}-{width}.png", full_page=True)


def test_prints_with_every_command(report, visit):
    page = visit(report.as_uri()).page
    page.emulate_media(media="print")
    assert page.locator("pre").first.is_visible()
    assert len(page.pdf()) > 10_000
