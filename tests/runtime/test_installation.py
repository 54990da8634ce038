"""How shipped commands and configs are typed and found, in a checkout and from a wheel."""

import os
import shlex
import subprocess

import pytest

from sit_atconv.runtime import installation
from sit_atconv.runtime.installation import COMMANDS, command, command_argv, find_config, shipped_configs
from tests.conftest import ROOT, python


@pytest.fixture
def wheel(monkeypatch):
    monkeypatch.setattr(installation, "IS_WHEEL", True)


@pytest.mark.parametrize(
    ("name", "in_root", "elsewhere"),
    [
        ("generate", "python sample/generate.py", f"python {shlex.quote(str(ROOT / 'sample/generate.py'))}"),
        (
            "train",
            "accelerate launch sit_atconv/train.py",
            f"accelerate launch {shlex.quote(str(ROOT / 'sit_atconv/train.py'))}",
        ),
        ("convert", "python -m sit_atconv.convert", "python -m sit_atconv.convert"),
    ],
)
def test_a_checkouts_commands_are_typed_by_their_scripts(name, in_root, elsewhere, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command(name) == in_root
    monkeypatch.chdir(tmp_path)
    assert command(name) == elsewhere


def test_a_wheels_commands_are_console_scripts(wheel):
    assert command("generate") == "sit-atconv-generate"
    assert command_argv("generate") == python("-m", "sit_atconv.generation.generate")


@pytest.mark.parametrize("name", ["convert", "compare"])
def test_a_command_starts_from_anywhere_without_a_path(name, tmp_path):
    done = subprocess.run(
        [*command_argv(name), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": "", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and f"usage: {COMMANDS[name][0].split()[0]} " in done.stdout, done.stderr


def test_accelerate_is_started_by_this_python():
    assert command_argv("train") == python("-m", "accelerate.commands.launch", ROOT / "sit_atconv/train.py")


def test_a_console_script_runs_the_module_of_its_name(tmp_path):
    """Its exit code is the module's, which is __main__ as other processes see it; Ctrl-C at its import is one line."""
    (tmp_path / "mine.py").write_text(
        "import pickle, sys\ndef f(): pass\nif __name__ == '__main__':\n"
        "    pickle.dumps(f)\n    sys.exit(len(sys.argv))\n"
    )
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")

    def run(name: str) -> tuple[int, str]:
        code = (
            f"import sys; from sit_atconv.runtime import installation; sys.argv = ['/bin/sit-atconv-{name}', 'x']\n"
            f"installation.COMMANDS['{name}'] = ('', '{name}'); sys.exit(installation.console_script())"
        )
        done = subprocess.run(
            python("-c", code), cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        return done.returncode, done.stderr.strip()

    assert run("mine") == (2, "")
    assert run("slow") == (130, "error: interrupted")


def test_a_config_is_a_file_or_the_name_of_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = shipped_configs()
    assert set(shipped) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name in ("imagenet256", "imagenet256.yaml", "configs/imagenet256.yaml", str(ROOT / "configs/imagenet256.yaml")):
        assert find_config(name).samefile(shipped["imagenet256"])
    (tmp_path / "ffhq512").mkdir()  # images, perhaps
    assert find_config("ffhq512") == shipped["ffhq512"]
    (tmp_path / "digits.yaml").touch()
    assert find_config("digits.yaml").samefile(tmp_path / "digits.yaml") and find_config("digits") == shipped["digits"]


@pytest.mark.parametrize("name", ["imagenet", "runs/imagenet256.yaml", "imagenet256.yml", "", "."])
def test_another_name_is_refused_with_the_shipped_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"digits, digits-onestep, fashion-mnist, ffhq512, imagenet256, .*imagenet512"
    ) as error:
        find_config(name)
    assert f"there is no file {name}: " in str(error.value)
