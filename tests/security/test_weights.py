"""Files of weights from strangers: not run, and not larger in memory than on the disk."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from robustdiff.errors import InputError
from robustdiff.metrics.extractors.classifier import Classifier
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.weights import read_weights


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors", "w.npz", "w"])
@pytest.mark.parametrize("how", ["zip", "legacy", "plain", "nested"])
def test_pickles_are_not_run(tmp_path, name, how):
    evil, path = Evil(tmp_path / "ran"), tmp_path / name
    if how == "plain":
        path.write_bytes(pickle.dumps({"a": evil}))
    else:
        held = {"state_dict": {"a": torch.zeros(1), "b": evil}} if how == "nested" else {"a": evil}
        torch.save(held, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_not_run(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.script(Module()).save(str(tmp_path / "w.pt"))
    with pytest.raises(InputError):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(4).as_strided((10**9,), (0,)),
        torch.zeros(4).as_strided((3, 3), (1, 0)),
        torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**12,)),
        torch.zeros(3).to(torch.float8_e4m3fn),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.int64),
        torch.empty(10**12, device="meta"),
        torch.full((2,), float("nan")),
    ],
)
def test_tensors_that_are_no_weights_are_refused_before_they_take_memory(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "w.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_members_that_expand_are_refused(tmp_path, member):
    torch.save({"w": torch.zeros(4)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "w.pt", "w") as bomb:
        for info in whole.infolist():
            data = whole.read(info)
            if info.filename.endswith(member):
                bomb.writestr(info.filename, data + bytes(2**20), zipfile.ZIP_DEFLATED)
            else:
                bomb.writestr(info.filename, data)
    with pytest.raises(InputError, match="compressed members"):
        read_weights(tmp_path / "w.pt")


def header(fields: dict[str, Any] | bytes, values: bytes = b"", length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


@pytest.mark.parametrize(
    "data",
    [
        header({}, length=2**63),
        header({}, length=2**40),
        header({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
        header({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, bytes(4)),
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        header({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
        header({"w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        header({"w": {"dtype": "X", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        header(b"[" * 10**5),
        header(b'{"a":' * 10**5),
        header(b""),
    ],
)
def test_headers_of_safetensors_are_not_believed(tmp_path, data):
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"dim": 10**9}, {"widths": [10**9, 2]}, {"widths": [2] * 10**4}, {"size": -1}, {"widths": []}, {"evil": 1}],
)
def test_a_classifier_takes_no_more_memory_than_its_file(tmp_path, changes):
    path = tmp_path / "c.safetensors"
    classifier = Classifier(1, 8, [2, 2], 3, 2)
    classifier.architecture |= changes
    classifier.save(path)
    with pytest.raises(InputError) as caught:
        load_extractor(str(path))
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(InputError, match="no such file"):
        read_weights(tmp_path / "w.pt")


def test_pickled_weights_of_inception_are_not_run(tmp_path):
    file = io.BytesIO()
    torch.save({"fc.weight": Evil(tmp_path / "ran")}, file)
    (tmp_path / "w.pth").write_bytes(file.getvalue())
    with pytest.raises(InputError):
        load_extractor("inception", weights=tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_name_of_any_length_is_refused_at_once(tmp_path, legacy):
    torch.save({"w": torch.zeros(4)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    name = b"ctorch.F" + b'{"a":' * 10**5 + b"\nx\n"
    if legacy:
        data = (tmp_path / "whole.pt").read_bytes()
        place = data.index(b"ctorch._utils\n")
        (tmp_path / "w.pt").write_bytes(data[:place] + name + data[place:])
    else:
        with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "w.pt", "w") as long:
            for info in whole.infolist():
                data = whole.read(info)
                long.writestr(info, data.replace(b"ctorch._utils\n", name) if info.filename.endswith("pkl") else data)
    with pytest.raises(InputError, match="more than 100 characters"):
        read_weights(tmp_path / "w.pt")
