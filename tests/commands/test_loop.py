"""How much the training loop adds, as a command."""

import json

import pytest

from tests.conftest import TINY_RUN


def test_the_parts_of_a_step_and_what_is_none_of_them(launch):
    codes, output = launch("eval/loop.py", ["--steps", 2, *TINY_RUN, "--train.max_grad_norm", 1])
    assert codes == [0], output
    found = json.loads(output[output.rindex("\n{") :])
    assert set(found["parts"]) == {"forward", "backward", "clipping", "AdamW", "averages"}
    assert all(seconds > 0 for seconds in found["parts"].values())
    rest = found["seconds_per_step"] - sum(found["parts"].values())
    assert rest > 0 and found["share_of_the_loop"] == pytest.approx(rest / found["seconds_per_step"])
