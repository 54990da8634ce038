"""Tour of the commands on real images that need no download, from training to a comparison of speed.

    python -m sit_atconv.quickstart [--out FOLDER]

Prints and runs each command as a user would type it, and ends with a table of results and files. If it is interrupted,
the same command resumes the tour.
"""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sit_atconv.checkpoints.run_folder import read_stats
from sit_atconv.evaluation.records import read_evaluation
from sit_atconv.runtime.commands import ArgumentParser, at_least, fail, run_command
from sit_atconv.runtime.installation import command, command_argv


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog=command("quickstart"),
        usage="%(prog)s [--out FOLDER] [--steps N]",
        description="Trains on scikit-learn's digits, generates, evaluates, compares speed and trains a classifier, in "
        "minutes on a CPU.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for all results")
    parser.add_argument(
        "--steps",
        type=at_least(1),
        help="number of training steps of the generator; fewer make a shorter tour with "
        "worse digits (default: 1800, from configs/digits.yaml)",
    )
    options = parser.parse_args(argv)
    out, steps = options.out, ["--train.steps", options.steps] if options.steps else []
    out.mkdir(parents=True, exist_ok=True)

    run, samples, scores, speed = out / "run", out / "samples", out / "scores.json", out / "speed"
    classifier, page = out / "classifier", out / "report.html"
    seconds = {
        "train": run_as_typed(out, "train", "--out", run, *steps),
        "generate": run_as_typed(
            out,
            "generate",
            "--ckpt",
            run,
            "--cfg",
            2,
            "--num-samples",
            1000,
            "--labels",
            "balanced",
            "--steps",
            12,
            "--batch-size",
            125,
            "--out",
            samples,
        ),
        "evaluate": run_as_typed(
            out,
            "fid",
            "--samples",
            samples,
            "--reference",
            "digits",
            "--extractor",
            "digits",
            "--features",
            out / "features",
            "--out",
            scores,
        ),
        "speed": run_as_typed(
            out, "speed", "--preset", "S/2", "--forms", "attention", "atconv", "--rounds", 3, "--out", speed
        ),
        "classify": run_as_typed(out, "classify", "--train.epochs", 4, "--train.warmup_epochs", 1, "--out", classifier),
        "report": run_as_typed(
            out,
            "report",
            run,
            "--scores",
            scores,
            "--speed",
            speed / "speed.png",
            "--title",
            "Quickstart",
            "--out",
            page,
        ),
    }

    print(f"\n{'stage':10} {'wall s':>7} {'CPU s':>7}")
    for name, (wall, cpu) in [*seconds.items(), ("total", tuple(map(sum, zip(*seconds.values(), strict=True))))]:
        print(f"{name:10} {wall:7.0f} {cpu:7.0f}")
    found = {name: str(score) for name, score in read_evaluation(scores).scores.items()}
    rows = {
        "Frechet distance": f"{found['FD-digits-1000']} (features of the digit classifier)",
        "precision, recall": f"{found['precision-digits']}, {found['recall-digits']}",
        "faster than attention": ", ".join(_speedups(speed / "speed.json")),
        "classified correctly": f"{read_stats(classifier)[-1]['val_raw_top1']:.1%} of 360 held-out digits (AttNet-XXS)",
        "page with all of it": page,
        "generated digits": samples / "grid.png",
        "loss curves": f"{run / 'loss.png'}, {classifier / 'loss.png'}",
        "speed chart": speed / "speed.png",
        "models": f"{run}, {classifier}",
        "record of scores": scores,
        "output of commands": out / "*.log",
    }
    print()
    for name, value in rows.items():
        print(f"{name:22} {value}")


def run_as_typed(out: Path, name: str, *options: object) -> tuple[float, float]:
    """Prints and runs a command, and exits with it if it fails.

    Its output goes to `out`/NAME.log; a terminal shows only its progress bar.

    Returns:
        Wall and CPU seconds.
    """
    arguments = [str(option) for option in options]
    print(f"\n$ {command(name)} {shlex.join(arguments)}", flush=True)
    wall, cpu, log = time.perf_counter(), _cpu_seconds(), out / f"{name}.log"
    # One process, said in full: accelerate warns about every value that it has to choose itself.
    launch = ["--quiet", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    start = command_argv(name)
    if "accelerate.commands.launch" in start:
        start[-1:] = [*launch, start[-1]]
    environment = {**os.environ, "COLUMNS": str(shutil.get_terminal_size().columns)}
    with (
        open(log, "wb", buffering=0) as file,
        subprocess.Popen([*start, *arguments], stdout=file, stderr=subprocess.PIPE, env=environment) as process,
    ):
        assert process.stderr is not None
        _follow(process.stderr.fileno(), file)
    if process.returncode:
        print(log.read_text(errors="replace"), file=sys.stderr)
        fail(
            f"that command failed with exit code {process.returncode} ({log}): fix the cause and run the quickstart "
            "again",
            process.returncode,
        )
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _follow(source: int, log) -> None:
    """Copies lines to a log, and shows what ends in a carriage return, a progress bar, on a terminal."""
    rest = b""
    while chunk := os.read(source, 1 << 16):
        *parts, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
        for part in parts:
            if part.endswith(b"\n"):
                log.write(part)
            elif sys.stderr.isatty():
                os.write(2, b"\033[K" + part)  # clears the rest of the line
    log.write(rest)
    if sys.stderr.isatty():
        os.write(2, b"\r\033[K")


def _speedups(path: Path) -> list[str]:
    """Returns how many times as fast as attention ATConv samples, for each resolution."""
    measured = json.loads(path.read_text())["measurements"]
    return [
        f"{each['speedup']['median']:.2f} at {each['resolution']} px"
        for each in measured
        if (each["form"], each["level"]) == ("atconv", "sampling")
    ]


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    run_command(main)
