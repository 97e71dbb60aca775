"""Lines in the log, where no bar can be watched."""

from __future__ import annotations

import sys

import pytest
from tqdm import auto

from pixnet_sd import _util as _progress
from pixnet_sd._util import LineBar, bar_class


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start, to be set."""
    now = [1000.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_so_often(clock, caplog, capsys):
    with LineBar(total=100, unit="tile") as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update()
    lines = caplog.messages
    assert lines[0] == "10 of 100 tiles, 00:10 gone, about 01:30 left"
    assert lines[-1] == "100 of 100 tiles, 01:40 gone"
    assert len(lines) == 10
    assert capsys.readouterr() == ("", "")


def test_lines_of_long_runs_are_minutes_apart(clock, caplog):
    with LineBar(total=1440, unit="tile") as bar:
        for _ in range(1440):
            clock[0] += 10
            bar.update()
    assert caplog.messages[-1] == "1440 of 1440 tiles, 4:00:00 gone"
    assert 48 < len(caplog.messages) < 120


def test_a_resumed_run_is_not_thought_fast(clock, caplog):
    with LineBar(total=100, initial=50, unit="epoch") as bar:
        clock[0] += 60
        bar.update()
    assert caplog.messages == ["51 of 100 epochs, 01:00 gone, about 49:00 left"]


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


def test_silent_when_disabled_or_idle(clock, caplog):
    for options in ({"disable": True}, {}):
        with LineBar(total=2, **options) as bar:
            clock[0] += 100
            bar.update(0)
    assert [line for line in caplog.messages if "2 of 2" in line] == []
    assert len(caplog.messages) <= 1


@pytest.mark.parametrize(("watched", "kind"), [(True, auto.tqdm), (False, LineBar)])
def test_a_bar_on_a_terminal_only(watched, kind, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched, raising=False)
    assert bar_class() is kind
