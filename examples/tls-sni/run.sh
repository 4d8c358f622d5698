#!/usr/bin/env bash
# Makes an authority and three certificates for trying, starts the gateway with them, and shows who gets which.
source "$(dirname "$0")/../lib.sh"
certs=$work/certs
mkdir "$certs"
ec=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
openssl req -x509 "${ec[@]}" -keyout "$certs/ca.key" -out "$certs/ca.pem" -subj /CN=example-ca -days 30 2>/dev/null
leaf() { # NAME DNS-NAME
    openssl req "${ec[@]}" -keyout "$certs/$1.key" -out "$certs/$1.csr" -subj "/CN=$1" 2>/dev/null
    openssl x509 -req -in "$certs/$1.csr" -CA "$certs/ca.pem" -CAkey "$certs/ca.key" -CAcreateserial -days 30 \
        -out "$certs/$1.pem" -extfile <(printf 'subjectAltName=DNS:%s\nbasicConstraints=CA:FALSE\n' "$2") 2>/dev/null
}
leaf shop shop.example.com
leaf internal '*.internal.example.com'
leaf client client.example.com
SHOP_CERT=$(cat "$certs/shop.pem") SHOP_KEY=$(cat "$certs/shop.key")
INTERNAL_CERT=$(cat "$certs/internal.pem") INTERNAL_KEY=$(cat "$certs/internal.key")
CLIENT_CA=$(cat "$certs/ca.pem")
export SHOP_CERT SHOP_KEY INTERNAL_CERT INTERNAL_KEY CLIENT_CA
start_peers
start_gateway

shop=(--cacert "$certs/ca.pem" --resolve shop.example.com:9443:127.0.0.1)
internal=(--cacert "$certs/ca.pem" --resolve a.internal.example.com:9443:127.0.0.1)
known=(--cert "$certs/client.pem" --key "$certs/client.key")

echo "# one name, for everybody"
status 200 "${shop[@]}" https://shop.example.com:9443/
echo "# the other, for those who show a certificate"
status 200 "${internal[@]}" "${known[@]}" https://a.internal.example.com:9443/
echo "# and not for others"
if curl --silent --output /dev/null --fail "${internal[@]}" https://a.internal.example.com:9443/; then
    fail "a client without a certificate got in"
fi
echo "refused"
echo
echo "# asking for it on a connection that was opened under another name is no way round"
status 421 "${shop[@]}" -H 'Host: a.internal.example.com' https://shop.example.com:9443/
