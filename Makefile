# One list of commands, for people and for CI. All that a run leaves lies under state/ and .venv/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# uv leaves compiling to the first import: where that is not kept, every process compiles torch and mlflow again
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin
ENGINE := bash docker/engine.sh
WITH_ENGINE := set -a; eval "$$($(ENGINE) env)"; set +a; PATH="$(CURDIR)/$(BIN):$$PATH";
EXAMPLE := nbs/examples/digits.ipynb

.PHONY: help setup release check test test-fast clients browser matrix kubernetes swarm site soak cuda-image dist export readme dockerfile docs docs-serve lab mlflow engine-start engine-stop engine-env debug-base bench bench-since bench-images models gpu-check gpu-wheels test-tools clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: .venv/.installed ## the environment, in .venv

.venv/.installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'mlserve needs Python 3.11 or later; set PYTHON=...' >&2; exit 7; }
	@echo 'setup: installing into .venv' >&2
	@PYTHON=$(PYTHON) bash .ci/install .venv -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

release: setup engine-start ## the main job: train, build, record, check and promote the example; JSON where nobody reads along
	@$(WITH_ENGINE) full=--json; [ ! -t 1 ] || full=; mlserve release $(EXAMPLE) --promote $$full

check: setup ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/mypy

LANES ?=
test: setup test-tools ## the tests of every day, with real releases in containers; LANES='pages serving' for some
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/test $(LANES)

test-fast: setup ## pages and units, without an engine
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -q -m 'pages and not matrix and not site'

test-tools: setup # what the tests trace, emulate, proxy, load, build and ask with; what pip brings goes below state/
	@PATH="$$PATH:/usr/sbin"; for tool in curl strace npm haproxy nginx slowhttptest buildah faketime cc $(MORE); do command -v $$tool >/dev/null || missing="$${missing:-} $$tool"; done; \
	missing=$${missing:-}; missing=$${missing/nginx/nginx-light}; missing=$${missing/javac/openjdk-17-jdk-headless}; missing=$${missing/%cc/gcc libc6-dev}; \
	[ -z "$$missing" ] || { s=$$(command -v sudo || true); $$s apt-get update -q >&2 && $$s env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -yq --no-install-recommends $$missing >&2; }
	@[ -x state/tools/checkov/bin/checkov ] || bash .ci/install state/tools/checkov checkov==3.3.30
	@for client in kubernetes-validate workflows $(PINS); do pins=tests/clients/$$client.txt; folder=state/tools/$$client; \
	cmp -s $$pins $$folder/.installed || { rm -rf $$folder; $(BIN)/pip install -q --disable-pip-version-check --no-deps --target $$folder -r $$pins 2> >(grep -v '^WARNING: Location' >&2); cp $$pins $$folder/.installed; }; done

clients: MORE := javac
clients: PINS := kserve mlserver
clients: setup test-tools ## servers asked by the clients of others, and a collector of traces
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -q -m clients

browser: MORE := $(shell command -v google-chrome >/dev/null || echo chromium)
browser: PINS := browser
browser: setup test-tools docs ## the page of a running model, and the site, in Chromium, with axe
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -q -m browser

matrix: setup engine-start test-tools ## the formats, deliveries, builders and devices that `make test` leaves out
	@$(WITH_ENGINE) pytest -q -m matrix

kubernetes: setup engine-start test-tools ## a real Kubernetes, built once in half an hour of two cores: what is rendered and deployed, and two nodes with pods under load
	@bash .ci/kubernetes state/kubernetes
	@$(WITH_ENGINE) pytest -q -s -m kubernetes

swarm: setup engine-start ## a Swarm of three engines in network namespaces: updates, bad images, a drained node, a cut link, under load; needs root
	@$(WITH_ENGINE) pytest -q -s -m swarm

site: setup ## the documentation site rendered: every page with its prose, every link and anchor
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -q -m site tests/test_generated.py

