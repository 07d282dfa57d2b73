#!/bin/bash
# Shows Kiln at work: a build, a failing and a cancelled one, a published and a denied one, one that waits for its
# registry, and one that a server gave up and then tried again. Needs no network and leaves no process.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

example=examples/demo
results=target/demo
scratch=$(mktemp -d)
kiln=
registry_pid=
build_pid=
server_pid=

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
    stop "$server_pid"
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
start_registry() { # PORT
    cat >"$scratch/registry.yml" <<YAML
version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $scratch/registry}}
http: {addr: "127.0.0.1:$1"}
YAML
    : >"$scratch/registry.log"
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

stop_registry() {
    stop "$registry_pid"
    registry_pid=
}

# Without curl, which the demo does not need otherwise.
scrape() { # ADDRESS
    exec 3<>"/dev/tcp/${1%:*}/${1##*:}"
    printf 'GET /metrics HTTP/1.0\r\nHost: %s\r\n\r\n' "$1" >&3
    cat <&3
    exec 3>&-
}

# Waits until FILE has TEXT.
await() { # FILE TEXT
    for _ in $(seq 600); do
        ! grep -q -- "$2" "$1" || return 0
        sleep 0.1
    done
    fail "no \`$2\` came: $(cat "$1")"
}

retried_build() {
    bold "6. A registry that is away for a moment"
    say "$ kiln build -t $registry/demo/site:1.0.2 …   (while the registry is stopped)"
    stop_registry
    "${command[@]}" --secret "id=signing-key,src=$scratch/signing-key" --build-arg GREETING=hello \
        -t "$registry/demo/site:1.0.2" "$example" >"$scratch/retried.log" 2>&1 &
    build_pid=$!
    await "$scratch/retried.log" "attempt 2 begins in"
    start_registry "${registry##*:}"
    local code=0
    wait "$build_pid" || code=$?
    build_pid=
    grep -e '^kiln: attempt' -e '^kiln: wrote' "$scratch/retried.log" | indented
    [ "$code" -eq 0 ] || fail "$(cat "$scratch/retried.log")"
    say "What happened: a registry that does not answer is nobody's fault, so the attempt was repeated after a pause."
}

replayed_build() {
    bold "7. A server, a dead letter and its replay, and where the metrics are"
    say "$ kiln up --metrics 127.0.0.1:0 &"
    local ask=(--server "unix:$scratch/state/api/kiln.sock") code=0
    # What the server may give to builds that name it.
    (umask 077 && mkdir -p "$scratch/state/secrets")
    cp "$scratch/signing-key" "$scratch/state/secrets/signing-key"
    "$kiln" up --metrics 127.0.0.1:0 --data "$scratch/state" --config "$scratch/kiln.toml" >"$scratch/up.log" 2>&1 &
    server_pid=$!
    await "$scratch/up.log" "metrics on"
    indented <"$scratch/up.log"
    stop_registry
    say "$ kiln build --server unix:… --attempts 1 -t $registry/demo/site:1.0.3 $example   (the registry is stopped again)"
    "$kiln" build "${ask[@]}" --config "$scratch/kiln.toml" --attempts 1 --secret id=signing-key,server=signing-key \
        --build-arg GREETING=hello -t "$registry/demo/site:1.0.3" "$example" >"$scratch/dead.log" 2>&1 || code=$?
    tail -n 4 "$scratch/dead.log" | indented
    [ "$code" -eq 5 ] || fail "a build whose registry is gone must exit with 5, not $code: $(cat "$scratch/dead.log")"
    say "$ kiln dead ls"
    "$kiln" dead ls "${ask[@]}" | tee "$scratch/dead.list" | indented
    local id
    id=$(grep -o '[0-9a-f]\{8\}-[0-9a-f-]\{27\}' "$scratch/dead.list" | head -n 1)
    start_registry "${registry##*:}"
    say "$ kiln dead replay $id   (the registry is back)"
    "$kiln" dead replay "${ask[@]}" "$id" | indented
    for _ in $(seq 600); do
        "$kiln" show "${ask[@]}" "$id" >"$scratch/shown"
        ! grep -q SUCCESS "$scratch/shown" || break
        sleep 0.1
    done
    grep -q SUCCESS "$scratch/shown" || fail "$(cat "$scratch/shown")"
    indented <"$scratch/shown"
    local metrics
    metrics=$(sed -n 's|.*metrics on http://\([0-9.:]*\)/metrics.*|\1|p' "$scratch/up.log")
    say "$ curl http://$metrics/metrics   (some of it)"
    scrape "$metrics" >"$scratch/metrics"
    grep -e '^kiln_dead_lettered_total.* [1-9]' -e '^kiln_builds_finished_total.* [1-9]' "$scratch/metrics" | indented
    stop "$server_pid"
    server_pid=
    say "What happened: the only attempt failed for no fault of the build, so the record kept it as a dead letter; the"
    say "replay ran it again, under the same id, and moved the tag. kiln ls, show, logs, queue and cancel ask the same server; docs/metrics.md lists what Prometheus can scrape."
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
start_registry 0
push_base_image
write_config
good_build
failing_build
cancelled_build
published_build
denied_build
retried_build
replayed_build
bold "Done. Nothing of this runs any more; the results are in $results."
