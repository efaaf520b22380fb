"""Feature extractors: the shipped ones know their data, Inception is torch-fidelity's, errors are clear."""

import importlib.util
import io
import json
import subprocess
import sys
from importlib.resources import files

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from robustdiff.data import load_dataset, to_unit
from robustdiff.errors import InputError
from robustdiff.metrics.extractors import inception as features
from robustdiff.metrics.extractors.classifier import Classifier, ClassifierExtractor
from robustdiff.metrics.extractors.extractor import EXTRACTORS, load_extractor

SHIPPED = ["digits", "fashion-16", "fashion-mnist"]
WEIGHTS = files("robustdiff.metrics") / "weights"


def random_images(extractor, n, seed=0):
    architecture = extractor.classifier.architecture
    shape = (n, architecture["channels"], architecture["size"], architecture["size"])
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped(name):
    extractor = load_extractor(name)
    images = random_images(extractor, 5)
    found = extractor(images)
    assert found.shape == (5, extractor.dim)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert extractor.name == name
    assert len(extractor.fingerprint) == 64
    assert not extractor.training
    assert not any(p.requires_grad for p in extractor.parameters())
    assert torch.allclose(found[2:3], extractor(images[2:3]), atol=1e-5)  # the rest of the batch does not matter
    assert name in repr(extractor)


def test_the_precision_of_the_caller_does_not_matter():
    extractor = load_extractor("fashion-16")
    images = random_images(extractor, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = extractor(images)
    assert torch.equal(found, extractor(images))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_is_small_and_says_what_it_is(name):
    path = WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 1_000_000
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["classifier"])
    assert record["architecture"]["dim"] == load_extractor(name).dim
    assert record["dataset"] == name
    assert float(record["test_accuracy"]) > {"digits": 0.95, "fashion-16": 0.88, "fashion-mnist": 0.90}[name]


def test_recorded_accuracy_is_true():
    dataset = load_dataset("fashion-16", split="test")
    classifier = Classifier.load(WEIGHTS / "fashion-16.safetensors")
    images, labels = dataset.__getitems__(range(2000))[:2]
    with torch.no_grad():
        accuracy = (classifier(to_unit(images)).argmax(1) == labels).float().mean()
    assert accuracy > 0.88


def test_fingerprint_is_of_the_weights(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(1, 8, [4], 3, 2)
    classifier.save(tmp_path / "a.safetensors", note="one")
    classifier.save(tmp_path / "b.safetensors", note="another")
    a, b = load_extractor(str(tmp_path / "a.safetensors")), load_extractor(str(tmp_path / "b.safetensors"))
    assert a.fingerprint == b.fingerprint
    with torch.no_grad():
        classifier.embed.bias[0] += 1e-6
    assert ClassifierExtractor("c", classifier).fingerprint != a.fingerprint
    assert len({load_extractor(name).fingerprint for name in SHIPPED}) == 3


def test_a_file_of_ones_own(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(3, 12, [4, 5], 7, 2)
    classifier.save(tmp_path / "mine.safetensors")
    extractor = load_extractor(str(tmp_path / "mine.safetensors"))
    images = random_images(extractor, 2)
    assert extractor.dim == 7
    assert torch.equal(extractor(images), classifier.features(to_unit(images)))


def test_the_features_are_what_the_logits_are_made_of():
    extractor = load_extractor("digits")
    images = random_images(extractor, 3)
    logits = extractor.classifier.head(extractor(images))
    assert torch.equal(logits, extractor.classifier(to_unit(images)))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(2, 1, 16, 16),
        torch.zeros(1, 16, 16, dtype=torch.uint8),
    ],
)
def test_wrong_images(images):
    with pytest.raises(InputError, match="extractor fashion-16"):
        load_extractor("fashion-16")(images)


def test_bad_names():
    with pytest.raises(InputError) as caught:
        load_extractor("vgg")
    assert all(name in str(caught.value) for name in EXTRACTORS)
    with pytest.raises(InputError, match="takes no weights"):
        load_extractor("digits", weights="x")
    with pytest.raises(InputError, match="needs weights=FILE; download it from https://"):
        load_extractor("inception")


def test_bad_weight_files(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_extractor(str(path))
    weights = Classifier(1, 8, [4], 3, 2).state_dict()
    architecture = {"channels": 1, "size": 8, "widths": [4], "dim": 4, "num_classes": 2}
    for content in [
        b"",
        b"hello, world",
        safetensors.torch.save(weights),  # no architecture
        safetensors.torch.save(weights, {"classifier": "{"}),
        safetensors.torch.save(weights, {"classifier": "{}"}),
        safetensors.torch.save(weights, {"classifier": json.dumps({"architecture": architecture})}),  # another dim
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.safetensors: not weights of a classifier") as caught:
            load_extractor(str(path))
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights, and a file of them."""
    network = features._torch_fidelity_inception()
    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)  # leave the initial ones in place
        net = network("inception", ["2048"], feature_extractor_weights_path=buffer)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return net, path


def test_inception_is_that_of_torch_fidelity(inception):
    net, path = inception
    extractor = load_extractor("inception", weights=path)
    assert (extractor.name, extractor.dim, extractor.training) == ("inception", 2048, False)
    assert len(extractor.fingerprint) == 64
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)
    found = extractor(colour)
    assert found.shape == (1, 2048)
    assert found.dtype == torch.float32
    assert torch.equal(found, net(colour)[0])
    grey = colour[:, :1, :9]
    assert torch.equal(extractor(grey), net(grey.repeat(1, 3, 1, 1))[0])


def test_inception_refuses_other_images(inception):
    extractor = load_extractor("inception", weights=inception[1])
    with pytest.raises(InputError, match="2 channels"):
        extractor(torch.zeros(1, 2, 32, 32, dtype=torch.uint8))
    with pytest.raises(InputError, match="uint8"):
        extractor(torch.zeros(1, 3, 32, 32))


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_inception_weight_file_is_not_executed(tmp_path, capsys):
    torch.save({"a": Payload()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not Inception weights"):
        load_extractor("inception", weights=tmp_path / "w.pth")
    assert "executed" not in capsys.readouterr().out


def test_inception_bad_weight_files(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(InputError, match=r"w\.pth: no such file; download it"):
        load_extractor("inception", weights=path)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"w\.pth: not Inception weights") as caught:
        load_extractor("inception", weights=path)
    assert "\n" not in str(caught.value)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not Inception weights"):
        load_extractor("inception", weights=path)


def test_without_torch_fidelity(monkeypatch, tmp_path):
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"the extra inception .*, or without torchvision: pip install --no-deps"):
        load_extractor("inception", weights=tmp_path / "w.pth")


def test_without_torchvision_torch_fidelity_is_left_as_it_was():
    code = """
import sys
sys.modules["torchvision"] = None  # an import of it fails, also where it is installed
from robustdiff.metrics.extractors.inception import _torch_fidelity_inception
assert _torch_fidelity_inception().INPUT_IMAGE_SIZE == 299
assert "torch_fidelity" not in sys.modules
try:
    import torch_fidelity
except ImportError as error:
    assert "torchvision" in str(error)
else:
    raise AssertionError("torch_fidelity imported without torchvision")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.util.find_spec("torch_fidelity") is not None
