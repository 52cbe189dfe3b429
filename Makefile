# make quickstart: install, then run the example.   make test: install, then run all checks.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The Triton kernels have an environment of their own: transformers takes them wherever they are installed.
KERNELS := .venv-kernels
RUN_KERNELS := $(KERNELS)/bin/python
# DeepSpeed, which is imported wherever it is installed, too: a folder, which its tests alone look into.
DEEPSPEED := .deepspeed
# The newest transformers, which calls caches otherwise than that of constraints.txt: a folder, which these tests alone
# look into. Its own adapter methods ask for a PEFT that is not there yet.
NEWEST := .newest
NEWEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,law corrections own_caches offset cost))
# The site is built from the sources as they stand, without importing them.
SITE := .venv-site
# llama.cpp is built from the source distribution of llama-cpp-python, once for each content of its constraints: its stamp
# has no time to be renewed by.
LLAMA := .venv-llama
LLAMA_BUILT := $(LLAMA)/built-$(shell cksum < constraints-llama.txt | cut -d " " -f 1)
RUN_LLAMA := $(LLAMA)/bin/python
LLAMA_CPP := $(LLAMA)/src/vendor/llama.cpp
# mlx-lm, with mlx's build for a CPU.
MLX := .venv-mlx
RUN_MLX := $(MLX)/bin/python

.PHONY: quickstart test environments lint ratios kernels newest site deepspeed llama mlx

quickstart: $(VENV)/examples
	$(RUN) examples/quickstart.py

test: environments lint ratios site kernels newest
	$(RUN) -m pytest -n 2 --dist loadgroup

# pip keeps one core busy, mostly with compiling what it has installed.
environments:
	$(MAKE) --jobs 2 $(VENV)/dev $(DEEPSPEED)/installed $(NEWEST)/installed $(KERNELS)/kernels $(SITE)/site

kernels: $(KERNELS)/kernels
	$(RUN_KERNELS) -m pytest -n 2 -p tests.kernels.interpreter tests/kernels

newest: $(NEWEST)/installed
	PYTHONPATH=$(NEWEST) $(RUN) -m pytest -n 2 --dist loadgroup $(NEWEST_TESTS)

deepspeed: $(DEEPSPEED)/installed
	$(RUN) -m pytest -n 2 tests/test_distributed.py -k deepspeed

site: $(SITE)/site
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/python -m mkdocs build --quiet --strict

llama: $(LLAMA)/llama
	LLAMA_CPP=$(abspath $(LLAMA_CPP)) $(RUN_LLAMA) -m pytest tests/llama

mlx: $(MLX)/mlx
	$(RUN_MLX) -m pytest tests/on_mlx

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

ratios: $(VENV)/dev
	$(RUN) benchmarks/ratios.py

# A stamp for each set of packages, renewed when what they are made from changes.
$(VENV)/examples $(VENV)/dev: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[$(@F)]"
	touch $@

# mamba-ssm is built without its CUDA part, for which there may be no compiler, and installed without what only that needs.
$(KERNELS)/kernels: pyproject.toml constraints.txt constraints-kernels.txt
	test -x $(RUN_KERNELS) || $(PYTHON) -m venv $(KERNELS)
	$(RUN_KERNELS) -m pip install --quiet --constraint constraints.txt --constraint constraints-kernels.txt \
		--editable ".[fla]" triton einops setuptools wheel packaging pytest pytest-timeout pytest-xdist hypothesis
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(RUN_KERNELS) -m pip install --quiet --no-build-isolation \
		--no-deps --constraint constraints-kernels.txt mamba-ssm
	touch $@

$(SITE)/site: constraints.txt
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material "mkdocstrings[python]" \
		mkdocs-include-markdown-plugin ruff
	touch $@

# Without its dependencies, of which the others are there, and without its kernels.
$(DEEPSPEED)/installed: $(VENV)/dev
	$(RUN) -m pip install --quiet --target $(DEEPSPEED) --upgrade --no-build-isolation --no-deps \
		--constraint constraints.txt deepspeed einops hjson msgpack py-cpuinfo
	touch $@

# Without its dependencies, which are there.
$(NEWEST)/installed: $(VENV)/dev constraints-newest.txt
	$(RUN) -m pip install --quiet --target $(NEWEST) --upgrade --no-deps --constraint constraints-newest.txt transformers
	touch $@

$(LLAMA)/llama: pyproject.toml constraints.txt $(LLAMA_BUILT)
	$(RUN_LLAMA) -m pip install --quiet --constraint constraints.txt --constraint constraints-llama.txt \
		--editable ".[examples,llama]" pytest pytest-timeout pytest-xdist hypothesis
	touch $@

$(MLX)/mlx: pyproject.toml constraints.txt constraints-mlx.txt
	test -x $(RUN_MLX) || $(PYTHON) -m venv $(MLX)
	$(RUN_MLX) -m pip install --quiet --constraint constraints.txt --constraint constraints-mlx.txt \
		--editable . "mlx[cpu]" mlx-lm pytest pytest-timeout pytest-xdist hypothesis
	touch $@

# For any CPU and without what tests have no use for; -O1, since compiling is what takes time here. The Python package is
# installed without a build of its own.
$(LLAMA_BUILT):
	test -x $(RUN_LLAMA) || $(PYTHON) -m venv $(LLAMA)
	$(RUN_LLAMA) -m pip install --quiet --constraint constraints-llama.txt cmake
	rm -rf $(LLAMA)/src
	mkdir $(LLAMA)/src
	$(RUN_LLAMA) -m pip download --quiet --no-deps --no-binary llama-cpp-python --constraint constraints-llama.txt \
		--dest $(LLAMA)/src llama-cpp-python
	tar xzf $(LLAMA)/src/llama_cpp_python-*.tar.gz --strip-components 1 --directory $(LLAMA)/src
	$(LLAMA)/bin/cmake -S $(LLAMA_CPP) -B $(LLAMA_CPP)/build --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF \
		-DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	$(LLAMA)/bin/cmake --build $(LLAMA_CPP)/build --target llama-server --parallel 2
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(RUN_LLAMA) -m pip install --quiet $(LLAMA)/src
	ln -sfn $(abspath $(LLAMA_CPP))/build/bin \
		"$$($(RUN_LLAMA) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/llama_cpp/lib"
	touch $@
