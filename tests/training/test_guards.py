import os
import signal
import sys

import pytest
import torch

from sit_atconv.training.guards import (
    STOP_SIGNALS,
    Agreement,
    FiniteWatch,
    StopRequest,
    leave_signals_to_the_trainer,
    poisoned,
)


@pytest.fixture
def stop(monkeypatch):
    """A StopRequest whose clock is `stop.now`; `stop.said` lists its announcements."""
    said, before = [], {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopRequest(announce=lambda: said.append("announced"), leave=lambda: sys.exit("left"))
    stop.said, stop.now = said, 100.0
    monkeypatch.setattr("sit_atconv.training.guards.time.monotonic", lambda: stop.now)
    yield stop
    stop.close()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_by_the_trainer_and_ignored_by_workers(stop, number):
    stop.has_work = True
    assert stop.number == 0
    os.kill(os.getpid(), number)
    assert stop.number == number and stop.said == ["announced"] * (number == signal.SIGINT)
    leave_signals_to_the_trainer(0)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])  # torchrun forwards it as SIGTERM
def test_a_second_ctrl_c_exits_at_once_unless_it_is_a_launchers_copy(stop, second):
    stop.has_work = True
    os.kill(os.getpid(), signal.SIGINT)
    stop.now = 100.9
    os.kill(os.getpid(), second)
    assert stop.said == ["announced"] and stop.number == signal.SIGINT
    stop.now = 101.0
    with pytest.raises(SystemExit, match="left"):
        os.kill(os.getpid(), second)
    assert stop.said == ["announced"]


def test_ctrl_c_before_the_first_step_exits_at_once(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.said == [] and stop.number == signal.SIGTERM
    with pytest.raises(SystemExit, match="left"):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stays_ignored_in_a_background_job():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = StopRequest(announce=pytest.fail, leave=pytest.fail)
        os.kill(os.getpid(), signal.SIGINT)
        stop.close()
        assert stop.number == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_single_process_agrees_with_itself():
    assert Agreement().largest(3, 0) == [3, 0] and Agreement().largest(0, 7, now=True) == [0, 7]


def agree(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    agreement = Agreement()
    calls = [(5 * rank, 0, False), (0, 0, False), (0, 3 * rank, False), (9 - rank, 0, True), (0, 0, False)]
    results.put([agreement.largest(a, b, now=now) for a, b, now in calls] + [agreement.gather({rank: "why"})])
    torch.distributed.destroy_process_group()


def test_processes_agree_one_call_later_or_at_once():
    import multiprocessing
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=agree, args=(rank, port, results)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    both = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert both[0] == both[1] == [[0, 0], [5, 0], [0, 0], [9, 0], [0, 0], {0: "why", 1: "why"}]


def test_the_first_step_that_is_not_finite_is_reported():
    watch = FiniteWatch()
    for step in range(1, 6):
        watch.note(step, torch.tensor(step not in (3, 4)))
    assert watch.look() == 3 and watch.look(wait=True) == 3


class Late:
    """An event that the device has not reached yet."""

    def __init__(self):
        self.reached = False

    def query(self):
        return self.reached

    def synchronize(self):
        self.reached = True


def test_flags_that_have_not_arrived_are_awaited_only_with_wait():
    watch = FiniteWatch()
    watch.flags.append((1, torch.tensor(True), None))
    watch.flags.append((2, torch.tensor(False), late := Late()))
    watch.flags.append((3, torch.tensor(False), Late()))
    assert watch.look() == 0 and not late.reached
    assert watch.look(wait=True) == 2 and late.reached


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_poisons_its_gradient_and_a_finite_one_keeps_its_bits(value):
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    (plain,) = torch.autograd.grad((x**3).sum(), x)
    (same,) = torch.autograd.grad(poisoned((x**3).sum()), x)
    assert torch.equal(plain, same)
    loss = (x**3).sum() + value  # its gradient is finite nevertheless
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
    assert torch.autograd.grad(poisoned((x**3).sum() + value), x)[0].isnan().all()
