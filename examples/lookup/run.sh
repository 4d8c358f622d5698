#!/usr/bin/env bash
# Starts the gateway and two upstreams, and shows where each id goes.
source "$(dirname "$0")/../lib.sh"
start_peers
start_gateway

echo "# each cluster is at its own place"
expect '"name":"one"' curl -s http://127.0.0.1:9080/clusters/BCS-K8S-1/api/v1/pods
expect '"path":"/proxy/BCS-K8S-2/api/v1/pods"' curl -s http://127.0.0.1:9080/clusters/BCS-K8S-2/api/v1/pods

echo "# nobody knows this one"
status 404 http://127.0.0.1:9080/clusters/BCS-K8S-3/api/v1/pods
