"""Exit codes, and what is said when something goes wrong."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from unittest.mock import Mock

import pytest

import pixnet_sd as ps
from pixnet_sd.cli import main
from pixnet_sd.errors import DataError


@pytest.fixture
def fit_does(monkeypatch, drawn):
    """Run `fit` on a slide, with a verb that raises an error or does what a function does."""

    def run(effect: BaseException | Callable[..., None], *options: str) -> int:
        monkeypatch.setattr(ps.tl, "fit", Mock(side_effect=effect), raising=False)
        return main(["fit", str(drawn), *options])

    return run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("Lost. Give table_key=.", argument="table_key"), "--table-key: Lost. Give table_key=."),
        (DataError("table_key=5?"), "--table-key: table_key=5?"),
        (DataError("x=5?"), "x=5?"),  # no option of this command
        (DataError("Lost. Give table_key=."), "Lost. Give table_key=."),
        (ImportError("pip install 'pixnet_sd[io]'"), "pip install 'pixnet_sd[io]'"),
    ],
)
def test_errors(error, said, fit_does, capsys):
    """In one line, with the option that they are about, and with `--verbose` where they come from."""
    assert fit_does(error) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"pixnet-sd fit: error: {said}"
    assert fit_does(error, "--verbose") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_bug_is_not_hidden_and_a_wrong_value_is_found_before_a_slide_is_read(fit_does, capsys):
    with pytest.raises(ZeroDivisionError):
        fit_does(ZeroDivisionError())
    assert main(["fit", "nowhere.zarr", "--lr=-1"]) == 1
    assert capsys.readouterr().err.startswith("pixnet-sd fit: error: --lr: lr=-1.0: give ")


@pytest.mark.parametrize(("sent", "code", "said"), [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated")])
def test_stopped_by_a_signal(sent, code, said, fit_does, capsys):
    def stop(*_, **__) -> None:
        os.kill(os.getpid(), getattr(signal, sent))
        time.sleep(10)
        pytest.fail("nothing stopped it")

    before = signal.getsignal(signal.SIGTERM)
    on_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    try:
        assert fit_does(stop) == code
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    assert capsys.readouterr().err.endswith(f"{said}. The same command goes on after the last finished epoch.\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_stopped_before_anything_is_imported(monkeypatch, capsys):
    """Nor is the command line itself: all of it is imported where an interrupt is answered."""

    class Stop:
        def find_spec(self, name, *_):
            if name == "pixnet_sd.params":
                raise KeyboardInterrupt

    for name in ("pixnet_sd.cli._commands", "pixnet_sd.params"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    assert main(["fit", "a.zarr"]) == 130
    assert capsys.readouterr().err == "Interrupted. Nothing was changed.\n"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom pixnet_sd.cli import COMMANDS, main\n"
        "for name in COMMANDS: main([name, '--help'])\nmain(['--version'])\n"
        "heavy = {'torch', 'spatialdata', 'anndata', 'numpy', 'pandas'} & set(sys.modules)\nsys.exit(str(heavy or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "\n"
    assert done.stdout.count("usage: pixnet-sd") == 7
    assert done.stdout.endswith(f"\npixnet-sd {ps.__version__}\n")


@pytest.mark.parametrize(
    ("option", "shown"),
    [("--no-quiet", "ours careful"), ("--verbose", "ours theirs hm careful"), ("--quiet", "ours careful")],
)
def test_what_others_say(option, shown, fit_does, caplog):
    def fit(*_, **__) -> None:
        warnings.warn_explicit("ours", UserWarning, ps.tl.__file__, 1)
        warnings.warn_explicit("theirs", UserWarning, "/elsewhere/anndata.py", 1)
        theirs = logging.getLogger("spatialdata._logging")
        theirs.warning("careful")
        with caplog.at_level(logging.INFO, logger="spatialdata._logging"):
            theirs.info("hm")
        raise DataError("done")

    assert fit_does(fit, option) == 1
    words = ("ours", "theirs", "hm", "careful")
    assert [word for word in words if word in caplog.text] == shown.split()
    assert logging.getLogger("pixnet_sd").level == (logging.WARNING if option == "--quiet" else logging.INFO)
