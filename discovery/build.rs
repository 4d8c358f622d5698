//! Makes the code of the discovery service from its proto file. No `protoc` is needed: protox reads it.

use std::error::Error;

const FILE: &str = "proto/postern/discovery/v1/discovery.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={FILE}");
    let files = protox::compile([FILE], ["proto"])?;
    tonic_prost_build::configure().btree_map(".").emit_rerun_if_changed(false).compile_fds(files)?;
    Ok(())
}
