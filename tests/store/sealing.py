"""Model folders whose checksums fit whatever is in them, as someone who means harm would leave them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def sealed(folder: Path, config: str | None = None) -> Path:
    """A folder with checksums of what is in it, and with another config.json if one is given."""
    if config is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")
    files = {}
    for path in (folder / "config.json", folder / "model.safetensors"):
        if path.exists():
            content = path.read_bytes()
            files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "checksums.json").write_text(json.dumps({"files": files}))
    return folder
