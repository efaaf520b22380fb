"""Pipeline folders as others save them: loaded, or refused in one line; nothing that they name is imported."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file

from robustdiff.backbones.adm import AdmFlags, AdmUNet2DModel, build_adm
from robustdiff.backbones.model import Model, load_model
from robustdiff.backbones.unet2d import UNet2D
from robustdiff.codecs.pixels import Pixels
from robustdiff.data import ArrayDataset
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.recipe import Recipe
from robustdiff.training.build import build_model

NAME = "diffusion_pytorch_model"


def small(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**{**arguments, **changes})


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return small()


@pytest.fixture(scope="module")
def saved(unet, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "saved"
    Model.of(unet, DDPMScheduler()).save(folder)
    return folder


@pytest.fixture
def pipeline(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "p")
    return tmp_path / "p"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rename(folder: Path, names: dict[str, str] | str) -> None:
    """Give tensors other names: by a prefix, or each its own."""
    state = load_file(folder / "unet" / f"{NAME}.safetensors")
    new = {(names + k if isinstance(names, str) else names.get(k, k)): v.clone() for k, v in state.items()}
    save_file(new, folder / "unet" / f"{NAME}.safetensors")


def assert_loads(folder: Path, unet: UNet2DModel, atol: float = 0.0) -> UNet2DModel:
    loaded = load_model(folder).network
    torch.testing.assert_close(loaded.state_dict(), unet.state_dict(), rtol=0, atol=atol)
    assert not loaded.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    return loaded


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def save_unet(folder: Path, unet: UNet2DModel, **options: Any) -> None:
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", **options)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", ["10GB", "5KB"])
def test_weights_are_found_in_all_forms_that_diffusers_saves(pipeline, unet, safe, variant, shards):
    save_unet(pipeline, unet, safe_serialization=safe, variant=variant, max_shard_size=shards)
    assert (len(list((pipeline / "unet").iterdir())) > 2) == (shards == "5KB")
    assert_loads(pipeline, unet)


def test_a_network_is_called_on_trial_once_for_each_configuration(pipeline, monkeypatch):
    """Load as a study does, a network for each of its cells."""
    trials, forward = [], UNet2DModel.forward

    def call(self, sample, *arguments, **more):
        trials.append(tuple(sample.shape))
        return forward(self, sample, *arguments, **more)

    monkeypatch.setattr(UNet2DModel, "forward", call)
    edit(pipeline / "unet" / "config.json", norm_eps=1.25e-5)  # as no other test has it
    for size in (None, None, 16, 16):
        load_model(pipeline, size=size)
    assert trials == [(1, 1, 8, 8), (1, 1, 16, 16)]
    for _ in range(2):
        with pytest.raises(InputError, match="the size must be a multiple of 2"):
            load_model(pipeline, size=9)
    assert len(trials) == 4, "what was refused is called again"


def test_files_without_a_variant_come_first(pipeline, unet):
    small(norm_eps=0.1).half().save_pretrained(pipeline / "unet2", variant="fp16")
    shutil.copy(pipeline / "unet2" / f"{NAME}.fp16.safetensors", pipeline / "unet")
    assert_loads(pipeline, unet)
    (pipeline / "unet" / f"{NAME}.safetensors").unlink()
    assert_loads(pipeline, unet, atol=1e-3)
    shutil.copy(pipeline / "unet" / f"{NAME}.fp16.safetensors", pipeline / "unet" / f"{NAME}.bf16.safetensors")
    assert_refused(pipeline, "bf16, fp16", "rename")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_loaded_in_float32(pipeline, unet, dtype):
    Model.of(small().to(dtype), DDPMScheduler()).save(pipeline)
    assert_loads(pipeline, unet, atol=1e-2)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_stripped(pipeline, unet, prefix):
    rename(pipeline, prefix)
    assert_loads(pipeline, unet)


def test_the_layout_and_the_names_of_the_first_releases_are_read(pipeline, unet, tmp_path):
    block = "mid_block.attentions.0."
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename(pipeline, {f"{block}{a}.{k}": f"{block}{b}.{k}" for a, b in new.items() for k in ("weight", "bias")})
    for part in ("unet", "scheduler"):
        for file in (pipeline / part).iterdir():
            file.rename(pipeline / file.name)
        (pipeline / part).rmdir()
    edit(pipeline / "scheduler_config.json", tensor_format="pt")
    assert_loads(pipeline, unet)


def test_what_a_moving_average_saves_is_read_in_its_place(pipeline, unet):
    edit(pipeline / "unet" / "config.json", decay=0.999, optimization_step=3, use_ema_warmup=True, _name_or_path="x")
    assert_loads(pipeline, unet)


def test_a_scheduler_keeps_what_it_was_converted_from(pipeline):
    DDIMScheduler.from_config(DPMSolverMultistepScheduler(use_karras_sigmas=True).config).save_pretrained(
        pipeline / "scheduler"
    )
    index = json.loads((pipeline / "model_index.json").read_text())
    edit(pipeline / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert type(load_model(pipeline).scheduler) is DDIMScheduler


@pytest.mark.parametrize("earlier", ["robustdiff.models.adm", "robustdiff.backbones.adm", None])
def test_networks_of_ours_come_back(tmp_path, earlier):
    flags = {"image_size": 16, "num_channels": 64, "num_res_blocks": 1, "channel_mult": "0.5,1", "num_heads": 1}
    unet = build_adm(AdmFlags(**flags, attention_resolutions="8", num_head_channels=-1))
    Model.of(unet, DDPMScheduler()).save(tmp_path / "p")
    if earlier is not None:  # the module's name when the pipeline was saved
        index = tmp_path / "p" / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "unet": [earlier, "AdmUNet2DModel"]}))
    loaded = assert_loads(tmp_path / "p", unet)
    assert type(loaded) is AdmUNet2DModel
    assert loaded.config["_adm"] == unet.config["_adm"]


def test_channels_last_networks_are_saved(tmp_path, unet):
    other = small().to(memory_format=torch.channels_last)
    Model.of(other, DDPMScheduler()).save(tmp_path / "p")
    assert_loads(tmp_path / "p", unet)
    assert other.conv_in.weight.is_contiguous(memory_format=torch.channels_last) or other.conv_in.weight.shape[1] == 1
    DDPMPipeline.from_pretrained(tmp_path / "p")


def test_loaded_weights_do_not_depend_on_the_file(pipeline, unet):
    loaded = load_model(pipeline).network
    path = pipeline / "unet" / f"{NAME}.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    torch.testing.assert_close(loaded.state_dict(), unet.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vqvae": ["diffusers", "VQModel"]}, ["vqvae", "VQModel", "diffusers", "latents"]),
        ({"vae": ["diffusers", "AutoencoderKL"]}, ["vae", "AutoencoderKL", "latents"]),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, ["text_encoder", "CLIPTextModel", "text"]),
        ({"text_encoder_2": ["transformers", "T5"], "vae": ["diffusers", "A"]}, ["text_encoder_2", "text"]),
        ({"image_encoder": ["transformers", "CLIPVision"]}, ["image_encoder", "images"]),
        ({"transformer": ["diffusers", "DiTTransformer2DModel"]}, ["transformer", "DiTTransformer2DModel"]),
        ({"mel": ["audio_diffusion", "Mel"]}, ["mel", "audio_diffusion"]),
        ({"safety": True}, ["safety", "true"]),
        ({"unet": None}, ["names no transformer and no unet"]),
        ({"scheduler": [None, None]}, ["names no scheduler"]),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, ["UNet2DConditionModel", "StableDiffusion"]),
        ({"unet": ["evil_module", "UNet2DModel"]}, ["evil_module"]),
        ({"unet": ["robustdiff.backbones.adm", "AdmFlags"]}, ["AdmFlags"]),
        ({"unet": ["diffusers", ["UNet2DModel"]]}, ["unet", "not a library and a class"]),
        ({"unet": "UNet2DModel"}, ["unet", "not a library and a class"]),
        ({"scheduler": ["evil_module", "DDPMScheduler"]}, ["scheduler", "evil_module"]),
        ({"scheduler": ["diffusers", "NoSuchScheduler"]}, ["NoSuchScheduler", "update"]),
        ({"scheduler": ["diffusers", "DDPMPipeline"]}, ["DDPMPipeline"]),
        ({"scheduler": ["diffusers", "SchedulerMixin"]}, ["SchedulerMixin"]),
        ({"_class_name": ["evil_module", "Pipeline"]}, ["code of its own"]),
    ],
)
def test_other_pipelines_are_refused_with_the_reason(pipeline, monkeypatch, fields, words):
    (pipeline / "evil_module.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(pipeline)
    monkeypatch.syspath_prepend(str(pipeline))
    edit(pipeline / "model_index.json", **fields)
    assert_refused(pipeline, "model_index.json", *words)
    assert "evil_module" not in sys.modules
    assert not (pipeline / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"class_embed_type": "timestep"}, ["class_embed_type", "timestep"]),
        ({"class_embed_type": "identity"}, ["class_embed_type", "identity"]),
        ({"class_embed_type": "other"}, ["class_embed_type", "other"]),
        ({"in_channels": 3}, ["3 channels in and 1 out"]),
        ({"out_channels": 3}, ["1 channels in and 3 out"]),
        ({"in_channels": 0, "out_channels": 0}, ["0 channels"]),
        ({"layers_per_block": 10**9}, ["layers_per_block=1000000000"]),
        ({"layers_per_block": 10**400}, ["layers_per_block"]),
        ({"layers_per_block": 2}, ["lacks"]),
        ({"layers_per_block": "2"}, ["layers_per_block", "type"]),
        ({"layers_per_block": 1.5}, ["config.json"]),
        ({"layers_per_block": True}, ["layers_per_block", "type"]),
        ({"layers_per_block": None}, ["config.json"]),
        ({"block_out_channels": 8}, ["block_out_channels", "type"]),
        ({"block_out_channels": []}, ["block_out_channels"]),
        ({"block_out_channels": [8, "8"]}, ["block_out_channels", "type"]),
        ({"block_out_channels": [8, 8, 8]}, ["config.json"]),
        ({"block_out_channels": [16, 16]}, ["conv_in.weight is (8, 1, 3, 3)", "(16, 1, 3, 3)"]),
        ({"block_out_channels": [2**40, 2**40]}, ["config.json"]),
        ({"block_out_channels": [2**70, 8]}, ["config.json"]),
        ({"down_block_types": ["NoBlock"] * 2}, ["NoBlock"]),
        ({"down_block_types": ["DownBlock2D"] * 10**5, "up_block_types": ["UpBlock2D"] * 10**5}, ["100000 levels"]),
        ({"down_block_types": "DownBlock2D"}, ["down_block_types", "type"]),
        ({"attention_head_dim": 0}, ["config.json"]),
        ({"attention_head_dim": 16}, ["config.json"]),
        ({"attention_head_dim": {}}, ["attention_head_dim", "type"]),
        ({"norm_num_groups": 3}, ["config.json"]),
        ({"norm_eps": float("nan")}, ["norm_eps", "NaN"]),
        ({"act_fn": "os.system"}, ["os.system"]),
        ({"num_class_embeds": 10}, ["class_embedding.weight"]),
        ({"num_class_embeds": "ten"}, ["config.json"]),
        ({"time_embedding_dim": [1]}, ["config.json"]),
        ({"sample_size": "8"}, ["sample_size", '"8"']),
        ({"sample_size": 0}, ["sample_size=0"]),
        ({"sample_size": -8}, ["sample_size=-8"]),
        ({"sample_size": 10**9}, ["sample_size=1000000000"]),
        ({"sample_size": 8.0}, ["sample_size=8.0"]),
        ({"sample_size": True}, ["sample_size=true"]),
        ({"sample_size": [8]}, ["sample_size=[8]"]),
        ({"sample_size": [8, 8, 8]}, ["sample_size=[8, 8, 8]"]),
        ({"sample_size": 9}, ["9×9", "multiple of 2"]),
        ({"no_such_field": 3}, ["no_such_field", "update diffusers"]),
        ({"quantization_config": {"quant_method": "evil"}}, ["quantization_config"]),
        ({"_class_name": "UNet1DModel"}, ["UNet1DModel"]),
        ({"_class_name": 3}, ["config.json"]),
    ],
)
def test_configurations_that_make_no_network_are_refused(pipeline, fields, words):
    edit(pipeline / "unet" / "config.json", **fields)
    assert_refused(pipeline, *words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_train_timesteps": 10**12}, ["num_train_timesteps=1000000000000"]),
        ({"num_train_timesteps": "1000"}, ["num_train_timesteps"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps=0"]),
        ({"beta_start": "small"}, ["beta_start", "type"]),
        ({"beta_schedule": "no_such"}, ["no_such"]),
        ({"trained_betas": "abc"}, ["scheduler_config.json"]),
        ({"predict_epsilon": False}, ["predict_epsilon", "update diffusers"]),
    ],
)
def test_configurations_that_make_no_scheduler_are_refused(pipeline, fields, words):
    edit(pipeline / "scheduler" / "scheduler_config.json", **fields)
    assert_refused(pipeline, "scheduler_config.json", *words)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 10**5, b'{"a": ' + b"9" * 5000 + b"}", None]
)
def test_damaged_json_is_named(pipeline, file, content):
    (pipeline / file).unlink()
    if content is None:
        (pipeline / file).mkdir()
        assert_refused(pipeline, Path(file).name)
    else:
        (pipeline / file).write_bytes(content)
        assert_refused(pipeline, file)


def test_json_of_any_size_is_not_read(pipeline):
    (pipeline / "unet" / "config.json").write_bytes(b" " * 2**25)
    assert_refused(pipeline, "unet/config.json", "MiB")


def test_tensors_that_do_not_fit_are_counted_and_the_first_is_named(pipeline):
    path = pipeline / "unet" / f"{NAME}.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if not k.startswith("conv_out")}, path)
    assert_refused(pipeline, "lacks 2 of its", "conv_out.weight first")
    save_file({**state, "foo": torch.zeros(2)}, path)
    assert_refused(pipeline, "has 1 that it has not (foo first)")
    save_file({**state, "conv_in.weight": torch.zeros(8, 2, 3, 3)}, path)
    assert_refused(pipeline, "conv_in.weight is (8, 2, 3, 3)", "(8, 1, 3, 3)")
    save_file({**state, "conv_in.weight": torch.full((8, 1, 3, 3), torch.nan)}, path)
    assert_refused(pipeline, "conv_in.weight has values that are not finite")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in state.items()}, path)
    assert_refused(pipeline, "float8_e4m3fn")
    path.unlink()
    assert_refused(pipeline, "no weights", f"{NAME}.safetensors")
    path.mkdir()
    assert_refused(pipeline, "is a folder")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "damage", ["outside", "absolute", "link out", "dangling", "missing", "none", "other", "number", "list", "half"]
)
def test_damaged_shards_are_refused(pipeline, unet, kind, damage):
    save_unet(pipeline, unet, safe_serialization=kind == "safetensors", max_shard_size="20KB")
    index = pipeline / "unet" / f"{NAME}.{kind}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    tensor, file = next(iter(places.items()))
    path = index.parent / file
    if damage in ("outside", "link out"):
        path.rename(pipeline / file)
    if damage == "link out":
        path.symlink_to(pipeline / file)
    elif damage == "dangling":
        path.unlink()
        path.symlink_to(index.parent / "nowhere")
    elif damage == "missing":
        path.unlink()
    elif damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    new = {"outside": f"../{file}", "absolute": str(path), "number": 3}.get(damage, file)
    if damage == "none":
        places = {}
    elif damage == "other":
        del places[tensor]
    else:
        places = [file] if damage == "list" else {k: new if v == file else v for k, v in places.items()}
    edit(index, weight_map=places)
    assert_refused(pipeline, str(index if damage in ("none", "number", "list") else index.parent))


def test_shards_in_the_cache_of_the_hub_are_links(pipeline, unet, tmp_path):
    save_unet(pipeline, unet, max_shard_size="20KB")
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "hub" / "snapshots" / "0123"
    for file in [f for f in pipeline.rglob("*") if f.is_file()]:
        link = snapshot / file.relative_to(pipeline)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = tmp_path / "hub" / "blobs" / f"{len(os.listdir(tmp_path / 'hub' / 'blobs'))}"
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert_loads(snapshot, unet)


def test_folders_without_a_scheduler_say_how_to_make_a_pipeline(unet, tmp_path):
    unet.save_pretrained(tmp_path / "alone")
    assert_refused(tmp_path / "alone", "no model_index.json", "scheduler", "save_pretrained")
    unet.save_pretrained(tmp_path / "checkpoint-5" / "unet")
    assert_refused(tmp_path / "checkpoint-5", "no model_index.json", "checkpoint-5/unet'")
    unet.save_pretrained(tmp_path / "checkpoint-5" / "unet_ema")
    assert_refused(tmp_path / "checkpoint-5", "no model_index.json", "checkpoint-5/unet_ema'")


@pytest.mark.parametrize("part", ["scheduler", "unet"])
def test_a_folder_that_is_missing_is_named(pipeline, part):
    shutil.rmtree(pipeline / part)
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    assert_refused(pipeline, f"{pipeline}/{part}/{file} is missing")


def test_what_is_no_folder_is_named(tmp_path):
    assert_refused(tmp_path / "google" / "ddpm-cifar10-32", "no model at", "owner/name")
    (tmp_path / "model.pt").write_bytes(b"")
    assert_refused(tmp_path / "model.pt", "is a file", "robustdiff convert")
    (tmp_path / "recipe.yaml").write_text("")
    assert_refused(tmp_path, "--resume")


def test_a_size_can_be_given(robustdiff, tmp_path):
    Model.of(small(sample_size=None), DDPMScheduler()).save(tmp_path / "none")
    Model.of(small(sample_size=(8, 16)), DDPMScheduler()).save(tmp_path / "wide")
    unet = load_model(tmp_path / "none").network
    assert UNet2D(unet).size is None
    with pytest.raises(InputError, match="--size"):
        _ = Generator.load(tmp_path / "none").model.image_shape
    assert Generator.load(tmp_path / "none", size=12).model.image_shape == (1, 12, 12)
    assert Generator.load(tmp_path / "wide").model.image_shape == (1, 8, 16)
    assert Generator.load(tmp_path / "wide", size=6).model.image_shape == (1, 6, 6)
    with pytest.raises(InputError, match="multiple of 2"):
        load_model(tmp_path / "none", size=7)
    arguments = ["--num", 1, "--steps", 1, "--cpu", "--output", tmp_path / "png"]
    outcome = robustdiff("sample", tmp_path / "none", *arguments)
    assert outcome.code == 2
    assert "--size PIXELS" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "png").exists()
    assert robustdiff("sample", tmp_path / "none", *arguments, "--size", 12).code == 0


def test_the_data_decide_the_size_that_a_network_does_not_say(tmp_path):
    Model.of(small(sample_size=None), DDPMScheduler()).save(tmp_path / "none")
    recipe = Recipe.model_validate({"data": "digits", "model": {"name": "pretrained", "path": str(tmp_path / "none")}})
    images = torch.zeros(2, 12, 12, 1, dtype=torch.uint8).numpy()
    built = build_model(recipe, ArrayDataset("data", images))
    assert built.model.network.config.sample_size == 12
    with pytest.raises(InputError, match=r"multiples of 2.*9×9"):
        build_model(recipe, ArrayDataset("data", images[:, :9, :9]))


@pytest.mark.parametrize("size", [(8, 16), [8, 16]])
def test_sizes_that_are_not_square_are_compared(size):
    UNet2D(small(sample_size=size)).check_shape((1, 8, 16), Pixels(), "p")
    with pytest.raises(InputError, match="takes images of 8×16, the data has 8×8"):
        UNet2D(small(sample_size=size)).check_shape((1, 8, 8), Pixels(), "p")
