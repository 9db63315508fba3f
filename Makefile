# A thin door to meson and the scripts. make, make demo, make check, make bench, make install.
MESON := /usr/bin/meson
PYTHON := /usr/bin/python3
BUILD := build
DESTDIR ?=
prefix ?= /usr/local

export PYTHONDONTWRITEBYTECODE := 1
# Commands for make demo to run in the guest, instead of a shell in the terminal.
ifdef DEMO_CMD
export DEMO_CMD
endif

.PHONY: all setup-build demo check bench torture install clean

all: setup-build
	@test -e $(BUILD)/build.ninja || $(MESON) setup $(BUILD)
	@ninja -C $(BUILD)

setup-build:
	@scripts/setup.sh build

demo:
	@scripts/setup.sh demo
	@test -e $(BUILD)/build.ninja || $(MESON) setup $(BUILD) >/dev/null
	@ninja -C $(BUILD) --quiet
	@$(PYTHON) scripts/demo.py

check:
	@if scripts/setup.sh check; then \
		$(PYTHON) scripts/check.py; \
	else \
		echo "0 passed, 1 failed, 0 skipped"; exit 1; \
	fi

bench: all
	@scripts/setup.sh bench
	@$(PYTHON) bench/bench.py

torture: all
	@BUILD=$(BUILD) scripts/torture.sh

install: all
	@$(MESON) configure $(BUILD) -Dprefix=$(prefix)
	@DESTDIR=$(DESTDIR) $(MESON) install -C $(BUILD)

clean:
	@rm -rf build build-san
