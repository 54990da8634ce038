"""The page with a live model, used as people use it."""

import io
import re
import shlex
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image
from sklearn.svm import SVC

from sit_atconv.data.digits import load_digits
from tests.browser.conftest import LOOKS
from tests.conftest import ROOT, load_command, python

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def open_demo(digits_run):
    """open_demo(*options) -> address of a page that the command serves."""
    servers = []

    def start(*options: str) -> str:
        argv = python("-m", "sit_atconv.demo", "--ckpt", digits_run, *options)
        servers.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        return re.fullmatch(r"page: (\S+)\n", servers[-1].stdout.readline())[1]

    yield start
    for server in servers:
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130


@pytest.fixture(scope="module")
def address(open_demo):
    return open_demo()


@pytest.fixture(scope="module")
def read_digit():
    """read_digit(image, uint8 (8, 8, 3)) -> its label, by a classifier of its own."""
    images, labels = load_digits()
    classifier = SVC().fit(images.reshape(len(images), -1), labels)
    return lambda image: int(classifier.predict(image[..., 0].reshape(1, -1))[0])


def fill(visited, **fields) -> None:
    for name, value in fields.items():
        if name == "digit":
            visited.page.click("#classes button[aria-label='Clear'], #classes .remove-all")
            visited.page.fill("#classes input", str(value))
            visited.page.keyboard.press("Enter")
            visited.page.keyboard.press("Escape")
        else:
            visited.page.fill(f"#{name} input[type=number]", str(value))
            visited.page.keyboard.press("Tab")


def begin(visited, button: str = "#draw") -> None:
    visited.page.wait_for_selector("#status p")
    visited.page.eval_on_selector("#status p", "old => old.setAttribute('data-old', '')")  # until it is written anew
    visited.page.click(button)


def wait(visited, text: str = "Done|error") -> str:
    """Waits until what was begun has ended, and returns the status."""
    new = "text => new RegExp(text).test(document.querySelector('#status p:not([data-old])')?.innerText)"
    visited.page.wait_for_function(new, arg=text, timeout=60_000)
    return visited.page.locator("#status p").first.inner_text()


def press(visited, button: str = "#draw") -> str:
    begin(visited, button)
    return wait(visited)


def press_until_taken(visited) -> str:
    """Presses Draw again and again, as people do while what was stopped is still ending."""
    for _ in range(40):
        begin(visited)
        visited.page.wait_for_timeout(250)
        if visited.page.locator("#status p:not([data-old])").count():
            return wait(visited)
    raise AssertionError("the button does nothing")


def images(visited) -> np.ndarray:
    """The images on the page as their files have them, uint8 (N, H, W, 3)."""
    addresses = visited.page.eval_on_selector_all(".images .grid-container img", "all => all.map(i => i.src)")
    files = [Image.open(io.BytesIO(visited.page.request.get(address).body())) for address in addresses]
    assert all(file.format == "PNG" and "settings" in file.info for file in files)
    return np.stack([np.array(file) for file in files])


def shown_command(visited) -> str:
    return re.sub(r"\s+", " ", visited.page.inner_text(".command .cm-content")).strip()


def test_draws_the_class_that_was_asked_for(address, visit, read_digit, tmp_path):
    visited = visit(address)
    fill(visited, digit=7, cfg=3, images=4, steps=8, seed=11)
    press(visited)
    first = images(visited)
    assert [read_digit(image) for image in first] == [7] * 4
    press(visited)
    assert np.array_equal(images(visited), first)
    fill(visited, seed=12)
    press(visited)
    assert not np.array_equal(images(visited), first)
    _, *words = shlex.split(shown_command(visited))[1:]
    load_command("sample/generate.py").main([*words, "--out", str(tmp_path)])
    drawn = [np.array(Image.open(tmp_path / "images" / f"{index:06d}.png")) for index in range(4)]
    assert np.abs(np.stack(drawn).astype(int) - images(visited)).max() <= 1
    before = visited.page.input_value("#seed input")
    press(visited, "#new-seed")
    assert visited.page.input_value("#seed input") != before and visited.page.input_value(
        "#seed input"
    ) in shown_command(visited)
    visited.check()


