"""Execution of a sweep's tasks: several at a time, each command in a process of its own."""

import importlib
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from sit_atconv.runtime.installation import COMMANDS, launched
from sit_atconv.sampling.solvers import SOLVERS

PRELOADED = [  # imported once, so that the processes of the commands start in milliseconds
    "sit_atconv.train",
    "sit_atconv.generation.draw",
    "sit_atconv.evaluation.evaluate",
    *(solver.library for solver in SOLVERS.values() if solver.library),
]
REFRESH = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Task:
    """Commands that run one after the other, and what to do when they have succeeded.

    Args:
        name: unique name, also that of its log.
        kind: tasks of one kind take about the same time: "train", or "sample and evaluate".
        steps: (command, arguments) pairs; a command is a key of `COMMANDS`.
        finish: called in this process after the last command; a ValueError or OSError makes the task fail.
        needs: names of tasks that must succeed before.
    """

    name: str
    kind: str
    steps: Sequence[tuple[str, list[str]]]
    finish: Callable[[], None]
    needs: frozenset[str] = frozenset()


@dataclass
class _Running:
    """A task with its process; `slot` is the number of the place among those that run at once."""

    task: Task
    slot: int
    log: Path
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    process: multiprocessing.process.BaseProcess | None = None


def execute(
    tasks: Sequence[Task], logs: Path, jobs: int = 1, launch: str | None = None, threads: int = 1, devices: int = 0
) -> dict[str, str]:
    """Runs all tasks and shows their progress. A failed task stops only those that need it.

    Args:
        tasks: tasks in the order in which to start them.
        logs: folder of the logs, one for each task.
        jobs: number of tasks at a time.
        launch: launcher of the commands, such as "accelerate launch --num_processes 4"; None starts one process each.
        threads: CPU threads of each task.
        devices: number of GPUs; with several jobs, each task gets one of them.

    Returns:
        The reason of each failure by the task's name. On Ctrl-C, or if this process dies, the commands end, too.
    """
    os.environ.setdefault("TQDM_MININTERVAL", "1")  # of the commands' bars: their logs would grow too fast
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    logs.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    waiting, running, done = [*tasks], list[_Running](), set[str]()
    board = _Board(tasks, jobs)

    def start(state: _Running) -> None:
        environment = {"LOKY_MAX_CPU_COUNT": str(threads), "OMP_NUM_THREADS": str(threads)}
        if devices and jobs > 1 and launch is None:
            environment["CUDA_VISIBLE_DEVICES"] = str(state.slot % devices)
        name, arguments = state.task.steps[state.step]
        state.process = context.Process(
            target=_run_command, args=(name, arguments, launch, str(state.log), environment), name=state.task.name
        )
        state.process.start()

    try:
        while waiting or running:
            for task in [task for task in waiting if task.needs & failures.keys()]:
                waiting.remove(task)
                failures[task.name] = f"needs {next(iter(task.needs & failures.keys()))}, which failed"
                board.end(task, failures[task.name], 0.0)
            while len(running) < jobs and (ready := next((t for t in waiting if t.needs <= done), None)):
                waiting.remove(ready)
                slot = min({*range(jobs)} - {state.slot for state in running})
                running.append(_Running(ready, slot, logs / f"{ready.name}.log"))
                running[-1].log.unlink(missing_ok=True)
                start(running[-1])
            time.sleep(REFRESH)
            board.show(running)
            for state in [state for state in running if state.process and state.process.exitcode is not None]:
                assert state.process is not None
                failure = _failure(state.process.exitcode, state.log)
                if failure is None and state.step + 1 < len(state.task.steps):
                    state.step += 1
                    start(state)
                    continue
                if failure is None:
                    try:
                        state.task.finish()
                    except (ValueError, OSError) as error:
                        failure = str(error)
                running.remove(state)
                if failure is None:
                    done.add(state.task.name)
                else:
                    failures[state.task.name] = f"{failure} (log: {state.log})"
                board.end(state.task, failure, time.monotonic() - state.started)
    finally:
        for state in running:
            if state.process and state.process.is_alive():
                state.process.terminate()  # training saves a checkpoint
        for state in running:
            if state.process:
                state.process.join()
        board.close()
    return failures


def _run_command(name: str, arguments: list[str], launch: str | None, log: str, environment: dict[str, str]) -> None:
    """Runs one command in this process, whose output goes to `log`."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    command = launched(name, launch) + arguments
    print(f"$ {' '.join(command)}", flush=True)
    if launch is not None:
        os.execvp(command[0], command)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    sys.argv, sys.orig_argv = command[1:], command
    importlib.import_module(COMMANDS[name][1]).main(arguments)


def _die_with_parent() -> None:
    """Kills this process when the sweep has died, so that its next call finds no folder in use."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _failure(exitcode: int | None, log: Path) -> str | None:
    """Returns why a command failed: its last error, or the signal that killed it; None if it did not fail."""
    if not exitcode:
        return None
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {exitcode}"])[-1].removeprefix("error: ")


def _tail(log: Path, size: int = 8192) -> str:
    """Returns the end of a log, with a line break for each update of a progress bar."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read().decode(errors="replace").replace("\r", "\n")


class _Board:
    """Progress on the terminal: a line for each running task, and one for all with the time left."""

    def __init__(self, tasks: Sequence[Task], jobs: int):
        self.left, self.jobs = [*tasks], jobs
        self.seconds: dict[str, list[float]] = defaultdict(list)
        is_silent = not sys.stderr.isatty()
        self.lines = [tqdm(bar_format="{desc}", position=i + 1, disable=is_silent, leave=False) for i in range(jobs)]
        self.total = tqdm(total=len(tasks), unit="task", disable=is_silent, bar_format="{l_bar}{bar}| {n}/{total}")

    def show(self, running: Sequence[_Running]) -> None:
        by_slot = {state.slot: state for state in running}
        for slot, line in enumerate(self.lines):
            state = by_slot.get(slot)
            last = next(iter(reversed(_tail(state.log, 1024).split("\n"))), "") if state and not line.disable else ""
            line.set_description_str(f"{state.task.name}: {last.strip()}" if state else "")

    def end(self, task: Task, failure: str | None, seconds: float) -> None:
        self.left.remove(task)
        if failure is None:
            self.seconds[task.kind].append(seconds)
        self.total.update()
        left = self.time_left()
        outcome = f"{task.kind} took {in_words(seconds)}" if failure is None else f"FAILED: {failure}"
        tqdm.write(f"{task.name}: {outcome}; {len(self.left)} tasks left{left and f', about {left}'}", file=sys.stderr)

    def time_left(self) -> str:
        """Returns the time left, from the mean of each kind of task; "" if a kind has not been measured yet."""
        if not self.left or any(task.kind not in self.seconds for task in self.left):
            return ""
        return in_words(sum(fmean(self.seconds[task.kind]) for task in self.left) / self.jobs)

    def close(self) -> None:
        for line in [*self.lines, self.total]:
            line.close()


def in_words(seconds: float) -> str:
    """Returns "25 s", "4.2 min" or "3.1 h"."""
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def plain_commands(tasks: Sequence[Task], launch: str | None) -> Iterator[str]:
    """Yields the commands of each task on one line, joined by &&."""
    for task in tasks:
        yield " && ".join(shlex.join(launched(name, launch) + argv) for name, argv in task.steps)
