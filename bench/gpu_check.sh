#!/usr/bin/env bash
# Build, check and demonstrate on one GPU, in one command; prints a table last.
#   bench/gpu_check.sh [tests|bench|demo ...]   all three without arguments
# World 1, then 2 and 4 NVSHMEM processing elements side by side under an MPS daemon of its own. Changes no setting of
# the card. Needs torch with CUDA, Triton, nvshmem4py and a compiler; PYTHON names the interpreter (default python3).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
PARTS=${*:-tests bench demo}

part() {  # part NAME SECONDS COMMAND...: run, log, and note how it went
  local name=$1 limit=$2 start=$SECONDS; shift 2
  timeout -s KILL "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  [ $code = 0 ] || { echo "== $name"; tail -n 60 "$OUT/$name.log"; }
  printf '%-8s %-8s %4d s  %s\n' "$name" "$([ $code = 0 ] && echo passed || echo "exit $code")" $((SECONDS - start)) \
    "$(grep -E '[0-9]+ (passed|failed).* in ' "$OUT/$name.log" | tail -n 1)" >"$OUT/$name.row"
}

rm -f "$OUT"/*.row
part build 200 "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e .
PYTEST="$PYTHON -m pytest -q -p no:cacheprovider"
for wanted in $PARTS; do
  case $wanted in
    tests)  # most of their time is compilation on the host, so both parts run at once
      part kernels 400 $PYTEST tests/kernels tests/test_moe.py tests/test_csrc.py tests/conversion/test_parallelize.py &
      part ranks 400 $PYTEST tests/symmetric tests/test_layer.py &
      wait ;;
    bench) part bench 200 "$PYTHON" -m farskip_fused.cli bench experts --json "$OUT/experts.json"; cat "$OUT/bench.log" ;;
    demo) part demo 580 "$PYTHON" -m farskip_fused.cli demo --output "$OUT/demo" --overwrite; tail -n 40 "$OUT/demo.log" ;;
  esac
done
echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
cat "$OUT"/*.row
! grep -q ' exit ' "$OUT"/*.row
