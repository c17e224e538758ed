#!/usr/bin/env bash
# Builds for this machine's GPU, tests on it, and records its ceilings, the kernels' times and the peers'.
#
#   bash bench/gpu.sh [FOLDER]        (default: gpu_out; `make gpu GPU_OUT=FOLDER` calls this)
#   STAGES="bench racecheck" bash bench/gpu.sh FOLDER
#
# STAGES: groups and stages, in any order; they run in the order below. Preflight, build and env always run.
#   correct   smoke tests finetune memcheck racecheck synccheck initcheck
#   bench     training ops optim baseline
#   tune      tune
#   all       everything (the default)
#
# Needs nvcc, a CUDA device, and a python3 (or $PYTHON) with torch, setuptools and ninja; no network, no virtual
# environment; compute-sanitizer where it is installed. Every stage has a time limit, whatever fails is recorded and the
# rest goes on, and the whole takes under 10 minutes ($TOTAL_S seconds, default 570): benchmarks get what time is left, and
# stages that get none are named at the end, for a second call into the same or another folder. Leaves in FOLDER eight
# files: log.txt (all output, the optimizers' raw numbers among it), status.json, report.md (all tables), training.json,
# ops.json, tune.json, baseline.json, finetune.json. What an earlier call left there of other stages stays.
# Exit status: 0; 1 when a stage failed or had no time left (what is skipped for want of pytest or compute-sanitizer is no
# failure); 2 for an unknown stage; 3 when the machine has no nvcc or no device (what can run without, is run).

set -u

out=${1:-}
[ -n "$out" ] || out=gpu_out
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd) || exit 1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
cd "$root" || exit 1

python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset LORA_KERNELS_GPU_TESTS # the device, not the stand-in
export LORA_KERNELS_REQUIRE_GPU=1 # tests/gpu then fails where it would skip: a run that skips everything proves nothing
total_s=${TOTAL_S:-570} # of the 600 that the whole may take; the rest is for stages that need to be killed
start=$SECONDS
log=$out/log.txt
names=() states=() times=() notes=()
optional= # stages whose absence is no failure

correct="smoke tests finetune memcheck racecheck synccheck initcheck"
bench="training ops optim baseline"
selected=" "
for word in ${STAGES:-all}; do
  case $word in
    all) selected+="$correct $bench tune " ;;
    correct) selected+="$correct " ;;
    bench) selected+="$bench " ;;
    *)
      if [[ " $correct $bench tune " != *" $word "* ]]; then
        echo "gpu.sh: error: STAGES has $word, expected all, correct, bench, tune, or of: $correct $bench" >&2
        exit 2
      fi
      selected+="$word "
      ;;
  esac
done
wanted() { [[ $selected == *" $1 "* ]]; }

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
# Of an earlier call into this folder: its tables, and how its stages ended.
[ ! -s "$out/report.md" ] || cp "$out/report.md" "$scratch/earlier.md"
[ ! -s "$out/status.json" ] || grep '"stage"' "$out/status.json" | sed 's/,$//' >"$scratch/earlier_stages"
for name in training ops baseline tune finetune; do
  ! wanted "$name" || rm -f "$out/$name.json"
done
printf '\n======== %s, stages:%s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$selected" >>"$log"

# One element of status.json a line; rewritten after every stage, so that a kill loses only the running one.
write_status() {
  local i separator=
  {
    printf '{"seconds": %d, "missing": "%s", "stages": [' "$((SECONDS - start))" "${missing:-}"
    for i in "${!names[@]}"; do
      printf '%s\n  {"stage": "%s", "status": "%s", "seconds": %d, "note": "%s"}' \
        "$separator" "${names[i]}" "${states[i]}" "${times[i]}" "${notes[i]}"
      separator=,
    done
    if [ -s "$scratch/earlier_stages" ]; then
      while IFS= read -r line; do
        i=${line#*\"stage\": \"}
        [[ " ${names[*]} " == *" ${i%%\"*} "* ]] || printf '%s\n%s' "$separator" "$line"
        separator=,
      done <"$scratch/earlier_stages"
    fi
    printf '\n]}\n'
  } >"$out/status.json"
}

# All tables so far, the latest call's first.
write_report() {
  local name
  for name in training tune ops optim baseline earlier; do
    if [ -s "$scratch/$name.md" ]; then
      cat "$scratch/$name.md"
      printf '\n'
    fi
  done >"$scratch/report"
  [ ! -s "$scratch/report" ] || cp "$scratch/report" "$out/report.md"
}

record() { # NAME STATUS SECONDS NOTE
  names+=("$1") states+=("$2") times+=("$3")
  notes+=("$(printf '%s' "$4" | tr -c '[:alnum:] .,:;()+=_/%-' ' ' | cut -c1-200)")
  write_status
  printf '%-9s %-8s %4d s  %s\n' "$1" "$2" "$3" "${notes[-1]}" | tee -a "$log"
}

# The last line of FILE that says something, as the note of a stage.
last_line() { grep -v '^[[:space:]]*$' "$1" 2>/dev/null | tail -n 1; }

# stage NAME LIMIT_S FILE COMMAND...: output to FILE and to the log. A command that ignores the interrupt is killed.
stage() {
  local name=$1 limit=$2 file=$3 left began=$SECONDS rc state
  shift 3
  left=$((total_s - (SECONDS - start)))
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    record "$name" skipped 0 "no time left"
    left_out+=" $name"
    return 1
  fi
  printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
  # To the log as it comes: a run that is killed from outside leaves what its last stage said.
  timeout --signal=INT --kill-after=8 "$limit" "$@" 2>&1 | tee "$file" >>"$log"
  rc=${PIPESTATUS[0]}
  write_report
  case $rc in
    0) state=ok ;;
    124 | 137) state=timeout ;;
    *) state=failed ;;
  esac
  record "$name" "$state" "$((SECONDS - began))" "$([ $rc -eq 0 ] || printf 'exit %d: ' "$rc")$(last_line "$file")"
  return $rc
}

