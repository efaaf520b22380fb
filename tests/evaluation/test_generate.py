"""Streaming generation: an image depends on its seed and number alone, and interrupted work goes on."""

from __future__ import annotations

import copy
import json
import os
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from robustdiff.backbones.model import Model
from robustdiff.backbones.unet2d import UNet2D
from robustdiff.errors import InputError, RunError
from robustdiff.evaluation.generate import RECORD, Generator, share_of, write_npz, write_pngs
from robustdiff.files import held
from robustdiff.process import DiffusionProcess
from robustdiff.samplers.sample import SAMPLERS


@pytest.fixture
def generator(digits_run) -> Generator:
    return Generator.load(digits_run, sampler="iddpm", steps=3, seed=5, batch_size=4)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def images_of(generator: Generator, indices: range) -> torch.Tensor:
    return torch.cat([images for _, images in generator.images(indices)])


def test_an_image_is_the_same_alone_and_among_others(generator):
    together = images_of(generator, range(10)).int()
    alone = images_of(generator, range(7, 8)).int()
    other_batches = images_of(replace(generator, batch_size=3), range(10)).int()
    assert (together[7] - alone[0]).abs().max() <= 1  # a batch of another size may round otherwise
    assert (together - other_batches).abs().max() <= 1


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(generator, seed):
    with pytest.raises(InputError, match=r"give one from 0 to 2\*\*63 - 1"):
        replace(generator, seed=seed)


def test_samplers_start_from_the_same_noise(generator, monkeypatch):
    starts = []
    from robustdiff.evaluation import generate

    def record(model, process, sampler, steps, **arguments):
        starts.append(arguments["latents"])
        return arguments["latents"]

    monkeypatch.setattr(generate, "sample", record)
    for sampler, steps in (("ddim", 2), ("iddpm", 3), ("dpm++", 5)):
        images_of(replace(generator, sampler=sampler, steps=steps), range(4))
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(("num", "processes"), [(11, 1), (11, 2), (12, 5), (3, 4)])
def test_processes_share_all_images_evenly_and_in_order(num, processes):
    shares = [share_of(num, SimpleNamespace(process_index=i, num_processes=processes)) for i in range(processes)]
    assert [i for share in shares for i in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Stop(Exception):
    """An interruption."""


class Calls:
    """A progress that hands on how much more is done."""

    def __init__(self, on_advance) -> None:
        self.on_advance = on_advance

    def begin(self, description: str, total: float) -> None: ...

    def advance(self, amount: float, note: str = "") -> None:
        self.on_advance(amount)


def test_an_interrupted_npz_goes_on_and_ends_the_same(generator, accelerator, tmp_path):
    write_npz(generator, 11, tmp_path / "whole.npz", accelerator)
    made: list[int] = []

    def stop_at_second_batch(n: int) -> None:
        made.append(n)
        if sum(made) >= 8:
            raise Stop

    with pytest.raises(Stop):
        write_npz(generator, 11, tmp_path / "parts.npz", accelerator, Calls(stop_at_second_batch))
    assert not (tmp_path / "parts.npz").exists()
    resumed: list[int] = []
    write_npz(generator, 11, tmp_path / "parts.npz", accelerator, Calls(resumed.append))
    assert resumed[0] > 0, "what was there is counted, not made again"
    assert sum(resumed) == 11
    whole, parts = (np.load(tmp_path / f"{name}.npz", allow_pickle=False)["arr_0"] for name in ("whole", "parts"))
    assert np.array_equal(whole, parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.npz", "whole.npz"]


def test_parts_of_another_network_are_not_used(generator, accelerator, tmp_path):
    def stop(n: int) -> None:
        if n:
            raise Stop

    with pytest.raises(Stop):
        write_npz(generator, 8, tmp_path / "a.npz", accelerator, Calls(stop))
    other = replace(generator, model=copy.deepcopy(generator.model))
    with torch.no_grad():
        other.model.network.conv_out.bias.add_(1.0)
    assert other.model.fingerprint() != generator.model.fingerprint()
    counts: list[int] = []
    write_npz(other, 8, tmp_path / "a.npz", accelerator, Calls(counts.append))
    assert counts[0] == 0


def test_pngs_hold_the_images_and_missing_ones_are_made_again(generator, accelerator, tmp_path):
    write_pngs(generator, 6, tmp_path, accelerator)
    files = sorted(tmp_path.glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(f)) for f in files])
    assert np.array_equal(pixels, images_of(generator, range(6)).squeeze(1).numpy())
    files[3].unlink()
    write_pngs(generator, 6, tmp_path, accelerator)
    assert np.array_equal(np.asarray(Image.open(files[3])), pixels[3])


