#!/usr/bin/env bash
# Starts an ACME authority (Debian's pebble) and a gateway that has its certificates from there, and shows both kinds of
# challenge, a renewal, and a restart without the authority.
source "$(dirname "$0")/../lib.sh"
command -v pebble >/dev/null || { echo "there is no pebble (tests/needs.sh installs it)"; exit 0; }
acme=$work/acme
mkdir "$acme"
ec=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
openssl req -x509 "${ec[@]}" -keyout "$acme/ca.key" -out "$acme/ca.pem" -subj /CN=pebbles-own -days 30 2>/dev/null
openssl req "${ec[@]}" -keyout "$acme/key.pem" -out "$acme/csr.pem" -subj /CN=pebble 2>/dev/null
openssl x509 -req -in "$acme/csr.pem" -CA "$acme/ca.pem" -CAkey "$acme/ca.key" -CAcreateserial -days 30 \
    -out "$acme/cert.pem" -extfile <(printf 'subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n') 2>/dev/null
cat >"$acme/pebble.json" <<EOF
{"pebble": {"listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
            "certificate": "$acme/cert.pem", "privateKey": "$acme/key.pem", "httpPort": 9080, "tlsPort": 9443}}
EOF
# Every name is at 127.0.0.1.
pebble-challtestsrv -dns01 127.0.0.1:8053 -http01 '' -https01 '' -tlsalpn01 '' -defaultIPv6 '' \
    -management 127.0.0.1:8055 >"$work/names.log" 2>&1 &
started+=($!)
PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0 pebble -config "$acme/pebble.json" -dnsserver 127.0.0.1:8053 \
    >"$work/pebble.log" 2>&1 &
pebble=$!
started+=("$pebble")
wait_for "pebble" curl -fso /dev/null --cacert "$acme/ca.pem" https://127.0.0.1:14000/dir
curl -fs --cacert "$acme/ca.pem" https://127.0.0.1:15000/roots/0 >"$acme/root.pem"
export ACME_CA=$acme/ca.pem
start_peers
start_gateway

# at NAME: options of curl for a name that is served here, believing the authority alone.
at() { echo --cacert "$acme/root.pem" --resolve "$1:9443:127.0.0.1"; }
valid() { "$POSTERN" acme status >"$work/status"; }
serial() { openssl s_client -connect 127.0.0.1:9443 -servername shop.example.test </dev/null 2>/dev/null | openssl x509 -noout -serial; }

wait_for "the certificates" valid
echo "# every certificate, when it ends and when it is renewed"
cat "$work/status"
echo
echo "# shown to be ours by HTTP"
# shellcheck disable=SC2046
status 200 $(at shop.example.test) https://shop.example.test:9443/
# shellcheck disable=SC2046
status 200 $(at www.example.test) https://www.example.test:9443/
echo "# and in a handshake"
# shellcheck disable=SC2046
status 200 $(at api.example.test) https://api.example.test:9443/
echo
echo "# a new one, now"
before=$(serial)
"$POSTERN" acme renew shop
renewed() { [ "$(serial)" != "$before" ]; }
wait_for "another certificate" renewed
echo "$before, then $(serial)"
wait_for "the end of the order" valid
echo
echo "# without the authority, after a restart: nothing is ordered again"
before=$(serial)
kill "$pebble" "$gateway"
wait "$pebble" "$gateway" 2>/dev/null || true
start_gateway
# shellcheck disable=SC2046
status 200 $(at shop.example.test) https://shop.example.test:9443/
[ "$(serial)" = "$before" ] || fail "another certificate is shown"
