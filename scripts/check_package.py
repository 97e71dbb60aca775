"""Check what `make package` built: the sdist holds what it should, and the wheel works alone in a fresh environment.

    python scripts/check_package.py dist

Needs twine, and an index to install the wheel's dependencies from. Everything else goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

SMOKE = Path(__file__).with_name("smoke_test.py").resolve()

NEEDED = (
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "docs/conf.py",
    "docs/references.bib",
    "pyproject.toml",
    "src/pixnet_sd/__init__.py",
    "src/pixnet_sd/py.typed",
    "tests/conftest.py",
)
JUNK = {".DS_Store", ".git", ".ipynb_checkpoints", ".venv", "__pycache__", "_build", "demo_output"}
DATA = {".h5", ".h5ad", ".npy", ".parquet", ".pt", ".pyc", ".safetensors", ".tif", ".tiff", ".zarr"}
MOST_MB = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one sdist")
    parser.add_argument("--python", default=sys.executable, help="Python of the fresh environment (default: this one)")
    parser.add_argument("--only-contents", action="store_true", help="look at what is in them, no more")
    options = parser.parse_args(arguments)
    wheel, sdist = only(options.dist, "*.whl"), only(options.dist, "*.tar.gz")
    troubles = [*check_sdist(sdist), *check_wheel(wheel)]
    print("\n".join(troubles) or f"{sdist.name} and {wheel.name} hold what they should")
    if not troubles and not options.only_contents:
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        smoke(wheel, options.python)
    return bool(troubles)


def only(folder: Path, pattern: str) -> Path:
    """The one file of a kind."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} has {len(found)} files {pattern}: one is needed. Delete the folder, and build again.")
    return found[0].resolve()


def check_sdist(sdist: Path) -> list[str]:
    """What is wrong with the sdist."""
    with tarfile.open(sdist) as archive:
        names = [PurePosixPath(member.name) for member in archive.getmembers()]
    files = {str(PurePosixPath(*name.parts[1:])) for name in names}
    missing = [f"{sdist.name} lacks {name}" for name in NEEDED if name not in files]
    return [*missing, *_unwanted(sdist, files)]


def check_wheel(wheel: Path) -> list[str]:
    """What is wrong with the wheel."""
    files = zipfile.ZipFile(wheel).namelist()
    outside = [
        name for name in files if not name.startswith(("pixnet_sd/", f"{wheel.name.split('-py3')[0]}.dist-info/"))
    ]
    missing = [] if "pixnet_sd/py.typed" in files else [f"{wheel.name} lacks py.typed"]
    return [*missing, *(f"{wheel.name}: {name} is outside the package" for name in outside), *_unwanted(wheel, files)]


def _unwanted(archive: Path, files: Iterable[str]) -> list[str]:
    found = [
        f"{archive.name}: {name} does not belong there"
        for name in files
        if any(part in JUNK or PurePosixPath(part).suffix in DATA for part in PurePosixPath(name).parts)
    ]
    size_mb = archive.stat().st_size / 1e6
    return found if size_mb <= MOST_MB else [*found, f"{archive.name} has {size_mb:.1f} MB, more than {MOST_MB}"]


def smoke(wheel: Path, python: str) -> None:
    """Install the wheel alone in a fresh environment, and use it there."""
    with tempfile.TemporaryDirectory() as folder:
        environment, empty = Path(folder) / "venv", Path(folder) / "empty"
        empty.mkdir()
        own = environment / "bin" / "python"
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if uv:
            run(uv, "venv", "--quiet", "--python", python, environment)
            run(uv, "pip", "install", "--quiet", "--python", own, wheel)
        else:
            run(python, "-m", "venv", environment)
            run(own, "-m", "pip", "install", "--quiet", wheel)
        run(own, "-I", SMOKE, cwd=empty)  # -I: neither this folder nor PYTHONPATH, only what was installed


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a command, and stop with its status if it fails."""
    print("+", *command, flush=True)
    status = subprocess.run(list(map(str, command)), cwd=cwd).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(main())
