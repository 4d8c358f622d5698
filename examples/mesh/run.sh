#!/usr/bin/env bash
# The mesh on one machine: calls through sidecars, a policy, a root that is exchanged, a node that is killed.
. "$(dirname "$0")/../lib.sh"
mesh=$work/data/mesh
"$POSTERN" up --config . >"$work/gateway.log" 2>&1 &
started+=($!)
wait_for "the gateway" grep -q Ctrl-C "$work/gateway.log"

expect 'sa/edge' curl --silent http://127.0.0.1:9080/orders
expect '"status": 200' curl --silent http://127.0.0.1:9080/orders

answers() { curl --silent http://127.0.0.1:9080/orders | grep -q "\"status\": $1"; }
show sed -i 's|sa/orders|sa/nobody|' "$mesh"/payments-?.yaml
sed -i 's|sa/orders|sa/nobody|' "$mesh"/payments-?.yaml
wait_for "the refusal" answers 403
show sed -i 's|sa/nobody|sa/orders|' "$mesh"/payments-?.yaml
sed -i 's|sa/nobody|sa/orders|' "$mesh"/payments-?.yaml
wait_for "the permission" answers 200

expect 'steady' "$POSTERN" certs status --socket "$mesh/ca/operators.sock"
expect 'done' "$POSTERN" certs rotate root --soak 1s --spread 1s --timeout 60s --socket "$mesh/ca/operators.sock"

show kill "$(cat "$mesh/payments-1.pid")"
kill "$(cat "$mesh/payments-1.pid")"
for _ in 1 2 3 4 5; do status 200 http://127.0.0.1:9080/orders; done
expect 'payments-2' curl --silent http://127.0.0.1:9080/orders
