# Every target does its own set-up, in $(VENV), and is quick the second time.
#
#   make finetune   fine-tune a small language model on this machine, end to end   (ARGS="--steps 100 ...")
#   make test       build, then run every test that needs no GPU                   (ARGS="-k nf4 ...")
#   make bench      time the ops on this machine                                   (ARGS="--quick", "--goals")
#   make bench-compare   fail where an op has become slower than in another checkout (ARGS="--against FOLDER"),
#                        or than the stored baseline (ARGS="--update" stores one)
#   make gpu        on a machine with a GPU, nvcc and torch: build, test, measure  (GPU_OUT=folder STAGES="tests tune")
#   make lint       check the style;  make format mends it
#
# TORCH is what pip installs as torch. A CPU-only build saves gigabytes where there is no GPU:
#   make finetune TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
GPU_OUT ?= gpu_out
STAGES ?= all
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
export PYTHONPATH := $(CURDIR)

BUILD_NEEDS := "setuptools>=77" wheel ninja pybind11 numpy safetensors
FINETUNE_NEEDS := "transformers>=5" tqdm matplotlib
# triton: its wheel, for Linux only, brings cuobjdump, by which the tests read the GPU's machine code.
TEST_NEEDS := pytest pytest-benchmark hypothesis "peft>=0.18" "bitsandbytes>=0.50" accelerate \
	"triton; sys_platform == 'linux'"
LINT_NEEDS := ruff==0.17.6 clang-format==23.1.5

.PHONY: finetune test bench bench-compare gpu lint format build clean

# torch is named in every install, so that no dependency replaces the build of torch that was chosen.
$(VENV)/base.stamp: Makefile
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) $(BUILD_NEEDS)
	touch $@

$(VENV)/finetune.stamp: $(VENV)/base.stamp
	$(PIP) install $(TORCH) $(FINETUNE_NEEDS)
	touch $@

$(VENV)/test.stamp: $(VENV)/finetune.stamp
	$(PIP) install $(TORCH) $(TEST_NEEDS)
	touch $@

$(VENV)/lint.stamp: $(VENV)/base.stamp
	$(PIP) install $(LINT_NEEDS)
	touch $@

build: $(VENV)/base.stamp
	$(PY) setup.py --quiet build_ext --inplace

finetune: build $(VENV)/finetune.stamp
	$(PY) -m lora_kernels finetune $(ARGS)

test: build $(VENV)/test.stamp
	$(PY) -m pytest $(ARGS)

bench: build $(VENV)/test.stamp
	$(PY) bench/run.py $(ARGS)

bench-compare: build $(VENV)/test.stamp
	$(PY) bench/run.py --compare $(ARGS)

gpu:
	STAGES="$(STAGES)" bash bench/gpu.sh "$(GPU_OUT)"

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files -z 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -0 $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	git ls-files -z 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -0 $(VENV)/bin/clang-format -i

clean:
	rm -rf build lora_kernels/*.so $(VENV)
