//! What only features bring, hyper's HTTP aside: each module is there with its own features alone.
//! Its tests run beside each other.

#[path = "../common/mod.rs"]
mod common;

#[cfg(feature = "admin")]
mod admin;
#[cfg(feature = "admin")]
mod admin_page;
#[cfg(feature = "rustls")]
mod tls;
#[cfg(all(feature = "hyper", feature = "rustls"))]
mod tls_http;
#[cfg(feature = "rustls")]
mod tls_support;
#[cfg(feature = "tokio-io")]
mod tokio_io;
mod tokio_world;
