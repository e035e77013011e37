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
declare -a ROWS

part() {  # part NAME SECONDS COMMAND...: run, log, remember how it went
  local name=$1 limit=$2 start=$SECONDS; shift 2
  timeout -s KILL "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  ROWS+=("$(printf '%-8s %-6s %5d s  %s' "$name" "$([ $code = 0 ] && echo passed || echo "exit $code")" \
    $((SECONDS - start)) "$(grep -E '(passed|failed|error).* in |tokens/s|TFLOP' "$OUT/$name.log" | tail -n 1)")")
  [ $code = 0 ] || tail -n 40 "$OUT/$name.log"
  return $code
}

status=0
part build 200 "$PYTHON" setup.py -q build_ext --inplace || status=1
for wanted in $PARTS; do
  case $wanted in
    tests) part tests 420 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels tests/symmetric tests/test_moe.py tests/test_layer.py || status=1 ;;
    bench) part bench 200 "$PYTHON" -m farskip_fused.cli bench experts --json "$OUT/experts.json" || status=1; cat "$OUT/bench.log" ;;
    demo) part demo 580 "$PYTHON" -m farskip_fused.cli demo --output "$OUT/demo" --overwrite || status=1; tail -n 40 "$OUT/demo.log" ;;
  esac
done
echo
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
printf '%s\n' "${ROWS[@]}"
exit $status
