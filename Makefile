# Every target works in a fresh clone: .venv is made when it is first needed. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.flowanchor-installed
PACKAGES = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# For train, sample, eval-fid, demo, the benchmarks and the tests: more arguments for the program, for example make train ARGS="seed=1"
ARGS ?=

# One thread: the networks of the tests are tiny, and threads that wait for each other on shared cores are slow.
# Bytecode is kept: otherwise every process of the tests would compile their files anew.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

# Test files at the same time; each may start a process or two of its own. WORKERS=0: one after the other, in one process.
WORKERS ?= 2
DISTRIBUTED = -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The tests that say whether a release of PyTorch is one that we run with: `make test TORCH=2.11`.
CORE := tests/jvp tests/graphs tests/strategies tests/plugins tests/sampling tests/callbacks \
	$(filter-out tests/test_docs.py tests/test_packaging.py,$(wildcard tests/test_*.py))

# The slow tests that CI runs.
WAYS := tests/test_site.py tests/test_packaging.py tests/reporting/test_on_a_phone.py tests/play/test_page.py \
	$(addprefix tests/integration/test_,imf_whole.py killed_webdataset.py imagenet_road.py end_time_road.py sweeps.py) \
	tests/integration/test_wan_road.py::test_the_road_in_a_few_steps \
	tests/compatibility $(addprefix tests/benchmarks/test_,gpu_check.py harness.py) \
	tests/benchmarks/test_memory_plan.py::test_the_plan_is_what_two_processes_allocate \
	tests/plugins/test_lora.py tests/plugins/test_diffusers_end_time.py tests/plugins/formats/test_lora_file.py \
	tests/strategies/test_device_branch.py tests/jvp/test_compiled_dual.py tests/graphs tests/checkpoints/test_fuzz.py

# What goes with that release.
TORCHVISION_2.11 := 0.26.0
TRITON_2.11 := 3.6.0

.DEFAULT_GOAL := help
.PHONY: help setup lint format typecheck test test-slow test-ways demo train sample eval-fid bench ablation gpu-check compatibility docs site clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv and install everything (PYTHON=python3.12 chooses the interpreter)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "flowanchor needs Python >= 3.10, and $(PYTHON) is not: name another one with PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

lint: $(STAMP) ## check style (ruff)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP) ## repair style (ruff)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

typecheck: $(STAMP) ## check types (mypy)
	$(BIN)/python -m mypy

ifdef TORCH
test: $(VENV)-torch-$(TORCH)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)-torch-$(TORCH)/bin/python -m pytest $(DISTRIBUTED) $(CORE) $(ARGS)

# The packages of $(VENV), with another torch before them.
$(VENV)-torch-$(TORCH)/.installed: $(STAMP)
	@test -n '$(TRITON_$(TORCH))' || \
		{ echo "Which triton and torchvision go with torch $(TORCH)? Write TRITON_$(TORCH) and TORCHVISION_$(TORCH) in the Makefile" >&2; exit 1; }
	$(BIN)/python -m venv --clear --without-pip $(VENV)-torch-$(TORCH)
	for packages in $(VENV)-torch-$(TORCH)/lib/python3*/site-packages; do \
		echo "import site; site.addsitedir('$(PACKAGES)')" > "$$packages/zz_others.pth" && \
		$(BIN)/python -m pip install --no-deps --target "$$packages" torch==$(TORCH).* \
			triton==$(TRITON_$(TORCH)) torchvision==$(TORCHVISION_$(TORCH)) || exit 1; \
	done
	@touch $@
else
test: $(STAMP) ## run the tests that take seconds (WORKERS=4: more at a time; TORCH=2.11: with that release)
	$(PYTEST) $(DISTRIBUTED) $(ARGS)
endif

test-slow: $(STAMP) ## run the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

test-ways: $(STAMP) ## run what CI runs beside the tests: ways from end to end, browsers, packages, what `test` takes a part of
	$(PYTEST) -m slow -n $(WORKERS) --dist loadfile $(WAYS) $(ARGS)

demo: $(STAMP) ## teacher, one-step student, evaluation and report in outputs/demo (QUICK=1 for a short one)
	$(BIN)/python src/demo.py $(if $(filter-out 0 false no,$(QUICK)),quick=true) $(ARGS)

train: $(STAMP) ## train: make train ARGS="backbone=lightningdit objective=facm"
	$(BIN)/python src/train.py $(ARGS)

sample: $(STAMP) ## draw images: make sample CHECKPOINT=outputs/train/NAME [ARGS="sampler.steps=2"]
	$(need_checkpoint)
	$(BIN)/python src/sample.py "checkpoint='$(CHECKPOINT)'" $(ARGS)

eval-fid: $(STAMP) ## measure quality, going on where it stopped: make eval-fid CHECKPOINT=outputs/train/NAME [NFE=1,2,4] [GPUS=8]
	$(need_checkpoint)
	$(BIN)/python $(if $(GPUS),-m torch.distributed.run --standalone --nproc-per-node=$(GPUS)) src/eval.py "checkpoint='$(CHECKPOINT)'" $(if $(NFE),'nfe=[$(NFE)]') $(ARGS)

bench: $(STAMP) ## measure engines and data loading against their bars, on the CPU; refreshes the tables
	$(BIN)/python benchmarks/engines.py $(ARGS)
	$(BIN)/python benchmarks/compiled_dual.py
	$(BIN)/python benchmarks/data_loading.py
	@test ! -e outputs/demo/results.json || $(BIN)/python benchmarks/demo.py

ablation: $(STAMP) ## compare the objectives on digits, at most 90 minutes on 2 cores; goes on where it stopped
	$(BIN)/python benchmarks/ablation.py $(ARGS)

gpu-check: ## test and measure on the GPU that is here, under 9 minutes; installs nothing, refreshes the README's table
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

docs: $(STAMP) ## check the documentation: links resolve, every command runs, the site builds and asks nobody for anything
	$(PYTEST) tests/test_docs.py tests/test_site.py -m "slow or not slow" $(ARGS)

site: $(STAMP) ## write the documentation as a site to site/, warnings are errors; read it: python -m http.server -d site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove caches and build artefacts; outputs/, data/ and .venv stay
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache src/*.egg-info *.egg-info
	find src plugins conf tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

define need_checkpoint
@test -n '$(CHECKPOINT)' || { echo "Which checkpoint? make $@ CHECKPOINT=outputs/train/NAME (a run folder or a .ckpt file)" >&2; exit 1; }
endef
