"""``python -m pixnet_sd.cli`` is ``pixnet-sd``."""

from __future__ import annotations

import sys

from pixnet_sd.cli import main

if __name__ == "__main__":
    sys.exit(main())
