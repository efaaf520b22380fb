"""Datasets through Hugging Face's `datasets`, offline: saved to disk by the test."""

import io
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from robustdiff.data import load_dataset
from robustdiff.data.huggingface import HuggingFaceDataset
from robustdiff.errors import InputError

ARRAYS = [np.full((6, 8), value, np.uint8) for value in (10, 20, 30)]


def table(features, **columns):
    images = [Image.fromarray(array) for array in ARRAYS]
    return datasets.Dataset.from_dict({"picture": images, **columns}, features=datasets.Features(features))


def test_saved_to_disk_with_class_labels(tmp_path):
    features = {
        "picture": datasets.Image(),
        "caption": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["cat", "dog", "owl"]),
    }
    table(features, caption=["a", "b", "c"], kind=[1, 0, 1]).save_to_disk(tmp_path / "set")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    assert (len(dataset), dataset.shape, dataset.num_classes) == (3, (1, 6, 6), 3)
    images, labels = dataset.__getitems__([2, 0])[:2]
    assert images[:, 0, 0, 0].tolist() == [30, 10]
    assert labels.tolist() == [1, 1]
    dataset = load_dataset(f"hf:{tmp_path / 'set'}", size=4, channels=3)
    assert dataset[1][0].shape == (3, 4, 4)
    assert dataset[1][1] == 0


def test_integer_labels_and_splits(tmp_path):
    features = {"picture": datasets.Image(), "label": datasets.Value("int32")}
    splits = {"train": table(features, label=[0, 4, 2]), "validation": table(features, label=[1, 1, 1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert load_dataset(f"hf:{tmp_path / 'set'}").num_classes == 5
    _, labels = load_dataset(f"hf:{tmp_path / 'set'}", split="validation").__getitems__(range(3))[:2]
    assert labels.tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="no split 'test'; use one of: train, validation"):
        load_dataset(f"hf:{tmp_path / 'set'}", split="test")


def test_a_folder_that_datasets_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("cat", "dog"):
        (tmp_path / "set/train" / name).mkdir(parents=True)
        Image.fromarray(ARRAYS[0]).save(tmp_path / "set/train" / name / "a.png")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    assert (len(dataset), dataset.num_classes) == (2, 2)


def test_a_folder_of_several_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for k, name in enumerate("ab"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(ARRAYS[k]).save(tmp_path / "set" / name / "a.png")
    card = "".join(f"- {{config_name: {name}, data_dir: {name}}}\n" for name in "ab")
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{card}---\n")
    name = f"hf:{tmp_path / 'set'}"
    assert load_dataset(name, config="b")[0][0].max() == 20
    with pytest.raises(InputError, match=r"set has several configurations; choose one with data\.config: 'a', 'b'$"):
        load_dataset(name)
    with pytest.raises(InputError, match=r"set has no data\.config=c; choose one with data\.config: 'a', 'b'$"):
        load_dataset(name, config="c")
    with pytest.raises(InputError, match=r"has no data\.config=c; choose one with data\.config: 'default'$"):
        load_dataset(f"{name}/a", config="c")
    table({"picture": datasets.Image()}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"save_to_disk has no configurations; leave data\.config out"):
        load_dataset(f"hf:{tmp_path / 'saved'}", config="a")


def test_without_labels(tmp_path):
    table({"picture": datasets.Image()}).save_to_disk(tmp_path / "set")
    dataset = load_dataset(f"hf:{tmp_path / 'set'}")
    assert dataset.num_classes is None
    assert dataset.__getitems__([0])[1] is None


def test_sizes_that_differ(tmp_path):
    images = [Image.fromarray(np.zeros((n, n), np.uint8)) for n in (6, 6, 7)]
    datasets.Dataset.from_dict({"image": images}).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"row 0: 6, row 2: 7 pixels\); give images of one size; data.size=PIXELS"):
        load_dataset(f"hf:{tmp_path / 'set'}")
    assert load_dataset(f"hf:{tmp_path / 'set'}", size=6).shape == (1, 6, 6)


def encoded(array, format="PNG", damage=None):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format)
    data = file.getvalue()
    if damage == "truncated":
        data = data[: len(data) // 2]
    if damage == "chunk":
        start = data.index(b"IDAT")
        data = data[: start - 4] + (5).to_bytes(4, "big") + data[start:]
    return {"bytes": data, "path": None}


NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "has no image"),
        ({"bytes": b"hello", "path": None}, ": not an image"),
        ({"bytes": b"", "path": None}, ": not an image"),
        ({"bytes": None, "path": "/nowhere/a.png"}, r": cannot be read \(No such file"),
    ],
)
def test_a_row_that_is_no_image_is_named_when_it_is_loaded(row, bad, message):
    rows = [encoded(NOISE)] * 5
    rows[row] = bad
    bad_table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(InputError, match=f"mine: row {row}:? ?{message}"):
        HuggingFaceDataset("mine", bad_table, 8)


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("damage", ["truncated", "chunk"])
def test_a_row_with_damaged_pixels_is_named_in_its_batch(row, damage):
    rows = [encoded(NOISE)] * 5
    rows[row] = encoded(NOISE, damage=damage)
    bad_table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    dataset = HuggingFaceDataset("mine", bad_table, 8)
    with pytest.raises(InputError, match=f"mine: row {row}: cannot be decoded"):
        dataset.__getitems__([4, 2, row, 1])


