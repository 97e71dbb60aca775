"""Exit codes, and what is said when something goes wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings

import pytest

import pixnet_sd as ps
from pixnet_sd._util import logger
from pixnet_sd.cli import _run, main
from pixnet_sd.cli._log import set_up_logging
from pixnet_sd.errors import DataError


@pytest.fixture
def fit_does(monkeypatch):
    def arrange(what) -> None:
        monkeypatch.setitem(_run._RUN, "fit", what)

    return arrange


def raising(error: BaseException):
    def fail(_) -> None:
        raise error

    return fail


def test_an_error_in_the_terms_of_the_command_line(fit_does, capsys):
    fit_does(raising(DataError("Lost. Give table_key= of a table, n_genes=5 or genes=, or fit(sdata, mpp=1).")))
    assert main(["fit", "a.zarr"]) == 1
    said = "Lost. Give --table-key of a table, --n-genes 5 or --genes, or fit(sdata, mpp=1).\n"
    assert capsys.readouterr().err == f"pixnet-sd fit: error: {said}"


def test_verbose_shows_where(fit_does, capsys):
    fit_does(raising(DataError("Counts are lost.")))
    assert main(["fit", "a.zarr", "--verbose"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_missing_extra(fit_does, capsys):
    fit_does(raising(ImportError("pip install 'pixnet_sd[io]'")))
    assert main(["fit", "a.zarr"]) == 1
    assert capsys.readouterr().err == "pixnet-sd fit: error: pip install 'pixnet_sd[io]'\n"


def test_a_bug_is_not_hidden(fit_does):
    fit_does(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["fit", "a.zarr"])


@pytest.mark.parametrize(("sent", "code", "said"), [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated")])
def test_stopped_by_a_signal(sent, code, said, fit_does, capsys):
    def stop(_) -> None:
        os.kill(os.getpid(), getattr(signal, sent))
        time.sleep(10)
        pytest.fail("nothing stopped it")

    fit_does(stop)
    before = signal.getsignal(signal.SIGTERM)
    on_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    try:
        assert main(["fit", "a.zarr"]) == code
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    assert capsys.readouterr().err == f"{said}. The same command goes on after the last finished epoch.\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_stopped_before_anything_is_imported(monkeypatch, capsys):
    """Nor is the command line itself: all of it is imported where an interrupt is answered."""

    class Stop:
        def find_spec(self, name, *_):
            if name == "pixnet_sd.cli._main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "pixnet_sd.cli._main")
    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    assert main(["fit", "a.zarr"]) == 130
    assert capsys.readouterr().err == "Interrupted. Nothing was changed.\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pixnet-sd {ps.__version__}\n"


@pytest.mark.parametrize(
    ("verbose", "shown"), [(False, {"ours", "careful"}), (True, {"ours", "theirs", "hm", "careful"})]
)
def test_what_others_say(verbose, shown, caplog):
    set_up_logging(verbose=verbose, quiet=False)
    package = os.path.dirname(ps.__file__)
    warnings.warn_explicit("ours", UserWarning, os.path.join(package, "tl", "_fit.py"), 1)
    warnings.warn_explicit("theirs", UserWarning, "/elsewhere/anndata.py", 1)
    theirs = logging.getLogger("spatialdata._logging")
    theirs.log(logging.WARNING, "careful")
    with caplog.at_level(logging.INFO, logger="spatialdata._logging"):
        theirs.info("hm")
    words = {"ours", "theirs", "hm", "careful"}
    assert {word for word in words if any(word in line for line in caplog.messages)} == shown


def test_quiet():
    set_up_logging(verbose=False, quiet=True)
    assert logger.level == logging.WARNING
