# Two commands do everything: `make run` and `make test`. Both make their own environment in .venv first.

PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check --quiet

# Compose v2, or Debian's: make compose-demo COMPOSE=docker-compose
COMPOSE ?= docker compose
STACK = $(COMPOSE) --file compose/compose.yaml

.PHONY: run test packages lint bench docs lock clean compose-demo

run: .venv/run ## the broker on the sample organisation
	.venv/bin/broker up

# What is tried here is the same each time, also what Hypothesis draws: `pytest` alone draws anew. The two processes must see the
# tests in one order, hence the other seed. A test that hangs ends its process, and with it the run. What failed is tried once more,
# alone: most tests wait for real processes, on a machine that may be busy. Both outputs stay; see tests/README.md.
PYTEST = PYTHONHASHSEED=0 .venv/bin/python -m pytest --hypothesis-seed=0
test: .venv/test packages lint ## every check and every test
	$(PYTEST) -q tests/unit/policy --cov=broker.policy --cov-branch --cov-fail-under=100
	$(PYTEST) -n 2 --dist loadfile --max-worker-restart 0 --durations=10 || \
	  { test $$? = 1 && echo "what failed, once more and alone:" && $(PYTEST) --last-failed --last-failed-no-failures none; }

# What tests use from Debian, where root can install it; without it they skip, and say what is missing.
packages:
	@( for each in openssl redis-server git curl nft ip tcpdump dockerd docker-compose debootstrap slirp4netns; do \
	     command -v $$each || exit 1; done ) >/dev/null || \
	  test "$$(id -u)" != 0 || \
	  { apt-get update -qq && apt-get install -qq -y openssl redis-server git curl nftables iproute2 tcpdump && \
	    apt-get install -qq -y --no-install-recommends docker.io iptables docker-compose debootstrap slirp4netns; }

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m broker.manifest.schemas --check
	.venv/bin/python -m docs.generate --check

compose-demo: ## an agent in a container, whose only neighbour is Envoy, and all that stands behind it
	@echo "building the image, and starting Envoy, three processors, Redis, two tools, Prometheus and Grafana …"
	@$(STACK) build --quiet keys
	@$(STACK) up --detach --quiet-pull || { echo "see: $(STACK) logs; to the end: $(STACK) down --volumes"; exit 1; }
	@echo && echo "The agent, on a network with Envoy and nobody else:" && echo
	@$(STACK) run --rm agent || { echo "see: $(STACK) logs; to the end: $(STACK) down --volumes"; exit 1; }
	@echo && echo "What reached the tools, and with which credential, which the agent never had:" && echo
	@$(STACK) logs --no-log-prefix tools
	@echo && echo "Grafana:    http://127.0.0.1:$${GRAFANA_PORT:-3000}" && echo "Prometheus: http://127.0.0.1:$${PROMETHEUS_PORT:-9090}"
	@echo "Once more:  $(STACK) run --rm agent" && echo "To the end: $(STACK) down --volumes"

bench: .venv/test ## the table of benchmarks/README.md
	.venv/bin/python -m benchmarks.run

docs: .venv/test ## everything that is generated and checked in
	.venv/bin/python -m broker.manifest.schemas
	.venv/bin/python -m docs.generate

lock: .venv/test ## the newest versions of all dependencies, with their hashes
	.venv/bin/uv pip compile pyproject.toml requirements.in --upgrade --universal --python-version 3.11 \
	  --generate-hashes --no-strip-extras --no-emit-index-url --no-header --output-file requirements.txt
	.venv/bin/uv pip compile pyproject.toml requirements.in --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-strip-extras --no-emit-index-url --no-header --constraints requirements.txt --output-file requirements-dev.txt

clean:
	rm -rf .venv .broker build dist *.egg-info

.venv/bin/python:
	@echo "making the environment in .venv …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=…")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory python3-venv
	@$(PYTHON) -m venv .venv

# Debian keeps venv in a package of its own.
.PHONY: python3-venv
python3-venv:
	@test "$$(id -u)" = 0 || { echo "Python's venv is missing; as root: apt-get install python3-venv" >&2; exit 1; }
	apt-get update -qq && apt-get install -qq -y python3-venv

.venv/run: .venv/bin/python requirements.txt pyproject.toml
	@echo "installing what requirements.txt locks …"
	@$(PIP) install --require-hashes -r requirements.txt
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

.venv/test: .venv/bin/python requirements-dev.txt pyproject.toml
	@echo "installing what requirements-dev.txt locks …"
	@$(PIP) install --require-hashes -r requirements-dev.txt
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@ .venv/run