def test_the_limit_of_pixels_is_that_of_folders(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="mine: row 0: over Pillow's limit of pixels"):
        HuggingFaceDataset("mine", table({"picture": datasets.Image()}))


def test_images_by_their_path(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    features = datasets.Features({"image": datasets.Image()})
    dataset = HuggingFaceDataset(
        "mine", datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}, features=features)
    )
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), NOISE)


def test_grey_among_colour_is_colour_whichever_comes_first():
    rows = [encoded(NOISE[..., 0]), encoded(NOISE)]
    mixed = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    dataset = HuggingFaceDataset("mine", mixed)
    assert dataset.shape == (3, 16, 16)
    assert np.array_equal(dataset[0][0][2].numpy(), NOISE[..., 0])
    assert np.array_equal(dataset[1][0].permute(1, 2, 0).numpy(), NOISE)
    luma = np.asarray(Image.fromarray(NOISE).convert("L"))
    assert np.array_equal(HuggingFaceDataset("mine", mixed, channels=1)[1][0][0].numpy(), luma)


def test_the_mode_that_the_column_declares():
    rgb = datasets.Dataset.from_dict(
        {"image": [encoded(NOISE[..., 0])]}, features=datasets.Features({"image": datasets.Image(mode="RGB")})
    )
    assert HuggingFaceDataset("mine", rgb).shape == (3, 16, 16)


def test_transparency_shows_the_background():
    rows = [encoded(np.zeros((4, 4, 4), np.uint8))]
    clear = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    assert HuggingFaceDataset("mine", clear)[0][0].min() == 255
    assert HuggingFaceDataset("mine", clear, background="#102030")[0][0][:, 0, 0].tolist() == [16, 32, 48]


def test_the_image_column():
    images = [Image.fromarray(array) for array in ARRAYS]

    def columns(*names):
        features = datasets.Features({name: datasets.Image() for name in names})
        flipped = [images[::-1], images, images][: len(names)]
        return datasets.Dataset.from_dict(dict(zip(names, flipped, strict=True)), features=features)

    def first(*arguments, **options):
        return int(HuggingFaceDataset("mine", columns(*arguments), **options)[0][0].max())

    assert first("mask", "image") == 10
    assert first("mask", "img") == 10
    assert first("mask", "image", image_column="mask") == 30
    with pytest.raises(InputError, match=r"several image columns \(mask, photo\); choose one with data.image_column"):
        first("mask", "photo")
    with pytest.raises(InputError, match=r"data.image_column=foto is not an image column; use one of: mask, photo"):
        first("mask", "photo", image_column="foto")


