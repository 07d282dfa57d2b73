#!/bin/sh
# A PostgreSQL for tests, without a port, and without durability unless that is asked for. It ends with the process that started it.
#
#   scripts/test-postgres.sh start [durable]
#                                         writes KILN_TEST_POSTGRES=FOLDER to $NEXTEST_ENV, or prints it
#   scripts/test-postgres.sh restart FOLDER
set -eu

self=$(realpath "$0")
fail() { printf 'test-postgres: %s\n' "$*" >&2; exit 1; }

bin=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
[ -x "$bin/initdb" ] || bin=$(pg_config --bindir 2>/dev/null) || true
[ -x "$bin/initdb" ] ||
    fail "there is no initdb; install PostgreSQL with scripts/setup-system.sh test"

# The server refuses to run as root. The user is the one under whose ids builds of root run.
unprivileged() {
    if [ "$(id -u)" -eq 0 ]; then
        setpriv --reuid=kiln --regid="$(id -g kiln)" --clear-groups -- "$@"
    else
        "$@"
    fi
}

start() {
    folder=$(mktemp -d "${TMPDIR:-/tmp}/kiln-pg.XXXXXX")
    [ "$(id -u)" -ne 0 ] || chown kiln: "$folder"
    cd "$folder"
    unprivileged "$bin/initdb" --pgdata="$folder/data" --username=kiln --auth=trust --encoding=UTF8 --no-locale \
        --no-sync >"$folder/initdb.log"
    unprivileged tee -a "$folder/data/postgresql.conf" >/dev/null <<END
listen_addresses = ''
unix_socket_directories = '$folder'
max_connections = 300
shared_buffers = 64MB
# One round of the checkpointer per CREATE DATABASE is enough.
checkpoint_timeout = 1h
max_wal_size = 4GB
END
    # One role needs its password.
    sed -i '1i local all guarded scram-sha-256' "$folder/data/pg_hba.conf"
    [ "$1" = durable ] || unprivileged tee -a "$folder/data/postgresql.conf" >/dev/null <<END
fsync = off
full_page_writes = off
synchronous_commit = off
END
    # Nobody waits for the output of what stays.
    setsid "$self" guard "$PPID" "$folder" </dev/null >/dev/null 2>&1 &
    unprivileged "$bin/pg_ctl" --pgdata="$folder/data" --log="$folder/log" --wait --silent start ||
        fail "the server does not start: $(tail -n 5 "$folder/log")"
    answer=KILN_TEST_POSTGRES=$folder
    if [ -n "${NEXTEST_ENV:-}" ]; then
        echo "$answer" >>"$NEXTEST_ENV"
    else
        echo "$answer"
    fi
}

guard() { # PID FOLDER
    tail --pid="$1" -f /dev/null
    unprivileged "$bin/pg_ctl" --pgdata="$2/data" --mode=immediate --wait stop || true
    rm -rf "$2"
}

case ${1:-} in
    start) start "${2:-}" ;;
    guard) guard "$2" "$3" ;;
    restart)
        cd "$2"
        unprivileged "$bin/pg_ctl" --pgdata="$2/data" --log="$2/log" --mode=immediate --wait --silent restart
        ;;
    *) fail "usage: $0 start [durable] | restart FOLDER" ;;
esac
