//! An upstream as the data path knows it.

/// An upstream.
#[derive(Debug)]
pub struct Cluster {
    scheme: &'static str,
}

impl Cluster {
    /// APISIX `scheme`.
    pub fn scheme(&self) -> &'static str {
        self.scheme
    }
}