KINDS = datasets.ClassLabel(names=["a", "b", "c"])


@pytest.mark.parametrize(
    ("features", "values", "label_column", "expected", "num_classes"),
    [
        ({"label": datasets.Value("string")}, {"label": ["owl", "cat", "owl"]}, None, [1, 0, 1], 2),
        ({"labels": datasets.Value("uint8")}, {"labels": [1, 0, 1]}, None, [1, 0, 1], 2),
        ({"label": datasets.Value("bool")}, {"label": [True, False, True]}, None, [1, 0, 1], 2),
        ({"kind": KINDS}, {"kind": [2, 0, 0]}, None, [2, 0, 0], 3),
        ({"fine": KINDS, "coarse": KINDS}, {"fine": [2, 0, 0], "coarse": [0, 1, 1]}, "coarse", [0, 1, 1], 3),
        ({"other": datasets.Value("int64")}, {"other": [2, 0, 1]}, None, None, None),
        ({"other": datasets.Value("int64")}, {"other": [2, 0, 1]}, "other", [2, 0, 1], 3),
    ],
)
def test_the_label_column(features, values, label_column, expected, num_classes):
    labelled = table({"picture": datasets.Image(), **features}, **values)
    dataset = HuggingFaceDataset("mine", labelled, label_column=label_column)
    labels = dataset.__getitems__([0, 1, 2])[1]
    assert (None if labels is None else labels.tolist()) == expected
    assert dataset.num_classes == num_classes


@pytest.mark.parametrize(
    ("features", "values", "options", "message"),
    [
        ({"label": datasets.Value("int64")}, {"label": [0, 1, -1]}, {}, "the label of row 2 is -1"),
        ({"label": datasets.Value("int64")}, {"label": [0, None, 1]}, {}, "row 1 has no label"),
        ({"label": datasets.Value("string")}, {"label": ["a", None, "b"]}, {}, "row 1 has no label"),
        ({"kind": KINDS}, {"kind": [0, 1, -1]}, {}, "the label of row 2 is -1; labels are 0 to 2"),
        ({"kind": KINDS}, {"kind": [0, 1, None]}, {}, "row 2 has no kind"),
        (
            {"label": datasets.Value("float32")},
            {"label": [0, 1, 2]},
            {"label_column": "label"},
            "label is not a column of",
        ),
        ({"a": KINDS, "b": KINDS}, {"a": [0, 1, 2], "b": [0, 1, 2]}, {}, r"several label columns \(a, b\); choose one"),
        ({"a": KINDS}, {"a": [0, 1, 2]}, {"label_column": "c"}, "data.label_column=c is not .* use one of: a"),
    ],
)
def test_labels_that_are_none(features, values, options, message):
    with pytest.raises(InputError, match=message) as caught:
        HuggingFaceDataset("mine", table({"picture": datasets.Image(), **features}, **values), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "feature", "values"),
    [
        ("label", datasets.Image(), [Image.fromarray(array) for array in ARRAYS]),  # a segmentation
        ("labels", datasets.List(datasets.Value("int64")), [[1, 2], [0], []]),
        ("label", datasets.Value("float32"), [0, 1, 2]),
    ],
)
def test_a_column_of_another_kind_of_labels_is_passed_over(name, feature, values, caplog):
    features, options = {"picture": datasets.Image(), name: feature}, {"image_column": "picture"}
    assert HuggingFaceDataset("mine", table(features, **{name: values}), **options).num_classes is None
    warned = f"mine: column {name} is not of class labels, integers or strings, so it is passed over"
    assert [record.getMessage() for record in caplog.records] == [f"{warned}; data.label_column chooses another: none"]
    classes = table({**features, "kind": KINDS}, kind=[2, 0, 0], **{name: values})
    assert HuggingFaceDataset("mine", classes, **options).num_classes == 3


