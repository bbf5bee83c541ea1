//! The HTTP/1.1 servers: each answers any GET with `Hello, World!` as plain text.

use super::Entry;
#[cfg(any(feature = "actix", feature = "hyper", feature = "ntex"))]
use super::{Order, Result};

#[cfg(feature = "actix")]
mod actix;
#[cfg(feature = "hyper")]
mod answer;
#[cfg(feature = "axum")]
mod axum;
#[cfg(feature = "compio")]
mod compio;
#[cfg(feature = "monoio")]
mod monoio;
#[cfg(feature = "ntex")]
mod ntex;
#[cfg(feature = "hyper")]
mod slipring;
#[cfg(feature = "tokio")]
mod tokio;

pub const SERVERS: &[Entry] = &[
    #[cfg(feature = "tokio")]
    ("hyper-tokio", tokio::serve),
    #[cfg(feature = "monoio")]
    ("hyper-monoio", monoio::serve),
    #[cfg(feature = "compio")]
    ("hyper-compio", compio::serve),
    #[cfg(feature = "ntex")]
    ("ntex-http", ntex::serve),
    #[cfg(feature = "actix")]
    ("actix-web", actix::serve),
    #[cfg(feature = "hyper")]
    ("hyper-slipring", slipring::serve),
    #[cfg(feature = "axum")]
    ("axum-tokio", axum::serve_on_tokio),
    #[cfg(feature = "axum")]
    ("axum-slipring", axum::serve_on_slipring),
];

#[cfg(any(feature = "actix", feature = "hyper", feature = "ntex"))]
use slipring_peers::load::HELLO;
