# Sourced by the scripts of packaging/, image/ and tests/system/: where Debian comes from, and who may make trees of it.

say() { printf '%s\n' "${SAY:-packaging}: $*"; }
fail() {
    printf '%s\n' "${SAY:-packaging}: $*" >&2
    exit 1
}

# Trees and images are made as root: their files belong to many users.
need_root() {
    [ "$(id -u)" = 0 ] || fail "needs root: run it with sudo, or in a container"
}

# Each as PROGRAM:PACKAGE. Says all that is missing at once.
need_programs() {
    absent=""
    for wanted in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${wanted%%:*}" >/dev/null 2>&1 || absent="$absent ${wanted#*:}"
    done
    [ -z "$absent" ] || fail "missing here; as root: apt-get install --no-install-recommends$absent"
}

# The archive whose release the pattern names, as this machine reaches it: apt knows it after `apt-get update`, the name tells before.
archive_of() { # pattern that must occur, pattern that must not
    { apt-get indextargets --format '$(ORIGIN)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep '^Debian|' ||
        apt-get indextargets --format '?|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -i debian || true; } |
        cut -d '|' -f 2 | grep -e "$1" | grep -v -e "$2" | sort -u | head -n 1
}

# Lines for sources.list of a suite, from the mirror that this machine uses already.
debian_sources() { # suite, components
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    mirror=$(archive_of . security)
    [ -n "$mirror" ] && [ -f "$keyring" ] || fail "no Debian mirror or keyring here (package debian-archive-keyring)"
    printf 'deb [signed-by=%s] %s %s %s\n' "$keyring" "$mirror" "$1" "$2"
    printf 'deb [signed-by=%s] %s %s-updates %s\n' "$keyring" "$mirror" "$1" "$2"
    security=$(archive_of security '^$')
    [ -z "$security" ] || printf 'deb [signed-by=%s] %s %s-security %s\n' "$keyring" "$security" "$1" "$2"
}
