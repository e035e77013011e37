#!/usr/bin/env bash
# Build, check and demonstrate on one GPU, in one command; prints a table last. What is timed is bench/suite.py's.
#   bench/gpu_check.sh [tests] [demo] [sanitize]   the first two without arguments
# tests, demo: on one GPU; world 1, then 2 and 4 NVSHMEM processing elements side by side under an MPS daemon of its own.
# sanitize: every family of kernels once under compute-sanitizer's memcheck and racecheck, with the card to itself. Changes
# no setting of the cards. Ranks with a GPU each: multi_gpu.sh. Needs torch with CUDA, Triton, nvshmem4py and a compiler;
# PYTHON names the interpreter (default python3).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
PARTS=" ${*:-tests demo} "
PYTEST="$PYTHON -m pytest -q -p no:cacheprovider"
"$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL="-n 6" || PARALLEL=""

part() {  # part NAME SECONDS COMMAND...: run, log, and note how it went
  local name=$1 limit=$2 start=$SECONDS; shift 2
  timeout -s KILL "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  printf '%-8s %-8s %4d s  %s\n' "$name" "$([ $code = 0 ] && echo passed || echo "exit $code")" $((SECONDS - start)) \
    "$(grep -E '[0-9]+ (passed|failed).* in ' "$OUT/$name.log" | tail -n 1)" >"$OUT/$name.row"
}
wants() { [[ $PARTS == *" $1 "* ]]; }

rm -f "$OUT"/*.row
part build 200 "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e .
# Tests and demo wait for the host most of the time, so they run side by side.
if wants tests; then
  part kernels 400 $PYTEST $PARALLEL -m 'not rung3 and not rung4 and not full' --deselect tests/kernels/test_compiles.py tests/kernels \
    tests/conversion/test_experts_implementation.py tests/conversion/test_parallelize.py tests/test_all_reduce.py \
    tests/test_bench.py tests/test_csrc.py tests/test_layer.py tests/test_local_experts.py tests/test_moe.py \
    tests/test_router.py tests/test_tensor_parallel.py tests/test_token_exchange.py &
  part ranks 400 $PYTEST --durations=5 -m rung3 tests &
fi
wants demo && part demo 580 "$PYTHON" -m farskip_fused.cli demo --output "$OUT/demo" --overwrite &
wait
if wants sanitize; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null ||
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' | xargs -I{} find {}/nvidia -path '*/bin/compute-sanitizer' 2>/dev/null | head -n 1)
  if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not there: install the CUDA toolkit or pip install 'nvidia-cuda-sanitizer-api==13.0.*' (-cu12 for CUDA 12)" >&2
    printf '%-8s exit 127\n' sanitize >"$OUT/sanitize.row"; : >"$OUT/sanitize.log"
  else
    families="$PYTHON tests/kernels/one_of_each.py"
    # Compiled before, and with each tensor in an allocation of its own, past whose end nothing may be touched.
    export TRITON_CACHE_DIR="$OUT/triton" PYTORCH_NO_CUDA_MEMORY_CACHING=1
    part families 200 $families
    check="$sanitizer --error-exitcode 9 --target-processes application-only --kernel-name-exclude kns=at6native"
    part memcheck 400 $check --tool memcheck --leak-check no $families
    part racecheck 400 sh -c "$sanitizer --target-processes application-only --kernel-name-exclude kns=at6native --tool racecheck $families >$OUT/races.txt; $PYTHON tests/kernels/read_racecheck.py $OUT/races.txt"
  fi
fi
for row in "$OUT"/*.row; do
  name=$(basename "$row" .row)
  if grep -q ' exit ' "$row" || [ "$name" = demo ]; then echo "== $name"; tail -n 40 "$OUT/$name.log"; fi
done
echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
cat "$OUT"/*.row
! grep -q ' exit ' "$OUT"/*.row
