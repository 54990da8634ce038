"""The page with a live model, called as its buttons call it; tests/browser has the page itself."""

import json
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradio_client import Client
from PIL import Image

from sit_atconv import demo
from sit_atconv.generation.live_page import ARGUMENTS
from sit_atconv.generation.live_page import launch as serve
from tests.conftest import TINY_RUN

SETTINGS = dict(classes=["label:3"], images=2, seed=0, cfg=2.0, solver="unipc", steps=3, height=8, width=8)


@pytest.fixture(scope="module")
def open_demo():
    """open_demo(*options) -> its address."""
    pages = []

    def start(*argv: object) -> str:
        options = demo.make_parser().parse_args([*map(str, argv)])
        pages.append(demo.open_page(options))
        return serve(pages[-1], options.host, options.port, options.max_waiting)

    yield start
    for page in pages:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def address(open_demo, tiny_run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(tiny_run, other)
    return open_demo("--ckpt", tiny_run, "--ckpt", other, "--max-images", 4, "--max-side", 16, "--max-steps", 50)


class User(Client):
    """A user of the page."""

    def __init__(self, address: str):
        super().__init__(address, verbose=False)

    def draw(self, lo: float = 0, hi: float = 1, frames: int = 3, **changed):
        """Returns the status, and for each model its images, time, picture of the way, and command."""
        values = [*{**SETTINGS, **changed}.values(), lo, hi, frames]
        status, *parts = self.predict(*values, api_name="/draw")
        if "error" in status:
            return status, []
        return status, [parts[i : i + 6] for i in range(0, len(parts), 6)]


def pixels(part) -> np.ndarray:
    return np.stack([np.array(Image.open(entry["image"])) for entry in part[0]])


def test_two_models_draw_from_the_same_noise(address):
    user = User(address)
    status, (left, right) = user.draw(seed=4)
    assert re.fullmatch(r"Done. The second takes \d+\.\d\d times as long as the first.", status)
    assert np.array_equal(pixels(left), pixels(right)) and pixels(left).shape == (2, 8, 8, 3)  # equal weights
    assert re.fullmatch(r"\S+ s for each of 2 images, NFE 3", left[1]) and "--seed 4" in left[5]
    with Image.open(left[0][1]["image"]) as file:
        assert file.format == "PNG" and json.loads(file.info["settings"])["seed"] == 4
        assert json.loads(file.info["settings"])["index"] == 1 and file.info["command"] == left[5]
    again, other = user.draw(seed=4)[1][0], user.draw(seed=5)[1][0]
    assert np.array_equal(pixels(again), pixels(left)) and not np.array_equal(pixels(other), pixels(left))


def test_two_kinds_of_model_begin_with_a_solver_of_both(open_demo, launch, tiny_run, tmp_path):
    flow = ["--flow.class_path", "MeanFlow", "--model.two_times", "true"]
    codes, output = launch("sit_atconv/train.py", [*TINY_RUN, *flow, "--out", tmp_path / "run", "--train.steps", 1])
    assert codes == [0], output
    user = User(open_demo("--ckpt", tmp_path / "run", "--ckpt", tiny_run, "--max-images", 1))
    arguments = user.view_api(return_format="dict", print_info=False)["named_endpoints"]["/draw"]["parameters"]
    assert [argument["parameter_name"] for argument in arguments] == list(ARGUMENTS)
    first = {argument["parameter_name"]: argument["parameter_default"] for argument in arguments}
    assert (first["solver"], first["steps"], first["cfg"], first["num_samples"]) == ("unipc", 25, 4, 1)
    assert user.draw(images=1)[0].startswith("Done.")


def test_users_at_once_get_their_own_images(address):
    alone = [pixels(User(address).draw(seed=seed)[1][0]) for seed in range(2)]
    users = [User(address) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(lambda pair: pair[1].draw(seed=pair[0]), enumerate(users))]
    for seed, (_, (left, _)) in enumerate(results):
        assert np.array_equal(pixels(left), alone[seed]) and f"--seed {seed}" in left[5]


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(height=9), "height 9 is not divisible by 2"),
        (dict(height=18), "height 18: give a whole number, 1 ... 16"),
        (dict(width=None), "width is empty: give a whole number, 1 ... 16"),
        (dict(steps=51), "steps 51: give a whole number, 1 ... 50"),
        (dict(seed=-1), "seed -1: give a whole number, 0 ..."),
        (dict(seed=1.5), "seed 1.5: give a whole number"),
        (dict(lo=0.8, hi=0.2), "the guidance interval 0.8 ... 0.2 is empty"),
        (dict(cfg=1e9), "cfg 1e+09: give a number, -1000 ... 1000"),
    ],
)
def test_bad_input_gets_a_message(address, changed, message):
    status, parts = User(address).draw(**changed)
    assert status.startswith("**error:**") and message in status and parts == []


def test_a_full_queue_says_so(open_demo, tiny_run):
    address = open_demo("--ckpt", tiny_run, "--max-waiting", 2)
    start = threading.Barrier(10)

    def click(user: User) -> str:
        start.wait()
        try:
            return user.draw(solver="euler", steps=60, frames=0)[0]
        except Exception as error:
            return str(error)

    users = [User(address) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        said = [*pool.map(click, users)]
    assert {*said} >= {"Done."} and all(text == "Done." or "full" in text for text in said), said
    assert any("full" in text for text in said)
    assert users[0].draw()[0] == "Done."  # afterwards all is well


def test_what_cannot_be_shown(tiny_run, tmp_path, fails, monkeypatch):
    other = tmp_path / "run"
    shutil.copytree(tiny_run, other)
    for recipe in other.glob("checkpoints/*/*/recipe.json"):
        content = json.loads(recipe.read_text())
        recipe.write_text(json.dumps({**content, "class_names": [f"digit {label}" for label in range(10)]}))
    assert "have different classes" in fails(demo.main, ["--ckpt", tiny_run, "--ckpt", other])
    assert "nowhere" in fails(demo.main, ["--ckpt", tmp_path / "nowhere"])
    assert "no_such_module" in fails(demo.main, ["--ckpt", tiny_run, "--import", "no_such_module"])
    with socket.socket() as other_server:
        other_server.bind(("127.0.0.1", 0))
        other_server.listen()
        taken = other_server.getsockname()[1]
        assert f"port {taken} (Address already in use)" in fails(demo.main, ["--ckpt", tiny_run, "--port", taken])
    assert "192.0.2.1, port any" in fails(demo.main, ["--ckpt", tiny_run, "--host", "192.0.2.1"])
    assert "give another --host or --port" in fails(demo.main, ["--ckpt", tiny_run, "--port", 99999])
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert "pip install 'sit-atconv[demo]'" in fails(demo.main, ["--ckpt", tiny_run])
