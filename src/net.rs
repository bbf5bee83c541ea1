//! Outbound connections, passing bytes between two connections, and UDP sockets.
//!
//! What is established here is a [`Connection`] like an accepted one: in the core's table, with
//! the same calls, buffers, deadlines and books.
//!
//! ```no_run
//! use slipring::{Config, Connection, Result, Server, net};
//!
//! /// Passes everything on to another server and back.
//! async fn pass_on(mut client: Connection) -> Result<()> {
//!     let mut upstream = net::connect("127.0.0.1:7000").await?;
//!     net::proxy(&mut client, &mut upstream).await.map(drop)
//! }
//!
//! fn main() -> Result<()> {
//!     Server::new(Config::from_env()?).listen("127.0.0.1:8000", pass_on).run().map(drop)
//! }
//! ```
//!
//! [`Connection`]: crate::Connection

mod connect;
mod proxy;
mod race;
mod resolve;

pub use crate::udp::{Datagram, UdpSocket};
pub use connect::{Connect, connect, connect_any};
pub use proxy::{Transferred, proxy};
