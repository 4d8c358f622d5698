//! Makes the code of gRPC services from the proto files. No `protoc` is needed: protox reads them.

use std::error::Error;

/// A file that another part adds goes into this list.
const FILES: &[&str] = &[
    "proto/postern/ca/v1/ca.proto",
    "proto/postern/ca/v1/ca_tokens.proto",
    "proto/postern/ca/v1/ca_admin.proto",
    "proto/postern/signer/v1/signer.proto",
    "proto/workload.proto",
    "proto/istio.proto",
];

/// What commands print as JSON.
const PRINTED: &[&str] = &[
    "StatusReply",
    "RootStatus",
    "IssuerStatus",
    "RotationStatus",
    "EventStatus",
    "Blocker",
    "Culprit",
    "FleetStatus",
    "WorkloadStatus",
    "RevocationStatus",
    "RehearsalStatus",
    "ObserverStatus",
    "ReplicaStatus",
    "PlanReply",
    "Stage",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let files = protox::compile(FILES, ["proto"])?;
    let mut builder = tonic_prost_build::configure().btree_map(".").emit_rerun_if_changed(false);
    for message in PRINTED {
        builder =
            builder.message_attribute(format!("postern.ca.v1.{message}"), "#[derive(serde::Serialize)]");
    }
    builder.compile_fds(files)?;
    Ok(())
}
