#!/bin/sh
# Every test of the workspace. Arguments go to the test runner.
set -eu
cd "$(dirname "$0")/.."
# The suites run the `kiln` of this build. Everything at once: the same libraries for the command and the tests.
cargo build --locked --workspace --bins --tests
# Some suites load plugins. Their rules are tested on this machine's target.
scripts/plugins.sh
cargo test --quiet --manifest-path=plugins/Cargo.toml --target-dir=target/plugins-host --locked --package=tag-policy
target=$(cargo metadata --format-version=1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
KILN_BIN=$target/debug/kiln
export KILN_BIN
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --locked --no-fail-fast "$@"
else
    # What .config/nextest.toml does.
    eval "$(scripts/test-postgres.sh start)"
    export KILN_TEST_POSTGRES
    cargo test --workspace --locked --no-fail-fast "$@"
fi
