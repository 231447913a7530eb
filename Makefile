PYTHON ?= python

.PHONY: budget
budget:  ## every compiled kernel of the grid: no spills, wide loads, counted exponentials (no GPU needed)
	$(PYTHON) -m pytest -q -m grid tests/test_triton_budget.py
