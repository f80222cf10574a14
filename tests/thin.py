"""The quick suite runs one representative of a test's cases, or a few; the others are slow ones."""

from collections.abc import Iterable

import pytest


def slow_after(count: int, cases: Iterable) -> list:
    """Cases for pytest.mark.parametrize, those after the first `count` marked slow."""
    return [
        case if i < count else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]
