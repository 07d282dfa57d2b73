#!/bin/sh
# Everything that can be said about the code without running it.
set -eu
cd "$(dirname "$0")/.."
cargo fmt --all -- --check
cargo clippy --workspace --all-targets --locked -- -D warnings
# Their pure part also compiles for this machine, which needs no other target.
cargo fmt --manifest-path=plugins/Cargo.toml --all -- --check
cargo clippy --manifest-path=plugins/Cargo.toml --target-dir=target/plugins-host --all-targets --locked -- -D warnings
if command -v shellcheck >/dev/null 2>&1; then
    shellcheck scripts/*.sh .ci/run cli/src/setup.sh
else
    echo "lint: shellcheck is not installed, so the scripts were not checked"
fi
scripts/check-tree.sh
