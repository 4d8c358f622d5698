#!/usr/bin/env bash
# Makes keys and certificates for trying, starts two signers and a gateway that has none of them, and ends
# the signers one after the other.
source "$(dirname "$0")/../lib.sh"
export FILES=$work/files
mkdir -p "$FILES/keys"
umask 077
ec=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
authority() { # NAME
    openssl req -x509 "${ec[@]}" -keyout "$FILES/$1.key" -out "$FILES/$1.pem" -subj "/CN=$1" -days 30 2>/dev/null
}
leaf() { # NAME DNS-NAME AUTHORITY
    openssl req "${ec[@]}" -keyout "$FILES/$1.key" -out "$FILES/$1.csr" -subj "/CN=$1" 2>/dev/null
    openssl x509 -req -in "$FILES/$1.csr" -CA "$FILES/$3.pem" -CAkey "$FILES/$3.key" -CAcreateserial -days 30 \
        -out "$FILES/$1.pem" -extfile <(printf 'subjectAltName=DNS:%s\nbasicConstraints=CA:FALSE\n' "$2") 2>/dev/null
}
# One authority for browsers, and one for signers and gateways among themselves.
authority public-ca
authority internal-ca
leaf shop shop.example.com public-ca
leaf signer signer.internal internal-ca
leaf gateway gateway.internal internal-ca
# The key goes to the signers; the gateway gets the certificate.
mv "$FILES/shop.key" "$FILES/keys/shop.pem"
SHOP_CERT=$(cat "$FILES/shop.pem")
export SHOP_CERT

start_signer() { # PORT STATUS
    PORT=$1 STATUS=$2 "$POSTERN" signer run -c signer.yaml >"$work/signer-$1.log" 2>&1 &
    signer=$!
    started+=("$signer")
    wait_for "the signer" curl -fso /dev/null "http://127.0.0.1:$2/readyz"
}
start_peers
start_signer 7443 7453
first=$signer
start_signer 7444 7454
second=$signer
start_gateway

shop=(--cacert "$FILES/public-ca.pem" --resolve shop.example.com:9443:127.0.0.1)
url=https://shop.example.com:9443/
wait_for "the certificate" curl -fso /dev/null "${shop[@]}" "$url"
echo "# a handshake that a signer signs; each version of TLS"
status 200 "${shop[@]}" "$url"
status 200 --tls-max 1.2 "${shop[@]}" "$url"
echo "# what a signer tells"
expect '"name": "shop"' curl -s http://127.0.0.1:7453/status
echo "# one of them is killed: nobody notices"
show kill -KILL "$first"
kill -KILL "$first"
for _ in 1 2 3 4 5; do status 200 "${shop[@]}" "$url"; done
echo "# the other one is told to stop: handshakes fail, and everything else goes on"
show kill "$second"
kill "$second"
wait "$second" || fail "the signer did not end in order"
if curl --silent --output /dev/null --max-time 10 "${shop[@]}" "$url"; then fail "who has signed that?"; fi
echo "no handshake"
status 200 http://127.0.0.1:9080/
echo "# one is back: so is the name"
start_signer 7443 7453
wait_for "the name" curl -fso /dev/null "${shop[@]}" "$url"
status 200 "${shop[@]}" "$url"
echo "# every signature is in a log that shows when it was changed"
expect lines "$POSTERN" ca audit verify "$FILES/audit-7444.log"
