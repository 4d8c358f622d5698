pub mod admin;
pub mod control;
pub mod endpoint;
pub mod live;
pub mod status;
pub mod store;
