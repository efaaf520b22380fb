"""Embeddings of captions: computed once, exact, stale in no case, whole after a kill, and nobody else's."""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from robustdiff.conditions.t5 import T5Text
from robustdiff.errors import InputError, RunError

CAPTIONS = ["a red shoe", "a blue shirt", "a shoe"]


class Counting(T5Text):
    """A T5 that counts the texts that it encodes."""

    encoded = 0

    def encode(self, texts: list[str]) -> dict[str, torch.Tensor]:
        self.encoded += len(texts)
        return super().encode(texts)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def make(make_t5: Any) -> Any:
    def text(length: int = 8, **changes: Any) -> Counting:
        return Counting(*make_t5(**changes), length=length)

    return text


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "captions").glob("*/*") if len(path.name) == 64)


def test_a_caption_is_encoded_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make()
    once = text.batch(None, ["a red shoe"] * 3 + ["A red shoe", "a shirt"], None)
    assert text.encoded == 2
    for other in (text, make()):  # from memory, and from disk
        again = other.batch(None, ["a shirt", "a red shoe"], None)
        for name, value in again.items():
            assert torch.equal(value, once[name][[4, 0]])
    assert other.encoded == 0
    monkeypatch.setattr("robustdiff.conditions.text._MOST_BYTES", 0)
    assert torch.equal(
        make().batch(None, ["a shirt"], None)["encoder_hidden_states"], again["encoder_hidden_states"][:1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embeddings_are_stored_exactly(make: Any, dtype: torch.dtype) -> None:
    text, other = make(), make()
    for one in (text, other):
        one.encoder.to(dtype)
    with torch.no_grad():
        wanted = text.encode(CAPTIONS)
    assert wanted["encoder_hidden_states"].dtype == dtype
    text.prepare(CAPTIONS)
    for one in (text, other):
        given = one.batch(None, CAPTIONS, None)
        assert torch.equal(given["encoder_hidden_states"], wanted["encoder_hidden_states"].float())
        assert torch.equal(given["encoder_attention_mask"], wanted["encoder_attention_mask"])
    assert other.encoded == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"length": 7},
        {"num_layers": 2},
        {"layer_norm_epsilon": 1e-3},
        {"words": ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁blue", "▁red", "▁shoe", "▁shirt", "s", "h", "o", "e"]},
    ],
    ids=["weights", "length", "layers", "configuration", "tokenizer"],
)
def test_nothing_is_read_that_others_made(make: Any, changes: dict[str, Any]) -> None:
    make().prepare(CAPTIONS)
    other = make(**changes)
    other.prepare(CAPTIONS)
    assert other.encoded == len(CAPTIONS)


def test_the_key_of_entries_does_not_depend_on_what_was_done_before(make: Any) -> None:
    text = make()
    text.encode(["a"])
    assert text.fingerprint() == make().fingerprint()
    text.encoder.to(torch.float16)
    assert Counting(text.tokenizer, text.encoder, 8).fingerprint() != text.fingerprint()


def test_a_key_of_another_user_reads_nothing(make: Any, cache: Path) -> None:
    make().prepare(CAPTIONS)
    (cache / "key").write_bytes(bytes(32))
    other = make()
    other.prepare(CAPTIONS)
    assert other.encoded == len(CAPTIONS)


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "exchanged"])
def test_damaged_entries_are_computed_again(
    make: Any, cache: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = make()
    wanted = text.batch(None, CAPTIONS, None)
    path, second = entries(cache)[:2]
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b"", "exchanged": second.read_bytes()}[harm])
    other = make()
    with caplog.at_level(logging.WARNING):
        given = other.batch(None, CAPTIONS, None)
    assert "is damaged, and is computed again" in caplog.text
    assert other.encoded == 1
    torch.testing.assert_close(given, wanted)  # of another batch of texts, so that the rounding differs
    assert path.stat().st_size == len(whole)
    again = make()
    again.prepare(CAPTIONS)
    torch.testing.assert_close(again.batch(None, CAPTIONS, None), given, rtol=0, atol=0)
    assert again.encoded == 0


