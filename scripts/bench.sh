#!/bin/sh
# What Kiln adds to the same calls of buildah by hand, what its layer cache saves, what a hook and what the record
# costs, with the release binary.
# Figures: docs/performance.md.
set -eu
cd "$(dirname "$0")/.."
cargo build --locked --release --package=kiln --bin=kiln
target=$(cargo metadata --format-version=1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
KILN_BIN=$target/release/kiln cargo bench --locked --package=kiln-tests --bench=overhead --bench=cache
scripts/plugins.sh
KILN_PLUGINS=$target/plugins cargo bench --locked --package=kiln-agent --bench=hooks
eval "$(scripts/test-postgres.sh start durable)"
export KILN_TEST_POSTGRES
cargo bench --locked --package=kiln-orchestrator --bench=record
