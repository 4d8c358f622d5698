//! Who a request comes from, as a plugin that has verified it tells the plugins behind it.

/// The verified user of the request, kept as a slot of the exchange. Nothing that a client merely says gets in here.
#[derive(Clone, Debug)]
pub struct User(pub Box<str>);
