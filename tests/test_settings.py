"""`settings.verbosity` is the level of the package's logger, and nothing else can be set."""

from __future__ import annotations

import logging

import pytest

import pixnet_sd as ps
from pixnet_sd.errors import PixNetError

LOGGER = logging.getLogger("pixnet_sd")


@pytest.fixture(autouse=True)
def _level_kept():
    before = LOGGER.level
    yield
    LOGGER.setLevel(before)


def test_by_default_it_informs():
    assert ps.settings.verbosity == "info"
    assert repr(ps.settings) == "Settings(verbosity='info')"


@pytest.mark.parametrize(
    ("given", "level", "read"), [("warning", 30, "warning"), ("DEBUG", 10, "debug"), (40, 40, "error"), (25, 25, 25)]
)
def test_it_is_the_level_of_the_logger(given, level, read):
    root = logging.getLogger().level
    ps.settings.verbosity = given
    assert LOGGER.level == level
    assert ps.settings.verbosity == read
    assert logging.getLogger().level == root


def test_what_is_said(caplog):
    ps.settings.verbosity = "warning"
    LOGGER.info("hidden")
    LOGGER.warning("shown")
    assert caplog.messages == ["shown"]


@pytest.mark.parametrize("given", ["loud", "", 2.5, None, True, -1])
def test_what_is_no_verbosity(given):
    with pytest.raises(PixNetError, match=r"give one of 'error', 'warning', 'info', 'debug', or a logging level"):
        ps.settings.verbosity = given
    assert ps.settings.verbosity == "info"


def test_a_slip_is_no_new_setting():
    with pytest.raises(AttributeError):
        ps.settings.verbosty = "debug"
