"""What tests share: golden tensors, a tiny trained run, and commands in processes that start in no time."""

import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported: its kernels run on the CPU

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
TINY_RUN = [
    "--preset",
    "SiT-ATConv-Tiny/2",
    *["--model.depth", "2", "--model.hidden_size", "32", "--model.num_heads", "2"],
    "--model.learn_sigma",
    "false",
    "--train.batch_size",
    "512",
    "--data.held_out",
    "0",
    "--train.steps",
    "4",
    "--train.log_every",
    "1",
    "--train.checkpoint_every",
    "2",
    "--train.precision",
    "fp32",
    "--preview.every",
    "100",
    "--preview.num_steps",
    "2",
    "--preview.per_class",
    "2",
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
    """launch(command, argv, processes=1, die=None, kill_at=None, ...) -> (exit codes, what was printed).

    Runs a command's main() as torchrun would, in processes forked from one that has imported everything. `die` names
    one of DEATHS, or is the number of the write to the folder --out, or `work`, in which it dies; `kill_at` is the
    count of the progress bar at which the command waits until all of them, or `kill_rank` alone, got their kill -9, or
    `kill_with`. They have `seconds`, and 20 once one of them was killed. They work in `folder`, if it is given.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "sit_atconv.train",
            "sit_atconv.classification.records",
            "sit_atconv.generation.draw",
            "sit_atconv.data.encoding",
            "sit_atconv.evaluation.evaluate",
            "torchdiffeq",
            "diffusers.models.autoencoders.autoencoder_kl",
        ]
    )
    logs, numbers = tmp_path_factory.mktemp("logs"), itertools.count()

    def run(
        command: str,
        argv: list,
        processes: int = 1,
        die: str | int | None = None,
        kill_at: int | None = None,
        kill_with: int = signal.SIGKILL,
        kill_rank: int | None = None,
        seconds: int = 600,
        work: Path | None = None,
        folder: Path | None = None,
    ) -> tuple[list[int], str]:
        log = logs / f"{next(numbers)}.txt"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        stop = None if kill_at is None else (kill_at, context.Semaphore(0), context.Semaphore(0))
        workers = [
            context.Process(
                target=_worker, args=(command, [*map(str, argv)], rank, processes, port, log, die, stop, work, folder)
            )
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        while stop and workers[0].is_alive():
            _, reached, killed = stop
            if reached.acquire(timeout=0.05):
                for worker in workers if kill_rank is None else [workers[kill_rank]]:
                    os.kill(worker.pid, kill_with)
                killed.release()
                break
        end = time.monotonic() + seconds
        for worker in itertools.cycle(workers):
            worker.join(0.05)
            if any(worker.exitcode == -signal.SIGKILL for worker in workers):  # torchrun would end the others, too
                end = min(end, time.monotonic() + 20)
            if time.monotonic() > end or not any(worker.is_alive() for worker in workers):
                break
        for worker in workers:
            worker.kill()
            worker.join()
        return [worker.exitcode for worker in workers], log.read_text()

    return run


def _worker(command, argv, rank, processes, port, log, die, stop, work, folder):
    os.chdir(folder or ".")
    output = open(log, "a", buffering=1)  # noqa: SIM115
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers: not from a server once more
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, mininterval=0, miniters=0)  # every step is shown
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if isinstance(die, int):
        _die_at_write(die, str(work or argv[argv.index("--out") + 1]))
    elif die:
        DEATHS[die]()
    if stop:
        _wait_at_count(*stop)
    load_command(command).main(argv)


def _wait_at_count(count: int, reached, killed):
    """The first progress bar that shows `count` says so, and waits for the signal: no process outruns its kill."""
    display = tqdm.display

    def patched(bar, *args, **kwargs):
        shown = display(bar, *args, **kwargs)
        if bar.n >= count:
            tqdm.display = display
            reached.release()
            killed.acquire()
        return shown

    tqdm.display = patched


def _kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at_replace(number: int, before: bool):
    """In the `number`th renaming of a file into its place."""
    replace, counter = os.replace, itertools.count(1)

    def patched(source, target):
        last = next(counter) == number
        if last and before:
            _kill()
        replace(source, target)
        if last:
            _kill()

    os.replace = patched


def _die_at_write(number: int, folder: str):
    """Before the `number`th file or folder under `folder` is opened for writing, made, renamed or deleted.

    Of weights, which are not written by Python, half a file is left.
    """
    import safetensors.torch

    counter, write = itertools.count(1), safetensors.torch.serialize_file
    shutil._use_fd_functions = False  # they delete files by names without their folder; nothing public turns them off

    def write_half(tensors, path, *args, **kwargs):
        write(tensors, path, *args, **kwargs)
        if folder in str(path) and next(counter) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            _kill()

    safetensors.torch.serialize_file = write_half

    def hook(event: str, arguments: tuple):
        writes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and folder in str(arguments[0]) and next(counter) == number:
            _kill()

    sys.addaudithook(hook)


def _die_after_checkpoint():
    from accelerate import Accelerator

    Accelerator.wait_for_everyone = _kill


def _die_before_index():
    from sit_atconv.data.latent_folder import LatentFolder

    LatentFolder.write_index = _kill


def _limit_file_size(size: int):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _make_third_loss_nan():
    from sit_atconv.flow import FlowMatching

    loss, counter = FlowMatching.loss, itertools.count(1)

    def third_is_nan(*args):
        factor = float("nan") if next(counter) == 3 else 1.0
        return {name: term * factor for name, term in loss(*args).items()}

    FlowMatching.loss = third_is_nan


def _make_third_loss_of_a_classifier_nan():
    from timm.loss import SoftTargetCrossEntropy

    forward, counter = SoftTargetCrossEntropy.forward, itertools.count(1)
    SoftTargetCrossEntropy.forward = lambda *args: forward(*args) * (float("nan") if next(counter) == 3 else 1.0)


def _compile_without_code():
    torch.compile = functools.partial(torch.compile, backend="aot_eager")


def _hide_checkpoints():
    from sit_atconv.checkpoints import run_folder, training_state

    if os.environ["RANK"] == "1":
        run_folder.list_checkpoints = training_state.list_checkpoints = lambda run: []


def _break_tracker():
    from accelerate import Accelerator

    Accelerator.log = lambda *args, **kwargs: os.listdir("/nowhere")


def _press_ctrl_c_twice_while_saving():
    import safetensors.torch

    from sit_atconv.training import guards

    guards.SAME_PRESS, save = 0.0, safetensors.torch.save_file

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    safetensors.torch.save_file = interrupted


def _take_the_fifth_image_for_unreadable():
    """Its pixels stay as they are."""
    from sit_atconv.data.loading import BatchReader

    read = BatchReader.__getitem__

    def marked(self, items):
        batch = read(self, items)
        for row, (index, _) in enumerate(items):
            if index == 5:
                batch.readable[row] = False
                batch.unreadable[self.data.name(5)] = "cannot be read as an image: it is the fifth"
        return batch

    BatchReader.__getitem__ = marked


def _count_waiting():
    """Prints, at the end, how often the host asked for the content of a tensor."""
    from collections import Counter

    counts = Counter()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, method=method, **kwargs):
            counts[name] += 1
            return method(self, *args, **kwargs)

        setattr(torch.Tensor, name, counted)
    multiprocessing.util.Finalize(counts, lambda: print("waited:", sum(counts.values())), exitpriority=0)


DEATHS = {
    "after the first checkpoint": _die_after_checkpoint,
    "before the second renaming": functools.partial(_die_at_replace, 2, before=True),
    "after the second renaming": functools.partial(_die_at_replace, 2, before=False),
    "before the index": _die_before_index,
    "files of 100 kB are too large": functools.partial(_limit_file_size, 100_000),
    "files of 8 kB are too large": functools.partial(_limit_file_size, 8000),
    "the third loss is not a number": _make_third_loss_nan,
    "the third loss of a classifier is not a number": _make_third_loss_of_a_classifier_nan,
    "the second process sees no checkpoint": _hide_checkpoints,
    "the tracker fails": _break_tracker,
    "compilation makes graphs, not code": _compile_without_code,
    "waiting is counted": _count_waiting,
    "Ctrl-C twice while saving": _press_ctrl_c_twice_while_saving,
    "the fifth image is taken for unreadable": _take_the_fifth_image_for_unreadable,
}


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


@pytest.fixture(scope="session")
def make_vae(tmp_path_factory):
    """make_vae(seed=0, **config) -> folder of a tiny autoencoder in the real format."""
    from diffusers import AutoencoderKL

    def make(seed: int = 0, **config) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("vae")
        config = dict(latent_channels=4, scaling_factor=0.5, shift_factor=0.1) | config
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            **config,
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def vae(make_vae):
    return make_vae()


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory):
    """120 digits as 16x16 PNGs, in one subfolder for each class."""
    from sit_atconv.data.digits import load_digits

    folder = tmp_path_factory.mktemp("digits")
    for i, (image, label) in enumerate(zip(*(array[:120] for array in load_digits()), strict=True)):
        (folder / f"digit {label}").mkdir(exist_ok=True)
        Image.fromarray(np.kron(image, np.ones((2, 2), np.uint8))).save(folder / f"digit {label}" / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def latents(launch, digit_folder, vae, tmp_path_factory):
    """Those digits encoded, in float32, in six shards."""
    folder = tmp_path_factory.mktemp("latents") / "digits"
    codes, output = launch("sit_atconv/encode.py", encode_argv(digit_folder, vae, folder))
    assert codes == [0], output
    return folder


def encode_argv(images: Path, vae: Path, out: Path) -> list:
    """Small batches and shards: 5 and 20 images in float32."""
    return [
        "--images",
        images,
        "--vae",
        vae,
        "--out",
        out,
        "--image-size",
        32,
        "--dtype",
        "float32",
        "--batch-size",
        5,
        "--shard-mib",
        0.35,
        "--num-workers",
        1,
        "--cpu-threads",
        1,
    ]


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


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Inception's true graph with random weights, in the format of the real file."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        torch.save(theirs.FeatureExtractorInceptionV3("x", ["2048"]).state_dict(), path)
    return path
