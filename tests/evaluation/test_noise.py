"""The noise of images: published numbers of Philox, its distribution, and what it does not depend on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from robustdiff.evaluation import noise as module
from robustdiff.evaluation.noise import ImageNoise, philox

CPU = torch.device("cpu")

# kat_vectors of Random123: counter, key, result of philox4x32 with 10 rounds.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_numbers(counter, key, result):
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    even, odd = philox(torch.tensor([[c0], [c2]]), torch.tensor([[c1], [c3]]), (k0, k1))
    assert [even[0].item(), odd[0].item(), even[1].item(), odd[1].item()] == words(result)


def expected(seed: int, image: int, draw: int, size: int) -> np.ndarray:
    """The noise of an image by the formulas of the module, with numpy's unsigned integers and in float64."""
    quads = -(-size // 4)
    counter = np.zeros((4, quads), np.uint64)
    counter[0], counter[1] = np.arange(quads), draw
    counter[2], counter[3] = image % 2**32, image // 2**32 + 2**16 * 2
    low = np.uint64(2**32 - 1)
    keys = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = np.stack(
            [
                (second >> np.uint64(32)) ^ counter[1] ^ np.uint64(keys[0]),
                second & low,
                (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(keys[1]),
                first & low,
            ]
        )
        keys = [(key + step) % 2**32 for key, step in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
    u, angle = (counter[::2] + 1.0) / 2**32, 2 * np.pi * counter[1::2] / 2**32
    radius = np.sqrt(-2 * np.log(u))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)])  # (2, pair, quads)
    return pairs.transpose(2, 1, 0).reshape(-1)[:size]


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("image", [0, 2**32 - 1, 2**32, 2**41 + 7])
def test_noise_is_that_of_an_independent_implementation(seed, image):
    noise = ImageNoise(seed, range(image, image + 2), (3, 3, 3), CPU)
    for draw in range(2):
        found = noise.draw().flatten(1).numpy()
        for i in range(2):
            np.testing.assert_allclose(found[i], expected(seed, image + i, draw, 27), rtol=2e-6, atol=2e-6)


def test_an_image_has_the_same_noise_in_every_batch_and_however_many_draws_are_made_together():
    def draws(indices: range, ahead: int = 0) -> torch.Tensor:
        return torch.stack(list(itertools.islice(ImageNoise(7, indices, (3, 5, 5), CPU, ahead), 6)), 1)

    whole = draws(range(40))
    assert torch.equal(whole, draws(range(40), ahead=3))
    assert torch.equal(whole, draws(range(40), ahead=100))
    assert torch.equal(whole[7:8], draws(range(7, 8)))
    assert torch.equal(whole[11:24], draws(range(11, 24), ahead=5))


def test_draws_are_made_together_as_memory_allows(monkeypatch):
    made = []
    normal = ImageNoise._normal
    monkeypatch.setattr(ImageNoise, "_normal", lambda self, draws: made.append(len(draws)) or normal(self, draws))
    monkeypatch.setattr(module, "_CACHED", 3 * 2 * 16)
    for _ in zip(range(9), ImageNoise(0, range(2), (1, 4, 4), CPU, ahead=7), strict=False):
        pass
    assert made == [1, 3, 3, 1, 1]
    made.clear()
    ImageNoise(0, range(2), (1, 4, 4), CPU, ahead=7).draw()
    assert made == [1], "a sampler without noise in its steps needs the first draw alone"


def test_elements_do_not_depend_on_the_size_of_the_image():
    small, large = (ImageNoise(0, range(3), shape, CPU).draw().flatten(1) for shape in ((1, 3, 3), (3, 5, 7)))
    assert torch.equal(small, large[:, :9])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 3, 3), (3, 2, 1), (2, 4, 4)])
def test_shapes(shape):
    noise = ImageNoise(0, range(5), shape, CPU).draw()
    assert noise.shape == (5, *shape)
    assert noise.dtype == torch.float32
    assert len(noise.unique()) == noise.numel()
    assert ImageNoise(0, range(0), shape, CPU).draw().shape == (0, *shape)


def test_moments_are_those_of_normal_numbers():
    x = ImageNoise(1, range(256), (1, 32, 32), CPU).draw().double().flatten()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_the_distribution_function_is_the_normal_one():
    x = ImageNoise(2, range(64), (1, 32, 32), CPU).draw().double().flatten().sort().values
    steps = torch.arange(1, len(x) + 1) / len(x)
    distance = (torch.special.ndtr(x) - steps).abs().max()
    assert distance < 1.95 / len(x) ** 0.5, "Kolmogorov and Smirnov's test at the level 0.001"


def test_images_draws_elements_and_seeds_are_independent():
    def drawn(seed: int) -> torch.Tensor:
        noise = ImageNoise(seed, range(128), (1, 16, 16), CPU)
        return torch.stack([noise.draw() for _ in range(16)]).flatten(2).double()

    x = drawn(3)  # (draws, images, elements)
    n = x.numel()
    pairs = {
        "draws": (x[:-1], x[1:]),
        "images": (x[:, :-1], x[:, 1:]),
        "elements": (x[..., :-1], x[..., 1:]),
        "the numbers of a pair": (x[..., ::2], x[..., 1::2]),
        "quads": (x[..., :-4], x[..., 4:]),
        "seeds": (x, drawn(4)),
    }
    for name, (a, b) in pairs.items():
        for power in (1, 2):
            first, second = (value**power - (power - 1) for value in (a, b))
            assert abs((first * second).mean()) < 4.5 * power / (n / 2) ** 0.5, (name, power)


@pytest.mark.parametrize(
    ("seed", "indices"),
    [(-1, range(1)), (2**64, range(1)), (0, range(-1, 2)), (0, range(0, 4, 2)), (0, range(2**48, 2**48 + 1))],
)
def test_what_is_out_of_range_is_refused(seed, indices):
    with pytest.raises(ValueError, match="in \\[0, 2"):
        ImageNoise(seed, indices, (1, 2, 2), CPU)
