//! Makes the code of gRPC services from the proto files. No `protoc` is needed: protox reads them.

use std::error::Error;

/// A file that another part adds goes into this list.
const FILES: &[&str] =
    &["proto/postern/ca/v1/ca.proto", "proto/postern/ca/v1/ca_tokens.proto", "proto/workload.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let files = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().btree_map(".").emit_rerun_if_changed(false).compile_fds(files)?;
    Ok(())
}
