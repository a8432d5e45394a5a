# make quickstart: the whole way from text to a generating model, on this machine, in minutes
# make test:       every test that needs no GPU and no cluster, but for the long ones
# make long-test:  claims of accuracy, memory and endurance, three tests at a time; then those of speed, one at a time;
#                  of kernels, whole models alone
# make kernel-test: the proofs of the kernels, which depend on few files, fast and long, and test-triton with the newest;
#                  where none of these files has changed since they passed (tests/kernels/proof.py), it says so
# make test-triton TRITON=3.9.0: the kernels interpreted, and all compiled, with another Triton than the one that is
#                  pinned; KERNEL_TESTS=tests/kernels for all of their tests, SELECT="not sm_80" for a part of them
# make gpu:        all that a GPU must show, in at most eight minutes: one JSON and pictures in build/gpu. It takes the
#                  Python that is given, the environment of `make venv`, or python3, and installs nothing; tests/gpu/first_day.py
# make docs:       the pages of docs/ and the API as a site, in build/site; a broken link is an error
# make matrix:     the fast tests at the lowest and at the highest versions of pyproject.toml's ranges, in environments
#                  below build/; SETS=lowest for one of them, TESTS=tests/modeling for a part
# All but gpu make the virtual environment if it is missing: quickstart with what the commands need, the others (and
# `make venv`) with what the tests need beside it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# more keys for the training of the quickstart, such as QUICKSTART="--max_steps 50"
QUICKSTART ?=
TESTS ?= tests
# tests at a time, on the two cores that the suite is made for: tests often wait for what they started, long ones less
WORKERS ?= 4
LONG_WORKERS ?= 3
TRITON ?= 3.9.0
SETS ?= lowest highest
GPU_OUTPUT ?= build/gpu
# --device cpu: a rehearsal of `make gpu` without a GPU; --parts NAME,...: these alone
GPU ?=
SELECT ?=
KERNEL_TESTS ?= tests/kernels/test_kernels_interpreted.py::test_interpreted tests/kernels/test_kernel_launches.py \
	tests/kernels/test_kernel_resources.py

.PHONY: quickstart test long-test kernel-test kernel-proof test-triton gpu docs matrix fast-test lint format venv clean

quickstart: $(VENV)/.installed
	$(BIN)/ssm-lm prepare --dataset builtin --tokenizer bpe:4096 --output data/builtin
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 -m ssm_lm train configs/train/quickstart.yaml $(QUICKSTART)
	$(BIN)/ssm-lm eval runs/quickstart --data data/builtin --split validation --context 16,64,256,1024,full --json runs/quickstart/eval.json
	$(BIN)/ssm-lm generate runs/quickstart --prompt "Return a new array" --max-new-tokens 60 --seed 1
	@if [ -e exports/quickstart ]; then echo "exports/quickstart is there already"; \
	else $(BIN)/ssm-lm export runs/quickstart --output exports/quickstart --results runs/quickstart/eval.json; fi
	$(BIN)/ssm-lm plot runs/quickstart
	@echo
	@echo "Curves:       runs/quickstart/curves.png"
	@echo "TensorBoard:  $(BIN)/tensorboard --logdir runs/quickstart/runs"
	@echo "Model:        exports/quickstart, for AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"

test: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not long" $(TESTS)

# pytest ends with 5 where none of $(TESTS) is of a kind
long-test: venv
	$(BIN)/python -m pytest -n $(LONG_WORKERS) --dist worksteal -m "long and not alone and not proof" $(TESTS) || test $$? = 5
	$(BIN)/python -m pytest -m "long and alone" $(TESTS) || test $$? = 5

kernel-test: venv
	@$(BIN)/python tests/kernels/proof.py || $(MAKE) kernel-proof

# of the report's rows with the newest Triton those for Hopper and Blackwell, where compilers change most
kernel-proof: venv
	rm -f tests/kernels/proven.sha256
	$(BIN)/python -m pytest -n $(LONG_WORKERS) --dist worksteal -m proof tests/kernels
	$(MAKE) test-triton SELECT="not (test_every_kernel and (sm_80 or gfx942))"
	$(BIN)/python tests/kernels/proof.py --write

test-triton: venv
	test -d build/triton-$(TRITON) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) $(BIN)/python -m pytest -n 2 --dist worksteal -k "$(SELECT)" $(KERNEL_TESTS)

gpu:
	$(or $(if $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(PYTHON)) -m tests.gpu.first_day --output $(GPU_OUTPUT) $(GPU)

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

matrix: $(SETS:%=matrix-%)

matrix-%: tests/versions/%.txt
	test -x build/$*/bin/python || $(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< --editable '.[dev]'
	build/$*/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not long" $(TESTS)

fast-test: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not long" $(TESTS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[train,plot]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
