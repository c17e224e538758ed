#!/usr/bin/env bash
# Builds for this machine's GPU, tests on it, and records its ceilings, the kernels' times and the peers'.
#
#   bash bench/gpu.sh [FOLDER]        (default: gpu_out; `make gpu GPU_OUT=FOLDER` calls this)
#
# Needs nvcc, a CUDA device, and a python3 (or $PYTHON) with torch, setuptools and ninja; no network, no virtual
# environment; compute-sanitizer where it is installed. Every stage has a time limit, whatever fails is recorded and the
# rest goes on, and the whole takes under 10 minutes. Leaves in FOLDER: log.txt, env.txt, tests.txt, junit.xml, ops.json,
# ops.md, memcheck.txt, racecheck.txt, baseline.json, baseline.md, status.json.
# Exit status: 0; 1 when a stage failed or had no time left (what is skipped for want of pytest or compute-sanitizer is no
# failure); 3 when the machine has no nvcc or no device (what can run without, is run).

set -u

out=${1:-}
[ -n "$out" ] || out=gpu_out
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd) || exit 1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
cd "$root" || exit 1

python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export LORA_KERNELS_REQUIRE_GPU=1 # tests/gpu then fails where it would skip: a run that skips everything proves nothing
total_s=570 # of the 600 that the whole may take; the rest is for stages that need to be killed
start=$SECONDS
log=$out/log.txt
names=() states=() times=() notes=()
optional= # stages whose absence is no failure

rm -f "$out"/{log.txt,env.txt,tests.txt,junit.xml,ops.json,ops.md,memcheck.txt,racecheck.txt}
rm -f "$out"/{baseline.json,baseline.md,status.json}
: >"$log"

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
    printf '\n]}\n'
  } >"$out/status.json"
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
    return 1
  fi
  printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
  timeout --signal=INT --kill-after=8 "$limit" "$@" >"$file" 2>&1
  rc=$?
  [ "$file" = "$log" ] || cat "$file" >>"$log"
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
  if [ -s "$out/env.txt" ]; then cut -c1-150 "$out/env.txt" | head -n 25; fi
  if [ -s "$out/tests.txt" ]; then
    echo
    grep -E '^(FAILED|ERROR) ' "$out/tests.txt" | cut -c1-180 | head -n 15
    tail -n 1 "$out/tests.txt" | cut -c1-180
  fi
  for i in ops baseline; do
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
  [ -z "${missing:-}" ] || printf 'missing: %s\n' "$missing"
}

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'record gpu.sh stopped 0 "interrupted"; print_end; exit 1' INT TERM HUP

# ---- what this machine has ------------------------------------------------------------------------------------------

preflight='
import importlib.util, sys
print("python", sys.version.split()[0], sys.executable)
for name in ("torch", "setuptools", "ninja", "numpy", "safetensors", "pytest", "peft", "bitsandbytes"):
    print(name, "there" if importlib.util.find_spec(name) else "MISSING")
needed = [n for n in ("torch", "setuptools", "ninja", "numpy", "safetensors") if not importlib.util.find_spec(n)]
if needed:
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
stage build 120 "$scratch/build.txt" "$python" setup.py build_ext --inplace
build_ok=$?
[ "$build_ok" -eq 0 ] || ! compgen -G "lora_kernels/_C*.so" >/dev/null || \
  echo "gpu.sh: the build failed; what follows runs an OLDER library" | tee -a "$log"
stage env 60 "$out/env.txt" "$python" -m lora_kernels env

# sanitize TOOL [VARIABLE=VALUE]: every kernel on small problems, under one of compute-sanitizer's tools.
sanitize() {
  if [ -z "$sanitizer" ]; then
    record "$1" skipped 0 "compute-sanitizer is not installed"
    optional+=" $1 "
  else
    stage "$1" 75 "$out/$1.txt" env ${2:+"$2"} "$sanitizer" --tool "$1" --error-exitcode 9 \
      "$python" tests/gpu/sanitize.py
  fi
}
sanitizer=$(command -v compute-sanitizer || true)
for candidate in "$(dirname "${nvcc_found:-/}")/compute-sanitizer" /usr/local/cuda/bin/compute-sanitizer; do
  [ -n "$sanitizer" ] || [ ! -x "$candidate" ] || sanitizer=$candidate
done

# What is left of the time, to a whole stage of at most $1 seconds: what a script that ends itself may use of it.
budget() {
  local left=$((total_s - (SECONDS - start) - 15))
  [ "$left" -le "$1" ] || left=$1
  echo "$left"
}

if [ -n "$missing" ]; then
  # Its tables say "not measured".
  timeout --signal=INT --kill-after=8 60 "$python" bench/gpu_ops.py --out "$out" >>"$log" 2>&1
  for name in smoke tests ops memcheck racecheck baseline; do record "$name" skipped 0 "needs nvcc and a device"; done
else
  stage smoke 60 "$scratch/smoke.txt" "$python" tests/gpu/smoke.py
  if "$python" -c 'import pytest' 2>/dev/null; then
    stage tests 180 "$out/tests.txt" "$python" -m pytest tests/gpu -m gpu -q --tb=short --durations=5 \
      -p no:cacheprovider --junitxml="$out/junit.xml"
  else
    record tests skipped 0 "pytest is not importable: tests/gpu/smoke.py, with its opchecks, is all that ran"
    optional+=" tests "
  fi
  seconds=$(budget 120)
  stage ops $((seconds + 15)) "$scratch/ops.txt" "$python" bench/gpu_ops.py --out "$out" --budget-s "$seconds"
  # Without its caching allocator torch gives each tensor an allocation of its own: memcheck sees what leaves it.
  sanitize memcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize racecheck
  seconds=$(budget 240)
  stage baseline $((seconds + 15)) "$scratch/baseline.txt" "$python" bench/gpu_baseline.py --out "$out" \
    --budget-s "$seconds"
fi

trap - INT TERM HUP
print_end | tee -a "$log"
[ -z "$missing" ] || exit 3
[ "$preflight_ok" -eq 0 ] || exit 1
for i in "${!names[@]}"; do
  [ "${states[i]}" = ok ] || [[ $optional == *" ${names[i]} "* ]] || exit 1
done
exit 0
