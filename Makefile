# Two commands for a newcomer: `make demo` and `make test`. Both install first.
PYTHON ?= python3
RUN := .venv/bin/python
LDM := .venv/bin/ldm
INSTALLED := .venv/.installed

.PHONY: setup demo quality adversary test proofs faults torture parity recipes lint types
.DEFAULT_GOAL := help

help:
	@echo "make demo       train on handwritten digits and sample"
	@echo "make quality    measure the run of make demo"
	@echo "make adversary  train an autoencoder with its discriminator, and measure it"
	@echo "make test       run the tests"
	@echo "make proofs     run the tests that take longer: caches, scores, averages"
	@echo "make faults     kill, stop and starve runs of one process and of two"
	@echo "make torture    the same, ten times as often"
	@echo "make parity     compare with diffusers, transformers and PyTorch (installs them)"
	@echo "make recipes    dry-run every config; compare every table of names"
	@echo "make lint       check style with ruff"
	@echo "make types      check types"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: error: $(PYTHON) is too old, wanted 3.11 or later; try make PYTHON=python3.12"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: setup
	$(LDM) train --config digits --workdir runs/digits
	$(LDM) sample --workdir runs/digits --labels 0-9 --seeds 0-9 --steps 50 --sampler ddim --guidance-scale 2 --out runs/digits/samples
	$(LDM) sample --workdir runs/digits --labels 0-9 --seeds 0 --steps 50 --out runs/digits/trajectory --trajectory
	@echo
	@echo "Look at:"
	@ls runs/digits/samples/grid.png runs/digits/trajectory/trajectory.png \
	  runs/digits/loss.png runs/digits/*/reconstructions_*.png runs/digits/*/samples_*.png

quality: setup
	$(RUN) benchmarks/digits_quality.py --workdir runs/digits --check

adversary: setup
	$(RUN) benchmarks/adversarial_switch.py --seeds 0 --check

test: setup
	$(RUN) -m pytest --ignore=tests/parity --ignore=tests/faults --ignore=tests/proofs -n 2 --dist loadfile --no-loadscope-reorder

proofs: setup
	$(RUN) -m pytest tests/proofs --ignore-glob='tests/proofs/test_exact_*.py' -n 2 --dist loadfile --no-loadscope-reorder
	@# Tests of equal bits, with programs compiled as outside of the tests.
	LDM_JAX_AS_SHIPPED=1 $(RUN) -m pytest tests/cli/test_old_run.py tests/sampling/test_sample_fn.py tests/parallel/test_layouts.py tests/proofs/test_exact_*.py -n 2 --dist loadfile

faults: setup
	$(RUN) -m pytest tests/faults -n 2 --dist load

torture: setup
	LDM_JAX_KILLS=200 $(RUN) -m pytest tests/faults -n 2 --dist load

parity: setup
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[parity]'
	@# Without what they want: torchvision would bring another torch.
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-deps torch-fidelity clean-fid
	$(RUN) -m pytest tests/parity -n 2 --dist loadfile --no-loadscope-reorder

recipes: setup
	LDM_JAX_SLOW=1 $(RUN) -m pytest tests/config/test_presets.py -k dry_run_of -n 2 --dist load
	LDM_JAX_SLOW=1 $(RUN) -m pytest tests/pretrained/test_compvis_names.py -n 2 --dist load
	LDM_JAX_SLOW=1 $(RUN) -m pytest tests/training/test_train_tokenizer.py tests/tools/test_check_images.py \
	  -k 'draws or trains_on' -n 2 --dist load

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup
	$(RUN) -m basedpyright
