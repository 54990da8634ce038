# The README's commands by name. `make` alone lists them.
.PHONY: help install test test-slow lint types docs quickstart

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: ## install the package with everything that development needs
	pip install -e '.[dev]'

quickstart: ## train, sample, evaluate and time real digits, in minutes on a CPU
	python -m sit_atconv.quickstart

test: ## run the fast tests
	pytest

test-slow: ## run the slow tests: trained digits, killed processes, the wheel, the notebook
	pytest -m slow

lint: ## check style and formatting
	ruff check .
	ruff format --check .

types: ## check types
	mypy

docs: ## build the documentation site into site/
	mkdocs build --strict
