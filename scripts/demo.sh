#!/bin/bash
# Shows Kiln at work: a build, a failing and a cancelled one, a published and a denied one. Needs no network and
# leaves no process.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

example=examples/demo
results=target/demo
scratch=$(mktemp -d)
kiln=
registry_pid=
build_pid=

bold() { if [ -t 1 ]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi; }
say() { printf '%s\n' "$*"; }
fail() { printf 'demo: %s\n' "$*" >&2; exit 1; }

stop() { # PID
    if [ -n "$1" ] && kill "$1" 2>/dev/null; then
        wait "$1" 2>/dev/null || true
    fi
}

cleanup() {
    stop "$build_pid"
    stop "$registry_pid"
    if [ -d "$scratch/state" ]; then
        cp -r "$scratch/state/logs" "$results/logs" 2>/dev/null || true
        "$kiln" prune --all --data "$scratch/state" >/dev/null 2>&1 || true
    fi
    # buildah keeps the root of an image read-only.
    chmod -R u+w "$scratch" 2>/dev/null || true
    rm -rf "$scratch"
}

# A registry of our own on a free port of the loopback interface, with its files in the scratch directory.
start_registry() {
    cat >"$scratch/registry.yml" <<YAML
version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $scratch/registry}}
http: {addr: "127.0.0.1:0"}
YAML
    docker-registry serve "$scratch/registry.yml" >"$scratch/registry.log" 2>&1 &
    registry_pid=$!
    for _ in $(seq 100); do
        registry=$(sed -n 's/.*listening on \(127\.0\.0\.1:[0-9]*\).*/\1/p' "$scratch/registry.log")
        [ -z "$registry" ] || return 0
        kill -0 "$registry_pid" 2>/dev/null || break
        sleep 0.1
    done
    fail "the registry did not start: $(cat "$scratch/registry.log")"
}

# busybox as a base image: one program under many names.
push_base_image() {
    local base=$scratch/base applet
    mkdir -p "$base/bin" "$base/tmp" "$base/etc"
    chmod 1777 "$base/tmp"
    cp "$(command -v busybox)" "$base/bin/busybox"
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$base/bin/$applet"
    done
    printf 'FROM scratch\nCOPY . /\nCMD ["sh"]\n' >"$scratch/Dockerfile.base"
    printf '{"default":[{"type":"insecureAcceptAnything"}]}\n' >"$scratch/policy.json"
    mkdir "$scratch/home"
    local -x HOME=$scratch/home TMPDIR=$scratch XDG_RUNTIME_DIR=$scratch/home
    local buildah=(buildah --storage-driver vfs --root "$scratch/store" --runroot "$scratch/run")
    "${buildah[@]}" bud --quiet --signature-policy "$scratch/policy.json" \
        --tag base -f "$scratch/Dockerfile.base" "$base" >/dev/null
    "${buildah[@]}" push --quiet --signature-policy "$scratch/policy.json" \
        --tls-verify=false base "docker://$registry/library/busybox:1"
}

write_config() {
    cat >"$scratch/kiln.toml" <<TOML
[build]
grace = "2s"

[[registry]]
prefix = "docker.io"

[[registry.mirror]]
location = "$registry"
insecure = true

[[registry]]
prefix = "$registry"
insecure = true
TOML
}

build() { # ARGUMENTS
    "${command[@]}" "$@" "$example"
}

indented() { sed 's/^/    /'; }

good_build() {
    bold "1. A build"
    say "$ kiln build --secret id=signing-key,src=… --build-arg GREETING=hello -o docker-archive:$results/image.tar $example"
    printf 'not-for-your-eyes-%s' "$$" >"$scratch/signing-key"
    build --secret "id=signing-key,src=$scratch/signing-key" --build-arg GREETING=hello \
        --metadata-file "$results/metadata.json" -o "docker-archive:$results/image.tar" 2>&1 | indented
    say "What happened: the context was packed without what .dockerignore names; the base image came from the"
    say "registry; buildah ran inside a sealed slot that saw the context and nothing else of this machine; the"
    say "image was hashed and written by one rename. The secret was shown as *** and is in no layer."
    ! tar xOf "$results/image.tar" | grep -aq "not-for-your-eyes-$$" || fail "the secret is in the image"
    say "Where to look: $results/image.tar (docker load -i, podman load -i, tar tvf), $results/metadata.json,"
    say "$results/logs when the demo is over, and the Dockerfile in $example."
}

