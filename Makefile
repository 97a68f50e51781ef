# Everything runs in .venv, made from nothing but Python (3.10 or newer); choose one with make PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers

VERSIONS ?= oldest newest

.PHONY: sample peers test test-slow matrix fuzz research check sass bench gpu bench-gpu bench-step figures examples diffusers-suite clean

sample: $(READY)  ## draw sixteen moons through all 1000 steps: samples.png
	$(BIN)/ddpm-fast sample --seeds 0-15 --out samples.png

peers: $(PEERS)  ## the libraries whose models can be accelerated; the tests compare with them

test: $(READY) $(PEERS)  ## every test that needs no GPU; those that do are counted as skipped
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(READY)  ## the noise on 10^10 draws and more: minutes
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m benchmarks.noise

research: $(READY)  ## ideas that lost: their tests, and their tables in docs/kernels.md and docs/speculation.md measured anew
	$(BIN)/python -m pytest research
	$(BIN)/python -m research.sass_variants
	$(BIN)/python -m research.speculation_ideas
	$(BIN)/python -m benchmarks.tables

matrix: $(VERSIONS:%=.venv-%/.ready)  ## every test with the oldest and the newest releases that setup.py allows: tests/versions
	for name in $(VERSIONS); do .venv-$$name/bin/python -m pytest -n auto --dist loadfile || exit 1; done

fuzz: $(READY)  ## 20,000 random configurations and 3,000 damaged files: two minutes
	DDPM_FAST_FUZZ_CONFIGURATIONS=20000 DDPM_FAST_FUZZ_FILES=3000 $(BIN)/python -m pytest -n auto tests/test_fuzz.py

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sass: $(READY)  ## what every kernel costs, from its machine code, for five GPUs; fails where a budget is exceeded
	$(BIN)/python -m benchmarks.machine_code
	$(BIN)/python -m benchmarks.machine_code.layers

# Takes .venv where there is one, else the Python that is there: a machine with a GPU may have no network.
gpu:  ## everything that waits for a GPU, in two calls of six minutes: make gpu, then make gpu AFTER=stage
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.on_gpu $(if $(AFTER),--after $(AFTER)) $(if $(OUT),--out $(OUT))

bench-step: $(READY)  ## the fused step on a GPU, under eight minutes
	$(BIN)/python -m benchmarks.step

bench-gpu: $(PEERS)  ## whole walks on a GPU, under nine minutes a part: make bench-gpu PART=cifar-1-bfloat16
	$(BIN)/python -m benchmarks.walks $(if $(PART),--part $(PART),--list)
	$(if $(PART),$(BIN)/python -m benchmarks.walks.plot && $(BIN)/python -m benchmarks.tables)

figures: $(READY)  ## every picture of docs/walk.md, minutes; STUDY=1 measures anew what they show, half an hour
	$(if $(STUDY),$(BIN)/python -m benchmarks.study && $(BIN)/python -m benchmarks.study.digits_quality)
	$(BIN)/python -m benchmarks.study.figures
	$(BIN)/python -m benchmarks.tables

diffusers-suite: $(PEERS)  ## diffusers' own scheduler tests on our classes: make diffusers-suite TESTS=path-to-a-checkout
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torchsde
	$(BIN)/python -m benchmarks.libraries.diffusers_suite $(TESTS)

bench: $(PEERS)  ## benchmarks for a CPU; GUIDED=path-to-a-checkout adds guided-diffusion
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks.step.host
	$(BIN)/python -m benchmarks.network.overhead
	$(BIN)/python -m benchmarks.libraries $(if $(GUIDED),--guided-diffusion $(GUIDED))
	$(BIN)/python -m benchmarks.network.hoisting $(if $(GUIDED),--guided-diffusion $(GUIDED))
	$(BIN)/python -m benchmarks.network.building
	$(BIN)/python -m benchmarks.network.precision
	$(BIN)/python -m benchmarks.speculation
	$(BIN)/python -m benchmarks.speculation --calls
	$(BIN)/python -m benchmarks.speculation --every
	$(BIN)/python -m benchmarks.speculation.plot
	$(BIN)/python -m benchmarks.network.replay
	$(BIN)/python -m benchmarks.walks --part cpu
	$(BIN)/python -m benchmarks.walks.plot

# denoising-diffusion-pytorch imports torchvision for its trainer; a stand-in will do here.
examples: $(PEERS)  ## models of other libraries before and after; GUIDED=path-to-a-checkout adds guided-diffusion
	$(BIN)/python examples/with_diffusers.py
	$(BIN)/python -c "from benchmarks.common import standins; standins.run('examples/with_lucidrains.py')"
	$(BIN)/python examples/with_your_own_network.py
	$(if $(GUIDED),PYTHONPATH=$(GUIDED) $(BIN)/python examples/with_guided_diffusion.py)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

# As $(READY) and $(PEERS).
.venv-%/.ready: tests/versions/%.txt setup.py
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -c $< -e '.[test,bench]' diffusers accelerate ema-pytorch
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -c $< --no-deps denoising-diffusion-pytorch pytorch-fid
	touch $@

# denoising-diffusion-pytorch names packages that sampling does not need and that would replace torch.
$(PEERS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt diffusers accelerate ema-pytorch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps denoising-diffusion-pytorch pytorch-fid
	touch $(PEERS)

clean:  ## remove what was built
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
