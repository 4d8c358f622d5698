# Sourced by the scripts that install: collects missing Debian packages and installs them at once.

missing=()

# need COMMAND PACKAGE: notes PACKAGE when COMMAND is not there.
need() {
    command -v "$1" >/dev/null || missing+=("$2")
}

# Installs what was noted, without letting any package start a daemon.
install_needed() {
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || { echo "please install: ${missing[*]}" >&2; exit 1; }
    local root=()
    [ "$(id -u)" -eq 0 ] || root=(sudo)
    echo "installing ${missing[*]}"
    local policy=/usr/sbin/policy-rc.d ours=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee "$policy" >/dev/null
        "${root[@]}" chmod +x "$policy"
        ours=yes
    fi
    local status=0
    {
        "${root[@]}" apt-get -qq update &&
            "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
                apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
    } || status=$?
    [ -z "$ours" ] || "${root[@]}" rm -f "$policy"
    missing=()
    return "$status"
}

# A Python environment under .cache/venv, for what comes from PyPI.
need_venv() {
    [ -x .cache/venv/bin/pip ] && return 0
    need python3 python3
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    install_needed
    mkdir -p .cache
    python3 -m venv .cache/venv
}
