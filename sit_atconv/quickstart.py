"""A tour of the public commands on real images that need no download: train, generate, evaluate, compare speed.

    python -m sit_atconv.quickstart [--out FOLDER]

Prints and runs each command as you would type it, and at the end where every file and picture lies. Interrupted, the
same command goes on where it was.
"""

import resource
import shlex
import subprocess
import time
from pathlib import Path

from sit_atconv.evaluation.records import read_evaluation
from sit_atconv.runtime.commands import ArgumentParser, at_least, fail, run_command
from sit_atconv.runtime.installation import command, command_argv


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog=command("quickstart"),
        usage="%(prog)s [--out FOLDER] [--steps N]",
        description="Trains on the embedded digits, generates, evaluates and compares speed, in minutes on a CPU.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where everything goes")
    parser.add_argument("--steps", type=at_least(1), help="training steps, for a shorter tour of worse digits "
                        "(default: 1800, as configs/digits.yaml has it)")
    options = parser.parse_args(argv)
    out, steps = options.out, ["--train.steps", options.steps] if options.steps else []

    run, samples, scores, speed = out / "run", out / "samples", out / "scores.json", out / "speed"
    seconds = {
        "train": run_as_typed("train", "--out", run, *steps),
        "generate": run_as_typed("generate", "--ckpt", run, "--cfg", 2, "--num-samples", 1000, "--labels", "balanced",
                                 "--solver", "heun", "--steps", 12, "--batch-size", 125, "--out", samples),
        "evaluate": run_as_typed("fid", "--samples", samples, "--reference", "digits", "--extractor", "digits",
                                 "--features", out / "features", "--out", scores),
        "speed": run_as_typed("speed", "--preset", "S/2", "--forms", "attention", "atconv", "--out", speed),
    }

    found = {name: str(score) for name, score in read_evaluation(scores).scores.items()}
    print(f"\n{'part':10} {'wall s':>7} {'CPU s':>7}")
    for name, (wall, cpu) in [*seconds.items(), ("in all", tuple(map(sum, zip(*seconds.values(), strict=True))))]:
        print(f"{name:10} {wall:7.0f} {cpu:7.0f}")
    print(
        f"\nmodel            {run}\nloss curve       {run / 'loss.png'}\npreviews         {run / 'samples'}"
        f"\ngenerated digits {samples / 'grid.png'}\nall samples      {samples / 'samples.npz'}"
        f"\nscores           {scores}: Frechet distance {found['FD-digits-1000']}, precision "
        f"{found['precision-digits']}, recall {found['recall-digits']} (in the digit classifier's features)"
        f"\nspeed            {speed / 'speed.png'}, {speed / 'speed.md'}"
    )


def run_as_typed(name: str, *options: object) -> tuple[float, float]:
    """Prints and runs a command; leaves with it where it fails. Returns its wall and CPU seconds."""
    arguments = [str(option) for option in options]
    print(f"\n$ {command(name)} {shlex.join(arguments)}", flush=True)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    status = subprocess.run([*command_argv(name), *arguments]).returncode
    if status:
        fail(f"that command failed with exit code {status}; mend what it says and run the quickstart again", status)
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    run_command(main)
