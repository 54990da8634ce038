"""What tests share: golden tensors, a tiny trained run, and commands in processes that start in no time."""

import contextlib
import importlib.util
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported: its kernels run on the CPU

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
TINY_RUN = [
    "--preset", "SiT-ATConv-Tiny/2", "--model.learn_sigma", "false", "--train.batch_size", "512",
    "--train.steps", "4", "--train.log_every", "1", "--train.checkpoint_every", "2", "--train.precision", "fp32",
    "--preview.every", "100", "--preview.num_steps", "2", "--preview.per_class", "2",
]  # an epoch of three steps


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def golden():
    """name -> the golden tensors of that file, and its weights under their own names."""

    def load(name: str) -> tuple[dict, dict]:
        tensors = load_file(GOLDEN / f"{name}.safetensors")
        return tensors, {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}

    return load


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """launch(command, argv, processes=1, stop_at_checkpoint=False) -> (exit codes, what was printed).

    Runs a command's main() as torchrun would, in processes forked from one that has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sit_atconv.train", "sit_atconv.generation", "torchdiffeq"])
    logs = tmp_path_factory.mktemp("logs")

    def run(command: str, argv: list, processes: int = 1, stop_at_checkpoint: bool = False) -> tuple[list[int], str]:
        log = logs / f"{len(list(logs.iterdir()))}.txt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = [
            context.Process(target=_worker, args=(command, list(map(str, argv)), rank, processes, port, log,
                                                  stop_at_checkpoint))
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            if worker.is_alive():
                worker.kill()
        return [worker.exitcode for worker in workers], log.read_text()

    return run


def _worker(command, argv, rank, processes, port, log, stop_at_checkpoint):
    output = open(log, "a", buffering=1)  # noqa: SIM115
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }
    if stop_at_checkpoint:
        from accelerate import Accelerator

        Accelerator.wait_for_everyone = lambda self: os._exit(9)  # as if killed after the first checkpoint
    load_command(command).main(argv)


def load_command(path: str):
    """A command's module, from its file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_run(launch, tmp_path_factory):
    """A finished run of four steps on digits."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    codes, output = launch("sit_atconv/train.py", [*TINY_RUN, "--out", run])
    assert codes == [0], output
    return run


@pytest.fixture
def fails(capsys):
    """fails(main, argv) -> the error a command ends with: at most three lines, no traceback."""

    def run(main, argv) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, argv)))
        assert stop.value.code not in (0, None)
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if not line.startswith("usage:")]
        assert "Traceback" not in error and 1 <= len(lines) <= 2 and lines[0].startswith("error: "), error
        return error

    return run


@contextlib.contextmanager
def working_folder(path: Path):
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def python(*argv) -> list[str]:
    return [sys.executable, *map(str, argv)]
