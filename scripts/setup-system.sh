#!/bin/sh
# Makes this machine able to run `make demo` or `make test`. Changes nothing that is already there.
#
#   scripts/setup-system.sh demo    what the demo needs
#   scripts/setup-system.sh test    what the demo and the tests need
#   scripts/setup-system.sh plugins what `make plugins` needs
set -eu

purpose=${1:-demo}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
# Images use ids up to 65535.
ids=65536

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        fail "this needs root, and there is no sudo; run as root: $*"
    fi
}

# Debian's package `busybox` is linked dynamically; a base image of one file needs the static one.
static_busybox() {
    have busybox && ! ldd "$(command -v busybox)" >/dev/null 2>&1
}

# rustup has the standard library for plugins where it can fetch it; else Debian's compiler builds it.
has_plugin_target() {
    [ -d "$(rustc --print=sysroot)/lib/rustlib/wasm32-wasip2" ] ||
        { have rustup && timeout 120 rustup --quiet target add wasm32-wasip2 >/dev/null 2>&1; }
}

missing_for_plugins() {
    has_plugin_target && return 0
    [ -d /usr/lib/wasm32-wasi ] || echo wasi-libc
    # Another package's /usr/bin/rustc may be older than the cargo in use.
    dpkg -s rustc-web >/dev/null 2>&1 || echo rustc-web
    [ -d /usr/lib/rustlib/src ] || echo rust-web-src
}

# Its programs are in no PATH.
has_postgres() {
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1
}

# The package makes a database for the whole machine and starts its server; the tests have their own.
no_main_cluster() {
    file=/etc/postgresql-common/createcluster.conf
    ! grep -Eqs '^create_main_cluster *= *false' "$file" || return 0
    as_root mkdir -p "${file%/*}"
    echo 'create_main_cluster = false' | as_root tee -a "$file" >/dev/null
}

missing_packages() {
    if [ "$purpose" = plugins ]; then
        missing_for_plugins
        return 0
    fi
    have buildah || echo buildah
    have newuidmap && have newgidmap || echo uidmap
    have slirp4netns || echo slirp4netns
    have docker-registry || echo docker-registry
    static_busybox || echo busybox-static
    have git || echo git
    have cc || echo gcc libc6-dev
    missing_for_plugins
    if [ "$purpose" = test ]; then
        have openssl || echo openssl
        have skopeo || echo skopeo
        have ip || echo iproute2
        have curl || echo curl
        # The server itself; what is in the search path wants to be root.
        [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || echo rabbitmq-server
        # For promtool.
        have promtool || echo prometheus
        have shellcheck || echo shellcheck
        has_postgres || echo postgresql
    fi
}

install_packages() {
    packages=$(missing_packages | tr '\n' ' ')
    [ -n "$packages" ] || return 0
    if ! have apt-get; then
        fail "please install these Debian packages, or what your distribution calls them: $packages"
    fi
    say "installing: $packages"
    as_root apt-get -qq update || say "cannot refresh the package lists; trying with the old ones"
    case " $packages " in
        *" postgresql "*) no_main_cluster ;;
    esac
    # shellcheck disable=SC2086 # one word per package
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $packages
    case " $packages " in
        *" docker-registry "*) stop_service docker-registry ;;
    esac
    case " $packages " in
        *" prometheus "*) stop_service prometheus ;;
    esac
    case " $packages " in
        *" rabbitmq-server "*) stop_service rabbitmq-server ;;
    esac
}

# The packages start servers for the whole machine; we run our own, if any, and nobody asked for those.
stop_service() { # NAME
    if have systemctl && systemctl is-enabled --quiet "$1" 2>/dev/null; then
        say "switching off the $1 service that its package just started"
        as_root systemctl disable --quiet --now "$1" || true
    elif ! have systemctl && [ -x "/etc/init.d/$1" ]; then
        as_root "/etc/init.d/$1" stop >/dev/null 2>&1 || true
    fi
}

has_range() { # FILE USER
    awk -F: -v user="$2" -v uid="$(id -u "$2")" -v ids="$ids" \
        '($1 == user || $1 == uid) && $3 >= ids { found = 1 } END { exit !found }' "$1" 2>/dev/null
}

prepared() { # USER
    has_range /etc/subuid "$1" && has_range /etc/subgid "$1" &&
        { [ ! -e /dev/net/tun ] || [ "$(stat -c %a /dev/net/tun)" = 666 ]; }
}

# Builds of root run under the ids of the system user `kiln`, builds of anybody else under that person's own. The
# script is the one that `kiln doctor --print-setup` shows.
prepare_user() {
    user=$(id -un)
    [ "$(id -u)" -ne 0 ] || user=kiln
    if ! id "$user" >/dev/null 2>&1 || ! prepared "$user"; then
        say "preparing user $user: subordinate ids, /dev/net/tun"
        as_root sh "$(dirname "$0")/../cli/src/setup.sh" "$user"
    fi
}

case $purpose in
    demo | test | plugins) ;;
    *) fail "usage: $0 demo|test|plugins" ;;
esac
have cargo || fail "cargo is missing; install Rust with rustup, then try again"
install_packages
[ "$purpose" = plugins ] || prepare_user
say "ready"
