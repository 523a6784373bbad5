#!/usr/bin/env bash
# What only an NVIDIA GPU can tell, in one call: builds for the card that is here, runs the tests
# that need it, measures, and runs tests again under compute-sanitizer. Installs nothing.
#
#   benchmarks/gpu_check.sh [--seconds N] [--output FILE] [STEP...]
#
# Steps run in the order of this file, the most valuable first, as far as N seconds (1200) go. One
# that no longer fits is skipped, and the result says so. Only the STEPs that are named run, if any
# are; all but build need the build of an earlier call. FILE is benchmarks/results/CARD-DATE.json.
# PYTHON names another interpreter than .venv/bin/python or python3; MAMBA_SSM_SOURCE names a
# checkout of state-spaces/mamba, whose kernel is compiled to be compared with.
#
# Exit code: 0 no step failed; 1 one did; 2 wrong usage, or something that all need is missing.
set -uo pipefail
shopt -s inherit_errexit
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 2
steps=(build tests ceilings mamba scans gathers models memcheck racecheck compiled ort
  initcheck synccheck tensorrt engines)

refuse() { # WHAT REMEDY
  echo "gpu_check: $1; $2" >&2
  exit 2
}

seconds=1200 output="" named=()
while (($#)); do
  case "$1" in
    -h | --help) sed -n '2,/^# Exit/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    --seconds) seconds="${2-}" && shift $(($# > 1 ? 2 : 1)) ;;
    --output) output="${2-}" && shift $(($# > 1 ? 2 : 1)) ;;
    *)
      [[ " ${steps[*]} " == *" $1 "* ]] || refuse "$1 is no step" "name some of ${steps[*]}"
      named+=("$1") && shift
      ;;
  esac
done
[[ "$seconds" =~ ^[1-9][0-9]*$ ]] || refuse "--seconds=$seconds is no number" "give whole seconds"
[[ ! -e "$output" ]] || refuse "--output=$output is there already" "name a new file"

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON="$root/.venv/bin/python"
fi
cuda="${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}"
python="$PYTHON"
PYTHON="$(command -v "$python")" ||
  refuse "PYTHON=$python cannot be run" "name another interpreter with PYTHON="
export PATH="$PATH:$(dirname "$PYTHON"):$cuda/bin:/usr/local/nvidia/bin"
export PYTHONPATH="$root/exporter:$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1

has() { "$PYTHON" -c "import $1" &> /dev/null; }
card="$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2> /dev/null | head -1)"
[[ -n "$card" ]] || refuse "no NVIDIA GPU here (nvidia-smi lists none)" \
  "run it on a machine with a GPU and its driver"
has sys || refuse "PYTHON=$PYTHON cannot be run" "name another interpreter with PYTHON="
"$PYTHON" -c "import torch; assert torch.cuda.is_available()" &> /dev/null ||
  refuse "torch of PYTHON=$PYTHON is missing or cannot use the GPU" "name another with PYTHON="
for module in numpy onnx pytest; do
  has "$module" || refuse "$module is missing" "pip install $module, or name another with PYTHON="
done
for tool in nvcc cmake ninja c++; do
  command -v "$tool" > /dev/null || refuse "$tool is missing" "put it in the PATH (nvcc: CUDA_HOME)"
done

architecture="$(sed 's/.*, *//; s/\.//' <<< "$card")"
name="$(tr -cs 'a-z0-9' '-' <<< "$(tr 'A-Z' 'a-z' <<< "${card%,*}")")"
output="${output:-benchmarks/results/${name%-}-$(date -u +%Y-%m-%d-%H%M).json}"
work="$root/build/gpu_check" failed=0 child=""
rm -rf "$work" && mkdir -p "$work" || refuse "$work cannot be made" "free the disk, or its rights"

json() { # KEY VALUE...: an object of texts
  "$PYTHON" -c 'import json, sys; a = sys.argv[1:]; print(json.dumps(dict(zip(a[::2], a[1::2]))))' "$@"
}
json gpu "${card%,*}" commit "$(git describe --always --dirty --abbrev=12 2> /dev/null)" \
  date "$(date -u +%FT%TZ)" seconds "$seconds" named "${named[*]}" > "$work/steps.jsonl"

ended() { # STEP STATUS SECONDS REASON
  echo "gpu_check: $1: $2 ${4:-}"
  json step "$1" status "$2" seconds "$3" reason "${4:-}" >> "$work/steps.jsonl"
  "$PYTHON" -m benchmarks.gpu.results "$work" "$output" > "$work/summary.txt" || failed=1
}

stop() {
  [[ -z "$child" ]] || kill -KILL -- "-$child" "$child" 2> /dev/null
  exit 130
}
trap stop INT TERM

wanted() { [[ ${#named[@]} -eq 0 || " ${named[*]} " == *" $1 "* ]]; }

skip() { # STEP REASON
  ! wanted "$1" || ended "$1" skipped 0 "$2"
}

step() { # STEP LEAST MOST COMMAND...: in MOST of the seconds left, if these are no fewer than LEAST
  local step="$1" least="$2" most="$3" left=$((seconds - SECONDS)) start=$SECONDS code=0
  shift 3
  wanted "$step" || return 0
  if ((left < least)); then
    ended "$step" skipped 0 "$left s were left, and it takes at least $least"
    return 0
  fi
  local given=$((left < most ? left : most))
  echo "gpu_check: $step: at most $given s"
  # A command that knows its budget (@seconds) ends by itself, a sixth earlier.
  timeout --signal=KILL "$given" "${@//@seconds/$((given - given / 6))}" \
    > "$work/$step.out" 2> "$work/$step.log" &
  child=$!
  wait "$child"
  code=$?
  child=""
  [[ -z "${wrong:-}" ]] || ! grep -qE "$wrong" "$work/$step.out" || code=77
  case "$code" in
    0) ended "$step" ok $((SECONDS - start)) ;;
    124) ended "$step" cut $((SECONDS - start)) "its time was over; nothing was wrong until then" ;;
    137) failed=1 && ended "$step" failed $((SECONDS - start)) "killed at its limit of $given s" ;;
    *) failed=1 && ended "$step" failed $((SECONDS - start)) "exit code $code: see $work/$step.log" ;;
  esac
  return $((code == 0 || code == 124 ? 0 : 1))
}

table() { # TABLE LEAST MOST: one of the scripts
  step "$1" "$2" "$3" "$PYTHON" -m "benchmarks.gpu.$1" --seconds @seconds
}

first=(timeout --signal=INT --kill-after=10 @seconds)
pytest=("$PYTHON" -m pytest -c benchmarks/gpu/pytest.ini --rootdir "$root"
  -p benchmarks.gpu.few_packages -m gpu)
mapfile -t gpu_tests < <(grep -rlE 'mark\.gpu|import cuda_device|from cuda_device' tests \
  --include='test_*.py' | grep -v tensorrt | sort)
kernel_tests=(tests/plugins/cuda/test_gather.py tests/plugins/cuda/test_scan.py tests/ops/test_gpu.py)

sanitize() { # TOOL NAMES OPTION...: the kernels' tests but those that NAMES leaves out
  # PyTorch's memory as single allocations, so that a step outside one is seen; no graph then.
  step "$1" 45 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${@:3}" \
    "${first[@]}" "${pytest[@]}" -x -k "not graph and not capture $2" "${kernel_tests[@]}"
}

if wanted build; then
  step build 30 300 bash -c "cmake -S . -B build/gpu -G Ninja -DVSSM_CUDA=ON \
    -DVSSM_CUDA_ARCHITECTURES=$architecture-real -DVSSM_GPU_BENCH=ON && cmake --build build/gpu \
    && find build/gpu -name 'lib*.so' -exec touch {} +" || { # of several builds the newest is loaded
    tail -20 "$work/build.log" && cat "$work/summary.txt" && exit 1
  }
fi
step tests 30 150 "${first[@]}" "${pytest[@]}" "${gpu_tests[@]}"
table ceilings 15 30
if [[ -n "${MAMBA_SSM_SOURCE:-}" ]]; then
  step mamba 60 170 "$PYTHON" -m benchmarks.gpu.mamba
else
  skip mamba "MAMBA_SSM_SOURCE names no checkout of state-spaces/mamba"
fi
table scans 20 150
table gathers 20 30
table models 20 140
ours=()
if command -v compute-sanitizer > /dev/null; then
  filter="$(compute-sanitizer --help 2>&1 | grep -oE -- '--kernel-(name|regex)' | head -1)"
  ours=(--error-exitcode 77 ${filter:+"$filter" kns=vssm})
  sanitize memcheck "" "${ours[@]}"
  # Tokens that are named twice are added to by two threads, as the contract allows.
  sanitize racecheck "and not order_and_gap_of_any_value" "${ours[@]}"
else
  for tool in memcheck racecheck initcheck synccheck; do
    skip "$tool" "compute-sanitizer, which comes with the CUDA toolkit, is not in the PATH"
  done
fi
table compiled 40 90
if "$PYTHON" -c "import onnxruntime as o; assert 'CUDAExecutionProvider' in o.get_available_providers()" \
  &> /dev/null; then
  table ort 30 60
else
  skip ort "onnxruntime-gpu, with the CUDA provider, is not installed"
fi
if command -v compute-sanitizer > /dev/null; then
  # It must see what PyTorch's kernels write; only what it says of ours is judged.
  wrong='^=+ +at .*vssm' sanitize initcheck "" --show-backtrace no --print-limit 10000
  sanitize synccheck "" "${ours[@]}"
fi
if has tensorrt && has cuda.bindings; then
  step tensorrt 120 420 "${first[@]}" "${pytest[@]}" --slow tests/plugins/tensorrt tests/runtimes/tensorrt
  table engines 120 360
else
  skip tensorrt "TensorRT with cuda-bindings is not installed"
  skip engines "TensorRT with cuda-bindings is not installed"
fi
cat "$work/summary.txt"
exit "$failed"
