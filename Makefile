PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SANITIZED = build/sanitized
TRITON_36 = build/triton-3.6
MEASURED = build/bench

.PHONY: install demo test sanitize budgets budgets-triton-3.6 ptx grid kernel-counts bench docs lint clean

# After an installation the stamp file is newer than its prerequisites, so a second `make` installs nothing.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[plots]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/fastokd demo

# One thread per process: with more threads than cores, torch's threads mostly wait for each other. The tests of a file run
# in one process, so fixtures are computed once.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -q
	@if command -v cmake >/dev/null && command -v cc >/dev/null && command -v c++ >/dev/null; \
	 then $(MAKE) sanitize; else echo "sanitizer tests of the native library: skipped; install cmake, cc and c++ to run them"; fi

# Run the C test and the Python tests of the CPU executor under the address and undefined-behavior sanitizers.
sanitize: $(VENV)/.installed-dev
	cmake -S . -B $(SANITIZED) -DFASTOKD_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Release > $(VENV)/sanitize.log
	cmake --build $(SANITIZED) --parallel 2 >> $(VENV)/sanitize.log
	cd $(SANITIZED) && ctest --output-on-failure
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  FASTOKD_NATIVE_DIR=$(SANITIZED) $(BIN)/python -m pytest -q -p no:cacheprovider tests/test_cpu_executor.py tests/test_executor_contract.py -k "not reference and not opaque"

# Check the machine code of every kernel of the grid against budgets (hundreds of compilations); `make test` checks a subset.
budgets: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m grid tests/test_triton_budget.py

# Check the kernels' machine code under the oldest supported Triton, in a separate environment without torch.
budgets-triton-3.6:
	test -d $(TRITON_36) || $(PYTHON) -m venv $(TRITON_36)
	$(TRITON_36)/bin/pip install --quiet 'triton==3.6.*' numpy pytest
	$(TRITON_36)/bin/python -m pytest -q -p no:cacheprovider tests/test_triton_budget.py

# Execute the compiled kernels of every catalog graph for three GPU generations (hours); `make test` executes a subset.
ptx: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m grid tests/test_ptx.py

# Run the combinations that `make test` omits, apart from compiled kernels: every method on every network, every method's
# compiled step on the pretend CUDA device, and every kernel with every shape, target and dtype in Triton's interpreter.
grid: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m grid tests --ignore=tests/test_ptx.py --ignore=tests/test_triton_budget.py

# Measure the kernels per step again: the budgets and their table.
kernel-counts: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernel_counts --write
	$(BIN)/python -m bench.report

# Write results to build/ first: a changed file in bench/results/ would mark the commit of the following results as modified.
bench: $(VENV)/.installed-dev
	mkdir -p $(MEASURED)
	$(BIN)/python -m pytest bench/bench_loss.py -q --benchmark-json=$(MEASURED)/loss-cpu.json
	$(BIN)/python -m pytest bench/bench_terms.py -q --benchmark-json=$(MEASURED)/terms-cpu.json
	$(BIN)/python -m pytest bench/bench_gate.py -q --benchmark-json=$(MEASURED)/gate-cpu.json
	$(BIN)/python -m pytest bench/bench_step.py -q --benchmark-json=$(MEASURED)/quickstep-cpu.json
	$(BIN)/python -m pytest bench/bench_start.py -q --benchmark-json=$(MEASURED)/start-cpu.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench/bench_data.py bench/bench_data_resident.py -q --benchmark-json=$(MEASURED)/data-cpu.json
	$(BIN)/fastokd bench step --seconds 60 --out build/step
	cp build/step/step-ladder.json $(MEASURED)/step-cpu.json
	$(BIN)/python -m bench.machine_code --out $(MEASURED)/machine-code.json
	cp $(MEASURED)/*.json bench/results/
	$(BIN)/python -m bench.methods
	$(BIN)/python -m bench.method_pages
	$(BIN)/python -m bench.recipe_page
	$(BIN)/python -m bench.option_page
	$(BIN)/python -m bench.report

# Build the site in site/. Warnings fail the build.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not --quiet: --strict counts only printed warnings
	@echo "open site/index.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist site *.egg-info demo-out
