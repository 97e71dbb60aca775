#!/usr/bin/env bash
# Run the tests with other versions than the pinned ones, in an environment of their own.
#
#     scripts/test_versions.sh PYTHON RESOLUTION [pytest arguments]
#     scripts/test_versions.sh 3.13 highest
#     scripts/test_versions.sh 3.11 lowest-direct tests/store tests/slide
#
# highest: the newest versions of everything; lowest-direct: the oldest that pyproject.toml allows.  Needs uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
python=$1 resolution=$2
shift 2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
uv venv --quiet --python "$python" "$folder/venv"
uv pip install --quiet --python "$folder/venv/bin/python" --resolution "$resolution" --editable '.[test]'
uv pip list --python "$folder/venv/bin/python" | grep -iE '^(anndata|dask|numpy|pandas|spatialdata|squidpy|torch|zarr) '

export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MPLBACKEND=Agg
"$folder/venv/bin/python" -m pytest --numprocesses "${TEST_JOBS:-2}" --dist loadfile "$@"
