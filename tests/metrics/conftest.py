"""The digits, with the extractor that is made for them and the statistics of their features."""

import pytest

from robustdiff.data import load_dataset
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.reference import reference_statistics


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def reference(digits, extractor, tmp_path_factory):
    return reference_statistics(digits, extractor, tmp_path_factory.mktemp("cache"))
