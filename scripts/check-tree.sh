#!/bin/sh
# Refuses what does not belong into the repository: binary files, names of package registries, paths of the
# machine that somebody worked on.
set -eu
cd "$(git rev-parse --show-toplevel)"
status=0

refuse() { # REASON FOUND
    if [ -n "$2" ]; then
        printf '%s:\n%s\n' "$1" "$2" >&2
        status=1
    fi
}

refuse "binary files are tracked" "$(git ls-files --eol | grep -E '^i/-text' || true)"

# Written with brackets, so that this file does not contain the names itself.
hosts='crates[.]io|pypi[.]org|registry[.]npmjs[.]org|proxy[.]golang[.]org|deb[.]debian[.]org|rubygems[.]org'
# Cargo writes the name of its index into the lock file.
refuse "a package registry is named" "$(git grep -nIE "$hosts" -- ':!Cargo.lock' ':!*/Cargo.lock' || true)"

refuse "a path of one machine is named" "$(git grep -nIE '/[w]ork/(main|shared)|/[t]mp/kiln/' || true)"
refuse "the path of this checkout is named" "$(git grep -nIF -e "$(pwd)/" || true)"

exit $status
