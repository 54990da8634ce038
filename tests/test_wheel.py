"""The wheel and the sdist: what is in them, and that commands run from the wheel where there is no checkout.

The wheel's environment borrows the dependencies of the one that runs the tests: nothing is downloaded.
"""

import importlib
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from sit_atconv.runtime.installation import COMMANDS, console_script, shipped_configs, shipped_sweeps
from tests.conftest import ROOT, TINY_RUN, python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there


def test_pyproject_lists_every_package_and_command():
    """A package that is not listed would be missing in the wheel alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("sit_atconv/**/__init__.py")]
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted([*packages, "sit_atconv.configs"])
    assert project["project"]["scripts"].keys() == {f"sit-atconv-{name}" for name in COMMANDS}
    for entry in project["project"]["scripts"].values():
        module, name = entry.split(":")
        assert getattr(importlib.import_module(module), name) is console_script


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_script_or_module_and_a_main(name):
    typed, module = COMMANDS[name]
    assert (ROOT / typed.split()[-1]).exists() or typed == f"python -m {module}"
    module = importlib.import_module(module)
    assert callable(module.main) and 'if __name__ == "__main__":' in Path(module.__file__).read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist, built from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    names = re.findall(r"[\w.-]+", (ROOT / "MANIFEST.in").read_text())
    for name in {*names, "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "sit_atconv"}:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source / path.name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(python("-c", build), source)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "unpacked")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        python(
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--no-cache-dir",
            "-w",
            folder,
            sdist,
        ),
        folder,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment that has the wheel installed."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    run(
        python("-m", "pip", "--python", environment / "bin" / "python", "install", "--no-deps", "--no-index", wheel),
        environment,
    )
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))  # whose own .pth files are not followed
    imported = run([environment / "bin" / "python", "-c", "import sit_atconv; print(sit_atconv.__file__)"], environment)
    assert Path(imported.strip()).is_relative_to(packages)
    return environment / "bin"


def run(argv: list, folder: Path, code: int = 0) -> str:
    """Runs a process that does not find the checkout; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, argv)), cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_configs_types_and_weights(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert names == {
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("sit_atconv/**/*.py")),
        "sit_atconv/py.typed",
        "sit_atconv/studies/page.html",
        "sit_atconv/studies/model_card.md",
        *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("sit_atconv/encoders/*.safetensors")),
        *(f"sit_atconv/configs/{name}.yaml" for name in shipped_configs()),
        *(f"sit_atconv/configs/sweeps/{name}.yaml" for name in shipped_sweeps()),
    }


@pytest.mark.slow
def test_the_sdist_has_all_tests(sdist):
    found = run(python("-m", "pytest", "--collect-only", "-q", "-m", ""), sdist)
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py")}
    assert {line.split("::")[0] for line in found.splitlines() if "::" in line} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_console_scripts_answer_by_their_own_names(scripts, name, tmp_path):
    script = scripts / f"sit-atconv-{name}"
    assert run([script, "--help"], tmp_path).startswith(f"usage: sit-atconv-{name} ")
    assert run([script, "--no-such-option"], tmp_path, code=2).splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_shipped_configs_are_found_by_name(scripts, tmp_path):
    for name in ("imagenet512", "configs/imagenet512.yaml"):
        assert "image_size: 512" in run([scripts / "sit-atconv-train", "--config", name, "--print_config"], tmp_path)
    assert "imagenet256-24gb" in run([scripts / "sit-atconv-train", "--config", "imagenet"], tmp_path, code=2)


@pytest.mark.slow
def test_several_processes_train_and_the_printed_command_samples(scripts, tmp_path):
    trained = run(
        [
            scripts / "python",
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            2,
            "-m",
            "sit_atconv.train",
            *TINY_RUN,
            "--out",
            "run",
        ],
        tmp_path,
    )
    printed = re.search(r"^sample: (sit-atconv-generate) (.*)$", trained, re.MULTILINE)
    assert "batch 512, 2 x " in trained and printed, trained
    run([scripts / printed[1], *printed[2].split(), "--cfg", 1, "--num-samples", 4, "--steps", 2], tmp_path)
    assert len(list(tmp_path.glob("run/samples/*/images/*.png"))) == 4


@pytest.mark.slow
def test_the_quickstart_runs_in_an_empty_folder(scripts, tmp_path):
    printed = run([scripts / "sit-atconv-quickstart", "--steps", 60], tmp_path)
    assert re.findall(r"^\$ (\S+)", printed, re.MULTILINE) == [
        "sit-atconv-train",
        "sit-atconv-generate",
        "sit-atconv-fid",
        "sit-atconv-speed",
        "sit-atconv-classify",
        "sit-atconv-report",
    ]
    assert len(printed.splitlines()) <= 40 and "{" not in printed
    assert (tmp_path / "runs/quickstart/speed/speed.png").exists()
    assert (tmp_path / "runs/quickstart/report.html").exists()
