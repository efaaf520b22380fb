"""Recorded calls of a network: samples are those of unrecorded ones, whatever is done to the network in between."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.hooks import HookRegistry
from torch import nn

from robustdiff.backbones.fused_norm import fuse_norms
from robustdiff.backbones.lora import LoraSection
from robustdiff.backbones.model import Model, load_model
from robustdiff.backbones.unet2d import UNet2D
from robustdiff.data import load_dataset
from robustdiff.errors import InputError
from robustdiff.evaluation import recorded as module
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.recorded import RecordedModel, Recordings, unrecordable
from robustdiff.mismatch.measure import measure_mismatch
from robustdiff.process import DiffusionProcess


@pytest.fixture
def generator() -> Generator:
    return Generator.load("fashion-16", sampler="iddpm", steps=3, seed=5, batch_size=4, capture=True)


def assert_as_unrecorded(generator: Generator, **settings) -> None:
    """The samples of a recorded generator are those of a new one that calls the network itself."""
    made = replace(generator, **settings)
    plain = replace(made, capture=False, recordings=Recordings())
    for batch in (range(4), range(4, 8), range(8, 10)):
        labels = made.labels(batch)
        assert torch.equal(made.sample(batch, labels), plain.sample(batch, labels))


@pytest.fixture
def recorders(monkeypatch):
    """The recorders that are made."""
    made = []

    class Kept(module.Recorder):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(module, "Recorder", Kept)
    return made


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "dpm++", "es", "time-shift"])
def test_samples_are_those_of_the_network_itself(generator, recorders, sampler):
    assert_as_unrecorded(generator, sampler=sampler)
    assert len(recorders) == 1
    assert 2 <= len(recorders[0]._recordings) <= 4, "one for each shape, of two sizes of batches"


def test_precision_is_that_of_the_generator(generator, recorders):
    exact = generator.sample(range(4), None)
    assert_as_unrecorded(generator, precision="bf16")
    assert not torch.equal(replace(generator, precision="bf16").sample(range(4), None), exact)
    assert torch.equal(generator.sample(range(4), None), exact)
    assert len(recorders) == 3, "each change of the precision begins anew"


FAMILIES = ["classes", "dit", "sd", "xl", "sd3", "flux", "lora"]


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path, make_unet, make_sd_pipeline, make_sd3_pipeline, make_flux_pipeline) -> dict[str, Any]:
    """Return the arguments of Generator.load for a small network of each family, in bf16."""
    family, folder = request.param, tmp_path / request.param
    settings = {"path": folder, "steps": 2, "batch_size": 4, "capture": True, "precision": "bf16"}
    if family == "dit":
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8}
        network = DiTTransformer2DModel(**sizes, num_layers=2, sample_size=4, num_embeds_ada_norm=2)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4)
        DiTPipeline(network, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
        return settings
    if family == "classes":
        Model(UNet2D(make_unet(num_class_embeds=3)), DDPMScheduler(10)).save(folder)
        return settings
    make = {"sd3": make_sd3_pipeline, "flux": make_flux_pipeline}.get(family, make_sd_pipeline)
    make(folder, **({"kind": "xl"} if family == "xl" else {}))
    if family == "lora":
        pytest.importorskip("peft")
        model = load_model(folder, 8)
        model.add_lora(LoraSection(rank=2), seed=0)
        with torch.no_grad():
            for parameter in model.network.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        settings["path"] = tmp_path / "adapter"
        settings["path"].mkdir()
        model.save(settings["path"])
    return settings | {"prompts": ("a red shoe", "blue"), "guidance": 3.0, "size": 8}


@pytest.fixture
def in_half(saved) -> Generator:
    """Return a recorded generator in bf16, whose weights are in float32."""
    return Generator.load(**saved, half=False)


@pytest.mark.parametrize("capture", [True, False])
def test_weights_in_half_precision_make_the_same_images(saved, capture):
    """Compare bit for bit: autocast makes the same weights of those in float32, whose fingerprint the model keeps."""
    held, whole = (Generator.load(**(saved | {"capture": capture}), half=half) for half in (True, False))
    assert {parameter.dtype for parameter in whole.model.network.parameters()} == {torch.float32}
    network = held.model.network
    for i, (name, parameter) in enumerate(network.named_parameters()):
        layer = network.get_submodule(name.rpartition(".")[0])
        multiplied = isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in name and i > 0
        assert parameter.dtype == (torch.bfloat16 if multiplied else torch.float32), name
    for batch in (range(4), range(4, 6)):
        images = held.sample(batch, held.labels(batch))
        assert images.isfinite().all()
        assert torch.equal(images, whole.sample(batch, whole.labels(batch)))
    assert held.model.fingerprint() == whole.model.fingerprint()


def test_weights_in_half_precision_have_one_precision_and_are_not_saved(tmp_path):
    generator = Generator.load("fashion-16", steps=2, precision="bf16")
    with pytest.raises(
        InputError, match="fashion-16 are held in bfloat16, which is not fp32: load the model with that"
    ):
        replace(generator, precision="fp32")
    with pytest.raises(InputError, match="the precision is bf61: give fp32, bf16, fp16"):
        replace(generator, precision="bf61")
    with pytest.raises(InputError, match="held in fewer bits than float32, and rounded ones are not saved"):
        generator.model.save(tmp_path)
    assert not list(tmp_path.iterdir())
    dataset = load_dataset("fashion-16", split="test")
    with pytest.raises(InputError, match="one has weights in bf16, and robustness is measured in fp32"):
        measure_mismatch({"one": generator}, dataset, steps=[2])


def test_weights_that_are_cast_once_make_the_same_images(in_half, monkeypatch):
    """Bit for bit, although the recorded network has weights in bfloat16, and those of the network stay as they are."""
    seen = set()

    def spied(self, *given):
        seen.update(parameter.dtype for parameter in self.network.parameters())
        return predicted(self, *given)

    predicted = module._Calls.forward
    monkeypatch.setattr(module._Calls, "forward", spied)
    before = {name: value.clone() for name, value in in_half.model.network.state_dict().items()}
    assert_as_unrecorded(in_half)
    assert seen == {torch.float32, torch.bfloat16}
    for name, value in in_half.model.network.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        for parameter in in_half.model.network.parameters():
            parameter.mul_(1.1)  # as training and swapping in a moving average do
    assert_as_unrecorded(in_half)


def test_guidance_and_classes(make_unet, recorders):
    unet = make_unet(num_class_embeds=4)
    model = Model(UNet2D(unet), process=DiffusionProcess.cosine(10), prediction="epsilon")
    generator = Generator(model, "ddim", 3, batch_size=4, num_classes=3, capture=True)
    assert_as_unrecorded(generator)
    assert_as_unrecorded(generator, guidance=3.0)
    assert len(recorders) == 1
    sizes = {recording.tensors[0].shape[0] for recording in recorders[0]._recordings.values()}
    assert sizes == {2, 4, 8}, "with guidance the doubled batches, of which one has the size of a plain one"


def test_generators_made_of_one_share_its_recordings(generator, recorders):
    for steps in (2, 3):
        replace(generator, steps=steps).sample(range(4), None)
    assert len(recorders) == 1


def test_weights_changed_in_place_are_used(generator, recorders):
    before = generator.sample(range(4), None)
    with torch.no_grad():
        for parameter in generator.model.network.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(generator.sample(range(4), None), before)
    assert_as_unrecorded(generator)
    assert len(recorders) == 1


def change_parameter(network) -> None:
    network.conv_out.bias = nn.Parameter(network.conv_out.bias.detach() + 1)


def change_module(network) -> None:
    network.conv_out = copy.deepcopy(network.conv_out)


def change_norms(network) -> None:
    fuse_norms(network)


def change_type(network) -> None:
    network.to(torch.float64)
    network.to(torch.float32)


@pytest.mark.parametrize("change", [change_parameter, change_module, change_norms, change_type])
def test_what_is_replaced_is_recorded_anew(generator, recorders, change):
    generator.sample(range(4), None)
    generator.sample(range(4), None)
    assert len(recorders) == 1
    kept = [parameter.detach() for parameter in generator.model.network.parameters()]  # so that no memory is reused
    change(generator.model.network)
    assert_as_unrecorded(generator)
    assert len(recorders) == 2
    del kept


def test_an_adapter_is_switched(generator, recorders):
    pytest.importorskip("peft")
    plain = generator.sample(range(4), None)
    model = generator.model
    model.add_lora(LoraSection(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert_as_unrecorded(generator)
    adapted = generator.sample(range(4), None)
    with model.base():
        torch.testing.assert_close(generator.sample(range(4), None), plain)
    assert torch.equal(generator.sample(range(4), None), adapted)
    assert not torch.equal(adapted, plain)
    assert len(recorders) == 4
    model.merge()
    torch.testing.assert_close(generator.sample(range(4), None), adapted, rtol=1e-3, atol=1e-3)
    assert len(recorders) == 5


def test_the_mismatch_is_that_of_the_network_itself(generator):

    dataset = load_dataset("fashion-16", split="test")
    settings = {"samplers": ["ddim"], "steps": [3], "num": 40, "probes": 2, "times": [0.5]}
    made, plain = (
        measure_mismatch({"x": replace(generator, batch_size=20, capture=capture)}, dataset, **settings)
        for capture in (True, False)
    )
    assert made == plain


def test_calls_outside_of_inference_mode_are_not_recorded(generator, recorders):
    recorded = generator.recordings.model(generator.model, "fp32")
    assert isinstance(recorded, RecordedModel)
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with torch.no_grad():
        recorded(x, torch.zeros(1, dtype=torch.int64))
    recorded(x, torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert x.grad is not None
    assert not recorders[0]._recordings


def test_what_cannot_be_recorded_is_called_as_it_is_or_refused(generator, recorders):
    calls = []
    handle = generator.model.network.conv_in.register_forward_hook(lambda *_: calls.append(1))
    assert "hooks" in unrecordable(generator.model)
    generator.sample(range(4), None)
    assert (len(calls), recorders) == (3, [])
    with pytest.raises(InputError, match="hooks, which replays do not call: leave it out"):
        replace(generator)
    handle.remove()
    assert_as_unrecorded(generator)


@pytest.mark.parametrize(
    "offload",
    [
        lambda layer: add_hook_to_module(layer, ModelHook()),  # of accelerate
        lambda layer: HookRegistry.check_if_exists_or_initialize(layer),  # of diffusers
    ],
)
def test_weights_that_libraries_may_move_are_not_recorded(generator, offload):
    """By the libraries themselves, so that a new version that marks them otherwise is noticed."""
    assert unrecordable(generator.model) is None
    offload(generator.model.network.conv_in)
    assert "offload" in unrecordable(generator.model)


def test_nothing_is_recorded_on_a_cpu_by_default(recorders):
    Generator.load("fashion-16", steps=2).sample(range(2), None)
    assert recorders == []
