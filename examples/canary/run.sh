#!/usr/bin/env bash
# Starts the gateway and both versions, and shows who gets which.
source "$(dirname "$0")/../lib.sh"
start_peers
start_gateway

echo "# testers choose the new version"
expect '"name":"two"' curl -s -H 'X-Version: canary' http://127.0.0.1:9080/

echo "# of 200 requests, ten go to the new version"
counts=$(for _ in $(seq 200); do curl -s http://127.0.0.1:9080/ | grep -o '"name":"[a-z]*"'; done | sort | uniq -c)
echo "$counts"
canary=$(awk '/two/ { print $1 }' <<<"$counts")
[ "${canary:-0}" -ge 9 ] && [ "$canary" -le 11 ] || fail "that is not one in twenty"
