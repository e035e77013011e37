#!/usr/bin/env bash
# Time and check ranks with a GPU each, in one command; prints a table last. (make bench is what rewrites README.)
#   bench/multi_gpu.sh WORLD [comm] [fused] [layer] [reduce] [memcheck] [check]   all six without names
# On a machine with fewer GPUs, a rehearsal: the ranks side by side on GPU 0 under MPS. Changes no setting of the cards.
# Needs torch with CUDA, Triton, nvshmem4py, pytest with pytest-timeout and pytest-xdist, and a compiler, memcheck
# compute-sanitizer on the PATH; PYTHON names the interpreter (default python3). Ends within SECONDS_IN_ALL (default
# 540): what is timed comes first, memcheck and the tests take the time that is left.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
WORLD=${1:-}
[[ $WORLD =~ ^[2-9]$ ]] || { echo "usage: bench/multi_gpu.sh WORLD [comm] [fused] [layer] [reduce] [memcheck] [check], with 2 to 9 ranks" >&2; exit 2; }
shift
PARTS=" ${*:-comm fused layer reduce memcheck check} "
SECONDS_IN_ALL=${SECONDS_IN_ALL:-540}
CLI="$PYTHON -m farskip_fused.cli"
export COLUMNS=${COLUMNS:-180}  # so that no column of a table is cut

part() {  # part NAME SECONDS COMMAND...: run within the time that is left, log, and note how it went
  local name=$1 limit=$2 start=$SECONDS left=$((SECONDS_IN_ALL - SECONDS - 25)); shift 2
  ((limit > left)) && limit=$left
  if ((limit < 10)); then printf '%-8s exit: no time left\n' "$name" >"$OUT/$name.row"; : >"$OUT/$name.log"; return; fi
  # Interrupted, not killed, so that tests say how far they came and ranks are taken down.
  timeout -s INT -k 20 "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  printf '%-8s %-8s %4d s  %s\n' "$name" "$([ $code = 0 ] && echo passed || echo "exit $code")" $((SECONDS - start)) \
    "$(grep -E '[0-9]+ (passed|failed).* in ' "$OUT/$name.log" | tail -n 1)" >"$OUT/$name.row"
}
wants() { [[ $PARTS == *" $1 "* ]]; }

rm -f "$OUT"/*.row "$OUT"/{comm,fused,layer,reduce}.json
part build 200 "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e .
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if ((GPUS >= WORLD)); then
  # A test's ranks take longer to start than to run, and GPUs take turns between processes.
  MARK=rung4 LANES=$((2 * WORLD)) WHERE="$WORLD ranks, a GPU each"
  # So that no test takes more, and that each lane starts at other GPUs (tests/conftest.py).
  visible=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((WORLD - 1)))}
  export CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$WORLD" <<<"$visible")
else
  MARK=rung3 LANES=0 WHERE="rehearsal: $WORLD ranks on GPU 0 of $GPUS"
fi
wants comm && part comm 200 $CLI bench comm --ranks "$WORLD" --sms 20 --sms 8 --tokens 4096 --tokens 128 --json "$OUT/comm.json"
wants fused && part fused 150 $CLI bench fused --ranks "$WORLD" --link none --json "$OUT/fused.json"
# Ranks of one GPU get in each other's way there, and take minutes.
wants layer && ((GPUS >= WORLD)) && part layer 200 $CLI bench layer --ranks "$WORLD" --link none --link 50 --tokens 4096 --iterations 10 --json "$OUT/layer.json"
wants reduce && part reduce 100 $CLI bench all-reduce --ranks "$WORLD" --json "$OUT/reduce.json"
if wants memcheck; then
  # Once without it, so that all is compiled; NVSHMEM's own start asks for what is not there, which is no error of ours.
  # With two ranks: with four it takes twice as long, and says the same.
  soak="$PYTHON -m tests.symmetric.soak --world 2 --seed 1 --rounds 8 --seconds 60 --state $OUT/soak"
  part memcheck 200 sh -c "$soak-0.json && compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
    --target-processes all --kernel-name-exclude kns=at6native $soak-1.json" &
fi
# Nothing is timed any more: tests run beside it where ranks have a GPU each.
((GPUS >= WORLD)) || wait
wants check && part check 500 "$PYTHON" -m pytest -v -n $LANES -p no:cacheprovider --durations=5 -m "$MARK and not full" tests --ignore tests/engines
wait

for row in "$OUT"/*.row; do
  name=$(basename "$row" .row)
  if grep -q ' exit' "$row" || [[ " comm fused layer reduce " == *" $name "* ]]; then echo "== $name"; tail -n 80 "$OUT/$name.log"; fi
done
echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
echo "$WHERE"
cat "$OUT"/*.row
[ -f "$OUT/comm.json" ] && "$PYTHON" - "$OUT/comm.json" <<'PYTHON'
import json, sys

report = json.load(open(sys.argv[1]))
for row in report["rows"]:
    if row["step"] in ("dispatch", "combine of sums") and row["tokens"] == 4096:
        sms = f"{row['sms']} SMs" if row["sms"] else "own choice"
        print(f"{row['shape']:18} {row['step']:16} {sms:11} {row['ms']:8.3f} ms  {row['by']}")
for peer, reason in report["missing"].items():
    print(f"{peer}: {reason}")
PYTHON
! grep -q ' exit' "$OUT"/*.row
