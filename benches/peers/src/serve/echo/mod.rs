//! The echo servers, one per runtime.

use super::{Entry, Order, Result, ready};

#[cfg(feature = "compio")]
mod compio;
mod epoll;
#[cfg(feature = "glommio")]
mod glommio;
#[cfg(feature = "kimojio")]
mod kimojio;
mod minimal;
#[cfg(feature = "monoio")]
pub mod monoio;
#[cfg(feature = "ntex")]
mod ntex;
#[cfg(feature = "ringline")]
mod ringline;
mod slipring;
#[cfg(feature = "tokio")]
mod tokio;
#[cfg(feature = "tokio-uring")]
mod tokio_uring;

#[cfg(feature = "compio")]
pub use compio::runtime as compio_runtime;
#[cfg(feature = "monoio")]
pub use monoio::flags as monoio_flags;

pub const SERVERS: &[Entry] = &[
    ("minimal", minimal::serve),
    ("slipring", slipring::serve),
    ("slipring-spin", slipring::serve_spinning),
    ("epoll", epoll::serve),
    #[cfg(feature = "kimojio")]
    ("kimojio", kimojio::serve),
    #[cfg(feature = "ringline")]
    ("ringline", ringline::serve),
    #[cfg(feature = "monoio")]
    ("monoio", monoio::serve),
    #[cfg(feature = "compio")]
    ("compio", compio::serve),
    #[cfg(feature = "ntex")]
    ("ntex", ntex::serve),
    #[cfg(feature = "tokio-uring")]
    ("tokio-uring", tokio_uring::serve),
    #[cfg(feature = "tokio")]
    ("tokio", tokio::serve),
    #[cfg(feature = "glommio")]
    ("glommio", glommio::serve),
];
