PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SANITIZED = build/sanitized
TRITON_36 = build/triton-3.6
MEASURED = build/bench

.PHONY: install demo test sanitize budgets budgets-triton-3.6 ptx grid kernel-counts bench docs lint clean

# The stamp is newer than what was installed from, so a second `make` installs nothing.
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

# One thread each: with more threads than cores, torch's threads spend their time waiting for each other. A file's tests
# run in one process, which shares what its fixtures compute.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -q
	@if command -v cmake >/dev/null && command -v cc >/dev/null && command -v c++ >/dev/null; \
	 then $(MAKE) sanitize; else echo "the native library's sanitizer run is skipped: it needs cmake, cc and c++"; fi

# The C test and the Python tests of the CPU executor, under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/.installed-dev
	cmake -S . -B $(SANITIZED) -DFASTOKD_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Release > $(VENV)/sanitize.log
	cmake --build $(SANITIZED) --parallel 2 >> $(VENV)/sanitize.log
	cd $(SANITIZED) && ctest --output-on-failure
	LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  FASTOKD_NATIVE_DIR=$(SANITIZED) $(BIN)/python -m pytest -q -p no:cacheprovider tests/test_cpu_executor.py tests/test_executor_contract.py -k "not reference and not opaque"

# The machine code of every kernel of the grid (hundreds of compilations); `make test` holds a part of it to budgets.
budgets: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m grid tests/test_triton_budget.py

# The kernels' machine code under the oldest Triton that is supported, in an environment of its own without torch.
budgets-triton-3.6:
	test -d $(TRITON_36) || $(PYTHON) -m venv $(TRITON_36)
	$(TRITON_36)/bin/pip install --quiet 'triton==3.6.*' numpy pytest
	$(TRITON_36)/bin/python -m pytest -q -p no:cacheprovider tests/test_triton_budget.py

# The compiled kernels of every catalog graph for three GPU generations, executed (hours); `make test` executes some.
ptx: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m grid tests/test_ptx.py

# The combinations that `make test` leaves out outside of the kernels, such as every method on every network and every
# method's compiled step on the pretend CUDA device.
grid: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m grid tests --ignore=tests/test_ptx.py --ignore=tests/test_triton_budget.py

# New budgets of the kernels per step, and their table.
kernel-counts: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernel_counts --write
	$(BIN)/python -m bench.report

# Into build/ first: a result file that changes would make the commit of the next one a changed one.
bench: $(VENV)/.installed-dev
	mkdir -p $(MEASURED)
	$(BIN)/python -m pytest bench/bench_loss.py -q --benchmark-json=$(MEASURED)/loss-cpu.json
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

# The site, into site/. What is wrong with a page ends the build.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not --quiet: warnings that are not shown are not counted
	@echo "open site/index.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist site *.egg-info demo-out