def test_the_way_from_noise_to_image_is_on_a_slider(address, visit):
    visited = visit(address)
    fill(visited, steps=6)
    press(visited)
    assert visited.page.locator(".frame-time p").first.inner_text() == "t = 0.83"
    last = visited.page.get_attribute(".frame img", "src")
    visited.page.eval_on_selector(
        ".way input[type=range]",
        "range => { range.value = 0; range.dispatchEvent(new Event('input', {bubbles: true})) }",
    )
    visited.page.wait_for_function("document.querySelector('.frame-time').innerText.includes('t = 0.00')")
    assert visited.page.get_attribute(".frame img", "src") != last
    visited.check()


def test_a_bad_size_gets_a_message(address, visit):
    visited = visit(address)
    visited.page.click("#more button")
    fill(visited, height=9)
    assert "height 9 is not divisible by 2" in press(visited)
    fill(visited, height=8, width=12)
    press(visited)
    assert images(visited).shape[1:] == (8, 12, 3)
    visited.check()


def test_quick_clicks_end_in_a_result_or_in_busy(address, visit):
    visited = visit(address)
    fill(visited, steps=60)
    visited.page.wait_for_selector("#draw")
    visited.page.click("#draw", click_count=10)
    wait(visited, "Drawing")  # which says busy
    assert wait(visited) == "Done." and len(images(visited)) == 4
    fill(visited, steps=2)
    press(visited)  # and it goes on
    assert "--steps 2" in shown_command(visited)
    visited.check()


@pytest.mark.parametrize("frames", [0, 12])
def test_stop_ends_a_drawing_within_a_step(address, visit, frames):
    visited = visit(address)
    visited.page.click("#more button")
    fill(visited, steps=250, images=16, frames=frames)
    begin(visited)
    wait(visited, "t = 0[.]")
    visited.page.click("#stop")
    wait(visited, "Stopped")
    fill(visited, steps=2, images=1)
    assert press_until_taken(visited) == "Done." and len(images(visited)) == 1
    visited.check()


def test_a_closed_page_lets_the_next_person_through(address, visit):
    first, second = visit(address), visit(address)
    visited = first
    visited.page.click("#more button")
    fill(visited, steps=250, images=16, height=32, width=32, frames=0)
    begin(visited)
    wait(visited, "t = 0[.]")
    visited.page.close()
    fill(second, steps=2, images=1)
    assert press_until_taken(second) == "Done."


def test_a_full_queue_says_so_and_the_page_lives_on(open_demo, visit):
    address = open_demo("--max-waiting", "1")
    people = [visit(address) for _ in range(4)]
    for visited in people:
        fill(visited, steps=250, images=16)
    for visited in people:
        begin(visited)
    full = people[-1]
    full.page.wait_for_selector(".toast-body")
    assert "busy" in full.page.inner_text(".toast-body")
    for visited in people:
        visited.page.click("#stop")
    fill(full, steps=2, images=1)
    assert press_until_taken(full) == "Done."


def test_two_people_get_their_own_images(address, visit, read_digit):
    people = [visit(address) for _ in range(2)]
    for digit, visited in zip((3, 8), people, strict=True):
        fill(visited, digit=digit, images=2, cfg=3)
        begin(visited)
    for digit, visited in zip((3, 8), people, strict=True):
        wait(visited)
        assert [read_digit(image) for image in images(visited)] == [digit] * 2
        visited.check()


@pytest.mark.parametrize("scheme, width", LOOKS)
def test_every_look(address, visit, scheme, width, tmp_path):
    visited = visit(address, scheme, width)
    press(visited)
    visited.check()
    visited.page.screenshot(path=tmp_path / f"demo-{scheme}-{width}.png", full_page=True)
    background = visited.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