def test_a_finished_npz_is_made_once_and_kept_from_other_settings(generator, accelerator, tmp_path):
    path = tmp_path / "a.npz"
    assert write_npz(generator, 6, path, accelerator)
    before, counts = path.read_bytes(), []
    assert not write_npz(generator, 6, path, accelerator, Calls(counts.append))
    assert counts == [6]
    for other, num in ((generator, 7), (replace(generator, steps=2), 6), (replace(generator, seed=1), 6)):
        with pytest.raises(InputError, match=r"a.npz holds images of other settings .*--output"):
            write_npz(other, num, path, accelerator)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("content", [b"text", b""])
def test_a_file_that_was_not_sampled_is_not_overwritten(generator, accelerator, tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="does not say that robustdiff sample made it"):
        write_npz(generator, 2, path, accelerator)
    assert path.read_bytes() == content


def test_pngs_go_on_with_more_images_and_keep_those_that_are_there(generator, accelerator, tmp_path):
    folder = tmp_path / "png"
    assert write_pngs(generator, 3, folder, accelerator)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not write_pngs(generator, 2, folder, accelerator)
    assert write_pngs(generator, 6, folder, accelerator)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    pixels = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))]).astype(int)
    assert np.abs(pixels - images_of(generator, range(6)).squeeze(1).numpy()).max() <= 1


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"steps": 2}, {"sampler": "ddim"}, {"batch_size": 2}, {"options": {"clip": False}}]
)
def test_pngs_of_other_settings_are_refused(generator, accelerator, tmp_path, change):
    write_pngs(generator, 2, tmp_path / "png", accelerator)
    before = {path: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    with pytest.raises(InputError, match=rf"png holds images of other settings \({next(iter(change))} .*--output"):
        write_pngs(replace(generator, **change), 4, tmp_path / "png", accelerator)
    assert {path: path.read_bytes() for path in (tmp_path / "png").iterdir()} == before


def test_pngs_of_another_network_or_process_are_refused(generator, accelerator, tmp_path):
    write_pngs(generator, 2, tmp_path / "png", accelerator)
    other = replace(generator, model=copy.deepcopy(generator.model))
    with torch.no_grad():
        other.model.network.conv_out.bias.add_(1.0)
    with pytest.raises(InputError, match="png holds images of another network"):
        write_pngs(other, 2, tmp_path / "png", accelerator)
    other = Model(generator.model.backbone, process=DiffusionProcess.linear(1000), prediction="epsilon")
    with pytest.raises(InputError, match=r"png holds images of other settings \(process"):
        write_pngs(replace(generator, model=other), 2, tmp_path / "png", accelerator)


def test_pngs_of_other_noise_are_not_added_to(generator, accelerator, tmp_path):
    write_pngs(generator, 2, tmp_path / "png", accelerator)
    record = json.loads((tmp_path / "png" / RECORD).read_text())
    assert record.pop("noise") == "philox"
    (tmp_path / "png" / RECORD).write_text(json.dumps(record))  # as robustdiff 0.2.0 wrote it
    with pytest.raises(InputError, match=r"other settings \(noise None, now philox\).*--output"):
        write_pngs(generator, 4, tmp_path / "png", accelerator)


@pytest.mark.parametrize("name", ["000000.png", "notes.txt", RECORD])
def test_a_folder_of_something_else_is_refused(generator, accelerator, tmp_path, name):
    (tmp_path / name).write_text("[1]")
    (tmp_path / "mine.jpg").write_text("")
    with pytest.raises(InputError, match=r"does not say .*--output"):
        write_pngs(generator, 2, tmp_path, accelerator)
    assert not (tmp_path / "000001.png").exists()


def test_a_folder_without_images_may_be_used(generator, accelerator, tmp_path):
    """Stopped before its first image, a call leaves a record that binds nobody."""
    (tmp_path / RECORD).write_text("{}")
    (tmp_path / ".DS_Store").write_text("")
    assert write_pngs(generator, 2, tmp_path, accelerator)
    assert json.loads((tmp_path / RECORD).read_text())["sampler"] == "iddpm"


def test_classes_take_turns_and_are_written(make_unet, accelerator, tmp_path):
    unet = make_unet(num_class_embeds=3)
    generator = Generator(
        Model(UNet2D(unet), process=DiffusionProcess.cosine(10), prediction="epsilon"), "ddim", 1, batch_size=4
    )
    write_npz(generator, 7, tmp_path / "c.npz", accelerator)
    assert np.load(tmp_path / "c.npz", allow_pickle=False)["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert replace(generator, label=2).labels(range(3)).tolist() == [2, 2, 2]
    with pytest.raises(InputError, match="class 3"):
        replace(generator, label=3)


def test_autocast_is_close_to_full_precision(generator):
    full = images_of(generator, range(4)).int()
    half = images_of(replace(generator, precision="bf16"), range(4)).int()
    assert not torch.equal(full, half)
    assert (full - half).abs().float().mean() < 10


def test_a_run_is_sampled_as_its_recipe_says(digits_run, tmp_path):
    """Take the recipe's sampler for a given number of steps, and its number of steps for its own sampler alone."""
    run = shutil.copytree(digits_run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "sampler": {"name": "iddpm", "steps": 11}}))
    for own, wanted in (
        ({}, ("iddpm", 11)),
        ({"steps": 7}, ("iddpm", 7)),
        ({"sampler": "iddpm"}, ("iddpm", 11)),
        ({"sampler": "dpm++"}, ("dpm++", SAMPLERS["dpm++"].default_steps)),
        ({"by_recipe": False, "steps": 7}, ("ddim", 7)),
    ):
        found = Generator.load(run, **own)
        assert (found.sampler, found.steps) == wanted


