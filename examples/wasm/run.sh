#!/usr/bin/env bash
# Makes the module, starts the gateway and an upstream, and shows what the module does.
source "$(dirname "$0")/../lib.sh"
export MODULE=$work/mark.wasm
"$PEERS" module mark.wat "$MODULE"
start_peers
start_gateway

echo "# the upstream sees the mark, whatever the client wrote"
expect '"x-mark":["blue"]' curl -s -H 'X-Mark: forged' http://127.0.0.1:9080/

echo "# the module answers itself"
status 403 -H 'X-Block: 1' http://127.0.0.1:9080/

echo "# a changed module takes the place of the old one"
sed 's/blocked by a module/blocked by a change/' mark.wat >"$work/mark.wat"
"$PEERS" module "$work/mark.wat" "$MODULE"
changed() { curl -s -H 'X-Block: 1' http://127.0.0.1:9080/ | grep -q change; }
wait_for "the changed module" changed
expect 'blocked by a change' curl -s -H 'X-Block: 1' http://127.0.0.1:9080/
