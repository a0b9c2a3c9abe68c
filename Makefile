# Everything here starts from nothing: each target makes the virtual environment that it needs.
# PYTHON chooses the interpreter (3.10 to 3.13): make test PYTHON=python3.12

PYTHON ?= python3
PIP_FLAGS ?= --disable-pip-version-check --no-input --quiet

DEMO := .venv-demo
TEST := .venv-test
DOCS := .venv-docs
WHEEL := build/wheel-job
# setuptools packs whatever an earlier build left there, deleted modules too.
STALE := build/lib build/bdist.*

# A package on PYTHONPATH would be tested in place of this one.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: demo test lint wheel wheel-job test-slow test-torch test-browser fuzz docs bench bench-kernels \
	bench-forms bench-tuning bench-cuda clean help

help:
	@echo "make demo        install into a fresh environment, and compile a pruned model"
	@echo "make test        the tests, the linters and the installed wheel, in a fresh environment"
	@echo "make lint        ruff, formatting and mypy only"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-torch  the tests that need PyTorch"
	@echo "make test-browser  the tests that look at the report in a browser"
	@echo "make docs        these pages as a site, in build/docs"
	@echo "make fuzz        damaged files by the thousand, to every parser"
	@echo "make bench       measure networks; rewrites the tables of README.md and docs/networks.md"
	@echo "make bench-kernels  measure single kernels; rewrites the figures of docs/kernels.md"
	@echo "make bench-forms  measure every form of sparsity; and its accuracy; rewrites docs/forms.md"
	@echo "make bench-tuning  tune networks and walk whole spaces; rewrites the figures of docs/tuning.md"
	@echo "make bench-cuda  time kernels for GPUs beside NVIDIA's libraries; needs nvcc and a GPU"
	@echo "make clean       remove everything that these targets made"

demo:
	rm -rf $(STALE)
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/python -m pip install $(PIP_FLAGS) .
	$(DEMO)/bin/tvm-sparse demo

# Made anew only by `make test`; the other targets reuse it when its requirements did not change.
$(TEST)/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(TEST)
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) -e '.[test,bench]'
	touch $@

# The tests that run libraries on other processors need qemu-x86_64, and are skipped without it:
# apt-get install qemu-user
test:
	rm -rf $(TEST)
	$(MAKE) lint wheel-job
	$(TEST)/bin/pytest -n 2 -m "not slow and not torch"

# The wheel, unpacked beside the test environment's dependencies: nothing is downloaded twice, and
# PYTHONPATH puts it in front of the editable install.
wheel: $(TEST)/ready
	rm -rf $(STALE) $(WHEEL)
	mkdir -p $(WHEEL)
	$(TEST)/bin/python -m pip wheel $(PIP_FLAGS) --no-deps --wheel-dir $(WHEEL) .
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) --no-deps --target $(WHEEL)/site $(WHEEL)/*.whl

# mypy does not see the mapped folders of an editable install, so it reads the wheel.
lint: wheel
	$(TEST)/bin/ruff check
	$(TEST)/bin/ruff format --check
	cd $(WHEEL) && MYPYPATH=site ../../$(TEST)/bin/mypy --cache-dir ../../.mypy_cache --config-file ../../pyproject.toml

# An editable install hides a folder that the wheel lacks; these tests run on the wheel alone.
wheel-job: wheel
	cd $(WHEEL) && PYTHONPATH=site TVM_SPARSE_WHEEL=site ../../$(TEST)/bin/pytest -q -n 2 \
		-c ../../pyproject.toml -m "not slow and not torch" ../../tests/unit

test-slow: $(TEST)/ready
	$(TEST)/bin/pytest -n 2 -m slow

# From PyPI, torch for Linux brings gigabytes of CUDA libraries that nothing here uses. To avoid
# them, install the CPU build into $(TEST) from PyTorch's own index first.
test-torch: $(TEST)/ready
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0 -e '.[tutorials]'
	$(TEST)/bin/pytest -n 2 -m torch

# Warnings are errors: a link that leads nowhere, a docstring that cannot be read.
$(DOCS)/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install $(PIP_FLAGS) -e '.[docs]'
	touch $@

docs: $(DOCS)/ready
	rm -rf build/docs
	$(DOCS)/bin/sphinx-build --fail-on-warning --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

# Needs a Chromium: apt-get install chromium, or its path as TVM_SPARSE_BROWSER.
test-browser: $(TEST)/ready
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) -e '.[browser]'
	$(TEST)/bin/pytest tests/browser

# TVM_SPARSE_FUZZ_EXAMPLES says how many damaged files each parser is given.
fuzz: $(TEST)/ready
	$(TEST)/bin/pytest -m slow tests/fuzz

# Hours of nothing else on the machine; a run that was stopped goes on where it was.
bench: $(TEST)/ready
	$(TEST)/bin/python benchmarks/networks.py
	$(TEST)/bin/python benchmarks/dense_ops.py
	$(TEST)/bin/python benchmarks/sizes.py
	$(TEST)/bin/python benchmarks/time_budget.py
	$(TEST)/bin/python benchmarks/memory.py
	$(TEST)/bin/python benchmarks/deployment.py
	$(TEST)/bin/python benchmarks/soak.py
	$(TEST)/bin/python benchmarks/onnx_suite.py

# Hours of the same; needs g++ for the hand-written bar. Cases that are there already are measured again.
bench-kernels: $(TEST)/ready
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) -e '.[kernels]'
	$(TEST)/bin/python benchmarks/kernels.py
	$(TEST)/bin/python benchmarks/plot_kernels.py
	$(TEST)/bin/python benchmarks/kernels_page.py

# An hour, half of it training; ONNX files that are in build/digits are not trained again. Of torch
# the same holds as above.
bench-forms: $(TEST)/ready
	$(TEST)/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0 -e '.[kernels,tutorials]'
	$(TEST)/bin/python benchmarks/forms.py
	$(TEST)/bin/python benchmarks/accuracy.py train
	$(TEST)/bin/python benchmarks/accuracy.py time
	$(TEST)/bin/python benchmarks/accuracy.py page

# An hour of the same.
bench-tuning: $(TEST)/ready
	$(TEST)/bin/python benchmarks/tuning.py models
	$(TEST)/bin/python benchmarks/tuning.py walk
	$(TEST)/bin/python benchmarks/tuning.py page

# The first line needs nvcc, the second a GPU; on two machines, see docs/cuda.md. Peers are timed
# where PyTorch with CUDA, or CuPy, is installed into $(TEST).
bench-cuda: $(TEST)/ready
	$(TEST)/bin/python benchmarks/cuda.py build -o build/bench-cuda --configs 4
	$(TEST)/bin/python benchmarks/cuda.py run build/bench-cuda --asked

clean:
	rm -rf $(DEMO) $(TEST) $(DOCS) docs/tutorials build dist benchmarks/bars/build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
