//! The sidecar: what stands beside an application and speaks for it in the mesh.

pub mod authorize;
pub mod capture;
pub mod client_cert;
#[cfg(test)]
mod documented;
pub mod egress;
pub mod live;
pub mod matcher;
pub mod policy;
#[cfg(test)]
mod testing;
pub mod tokens;
