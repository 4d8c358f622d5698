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

# unpack_from SUITE PACKAGE FILE WHERE: puts FILE of a Debian package of another suite at WHERE. Asks the archive that the
# system's own sources name; they stay as they are, and nothing is installed.
unpack_from() {
    local suite=$1 package=$2 file=$3 where=$4 codename='' archive=''
    # shellcheck disable=SC1091
    [ -r /etc/os-release ] && codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    command -v apt-get >/dev/null && archive=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
        awk -v release="$codename" '$2 == release { print $1; exit }')
    [ -n "$archive" ] || return 1
    local folder status=0
    folder=$(mktemp -d)
    chmod 755 "$folder"
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $suite main" >"$folder/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o Acquire::Languages=none
        -o APT::Sandbox::User=root -o APT::Update::Post-Invoke-Success::=true)
    {
        apt-get "${options[@]}" update && (cd "$folder" && apt-get "${options[@]}" download "$package") &&
            dpkg -x "$folder/$package"_*.deb "$folder/root" && install -D "$folder/root/$file" "$where"
    } || status=$?
    rm -rf "$folder"
    return "$status"
}
