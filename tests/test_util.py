"""What the package says: how loud, and in lines where no bar can be watched."""

from __future__ import annotations

import logging
import sys
import time

import pytest
from tqdm import auto

import pixnet_sd as ps
from pixnet_sd._util import LineBar, bar_class
from pixnet_sd.errors import PixNetError


@pytest.mark.parametrize(
    ("verbosity", "level", "read"),
    [("warning", 30, "warning"), ("DEBUG", 10, "debug"), (40, 40, "error"), (25, 25, 25)],
)
def test_verbosity_is_the_level_of_the_logger(verbosity, level, read, monkeypatch):
    root = logging.getLogger().level
    monkeypatch.setattr(ps.settings, "verbosity", verbosity)
    assert (logging.getLogger("pixnet_sd").level, repr(ps.settings)) == (level, f"Settings(verbosity={read!r})")
    assert logging.getLogger().level == root


@pytest.mark.parametrize("verbosity", ["loud", "", 2.5, None, True, -1])
def test_what_is_no_verbosity(verbosity):
    with pytest.raises(PixNetError, match="verbosity"):
        ps.settings.verbosity = verbosity
    assert ps.settings.verbosity == "info"
    with pytest.raises(AttributeError):
        ps.settings.verbosty = "debug"


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start, to be set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("total", "initial", "seconds", "first", "last", "most"),
    [
        (100, 0, 1, "10 of 100 tiles, 00:10 gone, about 01:30 left", "100 of 100 tiles, 01:40 gone", 10),
        # long runs: minutes apart
        (1440, 0, 10, "1 of 1440 tiles, 00:10 gone, about 3:59:50 left", "1440 of 1440 tiles, 4:00:00 gone", 120),
        # a resumed run is not thought fast
        (52, 50, 60, "51 of 52 tiles, 01:00 gone, about 01:00 left", "52 of 52 tiles, 02:00 gone", 2),
    ],
)
def test_a_line_every_so_often(clock, caplog, capsys, total, initial, seconds, first, last, most):
    with LineBar(total=total, initial=initial, unit="tile") as bar:
        for _ in range(total - initial):
            clock[0] += seconds
            bar.update()
    assert (caplog.messages[0], caplog.messages[-1]) == (first, last)
    assert most / 3 < len(caplog.messages) <= most
    assert capsys.readouterr() == ("", "")


def test_what_the_bar_shows_is_told(clock, caplog):
    with LineBar(total=2, unit="epoch") as bar:
        clock[0] += 20
        bar.set_postfix_str("step 3/9, loss 0.5")
        bar.set_postfix_str("step 4/9, loss 0.4")  # at once: no line
        bar.set_description_str("loss 0.5, val PCC 0.2", refresh=False)
        clock[0] += 20
        bar.update(2)
    assert caplog.messages == [
        "0 of 2 epochs, 00:20 gone; step 3/9, loss 0.5",
        "2 of 2 epochs, 00:40 gone; loss 0.5, val PCC 0.2; step 4/9, loss 0.4",
    ]
    caplog.clear()
    with LineBar(total=2, disable=True) as bar:
        clock[0] += 100
        bar.update(2)
    assert caplog.messages == []


@pytest.mark.parametrize(("watched", "bar"), [(True, auto.tqdm), (False, LineBar)])
def test_a_bar_on_a_terminal_only(watched, bar, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched, raising=False)
    assert bar_class() is bar
