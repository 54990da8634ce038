"""Every recipe of docs/extending.md works from a user's own module, through the public commands, as printed."""

import re
import shlex

import pytest

from tests.conftest import ROOT, TINY_RUN

PAGE = (ROOT / "docs" / "extending.md").read_text()
RECIPES = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SMALL = {  # options that keep a command short, and those that the recipe itself gives win
    "sit_atconv/train.py": [*TINY_RUN, "--train.steps", "2"],
    "sample/generate.py": ["--num-samples", "4", "--steps", "2"],
    "eval/speed.py": ["--preset", "Tiny/2", "--resolutions", "32", "--rounds", "1", "--levels", "model"],
}


def commands_of(recipe: str) -> list[list[str]]:
    """The command lines of its shell blocks, split, without their launcher."""
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", recipe, re.DOTALL)
        for line in block.replace("\\\n", " ").strip().splitlines()
    ]
    return [shlex.split(line.removeprefix("accelerate launch ").removeprefix("python ")) for line in lines]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works_as_printed(name, tmp_path, launch, tiny_run):
    recipe = RECIPES[name]
    for block in re.findall(r"```python\n(.*?)```", recipe, re.DOTALL):
        module = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / module[1]).write_text(block)
    (tmp_path / "RUN").symlink_to(tiny_run)
    commands = commands_of(recipe)
    assert commands
    for script, *options in commands:
        codes, output = launch(script, [*SMALL.get(script, []), *options], folder=tmp_path)
        assert codes == [0], output
