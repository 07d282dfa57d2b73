# Each target is one line or one script. `make demo` and `make test` install what is missing.
.PHONY: build plugins demo test lint bench soak clean

build:
	cargo build --locked --package=kiln

plugins:
	scripts/setup-system.sh plugins
	scripts/plugins.sh

demo:
	scripts/setup-system.sh demo
	scripts/demo.sh

test:
	scripts/setup-system.sh test
	scripts/test.sh

lint:
	scripts/lint.sh

bench:
	scripts/setup-system.sh test
	scripts/bench.sh

# What takes too long for every change: 200 cancels at random instants.
soak:
	scripts/setup-system.sh test
	KILN_CANCELS=200 scripts/test.sh --package=kiln-tests --test=cancel

clean:
	cargo clean
