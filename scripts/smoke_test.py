"""Use an installed pixnet_sd, and nothing besides: a tiny slide, two steps of training, a prediction.

`scripts/check_package.py` runs it in a fresh environment with the wheel; it can be run in any, also to see whether an
installation works. It needs no network and takes less than a minute.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import pixnet_sd as ps


def main() -> None:
    """Fail with a traceback, or say that it works."""
    print(f"pixnet_sd {ps.__version__} on Python {sys.version.split()[0]}, in {Path(ps.__file__).parent}")
    check_installation()
    with tempfile.TemporaryDirectory() as folder:
        use(Path(folder))
    for entry in importlib.metadata.entry_points(group="console_scripts", name="pixnet-sd"):
        subprocess.run([Path(sys.executable).with_name(entry.name), "--help"], check=True, stdout=subprocess.DEVNULL)
        print(f"{entry.name} --help: fine")
    print("The installation works.")


def check_installation() -> None:
    """Without extras, typed, and quick to import."""
    assert ps.__version__ == importlib.metadata.version("pixnet_sd")
    assert "torch" not in sys.modules, "`import pixnet_sd` loads torch"
    assert (Path(ps.__file__).parent / "py.typed").exists()


def use(folder: Path) -> None:
    """Fit, predict, save and load."""
    ps.settings.verbosity = "warning"
    slide = ps.datasets.sample(size_um=150, mpp=1.0, bin_um=(8,))
    quiet = {"device": "cpu", "show_progress_bar": False}
    tiles = {"tile_px": 128}
    network = {"encoder": "test_resnet", "encoder_weights": None, "decoder_width": 8, "working_mpp": 1.0}
    model = ps.tl.fit(
        slide,
        genes=5,
        validation=None,
        model_params=network,
        train_params=tiles | {"max_steps": 2},
        checkpoint_dir=folder / "model",
        **quiet,
    )
    ps.tl.predict(slide, model, radius_um=8, predict_params=tiles, **quiet)
    table = slide.tables["pixnet_circles_8um"]
    assert list(table.var_names) == model.genes
    assert len(model.genes) == 5
    assert table.n_obs == len(slide.shapes["pixnet_circles_8um_shapes"]) > 0
    assert "pixnet_map" in slide.images
    model.save_pretrained(folder / "hub")
    assert ps.PixNet.from_pretrained(folder / "hub").genes == model.genes
    print(f"fit, predict, save and load: fine, {table.n_obs} circles")


if __name__ == "__main__":
    main()
