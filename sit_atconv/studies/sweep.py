"""Sweeps: train, sample and evaluate over a grid of settings and seeds, and report the results.

    python eval/sweep.py SWEEP.yaml [--jobs 2]

The file names the options that all runs share, axes, and a grid over them; docs/sweeps.md explains it. The same command
completes what is missing, after any interruption.
"""

import sys
from collections.abc import Sequence
from functools import partial

from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.runtime.commands import ArgumentParser, add_import_option, at_least, fail, run_command, user_errors
from sit_atconv.runtime.files import exclusive
from sit_atconv.runtime.installation import command, find_sweep, shipped_sweeps
from sit_atconv.studies.execution import Task, execute, plain_commands
from sit_atconv.studies.plan import STAGES, Run, read_sweep
from sit_atconv.studies.records import collect_scores, collect_training, read_scores, read_trainings

EXAMPLES = {"train": "--train.steps 6000", "generate": "--num-samples 50000", "evaluate": "--metrics fid"}
TRAIN, MEASURE = "training", "sampling and evaluation"  # kinds of tasks


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    with user_errors():
        more = {stage: text for stage in STAGES if (text := getattr(options, stage)) is not None}
        sweep = read_sweep(find_sweep(options.sweep), options.out, more)
        runs = sweep.runs()
        leaves = [leaf for run in runs for leaf in run.leaves]
        read_trainings(runs), read_scores(leaves)  # a record of other options is an error before anything runs
        failures: dict[str, str] = {}
        if not options.report:
            for leaf in leaves:  # what the commands of --print-commands made
                if leaf.scores.exists() and not leaf.record.exists():
                    collect_scores(leaf, jobs=1)
            tasks = missing_tasks(runs, options.jobs)
            if tasks:
                from sit_atconv.studies import checks  # imports torch

                checks.check_options(tasks)
            if options.print_commands:
                print(*plain_commands(in_lines(tasks), options.launch), sep="\n")
                return
            if options.dry_run:
                from sit_atconv.studies.estimate import estimate

                print(estimate(runs, tasks, options.jobs))
                return
            print(f"{sweep.out}: {len(tasks)} tasks to run, {options.jobs} at a time")
            if tasks:
                with exclusive(sweep.out):
                    threads, devices = checks.threads_and_devices(options.jobs)
                    failures = execute(tasks, sweep.out / "logs", options.jobs, options.launch, threads, devices)
        from sit_atconv.studies.report import report  # imports matplotlib

        print(report(sweep))
    if failures:
        print(*(f"FAILED {name}: {reason}" for name, reason in failures.items()), sep="\n", file=sys.stderr)
        fail(f"{len(failures)} of {len(tasks)} tasks failed; the same command tries them again")


def missing_tasks(runs: Sequence[Run], jobs: int) -> list[Task]:
    """Returns the tasks whose records are missing, each training before what needs it."""
    needed: set[str] = set()
    for run in reversed(runs):
        wanted = any(not leaf.record.exists() for leaf in run.leaves) or not run.record.exists()
        is_start = any(other.name in needed and other.needs(run) for other in runs)
        if run.is_trained and (wanted or (is_start and newest_checkpoint(run.folder) is None)):
            needed.add(run.name)
    tasks = []
    for run in runs:
        training = f"{run.name}.training"
        if run.name in needed:
            starts = {f"{other.name}.training" for other in runs if other.name in needed and run.needs(other)}
            finish = partial(collect_training, run, jobs)
            tasks.append(Task(training, TRAIN, [("train", run.argv)], finish, frozenset(starts)))
        for leaf in run.leaves:
            if not leaf.record.exists():
                steps = [("generate", leaf.generate_argv), ("fid", leaf.evaluate_argv)]
                needs = frozenset({training} if run.name in needed else ())
                tasks.append(Task(leaf.name, MEASURE, steps, partial(collect_scores, leaf, jobs), needs))
    return tasks


def in_lines(tasks: Sequence[Task]) -> list[Task]:
    """Returns the tasks for --print-commands: each training together with the leaves that need it."""
    lines: dict[str, Task] = {}
    for task in tasks:
        training = next((name for name in task.needs if name in lines), None) if task.kind == MEASURE else None
        if training is None:
            lines[task.name] = task
        else:
            first = lines[training]
            lines[training] = Task(first.name, first.kind, [*first.steps, *task.steps], first.finish, first.needs)
    return list(lines.values())


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command("sweep"),
        usage="%(prog)s SWEEP.yaml [--jobs 1] [--out DIR] [--dry-run | --print-commands | --report] [options]",
        description="Trains, samples and evaluates over a grid of settings and seeds, and reports means, errors over "
        "seeds and paired differences as tables and charts. Completes what is missing: the same command resumes after "
        "any interruption. A failed run is named at the end and stops no other run.",
    )
    parser.add_argument(
        "sweep", metavar="SWEEP.yaml", help=f"file of the sweep, or a shipped one: {', '.join(shipped_sweeps())}"
    )
    parser.add_argument("--jobs", type=at_least(1), default=1, help="number of runs at a time; they share the threads")
    parser.add_argument("--out", default=None, metavar="DIR", help="folder of the runs (default: the file's)")
    for stage in STAGES:
        parser.add_argument(
            f"--{stage}",
            default=None,
            metavar="OPTIONS",
            help=f'further options of {stage} for all runs, such as "{EXAMPLES[stage]}"; give another --out with them',
        )
    parser.add_argument(
        "--launch",
        default=None,
        metavar="LAUNCHER",
        help='launcher of each command, such as "accelerate launch --num_processes 4" (default: one process each)',
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="estimate the time from one measured step of each run")
    what.add_argument(
        "--print-commands",
        action="store_true",
        help="print the missing commands for a scheduler, one run a line; a later call collects what they made",
    )
    what.add_argument("--report", action="store_true", help="make tables and charts of the records that exist")
    add_import_option(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
