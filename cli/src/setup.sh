#!/bin/sh
# Prepares this machine for sealed builds. Run it as root; running it again changes nothing.
#   sh setup.sh          prepares the system user `kiln`, under whose ids root's builds run
#   sh setup.sh USER     prepares USER, who then runs builds without root
set -eu
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
if [ "$(id -u)" -ne 0 ]; then
    echo "run it as root" >&2
    exit 1
fi
user=${1:-kiln}

# 1. The user. It owns nothing and cannot log in.
if ! getent passwd "$user" >/dev/null; then
    if [ "$user" != kiln ]; then
        echo "there is no user $user" >&2
        exit 1
    fi
    useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$user"
    echo "made the system user $user"
fi

# 2. 65536 subordinate user and group ids behind all ranges that are given out already.
next_free() {
    awk -F: 'BEGIN { next_id = 100000 } { end = $2 + $3; if (end > next_id) next_id = end } END { print next_id }' \
        /etc/subuid /etc/subgid 2>/dev/null || echo 100000
}
has_range() {
    awk -F: -v user="$user" -v uid="$(id -u "$user")" \
        '($1 == user || $1 == uid) && $3 >= 65536 { found = 1 } END { exit !found }' "$1" 2>/dev/null
}
for file in /etc/subuid /etc/subgid; do
    [ -e "$file" ] || : >"$file"
done
if ! has_range /etc/subuid || ! has_range /etc/subgid; then
    first=$(next_free)
    last=$((first + 65535))
    has_range /etc/subuid || usermod --add-subuids "$first-$last" "$user"
    has_range /etc/subgid || usermod --add-subgids "$first-$last" "$user"
    echo "gave $user the subordinate ids $first-$last"
fi

# 3. The tun device, without which RUN has no network of its own.
if [ ! -c /dev/net/tun ]; then
    modprobe tun 2>/dev/null || echo "load the tun module by hand: RUN will need --network=none until then"
fi
if [ -c /dev/net/tun ] && [ "$(stat -c %a /dev/net/tun)" != 666 ]; then
    chmod 666 /dev/net/tun
    echo "made /dev/net/tun accessible (udev does this on most systems)"
fi

# 4. User namespaces, where the kernel asks for permission.
knob=/proc/sys/kernel/unprivileged_userns_clone
if [ -e "$knob" ] && [ "$(cat "$knob")" = 0 ]; then
    sysctl -w kernel.unprivileged_userns_clone=1
    echo kernel.unprivileged_userns_clone=1 >/etc/sysctl.d/60-kiln.conf
fi

# 5. Memory and CPU limits: systemd hands cgroup controllers to the services of a user.
if [ -d /run/systemd/system ] && [ ! -e /etc/systemd/system/user@.service.d/kiln.conf ]; then
    mkdir -p /etc/systemd/system/user@.service.d
    printf '[Service]\nDelegate=cpu memory pids\n' >/etc/systemd/system/user@.service.d/kiln.conf
    systemctl daemon-reload
    echo "delegated cgroup controllers to user services"
fi
echo "done: run 'kiln doctor' to see what this machine offers"
