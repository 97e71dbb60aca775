"""What `import pixnet_sd` costs, beside `import spatialdata`, and that it loads no torch.

    python benchmarks/import_time.py

New processes import one and the other in turn, so that whatever else the machine does meets both alike. What a process
takes that imports nothing is taken off both; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

IMPORTED = {"nothing": "pass", "pixnet_sd": "import pixnet_sd", "spatialdata": "import spatialdata"}
MOST = 1.2
"""Largest allowed ratio of pixnet_sd to spatialdata."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if the import is slower than allowed, or loads torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="processes per import (default: 9)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    seconds = {name: median(times) for name, times in measure(options.repeats).items()}
    bare = seconds["nothing"]
    ratio = (seconds["pixnet_sd"] - bare) / (seconds["spatialdata"] - bare)
    loaded = heavy("import pixnet_sd; dir(pixnet_sd); pixnet_sd.settings.verbosity")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, medians of {options.repeats} processes each")
    for name, value in seconds.items():
        print(f"{name:12} {value:7.3f} s   {value - bare:7.3f} s above nothing")
    print(f"pixnet_sd / spatialdata: {ratio:.3f}, at most {MOST} allowed; heavy modules loaded: {loaded or 'none'}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "ratio": ratio, "loaded": loaded}, indent=2))
    return int(ratio > MOST or bool(loaded))


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of each process; the first round fills the disk cache and is left out."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTED}
    for turn in range(repeats + 1):
        for name, code in IMPORTED.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stdout=subprocess.DEVNULL)
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def heavy(code: str) -> list[str]:
    """Heavy modules that some code leaves loaded."""
    ask = f"{code}; import sys; print(*({{'torch', 'timm', 'spatialdata', 'squidpy', 'zarr'}} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(main())
