#!/bin/sh
# Makes this machine able to run `make demo` or `make test`. Changes nothing that is already there.
#
#   scripts/setup-system.sh demo    what the demo needs
#   scripts/setup-system.sh test    what the demo and the tests need
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

missing_packages() {
    have buildah || echo buildah
    have newuidmap && have newgidmap || echo uidmap
    have slirp4netns || echo slirp4netns
    have docker-registry || echo docker-registry
    static_busybox || echo busybox-static
    have git || echo git
    have cc || echo gcc libc6-dev
    if [ "$purpose" = test ]; then
        have openssl || echo openssl
        have curl || echo curl
        have shellcheck || echo shellcheck
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
    # shellcheck disable=SC2086 # one word per package
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $packages
    case " $packages " in
        *" docker-registry "*) stop_registry_service ;;
    esac
}

# The package starts a registry for the whole machine; we run our own and nobody asked for that one.
stop_registry_service() {
    if have systemctl && systemctl is-enabled --quiet docker-registry 2>/dev/null; then
        say "switching off the docker-registry service that its package just started"
        as_root systemctl disable --quiet --now docker-registry || true
    fi
}

has_range() { # FILE USER
    awk -F: -v user="$2" -v uid="$(id -u "$2")" -v ids="$ids" \
        '($1 == user || $1 == uid) && $3 >= ids { found = 1 } END { exit !found }' "$1" 2>/dev/null
}

# The first id above every range that is given away, rounded up.
free_range() {
    cat /etc/subuid /etc/subgid 2>/dev/null | awk -F: -v ids="$ids" '
        { end = $2 + $3; if (end > top) top = end }
        END { if (top < 200000) top = 200000; print int((top + ids - 1) / ids) * ids }'
}

give_range() { # USER
    if has_range /etc/subuid "$1" && has_range /etc/subgid "$1"; then
        return 0
    fi
    first=$(free_range)
    last=$((first + ids - 1))
    say "giving user $1 the subordinate ids $first to $last, under which its builds run"
    has_range /etc/subuid "$1" || as_root usermod --add-subuids "$first-$last" "$1"
    has_range /etc/subgid "$1" || as_root usermod --add-subgids "$first-$last" "$1"
}

# Builds of root run under the ids of a system user, builds of anybody else under that person's own.
prepare_user() {
    if [ "$(id -u)" -ne 0 ]; then
        give_range "$(id -un)"
        return
    fi
    if ! id kiln >/dev/null 2>&1; then
        say "creating the system user kiln, under whose ids the builds of root run"
        useradd --system --user-group --home-dir /var/lib/kiln --no-create-home --shell /usr/sbin/nologin kiln
    fi
    give_range kiln
}

# slirp4netns, which connects a build to the network, runs as an ordinary user.
open_tun() {
    [ -e /dev/net/tun ] || as_root modprobe tun 2>/dev/null || true
    if [ ! -e /dev/net/tun ]; then
        say "there is no /dev/net/tun; builds need --network none here"
    elif [ "$(stat -c %a /dev/net/tun)" != 666 ]; then
        say "opening /dev/net/tun for ordinary users, as most distributions do"
        as_root chmod 0666 /dev/net/tun
    fi
}

case $purpose in
    demo | test) ;;
    *) fail "usage: $0 demo|test" ;;
esac
have cargo || fail "cargo is missing; install Rust with rustup, then try again"
install_packages
prepare_user
open_tun
say "ready"
