"""A stage of a benchmark in a process of its own, with its peak memory as the operating system accounts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

RESULT = "RESULT "
"""What the line begins with in which a stage prints its figures, JSON."""


def in_own_process(arguments: list[str]) -> dict[str, Any]:
    """Run Python with some arguments; the figures that it prints, and its peak resident size, "peak_gb"."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with {process.returncode}")
    result = json.loads(next(line for line in output.splitlines() if line.startswith(RESULT))[len(RESULT) :])
    return {**result, "peak_gb": usage.ru_maxrss * 1024 / 1e9}
