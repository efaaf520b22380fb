"""The form of every refusal, for the tests of the commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def assert_bad_input() -> Callable[..., None]:
    """Check that a command ended with exit code 2, and one line on stderr that holds some words."""

    def check(outcome, *words: str) -> None:
        assert outcome.code == 2, outcome
        lines = [line for line in outcome.err.splitlines() if line.strip()]
        assert len(lines) == 1, outcome.err
        for word in words:
            assert word in lines[0]

    return check
