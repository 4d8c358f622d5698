# Sourced by the run.sh of every example: builds and starts what it needs on loopback, shows requests with their
# answers, and ends everything it has started. POSTERN and PEERS may name binaries that are built already.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$(dirname "$0")"
work=$(mktemp -d)
export POSTERN_DATA_DIR=$work/data
if [ -z "${POSTERN:-}" ]; then
    (cd "$root" && cargo build --quiet --package postern)
    POSTERN=$root/target/debug/postern
fi
if [ -z "${PEERS:-}" ]; then
    (cd "$root" && cargo build --quiet --package e2e --example peers)
    PEERS=$root/target/debug/examples/peers
fi
started=()

finish() {
    local status=$?
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
    if [ "$status" -ne 0 ] && [ -f "$work/gateway.log" ]; then
        echo "the end of the gateway's output:"
        tail -20 "$work/gateway.log"
    fi
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT

fail() {
    echo "FAILED: $*"
    exit 1
}

# start_peers: the upstreams that the examples name.
start_peers() {
    "$PEERS" >"$work/peers.log" 2>&1 &
    started+=($!)
    wait_for "the upstreams" grep -q upstreams "$work/peers.log"
}

# start_gateway: the gateway with the files of this directory, until it is ready. Its process id is in $gateway.
start_gateway() {
    "$POSTERN" edge -c . >"$work/gateway.log" 2>&1 &
    gateway=$!
    started+=("$gateway")
    wait_for "the gateway" curl -fso /dev/null http://127.0.0.1:7085/status/ready
}

# wait_for WHAT COMMAND...: until the command succeeds, at most 30 seconds.
wait_for() {
    local what=$1
    shift
    for _ in $(seq 300); do
        if "$@" 2>/dev/null; then return; fi
        sleep 0.1
    done
    fail "$what did not come up"
}

# show COMMAND...: prints a command as one would type it.
show() {
    local word
    printf '$'
    for word in "$@"; do
        case $word in
        *[!A-Za-z0-9_./:=@%-]* | '') printf " '%s'" "$word" ;;
        *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
}

# expect TEXT COMMAND...: shows the command and what it prints, which must hold TEXT.
expect() {
    local text=$1 output
    shift
    show "$@"
    output=$("$@" 2>&1) || true
    echo "$output"
    echo
    grep -qF -- "$text" <<<"$output" || fail "'$text' is not there"
}

# status CODE ARGUMENTS...: curl with these arguments must get this status.
status() {
    local code=$1
    shift
    show curl "$@"
    local got
    got=$(curl --silent --show-error --output "$work/body" --write-out '%{http_code}' "$@") || true
    echo "$got $(head -c 300 "$work/body")"
    echo
    [ "$got" = "$code" ] || fail "status $code was expected"
}
