# `make demo` shows it, `make test` proves it. Both set up what they need (tools/setup); as root they do everything.
PYTHON_BIN := .venv/bin/python
PYTEST := $(PYTHON_BIN) -m pytest
ROOT := $(shell [ "$$(id -u)" = 0 ] && echo yes)

.PHONY: demo test check format unit integration e2e e2e-v2 rows critest critest-v2 bench setup docs proto clean

demo: setup
	@$(PYTHON_BIN) -m demo

# Everything. Without root nothing that makes namespaces, mounts or cgroups can run: the unit tests only.
ifeq ($(ROOT),yes)
test: setup
	$(PYTEST) tests
else
test: unit
	@echo "make test: not root: ran the unit tests only; run as root for integration and e2e"
endif

check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(PYTHON_BIN) -m mypy
	$(PYTEST) -q tests/unit/house

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

unit: setup
	$(PYTEST) tests/unit

integration: setup
	$(PYTEST) tests/integration

e2e: setup
	$(PYTEST) tests/e2e

# For every call and field of the CRI: that a test fails without it (in 15 minutes).
rows: setup
	$(PYTHON_BIN) -m tests.rows $(ARGS)

# CRITEST_IMAGES is the data directory of a docker-registry with the suite's images, by default critest-images in the
# user's cache directory; ARGS are more arguments (--newer, --handler crun, --focus TEXT …).
critest: setup
	$(PYTHON_BIN) -m critest $(ARGS)

# In a virtual machine with systemd, cgroup v2 alone and AppArmor, which `tests/vm/v2vm build` makes: what nodes are.
e2e-v2: setup
	tests/vm/run --timeout 2400 python -m pytest -p no:cacheprovider tests/e2e tests/integration/oci/test_project_quotas.py

critest-v2: setup
	tests/vm/critest --newer "$${CRITEST_IMAGES:-$${XDG_CACHE_HOME:-$$HOME/.cache}/critest-images}" $(ARGS)

bench: setup
	tools/setup --peers
	$(PYTHON_BIN) -m bench
	$(PYTHON_BIN) -m bench.pull

setup:
	@tools/setup

# The reference pages and the default file, from the declarations in cri/.
docs: setup
	$(PYTHON_BIN) tools/docs.py

# The CRI's and NRI's code, from their api.proto files; only the CRI is gRPC.
proto: setup
	PATH=$(CURDIR)/.venv/bin:$$PATH $(PYTHON_BIN) -m grpc_tools.protoc -I. --python_out=. --mypy_out=. \
	    --grpc_python_out=. cri/api/runtime/v1/api.proto
	PATH=$(CURDIR)/.venv/bin:$$PATH $(PYTHON_BIN) -m grpc_tools.protoc -I. --python_out=. --mypy_out=. \
	    cri/api/nri/v1alpha1/api.proto cri/api/ttrpc/api.proto

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