def test_fingerprint(tmp_path):
    def saved(name, rows, labels):
        features = datasets.Features({"image": datasets.Image(), "label": KINDS})
        made = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
        made.save_to_disk(tmp_path / name)
        return load_dataset(f"hf:{tmp_path / name}").fingerprint()

    rows = [encoded(NOISE), encoded(NOISE[::-1])]
    first = saved("first", rows, [0, 1])
    assert saved("second", rows, [0, 1]) == first
    assert len({first, saved("a", rows, [1, 1]), saved("b", rows[::-1], [0, 1]), saved("c", rows[:1], [0])}) == 4


@pytest.mark.parametrize("name", ["imagefolder", "pandas", "json", "text", "webdataset", "hf://datasets/pandas"])
def test_readers_are_not_handed_the_working_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"hf:{name} is a file reader.*data.name=imagefolder with data.root=FOLDER"):
        load_dataset(f"hf:{name}")
    with pytest.raises(InputError, match="needs the name of a dataset"):
        load_dataset("hf:")


def test_a_library_that_runs_scripts_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match=r"needs datasets 5\.2 or later"):
        load_dataset("hf:ylecun/mnist")


def test_scripts_are_not_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in (tmp_path / "set", tmp_path / "set/set.py"):
        with pytest.raises(InputError, match="cannot be loaded"):
            load_dataset(f"hf:{name}")
    assert not (tmp_path / "ran").exists()


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(InputError, match="no image column"):
        load_dataset(f"hf:{tmp_path / 'text'}")
    with pytest.raises(InputError, match="no split 'test'"):
        load_dataset(f"hf:{tmp_path / 'text'}", split="test")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_dataset(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no rows"):
        HuggingFaceDataset("mine", table({"picture": datasets.Image()}).select([]))
    (tmp_path / "text/state.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_dataset(f"hf:{tmp_path / 'text'}")


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="install the extra datasets"):
        load_dataset("hf:mnist")


# -- captions --------------------------------------------------------------------------------------------------


def captioned(name, feature, values, **options):
    features = {"picture": datasets.Image(), name: feature}
    return HuggingFaceDataset("mine", table(features, **{name: values}), **options)


def test_captions_of_strings_and_of_lists():
    string = datasets.Value("string")
    for name in ("text", "caption"):
        assert captioned(name, string, ["a", "", "c"]).__getitems__([2, 0]).captions == [("c",), ("a",)]
    five = [[f"{k} {i}" for i in range(5)] for k in range(3)]
    dataset = captioned("sentences", datasets.List(string), five, caption_column="sentences")
    assert dataset.__getitems__([1]).captions == [tuple(five[1])]
    assert not captioned("sentences", datasets.List(string), five).captioned
    assert dataset.fingerprint(captions=False) == captioned("text", string, ["a"] * 3).fingerprint(captions=False)
    assert dataset.fingerprint() != captioned("text", string, ["a"] * 3).fingerprint()


def test_a_row_without_a_caption(caplog):
    string = datasets.Value("string")
    with pytest.raises(InputError, match=r"mine: caption of row 1 is null; make it a string.*filter such rows out"):
        captioned("caption", string, ["a", None, "c"], caption_column="caption")
    assert not captioned("caption", string, ["a", None, "c"]).captioned
    assert "mine: caption of row 1 is null" in caplog.text
    with pytest.raises(InputError, match=r"caption of row 2 is list \[\]"):
        captioned("caption", datasets.List(string), [["a"], ["b"], []], caption_column="caption")
    with pytest.raises(InputError, match=r"caption_column=x is not a column of strings .*; use one of: text"):
        captioned("text", string, ["a", "b", "c"], caption_column="x")
    with pytest.raises(InputError, match=r"caption_column=number is not a column of strings .*; use one of: none"):
        captioned("number", datasets.Value("int32"), [1, 2, 3], caption_column="number")
