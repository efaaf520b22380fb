"""A model knows what it is: its process, parameterisation, codec, condition and samplers."""

from __future__ import annotations

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from robustdiff import load_model, sample
from robustdiff.backbones.model import Model
from robustdiff.backbones.unet2d import UNet2D
from robustdiff.codecs.pixels import Pixels
from robustdiff.conditions.labels import Labels
from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess


def network(**settings) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    return UNet2DModel(**sizes, **blocks, **settings).eval()


def test_a_shipped_model_is_loaded_by_its_name():
    model = load_model("fashion-16")
    assert model.shape == model.image_shape == (1, 16, 16)
    assert model.prediction == "epsilon"
    assert isinstance(model.codec, Pixels)
    assert model.condition.batch(None, None, None) == {}
    assert {"ddim", "iddpm", "dpm++"} <= set(model.samplers)
    assert len(model.process) == 1000
    images = sample(model, model.process, "ddim", 2, shape=(1, *model.shape))
    assert images.shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    ("scheduler", "prediction", "sampler"),
    [
        (DDIMScheduler(prediction_type="v_prediction"), "v_prediction", "ddim"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow", "euler"),
        (CMStochasticIterativeScheduler(), "sample", "multistep"),
    ],
)
def test_the_scheduler_says_what_it_is(scheduler, prediction, sampler):
    model = Model.of(network(), scheduler)
    assert model.prediction == prediction
    assert model.samplers[0] == sampler


def test_classes_are_the_condition():
    model = Model.of(network(num_class_embeds=5), DDIMScheduler())
    assert model.condition == Labels(5)
    model.backbone.note_classes(4)
    assert model.condition == Labels(5, null=True)


def test_process_and_prediction_may_be_given():
    process = DiffusionProcess.cosine(10)
    model = Model(UNet2D(network()), process=process, prediction="sample")
    assert model.process is process
    assert model.prediction == "sample"
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, torch.tensor([1, 2])).sample, model.network(x, torch.tensor([1, 2])).sample)


def test_a_saved_model_is_the_same(tmp_path):
    model = Model.of(network(num_class_embeds=2), DDIMScheduler(prediction_type="sample"))
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    assert again.prediction == "sample"
    assert again.condition == model.condition
    state = {name: value + 1 for name, value in model.network.state_dict().items()}
    model.save(tmp_path / "other", state)
    torch.testing.assert_close(load_model(tmp_path / "other").network.state_dict(), state)


def test_other_networks_are_refused():
    with pytest.raises(InputError, match=r"Linear is not supported: use one of .*UNet2DModel"):
        Model.of(torch.nn.Linear(1, 1), DDIMScheduler())


def test_a_model_without_a_size_says_so():
    model = Model.of(network(), DDIMScheduler(), path="here")
    model.network.register_to_config(sample_size=None)
    with pytest.raises(InputError, match=r"the model here does not say the size of its images .* --size"):
        model.shape  # noqa: B018


def test_a_model_is_sampled_as_its_scheduler_says():
    """Parameterisation, spacing and clipping come with the model; an argument comes before them."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    model = Model.of(network(), scheduler)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def bare(x, t, **condition):
        return model(x, t, **condition)

    images = sample(model, model.process, "ddim", 3, latents=noise)
    given = {"prediction": "v_prediction", "spacing": "trailing", "clip": False}
    assert torch.equal(images, sample(bare, model.process, "ddim", 3, latents=noise, **given))
    assert torch.equal(
        sample(model, model.process, "ddim", 3, latents=noise, spacing="own", clip=True),
        sample(bare, model.process, "ddim", 3, latents=noise, prediction="v_prediction"),
    )
