"""The client of the SPIFFE Workload API from PyPI: prints what it was given, a line for each answer."""

import functools
import json
import sys

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from spiffe import WorkloadApiClient

# The C core of gRPC sends the path of the socket as `:authority`, percent-encoded, which h2 resets as malformed.
grpc.insecure_channel = functools.partial(grpc.insecure_channel, options=[("grpc.default_authority", "localhost")])


def public(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def told(context):
    svid = context.default_svid
    print(
        json.dumps(
            {
                "id": str(svid.spiffe_id),
                "serial": format(svid.leaf.serial_number, "x"),
                "chain": len(svid.cert_chain),
                "key": public(svid.private_key.public_key()) == public(svid.leaf.public_key()),
                "bundles": {
                    bundle.trust_domain.name: len(bundle.x509_authorities)
                    for bundle in context.x509_bundle_set.bundles
                },
            }
        ),
        flush=True,
    )


with WorkloadApiClient(sys.argv[1]) as client:
    try:
        client.fetch_jwt_svid(audience={"somebody"}, timeout=20)
    except Exception as error:
        print(json.dumps({"jwt": str(error)}), flush=True)
    stream = client.stream_x509_contexts(told, lambda error: print(json.dumps({"error": str(error)}), flush=True))
    # Until whoever started this closes the pipe.
    sys.stdin.read()
    stream.cancel()
