"""Execute the notebooks and keep their outputs, without what belongs to the machine that made them.

    python notebooks/render.py                     # all
    python notebooks/render.py 1_quickstart        # some

Each runs in an empty folder of its own. ``PIXNET_SD_HER2ST`` names the folder of the her2st sections, which the last
one needs; default: ``../shared/data/her2st``.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

NOTEBOOKS = Path(__file__).parent
HER2ST = Path(os.environ.get("PIXNET_SD_HER2ST", NOTEBOOKS.parents[1] / "shared/data/her2st")).resolve()
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the notebooks and keep their outputs.")
    parser.add_argument("names", nargs="*", help="such as 1_quickstart; default: all")
    names = parser.parse_args().names or [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    for name in names:
        path = NOTEBOOKS / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder), {})
            clean(notebook, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def execute(
    path: Path,
    folder: Path,
    parameters: Mapping[str, object],
    *,
    her2st: Path = HER2ST,
    kernel: AsyncKernelManager | None = None,
) -> NotebookNode:
    """Run a notebook in a folder, with other values for what its cell tagged "parameters" sets.

    A kernel that is given has its names and folder reset, and goes on running: what is loaded is loaded once.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = "\n".join([cell.source, *(f"{name} = {value!r}" for name, value in parameters.items())])
    # With MPLBACKEND set, pictures would not come into the notebook.
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment["PIXNET_SD_HER2ST"] = str(her2st)
    if kernel is not None:
        start = f"%reset -f\n%cd -q {folder}\n%env PIXNET_SD_HER2ST={her2st}"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(start))
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=None,
        startup_timeout=600,  # on a busy machine
        iopub_timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    if kernel is not None:
        client.kc.stop_channels()  # which the client leaves open where the kernel goes on
        del notebook.cells[0]
    return notebook


def clean(notebook: NotebookNode, folder: Path) -> None:
    """Leave out what differs between machines, and make pictures small."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            clean_output(output, folder)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]


def clean_output(output: NotebookNode, folder: Path) -> None:
    """Cut out the path of the folder, and warnings of other libraries: which there are depends on what is installed."""
    parts = output.get("data", output)
    for key in {"text", "text/plain", "text/html"} & set(parts):
        parts[key] = parts[key].replace(f"{folder.resolve()}/", "")
    if output.get("name") == "stderr":
        output.text = "".join(line for line in output.text.splitlines(True) if line.startswith("pixnet_sd: "))
    if "image/png" in parts:
        parts["image/png"] = small(parts["image/png"])


def small(png: str) -> str:
    """A picture in the 256 colours that suit it best, a third of its size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    found = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(found, "PNG", optimize=True)
    return base64.b64encode(found.getvalue()).decode()


if __name__ == "__main__":
    main()
