"""Small models and their records; and folders whose checksums fit whatever is in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pixnet_sd.model import DecoderConfig, ModelRecord, Network, PixNet, build_encoder

SHAPE = DecoderConfig(widths=(4, 8, 8, 16), hidden=(4, 8, 8), dropout=0.5)


def make_record(*, genes: int = 3, **changes: Any) -> ModelRecord:
    fields: dict[str, Any] = {
        "genes": [f"GENE{k}" for k in range(genes)],
        "target_sum": 1e4,
        "objective": "mse_pcc",
        "aggregation": "mean",
        "working_mpp": 0.5,
        "encoder": "test_resnet",
        "encoder_weights": None,
        "encoder_sha256": "",
        "freeze_encoder": False,
        "decoder": SHAPE,
        "tile_px": 128,
        "sizes": {"spots": 2500.0},
        "halo_px": 160,
        "sees_whole_tile": False,
        "history": [{"epoch": 1.0, "loss": 2.5}, {"epoch": 2.0, "loss": 1.5}],
    }
    return ModelRecord(**fields | changes)


def make_model(seed: int = 0, *, genes: int = 3) -> PixNet:
    torch.manual_seed(seed)
    return PixNet(Network(build_encoder("test_resnet", None), SHAPE, genes, "mean"), make_record(genes=genes))


def sealed(folder: Path, config: str | None = None) -> Path:
    """A folder with checksums of what is in it, as someone who means harm would leave it; perhaps another record."""
    if config is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")
    files = {}
    for path in (folder / "config.json", folder / "model.safetensors"):
        if path.exists():
            content = path.read_bytes()
            files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "checksums.json").write_text(json.dumps({"files": files}))
    return folder
