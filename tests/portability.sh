#!/usr/bin/env bash
# The overlapped layer's backward order and exactness under several versions of torch, each in a virtual environment of
# its own; prints a line a version for docs/portability.md.
#
#   tests/portability.sh FOLDER [VERSION...]      by default 2.9 2.10 2.11 2.12 2.13
#
# FOLDER keeps the environments, about 2 GB each where pip finds CUDA builds only; they serve here too. PYTHON (python3)
# must be the one that this checkout was built with (make setup): its compiled module is used.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?name a folder for the virtual environments}")
shift
[ $# -gt 0 ] || set -- 2.9 2.10 2.11 2.12 2.13
export CUDA_VISIBLE_DEVICES= PYTHONPATH=$PWD
mkdir -p "$folder"

for version; do
  python="$folder/torch-$version/bin/python"
  log="$folder/torch-$version.log"
  if ! "$python" -c 'import torch, pytest' 2>/dev/null; then
    # numpy: the interpreter of Triton 3.6 and older needs it below 2.4
    "${PYTHON:-python3}" -m venv "$folder/torch-$version" &&
      "$python" -m pip install --no-compile --quiet --disable-pip-version-check \
        "torch==$version.*" triton 'numpy<2.4' packaging pytest pytest-timeout rich typer > "$log" 2>&1 ||
      { echo "| $version | could not be installed: $(tail -n 1 "$log") |"; continue; }
  fi
  "$python" -m pytest -p no:cacheprovider -m '' --timeout 1800 tests/test_backward_order.py \
    tests/test_layer.py -k 'backward or dense_parts or stock or without_slots' > "$log" 2>&1
  versions=$("$python" -c 'import torch, triton; print(f"{torch.__version__}, Triton {triton.__version__}")')
  echo "| $version | $versions | $(tail -n 1 "$log" | tr -d '=') |"
done
