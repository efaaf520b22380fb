"""The order of the data and the randomness of a batch depend on the seed and the batch number alone."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustdiff.training.stream import BatchIndices, batch_generator, caption_numbers


def batches(n, **arguments):
    return list(islice(BatchIndices(**arguments), n))


def test_every_epoch_is_another_permutation_of_the_data():
    flat = [index for batch in batches(10, length=15, batch_size=3, seed=0) for index in batch]
    first, second = flat[:15], flat[15:]
    assert sorted(first) == sorted(second) == list(range(15))
    assert first != second


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 9))
def test_starting_later_is_skipping_batches(batch_size, length, start):
    whole = batches(start + 4, length=length, batch_size=batch_size, seed=5)
    assert batches(4, length=length, batch_size=batch_size, seed=5, start=start) == whole[start:]


def test_a_batch_larger_than_the_data_goes_on_into_the_next_epochs():
    (batch,) = batches(1, length=3, batch_size=8, seed=0)
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_processes_and_microbatches_share_out_the_same_batch(processes, accumulate, each):
    size = processes * accumulate * each
    (whole,) = batches(1, length=50, batch_size=size, seed=1)
    parts: list[int | None] = [None] * size
    for rank in range(processes):
        indices = BatchIndices(50, size, 1, rank=rank, processes=processes, accumulate=accumulate)
        for m, microbatch in enumerate(islice(indices, accumulate)):
            parts[indices.rows(m)] = microbatch
    assert parts == whole


def test_seeds_differ():
    assert batches(1, length=50, batch_size=8, seed=1) != batches(1, length=50, batch_size=8, seed=2)


def test_the_generator_is_a_function_of_seed_and_batch():
    def draw(seed, batch):
        return torch.randn(4, generator=batch_generator(seed, batch, "cpu"))

    assert torch.equal(draw(3, 7), draw(3, 7))
    others = [draw(3, 8), draw(4, 7), draw(7, 3), draw(0, 0)]
    assert not any(torch.equal(draw(3, 7), other) for other in others)


def test_the_numbers_that_choose_captions_are_a_function_of_seed_and_batch():
    numbers = caption_numbers(3, 7, 1000)
    assert (numbers == caption_numbers(3, 7, 1000)).all()
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 0.05
    assert not any((numbers == other).any() for other in (caption_numbers(3, 8, 1000), caption_numbers(4, 7, 1000)))


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_large_seeds_are_seeds(seed):
    batch_generator(seed, 0, "cpu")
    batches(1, length=5, batch_size=2, seed=seed)
