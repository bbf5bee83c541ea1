//! Service managers that speak the protocols of systemd: sockets that they have opened
//! ([`listen_fds`], sd_listen_fds(3)), and what they are told
//! ([`Server::notify_systemd`](crate::Server::notify_systemd), sd_notify(3)). Needs the feature
//! `systemd`.
//!
//! Nothing here reads the environment or does anything else unless it is called. Units to go with
//! it are in `docs/deploy.md`.
//!
//! # Examples
//!
//! ```no_run
//! use slipring::{Config, Connection, Server, systemd};
//!
//! # async fn echo(_conn: Connection) -> slipring::Result<()> { Ok(()) }
//! fn main() -> slipring::Result<()> {
//!     let server = Server::new(Config::from_env()?)
//!         .drain_on_signals()
//!         .notify_systemd(|error| eprintln!("{error}"));
//!     let mut passed = systemd::listen_fds()?;
//!     let server = if passed.is_empty() {
//!         server.listen("127.0.0.1:7000", echo) // started by hand
//!     } else {
//!         server.listen_on(passed.take_all(), echo)
//!     };
//!     println!("{}", server.run()?);
//!     Ok(())
//! }
//! ```

mod activation;
mod beat;
mod notify;

pub use activation::{ListenFds, listen_fds};
pub(crate) use notify::{NotifyHook, accompany, prepare};