print_end() {
  local i
  write_status
  echo
  if [ -s "$scratch/env.txt" ]; then cut -c1-150 "$scratch/env.txt" | head -n 25; fi
  if [ -s "$scratch/tests.txt" ]; then
    echo
    grep -E '^(FAILED|ERROR) ' "$scratch/tests.txt" | cut -c1-180 | head -n 25
    tail -n 1 "$scratch/tests.txt" | cut -c1-180
  fi
  if [ -s "$scratch/finetune.txt" ]; then
    echo
    tail -n 2 "$scratch/finetune.txt" | cut -c1-180
  fi
  for i in training tune ops optim baseline; do
    if [ -s "$scratch/$i.txt" ]; then
      echo
      tail -n 40 "$scratch/$i.txt" | cut -c1-180
    fi
  done
  printf '\n%-9s %-8s %7s  %s\n' stage status seconds note
  for i in "${!names[@]}"; do
    printf '%-9s %-8s %7d  %s\n' "${names[i]}" "${states[i]}" "${times[i]}" "$(printf '%s' "${notes[i]}" | cut -c1-110)"
  done
  printf 'total %d s; files in %s\n' "$((SECONDS - start))" "$out"
  [ -z "$left_out" ] || printf 'no time left for:%s. Go on with STAGES="%s"\n' "$left_out" "${left_out# }"
  [ -z "${missing:-}" ] || printf 'missing: %s\n' "$missing"
}

left_out=
trap 'record gpu.sh stopped 0 "interrupted"; print_end; exit 1' INT TERM HUP

# ---- what this machine has ------------------------------------------------------------------------------------------

preflight='
import importlib.util, sys
print("python", sys.version.split()[0], sys.executable)
for name in ("torch", "setuptools", "ninja", "numpy", "safetensors", "pytest", "transformers", "matplotlib", "peft",
             "bitsandbytes"):
    print(name, "there" if importlib.util.find_spec(name) else "MISSING")
needed = [n for n in ("torch", "setuptools", "ninja", "numpy", "safetensors") if not importlib.util.find_spec(n)]
if "torch" in needed:
    sys.exit("missing python packages: " + ", ".join(needed))
import torch
arch = ""
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        capability = "%d%d" % torch.cuda.get_device_capability(i)
        # 9.0 and 10.0 have instructions that exist only in the arch-specific target.
        part = capability + ("a" if capability in ("90", "100") else "")
        arch += (";" if arch and part not in arch else "") + ("" if part in arch else part)
print("torch", torch.__version__, "cuda", torch.version.cuda)
print("archs:" + arch)
if needed:
    sys.exit("missing python packages: " + ", ".join(needed))
'
stage preflight 60 "$scratch/preflight.txt" "$python" -c "$preflight"
preflight_ok=$?
archs=$(sed -n 's/^archs://p' "$scratch/preflight.txt")

nvcc_found=
for candidate in "${NVCC:-}" "$(command -v nvcc)" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" /usr/local/cuda/bin/nvcc; do
  if [ -n "$candidate" ] && [ -x "$candidate" ]; then
    nvcc_found=$candidate
    break
  fi
done
missing=
[ -n "$nvcc_found" ] || missing="nvcc (not on PATH, in CUDA_HOME or /usr/local/cuda)"
[ -n "$archs" ] || missing="${missing:+$missing; }a CUDA device that torch sees"
[ -z "$missing" ] || echo "gpu.sh: this machine lacks $missing: only the build and the environment are checked"
if command -v nvidia-smi >/dev/null; then
  {
    printf '\n==== nvidia-smi\n'
    timeout 20 nvidia-smi
  } >>"$log" 2>&1
fi

# ---- build, load, test, measure ----------------------------------------------------------------------------------------

