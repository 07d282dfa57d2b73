#!/bin/sh
# Everything that can be said about the code without running it.
set -eu
cd "$(dirname "$0")/.."
cargo fmt --all -- --check
cargo clippy --workspace --all-targets --locked -- -D warnings
if command -v shellcheck >/dev/null 2>&1; then
    shellcheck scripts/*.sh .ci/run cli/src/setup.sh
else
    echo "lint: shellcheck is not installed, so the scripts were not checked"
fi
scripts/check-tree.sh
