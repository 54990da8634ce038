import os
import signal

import pytest
import torch

from sit_atconv.training.guards import (
    Agreement,
    FiniteWatch,
    StopRequest,
    leave_signals_to_the_trainer,
    poisoned,
)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_workers_live_on(handlers, number):
    stop = StopRequest()
    assert stop.number == 0
    os.kill(os.getpid(), number)
    assert stop.number == number
    leave_signals_to_the_trainer(0)
    os.kill(os.getpid(), number)


def test_alone_one_agrees_with_oneself():
    assert Agreement().largest(3, 0) == [3, 0] and Agreement().largest(0, 7, now=True) == [0, 7]


def agree(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    agreement = Agreement()
    calls = [(5 * rank, 0, False), (0, 0, False), (0, 3 * rank, False), (9 - rank, 0, True), (0, 0, False)]
    results.put([agreement.largest(a, b, now=now) for a, b, now in calls])
    torch.distributed.destroy_process_group()


def test_all_processes_agree_one_call_later_or_at_once():
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
    assert both[0] == both[1] == [[0, 0], [5, 0], [0, 0], [9, 0], [0, 0]]


def test_the_first_bad_step_is_the_one_that_is_named():
    watch = FiniteWatch()
    for step in range(1, 6):
        watch.note(step, torch.tensor(step not in (3, 4)))
    assert watch.look() == 3 and watch.look(wait=True) == 3


class Late:
    """An event of a device that has not yet come to it."""

    def __init__(self):
        self.reached = False

    def query(self):
        return self.reached

    def synchronize(self):
        self.reached = True


def test_flags_that_have_not_arrived_are_waited_for_only_if_asked_to():
    watch = FiniteWatch()
    watch.flags.append((1, torch.tensor(True), None))
    watch.flags.append((2, torch.tensor(False), late := Late()))
    watch.flags.append((3, torch.tensor(False), Late()))
    assert watch.look() == 0 and not late.reached
    assert watch.look(wait=True) == 2 and late.reached


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_poisons_its_gradient_and_another_keeps_its_bits(value):
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    (plain,) = torch.autograd.grad((x**3).sum(), x)
    (same,) = torch.autograd.grad(poisoned((x**3).sum()), x)
    assert torch.equal(plain, same)
    loss = (x**3).sum() + value  # finite gradient, all the same
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
    assert torch.autograd.grad(poisoned((x**3).sum() + value), x)[0].isnan().all()