if [ -n "$archs" ] && [ -z "${LORA_KERNELS_CUDA_ARCHS:-}" ]; then
  export LORA_KERNELS_CUDA_ARCHS=$archs
fi
# The stand-in, which the tests load, is built beside it: these machines have more cores than one of the two uses.
standin_pid=
if wanted tests && [ -z "$missing" ]; then
  "$python" csrc/simt/build.py >"$scratch/standin.txt" 2>&1 &
  standin_pid=$!
fi
stage build 150 "$scratch/build.txt" "$python" setup.py build_ext --inplace
build_ok=$?
[ "$build_ok" -eq 0 ] || ! compgen -G "lora_kernels/_C*.so" >/dev/null || \
  echo "gpu.sh: the build failed; what follows runs an OLDER library" | tee -a "$log"
stage env 60 "$scratch/env.txt" "$python" -m lora_kernels env

# sanitize TOOL [VARIABLE=VALUE]: every kernel on small problems, under one of compute-sanitizer's tools.
sanitize() {
  wanted "$1" || return 0
  if [ -z "$sanitizer" ]; then
    record "$1" skipped 0 "compute-sanitizer is not installed"
    optional+=" $1 "
  else
    stage "$1" 60 "$scratch/$1.txt" env ${2:+"$2"} "$sanitizer" --tool "$1" --error-exitcode 9 \
      "$python" tests/gpu/sanitize.py
  fi
}
sanitizer=$(command -v compute-sanitizer || true)
for candidate in "$(dirname "${nvcc_found:-/}")/compute-sanitizer" /usr/local/cuda/bin/compute-sanitizer; do
  [ -n "$sanitizer" ] || [ ! -x "$candidate" ] || sanitizer=$candidate
done

# measure NAME SECONDS SCRIPT: one of the benchmarks, which ends itself after SECONDS or what is left of the time.
measure() {
  wanted "$1" || return 0
  local seconds=$((total_s - (SECONDS - start) - 15))
  [ "$seconds" -le "$2" ] || seconds=$2
  if [ "$seconds" -lt 10 ]; then
    record "$1" skipped 0 "no time left"
    left_out+=" $1"
    return 1
  fi
  stage "$1" $((seconds + 15)) "$scratch/$1.txt" "$python" "$3" --out "$out" --tables "$scratch" --budget-s "$seconds"
}

if [ -n "$missing" ]; then
  # Their tables say "not measured".
  for name in training tune ops; do
    ! wanted "$name" || timeout --signal=INT --kill-after=8 60 "$python" "bench/gpu_$name.py" --out "$out" \
      --tables "$scratch" >>"$log" 2>&1
  done
  write_report
  for name in $selected; do record "$name" skipped 0 "needs nvcc and a device"; done
else
  # Correctness. A new kernel gets a file in tests/gpu, which `tests` picks up, and a line in smoke.py and sanitize.py.
  ! wanted smoke || stage smoke 60 "$scratch/smoke.txt" "$python" tests/gpu/smoke.py
  if ! wanted tests; then
    :
  elif "$python" -c 'import pytest' 2>/dev/null; then
    wait "$standin_pid" || cat "$scratch/standin.txt" >>"$log"
    stage tests 210 "$scratch/tests.txt" "$python" -m pytest tests/gpu -m gpu -q --tb=short --durations=8 \
      -p no:cacheprovider
  else
    record tests skipped 0 "pytest is not importable: tests/gpu/smoke.py, with its opchecks, is all that ran"
    optional+=" tests "
  fi
  if ! wanted finetune; then
    :
  elif "$python" -c 'import transformers, tqdm, matplotlib' 2>/dev/null; then
    stage finetune 75 "$scratch/finetune.txt" "$python" tests/gpu/finetune_pair.py --out "$out"
  else
    record finetune skipped 0 "transformers, tqdm or matplotlib is not importable"
    optional+=" finetune "
  fi
  # Without its caching allocator torch gives each tensor an allocation of its own: memcheck sees what leaves it, and
  # initcheck what nobody wrote.
  sanitize memcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize racecheck
  sanitize synccheck
  sanitize initcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1

  # Benchmarks, then tuning. Another family of kernels adds its script here and its name to `bench`.
  measure training 180 bench/gpu_training.py
  measure ops 75 bench/gpu_ops.py
  ! wanted optim || stage optim 75 "$scratch/optim.txt" "$python" -m bench.optim_step --device cuda --rounds 9 \
    --tables "$scratch"
  measure tune 90 bench/gpu_tune.py
  measure baseline 200 bench/gpu_baseline.py
fi

trap - INT TERM HUP
print_end | tee -a "$log"
[ -z "$missing" ] || exit 3
[ "$preflight_ok" -eq 0 ] || exit 1
for i in "${!names[@]}"; do
  [ "${states[i]}" = ok ] || [[ $optional == *" ${names[i]} "* ]] || exit 1
done
exit 0
