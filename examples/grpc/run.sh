#!/usr/bin/env bash
# Starts the gateway and a gRPC service, and calls it: one message, then a stream of three.
source "$(dirname "$0")/../lib.sh"
start_peers
start_gateway

echo "# one message, and a stream of three"
expect 'HELLO' "$PEERS" call 127.0.0.1:9080 hello
expect 'hello 3' "$PEERS" call 127.0.0.1:9080 hello

echo "# a service that cannot be reached is a gRPC status"
kill "${started[0]}"
wait "${started[0]}" 2>/dev/null || true
expect 'Unavailable' "$PEERS" call 127.0.0.1:9080 hello
