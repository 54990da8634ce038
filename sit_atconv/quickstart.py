"""A tour of the public commands on real images that need no download: train, generate, evaluate, compare speed.

    python -m sit_atconv.quickstart [--out FOLDER]

Prints and runs each command as you would type it, and at the end where every file and picture lies. Interrupted, the
same command goes on where it was.
"""

import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from sit_atconv.evaluation.records import read_evaluation
from sit_atconv.runtime.commands import ArgumentParser, fail, run_command

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "accelerate launch": [sys.executable, "-m", "accelerate.commands.launch"],
    "python": [sys.executable],
}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        usage="python -m sit_atconv.quickstart [--out FOLDER]",
        description="Trains on the embedded digits, generates, evaluates and compares speed, in minutes on a CPU.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where everything goes")
    out = parser.parse_args(argv).out
    if not (ROOT / "sample" / "generate.py").exists():
        fail(f"the commands are not in {ROOT}: install the project from its source folder with pip install -e .")

    run, samples, scores, speed = out / "run", out / "samples", out / "scores.json", out / "speed"
    parts = {
        "train": f"accelerate launch sit_atconv/train.py --out {shlex.quote(str(run))}",
        "generate": f"python sample/generate.py --ckpt {shlex.quote(str(run))} --cfg 2 --num-samples 1000 "
        f"--labels balanced --solver heun --steps 12 --batch-size 125 --out {shlex.quote(str(samples))}",
        "evaluate": f"python eval/fid.py --samples {shlex.quote(str(samples))} --reference digits --extractor digits "
        f"--features {shlex.quote(str(out / 'features'))} --out {shlex.quote(str(scores))}",
        "speed": f"python eval/speed.py --preset S/2 --forms attention atconv --out {shlex.quote(str(speed))}",
    }
    seconds = {name: run_as_typed(command) for name, command in parts.items()}

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


def run_as_typed(command: str) -> tuple[float, float]:
    """Prints and runs a command; leaves with it where it fails. Returns its wall and CPU seconds."""
    print(f"\n$ {command}", flush=True)
    launcher = next(name for name in LAUNCHERS if command.startswith(name))
    script, *arguments = shlex.split(command.removeprefix(launcher))
    wall, cpu = time.perf_counter(), _cpu_seconds()
    status = subprocess.run([*LAUNCHERS[launcher], str(ROOT / script), *arguments]).returncode
    if status:
        fail(f"that command failed with exit code {status}; mend what it says and run the quickstart again", status)
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    run_command(main)
