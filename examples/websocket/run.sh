#!/usr/bin/env bash
# Starts the gateway and a WebSocket echo, and sends a message through.
source "$(dirname "$0")/../lib.sh"
start_peers
start_gateway

echo "# the upgrade is passed on, and a message comes back"
expect '101 Switching Protocols' "$PEERS" say 127.0.0.1:9080 /chat hello
expect 'hello' "$PEERS" say 127.0.0.1:9080 /chat hello
