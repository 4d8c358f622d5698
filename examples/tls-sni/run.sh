#!/usr/bin/env bash
# Makes an authority and three certificates for trying, and starts the gateway with them.
set -euo pipefail
cd "$(dirname "$0")"
certs=$(mktemp -d)
trap 'rm -rf "$certs"' EXIT
key() { echo -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes; }
openssl req -x509 $(key) -keyout "$certs/ca.key" -out "$certs/ca.pem" -subj /CN=example-ca -days 30 2>/dev/null
leaf() { # NAME SUBJECT-ALTERNATIVE-NAME
    openssl req $(key) -keyout "$certs/$1.key" -out "$certs/$1.csr" -subj "/CN=$1" 2>/dev/null
    openssl x509 -req -in "$certs/$1.csr" -CA "$certs/ca.pem" -CAkey "$certs/ca.key" -out "$certs/$1.pem" -days 30 \
        -extfile <(printf 'subjectAltName=DNS:%s\nbasicConstraints=CA:FALSE\n' "$2") 2>/dev/null
}
leaf shop shop.example.com
leaf internal '*.internal.example.com'
leaf client client.example.com
SHOP_CERT=$(cat "$certs/shop.pem") SHOP_KEY=$(cat "$certs/shop.key")
INTERNAL_CERT=$(cat "$certs/internal.pem") INTERNAL_KEY=$(cat "$certs/internal.key")
CLIENT_CA=$(cat "$certs/ca.pem")
export SHOP_CERT SHOP_KEY INTERNAL_CERT INTERNAL_KEY CLIENT_CA
echo "curl --cacert $certs/ca.pem --resolve shop.example.com:9443:127.0.0.1 https://shop.example.com:9443/"
echo "curl --cacert $certs/ca.pem --cert $certs/client.pem --key $certs/client.key" \
    "--resolve a.internal.example.com:9443:127.0.0.1 https://a.internal.example.com:9443/"
"${POSTERN:-postern}" up -c .
