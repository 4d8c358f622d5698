#!/usr/bin/env bash
# Starts a Consul of its own, the gateway and two upstreams; registers them, drains one, and takes Consul away.
source "$(dirname "$0")/../lib.sh"
consul=$(command -v consul || echo "$root/.cache/bin/consul")
[ -x "$consul" ] || { echo "there is no Consul (tests/needs.sh unpacks one)"; exit 0; }
start_peers
"$consul" agent -dev -bind 127.0.0.1 -log-level warn >"$work/consul.log" 2>&1 &
agent=$!
started+=("$agent")
wait_for "Consul" curl -fso /dev/null http://127.0.0.1:8500/v1/catalog/nodes
start_gateway
api=http://127.0.0.1:8500/v1/agent/service

# names: who answers ten requests.
names() {
    for _ in $(seq 10); do curl -s http://127.0.0.1:9080/ | grep -o '"name":"[a-z]*"' || true; done | sort -u | tr '\n' ' '
}

# only NAMES: until these and no others answer.
only() {
    [ "$(names)" = "$1" ]
}

echo "# an instance is registered, and then another one"
status 200 -X PUT $api/register -d @one.json
wait_for "the first instance" only '"name":"one" '
status 200 -X PUT $api/register -d @two.json
wait_for "the second instance" only '"name":"one" "name":"two" '

echo "# one goes into maintenance: it takes no new request"
status 200 -X PUT "$api/maintenance/orders-1?enable=true"
wait_for "that it is left" only '"name":"two" '
status 200 -X PUT "$api/maintenance/orders-1?enable=false"
wait_for "that it is used again" only '"name":"one" "name":"two" '

echo "# without Consul the gateway serves on"
kill "$agent"
wait "$agent" 2>/dev/null || true
status 200 http://127.0.0.1:9080/hello
