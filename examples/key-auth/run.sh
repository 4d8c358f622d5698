#!/usr/bin/env bash
# Starts the gateway and an upstream, and shows who gets in and how often.
source "$(dirname "$0")/../lib.sh"
start_peers
start_gateway

echo "# nobody gets in without a key"
status 401 http://127.0.0.1:9080/api/orders

echo "# the upstream is told who it is, and does not see the key"
expect '"x-consumer-username":["ann"]' curl -s -H 'apikey: ann-secret' http://127.0.0.1:9080/api/orders
seen=$(curl -s -H 'apikey: ann-secret' http://127.0.0.1:9080/api/orders)
if grep -q ann-secret <<<"$seen"; then fail "the key was passed on"; fi

echo "# a partner has three requests a minute"
for _ in 1 2 3; do status 200 -H 'apikey: bob-secret' http://127.0.0.1:9080/api/orders; done
status 429 -H 'apikey: bob-secret' http://127.0.0.1:9080/api/orders
