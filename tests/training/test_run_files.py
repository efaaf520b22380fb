"""The files of a run, as a stranger or a kill may leave them."""

import json

import pytest

from robustdiff.errors import InputError
from robustdiff.training.run_files import read_data, read_metrics, read_result

LINE = {"step": 4, "loss": 0.5, "delta_norm": 0.1, "images_per_second": 7.0}
RESULT = {
    **{"steps": 4, "batches": 2, "batch_size": 8, "backward_passes": 4, "loss": 0.5, "delta_norm": None},
    **{"skipped": 0, "skipped_updates": 0, "parameters": 9, "data": "digits", "images": 99, "processes": 1},
    **{"device": "cpu", "torch": "2.13.0"},
}
DATA = {"name": "digits", "images": 9, "shape": [1, 8, 8], "classes": None}
DATA |= {"labels": None, "captions": None, "fingerprint": "00"}


def test_lines_of_metrics_are_read_with_the_further_parts_of_the_loss(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [LINE | {"mse": 0.25, "skipped": 3}, LINE | {"step": 6}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 8, "loss"')
    found = read_metrics(path)
    assert [line.model_dump() for line in found] == lines
    assert type(found[0].model_dump()["skipped"]) is int


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([LINE, LINE], "step 4 comes after 4"),
        ([LINE | {"loss": "1"}], "line 1, .*loss"),
        ([LINE, LINE | {"step": 5, "mse": "1"}], "line 2, .*mse"),
        ([LINE | {"mse": float("inf")}], "line 1, .*mse"),
        ([LINE | {"images_per_second": 0.0}], "line 1, .*images_per_second"),
        ([LINE | {"x" * 2**16: 0}], "line 1, .*damaged"),
    ],
)
def test_a_line_of_metrics_that_no_run_writes(tmp_path, lines, words):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(InputError, match=rf"metrics\.jsonl.*{words}.*: remove the line$"):
        read_metrics(path)


def test_a_result_is_returned_as_it_was_written(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert read_result(tmp_path / "result.json").as_dict() == RESULT


@pytest.mark.parametrize(
    ("change", "words"),
    [({"loss": True}, "loss"), ({"steps": -1}, "steps"), ({"more": 1}, "more"), ({"signs": []}, "best and signs")],
)
def test_a_result_that_no_run_writes(tmp_path, change, words):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | change))
    with pytest.raises(InputError, match=rf"damaged \(.*{words}.*\): remove it, and resume the run$"):
        read_result(tmp_path / "result.json")


def test_a_record_of_data(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    assert read_data(tmp_path / "data.json").shape == (1, 8, 8)
    (tmp_path / "data.json").write_text(json.dumps(DATA | {"shape": [1, 8]}))
    with pytest.raises(InputError, match=r"damaged \(shape.*restore it"):
        read_data(tmp_path / "data.json")
