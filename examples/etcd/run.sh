#!/usr/bin/env bash
# Starts an etcd of its own, the gateway, and writes resources.json by the Admin API.
set -euo pipefail
cd "$(dirname "$0")"
data=$(mktemp -d)
etcd --data-dir "$data" >"$data/log" 2>&1 &
etcd=$!
"${POSTERN:-postern}" up -c . &
gateway=$!
trap 'kill $gateway $etcd; wait; rm -rf "$data"' EXIT
until curl -fs http://127.0.0.1:7085/status/ready >/dev/null; do sleep 0.1; done
python3 - <<'PYTHON'
import json, os, urllib.request
key = os.environ.get("ADMIN_KEY", "change-me")
for path, value in json.load(open("resources.json")).items():
    request = urllib.request.Request(f"http://127.0.0.1:9180/apisix/admin/{path}", json.dumps(value).encode(),
                                     {"X-API-KEY": key, "Content-Type": "application/json"}, method="PUT")
    print(path, urllib.request.urlopen(request).status)
PYTHON
echo "curl -i http://127.0.0.1:9080/hello"
wait $gateway
