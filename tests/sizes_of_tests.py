"""Which cases of a long parametrized test run by default; `make test-slow` has the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_default(quick: Collection[Any], every: Iterable[Any]) -> list:
    """`every` as parameters of a test, those outside of `quick` marked slow."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[] if value in quick else pytest.mark.slow
        )
        for value in every
    ]
