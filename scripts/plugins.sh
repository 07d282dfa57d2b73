#!/bin/sh
# Builds the plugins for wasm32-wasip2, from source, into target/plugins. `scripts/setup-system.sh plugins` installs
# what is missing.
set -eu
cd "$(dirname "$0")/.."
target=$(cargo metadata --format-version=1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
triple=wasm32-wasip2

build() {
    cargo build --manifest-path=plugins/Cargo.toml --locked --release --target=$triple \
        --target-dir="$target/plugins-build" "$@"
}

sysroot=$(rustc --print=sysroot)
if [ -d "$sysroot/lib/rustlib/$triple" ]; then
    build
else
    # Debian's compiler has the source of the standard library; the linker for components comes with the toolchain.
    host=$(rustc --version --verbose | sed -n 's/^host: //p')
    PATH=$sysroot/lib/rustlib/$host/bin:$PATH RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 \
        RUSTFLAGS=-L/usr/lib/wasm32-wasi build -Zbuild-std=std,panic_abort
fi

mkdir -p "$target/plugins"
for built in "$target/plugins-build/$triple"/release/*.wasm; do
    name=$(basename "$built" | tr _ -)
    cp "$built" "$target/plugins/$name.new"
    mv "$target/plugins/$name.new" "$target/plugins/$name"
    echo "plugins: $target/plugins/$name"
done
