"""The order of the data and the randomness of a batch depend on the seed and the batch number alone."""

from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdiff.training.stream import BatchIndices, BucketIndices, batch_generator, caption_numbers, crop_positions


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


def test_processes_and_microbatches_share_out_the_same_batch():
    (whole,) = batches(1, length=50, batch_size=12, seed=1)
    for rank, first_rows in enumerate([(0, 4, 8), (2, 6, 10)]):  # of the first, second and third microbatch
        indices = BatchIndices(50, 12, 1, rank=rank, processes=2, accumulate=3)
        assert [indices.rows(m) for m in range(3)] == [slice(first, first + 2) for first in first_rows]
        assert list(islice(indices, 3)) == [whole[first : first + 2] for first in first_rows]


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
    drawn = [torch.rand(4, generator=batch_generator(own, 0, "cpu")) for own in (seed, seed, seed ^ 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    first, again = (batches(1, length=5, batch_size=2, seed=seed) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


# -- buckets ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 200))
def test_a_batch_is_of_one_bucket_and_starting_later_is_skipping_batches(names, batch_size, start):
    buckets = np.array(names)
    whole, later = BucketIndices(buckets, batch_size, 5), BucketIndices(buckets, batch_size, 5, start)
    for number in (0, 1, start, start + 1):
        indices = whole.batch(number)
        assert len(indices) == batch_size
        assert set(buckets[indices].tolist()) == {whole.bucket(number)}
    assert next(iter(later)) == whole.batch(start).tolist()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 9))
def test_every_image_is_drawn_equally_often(counts, batch_size):
    buckets, rounds = np.repeat(np.arange(len(counts)) * 3, counts), 10
    indices = BucketIndices(buckets, batch_size, 0)
    batches = sum(rounds * n // batch_size for n in counts)
    drawn = np.concatenate([np.empty(0, np.int64), *(indices.batch(number) for number in range(batches))])
    times = np.bincount(drawn, minlength=len(buckets))
    for bucket, n in enumerate(counts):
        own = times[buckets == 3 * bucket]
        # All of a bucket's images are drawn before one is drawn again; all but the last, begun batch are drawn.
        assert own.max() - own.min() <= 1
        assert rounds * n - batch_size < own.sum() <= rounds * n


def test_processes_and_microbatches_share_out_a_bucket():
    buckets = np.array([0, 1, 1, 0, 1, 1, 1, 0])
    whole = BucketIndices(buckets, 4, 1).batch(3).tolist()
    parts: list[int | None] = [None] * 4
    for rank in range(2):
        indices = BucketIndices(buckets, 4, 1, 3, rank, 2, 2)
        for m, microbatch in enumerate(islice(indices, 2)):
            parts[indices.rows(m)] = microbatch
    assert parts == whole


def test_buckets_are_mixed():
    indices = BucketIndices(np.repeat([0, 1], [40, 120]), 4, 0)
    order = [indices.bucket(number) for number in range(80)]
    assert order.count(0) == 20
    assert 5 < sum(a != b for a, b in pairwise(order)) < 45
    assert order[:40] != order[40:]


def test_crops_are_a_function_of_seed_and_batch():
    first = crop_positions(3, 7, 100)
    assert first == crop_positions(3, 7, 100)
    assert not set(first) & (set(crop_positions(3, 8, 100)) | set(crop_positions(4, 7, 100)))
    assert all(0 <= number < 1 for place in first for number in place)
    assert not set(chain(*first)) & set(caption_numbers(3, 7, 200)), "captions are chosen by other numbers"