def test_an_interrupted_computation_goes_on(make: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustdiff.conditions.text._BATCH", 1)
    text = make()
    encode = text.encode

    def interrupted(texts: list[str]) -> Any:
        if text.encoded == 2:
            raise KeyboardInterrupt
        return encode(texts)

    monkeypatch.setattr(text, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text.prepare(CAPTIONS)
    torn = entries(cache)[0].with_name(f".{'0' * 64}.{'0' * 12}.tmp")
    torn.write_bytes(b"of a killed process")
    os.utime(torn, (0, 0))
    other = make()
    other.prepare(CAPTIONS)
    assert other.encoded == 1
    assert not torn.exists()


def _prepare(captions: list[str], text: T5Text) -> None:
    torch.set_num_threads(1)
    text.prepare(captions)


def test_two_processes_may_fill_the_cache_at_once(make: Any, cache: Path) -> None:
    captions = [f"a{' red' * i} shoe" for i in range(40)]
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_prepare, args=(captions[::order], make(length=50))) for order in (1, -1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    text, fresh = make(length=50), make(length=50)
    given = text.batch(None, captions, None)
    assert text.encoded == 0
    assert len(entries(cache)) == len(captions)
    with torch.no_grad():
        wanted = fresh.encode(captions)
    torch.testing.assert_close(given["encoder_hidden_states"], wanted["encoder_hidden_states"])


def test_a_cache_that_cannot_be_written_is_said_and_left_out(
    make: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    text = make()
    text.prepare(CAPTIONS[:1])
    monkeypatch.setattr("robustdiff.conditions.text.atomic_write", full)
    with caplog.at_level(logging.WARNING):
        text.prepare(CAPTIONS)
        text.batch(None, CAPTIONS, None)
    assert caplog.text.count("No space left on device") == 1
    assert text.encoded == len(CAPTIONS)
    (cache / "captions").rename(cache / "moved")
    (cache / "captions").write_text("a file")
    with pytest.raises(InputError, match="a file and not a folder"):
        make().prepare(CAPTIONS)


def test_what_is_on_disk_is_read_after_a_write_has_failed(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    text = make()
    text.prepare(CAPTIONS)
    other = make()
    monkeypatch.setattr("robustdiff.conditions.text._MOST_BYTES", 0)
    monkeypatch.setattr("robustdiff.conditions.text.atomic_write", full)
    other.batch(None, ["red"], None)
    for _ in range(2):
        other.batch(None, CAPTIONS, None)
    assert other.encoded == 1
    assert caplog.text.count("No space left on device") == 1


def test_captions_that_fit_neither_in_memory_nor_on_disk_are_refused(
    make: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robustdiff.conditions.text._BATCH", 1)
    monkeypatch.setattr("robustdiff.conditions.text.atomic_write", full)
    text = make()
    text.prepare(CAPTIONS)  # in memory
    size = sum(map(len, text._rows.values()))
    monkeypatch.setattr("robustdiff.conditions.text._MOST_BYTES", size - 1)
    other = make()
    with pytest.raises(RunError, match=rf"MB more.*{cache}.*No space left on device.*set ROBUSTDIFF_CACHE"):
        other.prepare(CAPTIONS)
    assert other.encoded < 3


def test_what_is_dropped_is_the_empty_caption(make: Any) -> None:
    text = make()
    given = text.batch(None, CAPTIONS[:2], torch.tensor([False, True]))
    empty = text.empty()
    for name, value in given.items():
        assert torch.equal(value[1:], empty[name])
        assert not torch.equal(value[:1], empty[name])


def test_parked_encoders_are_on_the_cpu_and_embeddings_are_on_the_device(make: Any) -> None:
    text = make()
    text.prepare(CAPTIONS)
    text.to("meta")
    text.encoder.to_empty(device="cpu")
    text.park()
    assert text.encoder.device.type == "cpu"
    assert text.batch(None, CAPTIONS, None)["encoder_hidden_states"].device.type == "meta"


def test_encoders_move_to_the_device_only_to_encode(make: Any) -> None:
    make().prepare(CAPTIONS)
    text = make().to("meta")
    assert text.batch(None, CAPTIONS, None)["encoder_hidden_states"].device.type == "meta"
    assert text.encoder.device.type == "cpu"
    with pytest.raises((NotImplementedError, RuntimeError)):  # which computes shapes only
        text.prepare(["red"])
    assert text.encoder.device.type == "meta"


def test_embeddings_that_are_not_finite_are_refused(make: Any) -> None:
    text = make()
    text.encoder.shared.weight.data[4] = torch.inf
    with pytest.raises(RunError, match="caption 'a red shoe' is not finite"):
        text.prepare(CAPTIONS)


def test_a_caption_that_is_not_unicode_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match=r"caption 'a \\\\xff' is not UTF-8"):
        make().batch(None, ["a \udcff"], None)


def test_a_model_of_captions_needs_them(make: Any) -> None:
    text = make()
    text.check(None, True, "m")
    with pytest.raises(InputError, match=r"m needs captions.*metadata\.jsonl"):
        text.check(3, False, "m")
    with pytest.raises(InputError, match="conditioned on captions: give them"):
        text.batch(None, None, None)