def test_a_recipe_can_name_another_sampler(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["sampler"] = {"name": "iddpm", "steps": "2,3"}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = Generator.load(tmp_path / "run")
    assert (found.sampler, found.steps) == ("iddpm", "2,3")


def test_an_option_that_the_sampler_lacks_is_refused_before_any_work(generator):
    with pytest.raises(InputError, match="window is for time-shift"):
        replace(generator, options={"window": 3})


def test_many_prompts_fit_the_record(make_sd_pipeline, accelerator, tmp_path):
    """Write prompts that neither the comment of an archive (64 KiB) nor a folder's record (1 MiB) would hold."""
    prompts = tuple(f"{i:>99}" for i in range(12_000))
    model = make_sd_pipeline(tmp_path / "model")
    generator = Generator.load(model, sampler="ddim", steps=1, batch_size=2, prompts=prompts)
    for write, name in ((write_npz, "a.npz"), (write_pngs, "images")):
        assert write(generator, 2, tmp_path / name, accelerator)
        assert not write(generator, 2, tmp_path / name, accelerator)
        with pytest.raises(InputError, match=r"other settings \(prompts .*'n': 12000.*, now .*'n': 11999"):
            write(replace(generator, prompts=prompts[:-1]), 2, tmp_path / name, accelerator)


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_setting_that_only_the_existing_images_have_is_a_difference(generator, accelerator, tmp_path, kind):
    """Such as a negative prompt, which is in the record of images that were made with one."""
    path = tmp_path / ("a.npz" if kind == "npz" else "images")
    write = write_npz if kind == "npz" else write_pngs
    write(generator, 2, path, accelerator)
    if kind == "npz":
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = json.dumps({**json.loads(archive.comment), "negative": "blurry"}).encode()
    else:
        record = json.loads((path / RECORD).read_text())
        (path / RECORD).write_text(json.dumps({**record, "negative": "blurry"}))
    with pytest.raises(InputError, match=r"other settings \(negative blurry, now None\)"):
        write(generator, 2, path, accelerator)


@pytest.mark.parametrize("name", ["images.npz", "images"])
def test_an_output_that_another_process_writes_is_refused_and_left_alone(generator, accelerator, tmp_path, name):
    write = write_npz if name.endswith(".npz") else write_pngs
    lock = tmp_path / f".{name}.lock" if write is write_npz else tmp_path / name / ".robustdiff-samples.lock"
    unfinished = lock.with_name((f".{name}" if write is write_npz else ".000000.png") + f".{'0' * 12}.tmp")
    with held(lock):
        unfinished.touch()
        with pytest.raises(InputError, match=r"another process writes .*images"):
            write(generator, 2, tmp_path / name, accelerator)
        assert unfinished.exists()
    assert write(generator, 2, tmp_path / name, accelerator)
    assert not lock.exists()


def test_a_part_that_is_cut_short_meanwhile_is_not_filled_with_zeros(generator, accelerator, tmp_path, monkeypatch):
    flush = os.fsync

    def cut(descriptor):
        flush(descriptor)
        os.ftruncate(descriptor, 100)

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(RunError, match=r"0\.uint8 was cut short meanwhile"):
        write_npz(generator, 2, tmp_path / "images.npz", accelerator)
    assert not (tmp_path / "images.npz").exists()
