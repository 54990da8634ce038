import itertools

import pytest
import torch

from sit_atconv.speed.timing import Rotation, Rounds, time_interleaved

CPU = torch.device("cpu")


def test_rounds_are_interleaved_and_warmup_is_discarded():
    log, now = [], itertools.count()
    seconds = time_interleaved(
        {name: lambda name=name: log.append(name) for name in "AB"},
        rounds=3,
        warmup=2,
        synchronize=lambda: log.append("sync"),
        clock=lambda: log.append("clock") or next(now) ** 2,
        after_round=lambda: log.append("round"),
    )
    timed = [["sync", "clock", name, "sync", "clock"] for name in "AB"]
    assert log == [*timed[0], *timed[1], "round"] * 5
    elapsed = [(i + 1) ** 2 - i**2 for i in range(0, 20, 2)]  # of the ten timed runs, warm-up included
    assert seconds == {"A": elapsed[4::2], "B": elapsed[5::2]}


def test_quartiles_sums_and_ratios_are_taken_round_by_round():
    a, b = Rounds.of([2.0, 40.0, 9.0]), Rounds.of([1.0, 10.0, 3.0])
    assert (b.q1, b.median, b.q3) == (2.0, 3.0, 6.5)
    assert a.over(b) == Rounds(3.0, 2.5, 3.5, (2.0, 4.0, 3.0))
    assert a.plus(b).rounds == (3.0, 50.0, 12.0)
    assert Rounds.of([3.0]) == Rounds(3.0, 3.0, 3.0, (3.0,))
    with pytest.raises(ValueError):
        a.over(Rounds.of([1.0]))


def test_on_a_cpu_two_sets_take_turns():
    rotation, log = Rotation(CPU, 2**30), []
    assert (rotation.num_sets, rotation.calls_per_run) == (2, 1)
    run = rotation.run([lambda: log.append("A"), lambda: log.append("B")])
    for _ in range(5):
        run()
    assert log == list("ABABA")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_graphs_run_every_set_with_its_backward():
    device = torch.device("cuda")
    L2 = torch.cuda.get_device_properties(device).L2_cache_size
    rotation = Rotation(device, L2)
    assert rotation.num_sets == 5
    with rotation.preparing():
        x = [torch.full((8,), float(i), device=device, requires_grad=True) for i in range(5)]
        sums = [torch.zeros(8, device=device) for _ in x]
        cubes = [a**3 for a in x]

    def call(i):
        sums[i] += torch.autograd.grad(cubes[i].sum(), x[i], retain_graph=True)[0]

    run = rotation.run([lambda i=i: call(i) for i in range(5)])
    before = [s.clone() for s in sums]
    run()
    torch.cuda.synchronize()
    for i in range(5):
        assert torch.equal(sums[i] - before[i], torch.full_like(sums[i], 3.0 * i**2 * rotation.calls_per_run / 5))
