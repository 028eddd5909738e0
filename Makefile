# RecLoRA on Spark, Ray and DeepSpeed. `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := spark,train,serve,dev
DIST := dist

# The interpreter of a new environment: python3 if it is 3.11 or 3.12, else python3.12 or python3.11.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo "$$python" && break; \
	done)

.PHONY: help setup preflight demo test lint bench study wheel

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1|/' | awk -F'|' '{printf "  make %-7s %s\n", $$1, $$2}'

setup: $(READY)  ## make the environment in .venv (demo, test, lint and bench do it themselves)

demo: setup  ## logs to a served, evaluated RecLoRA, embedded; files in runs/demo, second time: what is up to date is skipped
	@$(BIN)/python -m reclora_dist.cli.pipeline $(ARGS)

test: setup  ## all tests, in two processes; ARGS="-k metrics" chooses, ARGS="-n 0" takes one, ARGS=--exhaustive repeats the slow ones
	@$(BIN)/python -m pytest -n 2 --no-loadscope-reorder $(ARGS)

lint: setup  ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup  ## one claim measured: NAME=movielens RAW=path/to/ml-1m, NAME=personalisation, NAME=retrieval, NAME=days, NAME=adapter_overhead, NAME=oracle, NAME=loader, NAME=resume, NAME=zero, NAME=crm RAW=path/to/ml-1m
	@test -f "benchmarks/$(NAME).py" || { echo "make bench NAME=<one of: $(basename $(notdir $(wildcard benchmarks/*.py)))>" >&2; exit 2; }
	@$(BIN)/python benchmarks/$(NAME).py $(if $(RAW),--raw "$(RAW)") $(ARGS)

study: setup  ## a grid of runs that answers a question: NAME=few_shot; without NAME, all are listed; ARGS="study.seeds=[0]"
	@$(BIN)/python -m reclora_dist.cli.study $(if $(NAME),"study=$(NAME)" $(ARGS),--help)

wheel: setup  ## the package as dist/reclora_dist-*.whl, for `spark-submit --py-files`; without the network
	@rm -rf build  # setuptools keeps modules there that are gone
	@$(BIN)/python -m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir "$(DIST)" .
	@echo "$(DIST)/reclora_dist-$$($(BIN)/python -c 'import reclora_dist; print(reclora_dist.__version__)')-py3-none-any.whl"

$(READY): pyproject.toml constraints.txt | preflight
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "No venv module: install it (Debian, Ubuntu: apt install python3-venv) and try again." >&2; exit 1; }
	@echo "Installing into $(VENV) (2.3 GB, 2 to 5 minutes; the whole output: $(VENV)/install.log)"
	@$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]' 2>&1 | tee $(VENV)/install.log | \
		awk '/^(Collecting|Requirement already)/ && ++n % 25 == 0 {print "  " n " packages resolved"; fflush()} \
		/^(Building wheels|Installing collected)/ {print "  " tolower(substr($$0, 1, 1)) substr($$0, 2, index($$0, ":") - 2); fflush()} \
		/^ERROR|^error/ {print > "/dev/stderr"}' || { tail -n 15 $(VENV)/install.log >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --no-deps -c constraints.txt petastorm==0.13.1
	@touch $@
	@echo "Ready: $(BIN)/python ($$($(BIN)/python -V))"

preflight:
	@java=$${JAVA_HOME:+$$JAVA_HOME/bin/}java; \
	version=$$("$$java" -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' | head -n 1 || true); \
	if [ "$${version:-0}" -lt 17 ]; then \
		echo "Spark needs Java 17 or newer; found $${version:-none}. Install it and try again:" >&2; \
		echo "  Debian, Ubuntu: sudo apt install openjdk-17-jre-headless    (or openjdk-21-jre-headless)" >&2; \
		echo "  Fedora:         sudo dnf install java-21-openjdk-headless" >&2; \
		echo "  macOS:          brew install openjdk@17 && export JAVA_HOME=\$$(brew --prefix openjdk@17)" >&2; \
		exit 1; \
	fi
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
		echo "Needs Python 3.11 or 3.12, and found neither on PATH. Name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