failing_build() {
    bold "2. A build that fails"
    say "$ kiln build -f $example/Dockerfile.fails $example"
    local code=0
    build -f "$example/Dockerfile.fails" >"$scratch/fails.log" 2>&1 || code=$?
    indented <"$scratch/fails.log"
    [ "$code" -eq 1 ] || fail "a failed build must exit with 1, not $code"
    say "What happened: RUN ended with code 3. Kiln names the phase, the reason and the line, repeats the end of"
    say "the log, exits with 1, and wrote no image."
}

cancelled_build() {
    bold "3. A build that is cancelled"
    say "$ kiln build -f $example/Dockerfile.slow $example   (and SIGTERM, as Jenkins sends it)"
    "${command[@]}" -f "$example/Dockerfile.slow" "$example" >"$scratch/slow.log" 2>&1 &
    build_pid=$!
    for _ in $(seq 300); do
        ! grep -q "^working" "$scratch/slow.log" || break
        kill -0 "$build_pid" 2>/dev/null || fail "it ended by itself: $(cat "$scratch/slow.log")"
        sleep 0.1
    done
    local began=$SECONDS code=0
    kill -TERM "$build_pid"
    wait "$build_pid" || code=$?
    build_pid=
    indented <"$scratch/slow.log"
    [ "$code" -eq 130 ] || fail "a cancelled build must exit with 130, not $code"
    local left
    left=$(find "$scratch/state/jobs" "$scratch/state/store/jobs" -mindepth 1 | wc -l)
    [ "$left" -eq 0 ] || fail "the cancelled build left $left files"
    say "What happened: within $((SECONDS - began)) s everything that RUN had started was gone, also the helper that had"
    say "left the process group, because the kernel ends a PID namespace as a whole. Exit code 130; no job files."
}

publish() { # TAG
    build --secret "id=signing-key,src=$scratch/signing-key" --build-arg GREETING=hello \
        --plugin "$policy" -t "$registry/demo/site:$1" >"$scratch/published.log" 2>&1 ||
        fail "$(cat "$scratch/published.log")"
}

published_build() {
    bold "4. A build that is published, under a policy"
    say "$ kiln build -t $registry/demo/site:1.0.0 --plugin tag-policy.wasm,settings=tags.json $example"
    printf '{"deny": ["latest"], "semver": "release"}\n' >"$scratch/tags.json"
    policy=$target/plugins/tag-policy.wasm,settings=$scratch/tags.json
    publish 1.0.0
    indented <"$scratch/published.log"
    say "$ kiln build -t $registry/demo/site:1.0.1 …   (the same again, under another tag)"
    publish 1.0.1
    grep -e '^kiln: cached' -e '^kiln: wrote' "$scratch/published.log" | indented
    grep -q '^kiln: cached [1-9]' "$scratch/published.log" || fail "no step of the second build was cached"
    local link=$scratch/registry/docker/registry/v2/repositories/demo/site/_manifests/tags/1.0.0/current/link
    say "What happened: the second build took over what the first one made. The image went to the registry by digest, the policy"
    say "let it pass, the record said that it may be published, and only then the tag moved: it is $(cat "$link")."
}

denied_build() {
    bold "5. A tag that the policy denies"
    say "$ kiln build -t $registry/demo/site:latest --plugin tag-policy.wasm,settings=tags.json $example"
    local code=0
    build --secret "id=signing-key,src=$scratch/signing-key" --plugin "$policy" \
        -t "$registry/demo/site:latest" >"$scratch/denied.log" 2>&1 || code=$?
    indented <"$scratch/denied.log"
    [ "$code" -eq 3 ] || fail "a denied build must exit with 3, not $code"
    [ ! -e "$scratch/registry/docker/registry/v2/repositories/demo/site/_manifests/tags/latest" ] ||
        fail "the denied tag is there"
    say "What happened: the policy spoke before anything was built. Exit code 3; the registry has no such tag."
}

trap cleanup EXIT
bold "Preparing: compile kiln, start a registry on the loopback interface, push a base image to it"
cargo build --quiet --locked --package=kiln --bin=kiln
target=$(cargo metadata --format-version=1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
kiln=$target/debug/kiln
scripts/plugins.sh >"$scratch/plugins.log" 2>&1 || fail "$(tail -n 20 "$scratch/plugins.log")"
policy=
command=("$kiln" build --data "$scratch/state" --config "$scratch/kiln.toml" --progress plain)
rm -rf "$results"
mkdir -p "$results"
start_registry
push_base_image
write_config
good_build
failing_build
cancelled_build
published_build
denied_build
bold "Done. Nothing of this runs any more; the results are in $results."
