"""Cached latents: the same as uncached ones, stale in no case, whole after a kill, and nobody else's."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from robustdiff.codecs.vae import VAE
from robustdiff.data import ArrayDataset
from robustdiff.data.latents import LatentDataset
from robustdiff.errors import InputError, RunError

N = 150


def small(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=8,
    )


def dataset(seed: int = 0, side: int = 8, captions: list[tuple[str, ...]] | None = None) -> ArrayDataset:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (N, side, side, 1), dtype=np.uint8)
    return ArrayDataset("noise", pixels, random.integers(0, 3, N), 3, captions)


@pytest.fixture
def parts_of_40(monkeypatch):
    monkeypatch.setattr("robustdiff.data.latents._PART_BYTES", 40 * 2 * 8 * 4 * 4)
    monkeypatch.setattr("robustdiff.data.latents._MOST_PARTS", 10**6)


class Counting(VAE):
    """A VAE that counts the images that it encodes."""

    encoded_images = 0

    def moments(self, images):
        self.encoded_images += len(images)
        return super().moments(images)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_those_of_the_images(tmp_path, parts_of_40, posterior, flip):
    images, codec = dataset(), VAE(small(), posterior)
    cached = LatentDataset(images, codec, flip, tmp_path)
    cached.fill()
    assert len(list(cached.folder.glob("*.float16"))) > 1
    indices = [0, 149, 39, 40, 41, 7]
    batch, labels = cached.__getitems__(indices)[:2]
    pixels, wanted = images.__getitems__(indices)[:2]
    assert torch.equal(labels, wanted)
    flipped = torch.tensor([True, False, True, True, False, False]) if flip else None
    noise = torch.randn(6, 4, 4, 4)
    latents = cached.latents(batch, codec, flipped, noise)
    torch.testing.assert_close(latents, images.latents(pixels, codec, flipped, noise), rtol=2e-3, atol=1e-4)
    again = cached.latents(batch, codec, flipped, None)
    assert torch.equal(latents, again) == (posterior == "mean")  # every epoch draws anew


def test_latents_are_resident_where_there_is_room(tmp_path, parts_of_40):
    cached = LatentDataset(dataset(), VAE(small()), True, tmp_path)
    cached.fill()
    wanted = cached.__getitems__(range(N)).images
    assert torch.equal(cached.resident(torch.device("cpu"), wanted.nbytes), wanted)
    assert cached.resident(torch.device("cpu"), wanted.nbytes - 1) is None


def test_it_describes_itself_as_its_images_do(tmp_path):
    images = dataset()
    cached = LatentDataset(images, VAE(small()), False, tmp_path)
    assert (cached.shape, cached.num_classes, len(cached)) == (images.shape, images.num_classes, N)
    assert cached.fingerprint() == images.fingerprint()


def test_captions_go_along_and_other_captions_have_the_same_latents(tmp_path):
    captions = [(f"image {k}",) for k in range(N)]
    codec = Counting(small())
    LatentDataset(dataset(), codec, False, tmp_path).fill()
    codec.encoded_images = 0
    cached = LatentDataset(dataset(captions=captions), codec, False, tmp_path)
    cached.fill()
    assert codec.encoded_images == 0
    assert cached.captioned
    assert cached.__getitems__([3, 1]).captions == [("image 3",), ("image 1",)]
    assert cached.fingerprint() != LatentDataset(dataset(), codec, False, tmp_path).fingerprint()


def test_nothing_is_computed_twice_and_a_killed_process_loses_a_part_at_most(tmp_path, parts_of_40):
    codec = Counting(small())
    cached = LatentDataset(dataset(), codec, False, tmp_path)

    class Killed(Exception):
        pass

    class After:
        done = 0

        def begin(self, description, total):
            assert total == N

        def advance(self, amount, note=""):
            self.done += amount
            if self.done > 60:
                raise Killed

    with pytest.raises(Killed):
        cached.fill(progress=After())
    with pytest.raises(RunError, match="start the run again"):
        cached.__getitems__([N - 1])
    torn = cached.folder / ".00003.float16.0123456789ab.tmp"
    torn.write_bytes(b"torn")
    os.utime(torn, (0, 0))
    before, codec.encoded_images = codec.encoded_images, 0
    cached = LatentDataset(dataset(), codec, False, tmp_path)
    cached.fill()
    assert 0 < codec.encoded_images <= N - 40 < N <= before + codec.encoded_images
    assert not list(cached.folder.glob(".*.tmp"))
    codec.encoded_images = 0
    LatentDataset(dataset(), codec, False, tmp_path).fill()
    assert codec.encoded_images == 0


def test_a_torn_part_is_computed_again(tmp_path, parts_of_40, caplog):
    codec = Counting(small(), "mean")
    cached = LatentDataset(dataset(), codec, False, tmp_path)
    cached.fill()
    wanted, _ = cached.__getitems__(range(N))[:2]
    part = cached.folder / "00001.float16"
    part.write_bytes(part.read_bytes()[:-2])
    again = LatentDataset(dataset(), codec, False, tmp_path)
    with pytest.raises(RunError, match=r"00001\.float16"):
        again.__getitems__([cached.part])
    codec.encoded_images = 0
    again.fill()
    assert codec.encoded_images == min(cached.part, N - cached.part)
    assert "damaged" in caplog.text
    torch.testing.assert_close(again.__getitems__(range(N))[0], wanted)


def test_another_vae_other_data_another_size_or_flip_is_another_entry(tmp_path):
    folders = {
        LatentDataset(images, VAE(vae, posterior), flip, tmp_path).folder
        for images, vae, posterior, flip in [
            (dataset(), small(), "mean", False),
            (dataset(), small(), "sample", False),
            (dataset(), small(), "mean", True),
            (dataset(), small(1), "mean", False),
            (dataset(1), small(), "mean", False),
            (dataset(side=16), small(), "mean", False),
        ]
    }
    assert len(folders) == 6
    assert LatentDataset(dataset(), VAE(small(), "mean"), False, tmp_path).folder in folders


def test_another_users_entry_is_not_taken(tmp_path, monkeypatch):
    mine = LatentDataset(dataset(), VAE(small()), False, tmp_path).folder
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / "another"))
    assert LatentDataset(dataset(), VAE(small()), False, tmp_path).folder != mine


@pytest.mark.parametrize("kind", ["file", "link", "folder link"])
def test_a_strangers_file_in_the_cache_is_refused_and_stays(tmp_path, kind):
    cached = LatentDataset(dataset(), VAE(small()), False, tmp_path / "cache")
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    if kind == "file":
        cached.folder.mkdir(parents=True)
        (cached.folder / "thesis.txt").write_text("mine")
    elif kind == "folder link":
        cached.folder.parent.mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        cached.folder.symlink_to(tmp_path / "elsewhere")
    else:
        cached.fill()
        place = cached.folder / "00000.float16"
        place.unlink()
        place.symlink_to(outside)
        cached = LatentDataset(dataset(), VAE(small()), False, tmp_path / "cache")
    with pytest.raises(InputError):
        cached.fill()
    assert outside.read_bytes() == b"mine"
    assert not list((tmp_path / "elsewhere").glob("*")) if kind == "folder link" else True


def test_processes_share_what_is_missing(tmp_path, parts_of_40):
    codecs = [Counting(small()) for _ in range(2)]
    for process, codec in enumerate(codecs):
        LatentDataset(dataset(), codec, False, tmp_path).fill(process=process, processes=2)
    assert all(codec.encoded_images for codec in codecs)
    assert sum(codec.encoded_images for codec in codecs) == N
    LatentDataset(dataset(), codecs[0], False, tmp_path).__getitems__(range(N))


def test_a_copy_in_another_process_opens_its_own_maps(tmp_path):
    cached = LatentDataset(dataset(), VAE(small(), "mean"), False, tmp_path)
    cached.fill()
    batch, _ = cached.__getitems__(range(N))[:2]
    copied = pickle.dumps(cached)
    assert torch.equal(pickle.loads(copied).__getitems__(range(N))[0], batch)


def test_latents_that_are_not_finite_are_refused_by_the_images_number(tmp_path):
    vae = small()

    class Broken(VAE):
        def moments(self, images):
            moments = super().moments(images)
            moments[-1, 0, 0, 0] = 1e6
            return moments

    with pytest.raises(RunError, match="image 63"):
        LatentDataset(dataset(), Broken(vae), False, tmp_path).fill()
