"""Pages in headless Chromium. `pytest -m browser` runs these tests; they need Debian's package chromium or a browser
named in CHROMIUM."""

import os
import shutil
from dataclasses import dataclass, field

import pytest

LOOKS = [("light", 400), ("dark", 400), ("light", 1400), ("dark", 1400)]


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install playwright")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("there is no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page in a browser of its own, and what went wrong there."""

    page: object
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Asserts that nothing was asked of another machine, no complaint was printed, and no picture is broken."""
        here = ("http://127.0.0.1:", "http://localhost:", "data:", "blob:", "file:")
        assert [url for url in self.requests if not url.startswith(here)] == []
        assert self.complaints == []
        whole = "[...document.images].every(image => !image.src || (image.complete && image.naturalWidth))"
        self.page.wait_for_function(whole, timeout=10_000)  # none is broken
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert self.page.evaluate(wide) <= 0  # nothing is cut off at the right


@pytest.fixture
def visit(chromium):
    """visit(address, scheme="light", width=1400) -> Visit."""
    contexts = []

    def open_at(address: str, scheme: str = "light", width: int = 1400) -> Visit:
        contexts.append(chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        seen = Visit(page)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda line: seen.complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.goto(address)
        return seen

    yield open_at
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def digits_run(launch, tmp_path_factory):
    """A run that has learned legible digits."""
    run = tmp_path_factory.mktemp("digits") / "run"
    argv = ["--out", run, "--train.steps", 500, "--preview.every", 250]
    codes, output = launch("sit_atconv/train.py", argv)
    assert codes == [0], output
    return run
