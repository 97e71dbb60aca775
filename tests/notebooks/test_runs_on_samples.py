"""Notebooks that draw their slides run."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1_quickstart", "3_he_only", "4_evaluate"])
def test_runs(name: str, check_runs: Callable[..., None]) -> None:
    check_runs(name)
