from itertools import chain, islice

import pytest

from sit_atconv.data.order import BatchOrder, hold_out, step_seed


def take(order, count):
    """Returns the images of the first `count` micro-batches, none of them flipped."""
    batches = list(islice(order, count))
    assert not any(mirrored for batch in batches for _, mirrored in batch)
    return [[index for index, _ in batch] for batch in batches]


def test_each_epoch_shows_every_image_once_in_its_own_order():
    order = BatchOrder(12, 4, seed=0)
    first, second = (list(chain(*batches)) for batches in (take(order, 6)[:3], take(order, 6)[3:]))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert take(BatchOrder(12, 4, seed=1), 3) != take(order, 3)


def test_the_incomplete_last_batch_of_an_epoch_is_skipped():
    order = BatchOrder(14, 4, seed=0)
    assert order.steps_per_epoch == 3 and len(set(chain(*take(order, 3)))) == 12


@pytest.mark.parametrize("step", [1, 3, 4, 11])
def test_the_order_is_the_same_from_any_starting_step(step):
    order = BatchOrder(13, 4, seed=0, accumulation=2)
    assert take(order.starting_at(step), 10) == take(order, 2 * step + 10)[2 * step :]


def test_processes_and_micro_batches_split_the_batches_of_one_process():
    alone = take(BatchOrder(24, 8, seed=0), 4)
    ranks = [take(BatchOrder(24, 8, seed=0, accumulation=2, rank=rank, num_processes=2), 8) for rank in (0, 1)]
    for step, batch in enumerate(alone):
        parts = [ranks[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]
        assert list(chain(*parts)) == batch and all(len(part) == 2 for part in parts)


def test_flips_are_a_function_of_seed_epoch_and_position():
    order = BatchOrder(1000, 100, seed=0, mirror=True)
    plain = BatchOrder(1000, 100, seed=0)
    batches = list(islice(order, 20))
    assert [[index for index, _ in batch] for batch in batches] == take(plain, 20)  # flips do not change the order
    epochs = [[mirrored for batch in batches[i : i + 10] for _, mirrored in batch] for i in (0, 10)]
    assert all(440 < sum(epoch) < 560 for epoch in epochs) and epochs[0] != epochs[1]
    assert list(islice(order.starting_at(13), 7)) == batches[13:]
    options = dict(seed=0, mirror=True, num_processes=2)
    ranks = [list(islice(BatchOrder(1000, 100, rank=rank, **options), 20)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == batches
    other = list(islice(BatchOrder(1000, 100, seed=1, mirror=True), 10))
    assert [mirrored for batch in other for _, mirrored in batch] != epochs[0]


def test_impossible_batch_sizes_are_refused():
    with pytest.raises(ValueError, match="batch_size 10 is not divisible by accumulation 2 x 3 processes"):
        BatchOrder(100, 10, seed=0, accumulation=2, num_processes=3)
    with pytest.raises(ValueError, match="batch_size 128 exceeds the 100 images"):
        BatchOrder(100, 128, seed=0)


def test_rows_are_the_positions_in_the_steps_batch():
    whole = take(BatchOrder(24, 8, seed=0), 2)
    for rank in (0, 1):
        order = BatchOrder(24, 8, seed=0, accumulation=2, rank=rank, num_processes=2)
        batches = take(order, 4)
        for number, batch in enumerate(batches):
            assert whole[number // 2][order.rows(number % 2)] == batch
        assert order.batch(1) == whole[1]


def test_held_out_images_are_never_used_and_all_others_are():
    held_out = hold_out(30, 6)
    assert len(set(held_out)) == 6 and list(held_out) != sorted(held_out) and list(hold_out(30, 6)) == list(held_out)
    assert held_out.tolist() == [2, 11, 26, 21, 10, 4]  # fixed: a resumed run must not train on them
    order = BatchOrder(30, 8, seed=3, held_out=held_out)
    assert order.steps_per_epoch == 3
    assert set(chain(*take(order, 3))) == set(range(30)) - set(held_out.tolist())
    with pytest.raises(ValueError, match="batch_size 25 exceeds the 30 images of the data set, 6 of them held out"):
        BatchOrder(30, 25, seed=0, held_out=held_out)
    with pytest.raises(ValueError, match=r"data.held_out 30 leaves none of the 30 images"):
        hold_out(30, 30)


def test_seeds_of_steps_differ():
    assert len({step_seed(seed, step) for step in range(40) for seed in range(2)}) == 80
