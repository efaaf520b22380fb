"""Models of the Hugging Face Hub, in a cache of it that is made here, and without a connection."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from robustdiff.backbones.hub import is_hub_name
from robustdiff.backbones.lora import Adapter, LoraSection
from robustdiff.backbones.model import load_model
from robustdiff.errors import InputError

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def keep(cache: Path, name: str, pipeline: Path) -> Path:
    """Put a pipeline into the cache as downloads are: links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in pipeline.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / str(number), snapshot / path.relative_to(pipeline)
        shutil.copy(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_pipeline_in_the_cache_is_loaded(
    cache: Path, tmp_path: Path, make_sd_pipeline: Any, robustdiff: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_sd_pipeline(tmp_path / "pipeline", "xl")
    keep(cache, "owner/name-xl", folder)
    monkeypatch.chdir(tmp_path)
    assert load_model("owner/name-xl").fingerprint() == load_model(folder).fingerprint()
    words = ["--prompt", "red", "--num", 1, "--steps", 2, "--cpu"]
    assert robustdiff("sample", "owner/name-xl", *words).code == 0
    (tmp_path / "owner").mkdir()  # a path of this machine
    with pytest.raises(InputError, match="no model at owner/name-xl"):
        load_model("owner/name-xl")


def test_what_is_downloaded_are_the_components_without_variants(
    cache: Path, tmp_path: Path, make_unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "safety_checker": ["a", "B"]}))
    snapshot = keep(cache, "owner/name", tmp_path / "pipeline")
    asked: list[tuple[list[str], list[str]]] = []

    def downloaded(name: str, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked.append((allow_patterns, ignore_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    with pytest.raises(InputError, match="safety_checker is B of a, which is not supported"):
        load_model("owner/name")
    (first, _), (second, ignored), (third, _) = asked
    assert first == ["model_index.json"]
    assert {"unet/*.safetensors", "unet/*.json", "scheduler/*.json", "codec/*.json"} <= set(second)
    assert not any(pattern.startswith("safety_checker") for pattern in second)
    assert "*.fp16.safetensors" in ignored
    assert third == ["scheduler/*.safetensors", "codec/*.safetensors"]
    assert not any("bin" in pattern for pattern in second)


def test_what_is_not_in_the_cache_is_refused_in_one_line(
    cache: Path, tmp_path: Path, robustdiff: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = robustdiff("sample", "owner/other", "--cpu")
    assert outcome.code == 2
    assert outcome.err.strip().count("\n") == 0
    assert "owner/other: the Hugging Face Hub cannot be reached, and its cache does not have the model" in outcome.err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("")
    keep(cache, "owner/empty", tmp_path / "empty")
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        load_model("owner/empty")


def test_other_failures_are_one_line(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def failing(*arguments: object, **options: object) -> str:
        raise OSError("the disk\nis full")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(InputError, match=r"owner/name: its download .* failed \(the disk\)"):
        load_model("owner/name")


def test_nothing_is_downloaded_because_a_file_names_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = Adapter(base="owner/base", fingerprint="0" * 64, lora=LoraSection(), scheduler="DDIMScheduler")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter.json").write_text(adapter.model_dump_json())
    download, asked = huggingface_hub.snapshot_download, []

    def downloaded(name: str, **options: Any) -> str:
        asked.append(options["local_files_only"])
        return download(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    with pytest.raises(InputError, match=r"owner/base is not in the Hugging Face Hub's cache.*hf download owner/base"):
        load_model(tmp_path / "run")
    assert asked == [True]


@pytest.mark.parametrize("name", ["runs/../x", "../name", "/owner/name", "owner/name/unet", "name", "owner/na me", ""])
def test_paths_are_no_names_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)