soak: setup engine-start test-tools ## the tests' full counts: hours of load, faults and fuzzing
	@ls -d /usr/lib/postgresql/*/bin >/dev/null 2>&1 || { s=$$(command -v sudo || true); $$s apt-get update -q >&2 && $$s env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -yq --no-install-recommends postgresql >&2; }
	@$(WITH_ENGINE) pytest -q -m soak

cuda-image: setup engine-start ## build the GPU flavour for real (2.5 GB of wheels), and see it refuse a host without a GPU
	@$(WITH_ENGINE) pytest -q -s -m cuda_image

dist: setup ## sdist and wheel, in dist/
	@rm -rf dist build
	@bash .ci/dist $(BIN)/python dist

export: setup ## package, README and Dockerfile from the notebooks
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(MAKE) -s readme dockerfile

readme: setup
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --output-dir . --output README nbs/index.ipynb

dockerfile: setup
	@env -u MLSERVE_BASE -u MLSERVE_REGISTRY $(BIN)/mlserve dockerfile $(EXAMPLE) > docker/Dockerfile
	@env -u MLSERVE_BASE -u MLSERVE_REGISTRY $(BIN)/mlserve dockerfile $(EXAMPLE) --device cuda > docker/Dockerfile.cuda

docs: setup ## the documentation site, in _docs
	@PATH="$(CURDIR)/$(BIN):$$PATH" python .ci/docs.py _docs
	@echo 'docs: _docs/index.html' >&2

docs-serve: docs ## the site on http://127.0.0.1:8000
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 8000

NOTEBOOKS ?= nbs
LAB ?=
lab: setup ## JupyterLab on the examples; LAB='--no-browser --port 9000' is handed on
	@$(WITH_ENGINE) jupyter lab --notebook-dir $(NOTEBOOKS) --LabApp.default_url=/lab/tree/examples/start.ipynb $$([ $$(id -u) != 0 ] || echo --allow-root) $(LAB)

BENCH ?=
bench: setup ## mlserve beside other model servers; BENCH='--servers mlserve,fastapi' for some of them
	@bash bench/servers/setup.sh "$(CURDIR)/state/bench"
	@[ -f state/bench/models/cnn.npz ] || $(BIN)/python -W ignore bench/servers/make_models.py state/bench/models
	@$(BIN)/python -W ignore bench/servers/run.py --root state/bench --out state/bench/results.jsonl $(BENCH)
	@$(BIN)/python bench/servers/table.py state/bench/results.jsonl

REV ?= HEAD~1
bench-since: setup ## this tree beside an earlier commit, five interleaved rounds, as ratios; REV=COMMIT
	@rev=$$(git rev-parse --short $(REV)) && bash bench/servers/setup.sh "$(CURDIR)/state/bench" mlserve mlserve@$$rev && \
	{ [ -f state/bench/models/cnn.npz ] || $(BIN)/python -W ignore bench/servers/make_models.py state/bench/models; } && \
	rm -f state/bench/since.jsonl && $(BIN)/python -W ignore bench/servers/run.py --root state/bench --out state/bench/since.jsonl --rounds 5 --conc 8,64 --no-off --no-floor --servers mlserve,mlserve@$$rev $(BENCH) && \
	$(BIN)/python bench/servers/table.py state/bench/since.jsonl

bench-images: setup engine-start ## our images beside MLflow's and the tutorials': size, builds, bytes pushed
	@$(WITH_ENGINE) python -W ignore bench/images.py $(BENCH)

# the tested minor versions of onnxruntime beside the one of constraints.txt; VERSIONS='--torch FOLDER' for another torch, whose wheels take gigabytes
RUNTIMES := 1.29.0 1.30.0 1.32.0
VERSIONS ?=

# what `mlserve[keras]` brings beside what the project has
KERAS := tensorflow-cpu==2.21.0 keras==3.15.1 tf2onnx==1.17.0 absl-py==2.5.1 gast==0.7.0 google-pasta==0.2.0 h5py==3.14.0 namex==0.1.0 \
	opt-einsum==3.4.0 optree==0.20.0 termcolor==3.3.0

models: setup ## every kind of table model, saved, served and asked over each wire, as a table
	@[ -d state/tools/catboost/catboost ] || $(BIN)/pip install -q --disable-pip-version-check --no-deps --target state/tools/catboost catboost==1.2.10 graphviz==0.21 2> >(grep -v '^WARNING: Location' >&2)
	@[ -d state/tools/statsmodels/statsmodels ] || $(BIN)/pip install -q --disable-pip-version-check --no-deps --target state/tools/statsmodels statsmodels==0.15.0 formulaic==1.2.1 interface_meta==1.3.0 patsy==1.0.1 wrapt==2.5.2 2> >(grep -v '^WARNING: Location' >&2)
	@[ -d state/tools/silero/silero_vad ] || $(BIN)/pip install -q --disable-pip-version-check --no-deps --target state/tools/silero silero-vad==6.2.3 2> >(grep -v '^WARNING: Location' >&2)
	@[ -d state/tools/keras/tensorflow ] || $(BIN)/pip install -q --disable-pip-version-check --no-deps --target state/tools/keras $(KERAS) 2> >(grep -v '^WARNING: Location' >&2)
	@$(BIN)/python -W ignore bench/models.py $(BENCH)
	@for v in $(RUNTIMES); do [ -d state/tools/onnxruntime-$$v/onnxruntime ] || $(BIN)/pip install -q --disable-pip-version-check --no-deps --target state/tools/onnxruntime-$$v onnxruntime==$$v 2> >(grep -v '^WARNING: Location' >&2); done
	@$(BIN)/python -W ignore bench/versions.py $(VERSIONS)

gpu-check: setup ## refusals, proof, speed and faults on a GPU, in state/gpu-check; BENCH=--cpu rehearses without one
	@$(BIN)/python bench/gpu_check.py --out state/gpu-check $(BENCH)

# what a machine lacks that has only torch: by name, at the versions of constraints.txt; LitServe is what it is compared with
GPU_WHEELS := fastapi starlette uvicorn uvloop httptools orjson safetensors pydantic pydantic-core annotated-types annotated-doc typing-inspection \
	typing-extensions opentelemetry-api prometheus-client httpx httpcore h11 anyio idna certifi click litserve==0.2.19 pyzmq
gpu-wheels: setup ## what `bench/gpu_check.sh` brings to a GPU machine without network (Python 3.12), in state/gpu-wheels
	@rm -rf state/gpu-wheels
	@$(BIN)/pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	$(addprefix --platform manylinux,_2_28_x86_64 _2_27_x86_64 _2_17_x86_64 2014_x86_64) -c constraints.txt -d state/gpu-wheels $(GPU_WHEELS) 2> >(grep -v '^WARNING: Location' >&2)
	@cd state/gpu-wheels && du -bc -- *.whl | sort -n | awk '{printf "%6.2f MiB  %s\n", $$1 / 1048576, $$2}'

mlflow: setup ## the record in a browser, on http://127.0.0.1:5000
	@$(WITH_ENGINE) mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri "$$MLFLOW_TRACKING_URI"

engine-start: ## a Docker Engine, a registry and a base image, where there are none
	@$(ENGINE) start

engine-stop: ## end what engine-start started
	@$(ENGINE) stop

debug-base: engine-start ## what `mlserve debug` lays over an image: a shell, strace, gdb, curl
	@$(ENGINE) debug-base

engine-env: ## NAME=value lines a shell can export
	@$(ENGINE) env

clean: engine-stop ## remove everything a run left
	@rm -rf state _docs _proc build dist *.egg-info
