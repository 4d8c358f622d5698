#!/usr/bin/env bash
# Starts an etcd of its own, the gateway and an upstream, writes a route by the Admin API, and takes etcd away.
source "$(dirname "$0")/../lib.sh"
start_peers
etcd --data-dir "$work/etcd" >"$work/etcd.log" 2>&1 &
etcd=$!
started+=("$etcd")
wait_for "etcd" curl -fso /dev/null http://127.0.0.1:2379/health
start_gateway

admin=http://127.0.0.1:9180/apisix/admin
key=${ADMIN_KEY:-change-me}
echo "# an upstream and a route by the Admin API"
status 201 -X PUT -H "X-API-KEY: $key" $admin/upstreams/samples -d @upstream.json
status 201 -X PUT -H "X-API-KEY: $key" $admin/routes/hello -d @route.json
wait_for "the route" curl -fso /dev/null http://127.0.0.1:9080/hello
status 200 http://127.0.0.1:9080/hello

echo "# they are where APISIX has them (etcd tells keys in base64)"
from=$(printf /apisix/routes/ | base64) to=$(printf /apisix/routes0 | base64)
expect "$(printf /apisix/routes/hello | base64)" \
    curl -s http://127.0.0.1:2379/v3/kv/range -d "{\"key\": \"$from\", \"range_end\": \"$to\", \"keys_only\": true}"

echo "# without etcd the gateway serves on, and starts again"
wait_for "the snapshot" grep -aq routes/hello "$POSTERN_DATA_DIR/last-good.etcd"
kill "$etcd"
wait "$etcd" 2>/dev/null || true
status 200 http://127.0.0.1:9080/hello
kill "$gateway"
wait "$gateway" 2>/dev/null || true
start_gateway
status 200 http://127.0.0.1:9080/hello
expect '"stale":{' curl -s http://127.0.0.1:9090/v1/config
