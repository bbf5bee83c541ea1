//! slipring is an io_uring server runtime for Linux: one thread per core, each with its own ring,
//! its own listeners, its own connections and its own timer wheel. Every connection has an owner,
//! a deadline and an end, and a shutdown is a call that returns an account.
//!
//! ```no_run
//! use slipring::{Config, Connection, Server};
//!
//! fn main() -> slipring::Result<()> {
//!     let report = Server::new(Config::from_env()?)
//!         .listen("127.0.0.1:7000", echo)
//!         .drain_on_signals()
//!         .run()?;
//!     eprintln!("{report}");
//!     Ok(())
//! }
//!
//! async fn echo(mut conn: Connection) -> slipring::Result<()> {
//!     while let Some(chunk) = conn.recv().await? {
//!         conn.send(chunk).await?;
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # Where to start
//! [`Server`] starts and ends things, [`Connection`] is what a handler gets, [`Config`] is all
//! that can be tuned, [`DrainReport`] is the account, and [`doctor`] says what a machine gives.
//!
//! # Cancel safety
//! A future of this crate may be dropped at any time. What the kernel may still touch belongs to
//! the operation until its last completion, never to the future; what was received stays with the
//! connection. The functions whose futures hold bytes of their own say so.
#![deny(unsafe_code, missing_docs, missing_debug_implementations, unreachable_pub)]
#![deny(rust_2018_idioms)]
#![doc(test(attr(deny(warnings), allow(dead_code, unused_imports, unused_variables))))]

/// Compiles a statement only with the feature `tracing`.
macro_rules! traced {
    ($($statement:tt)+) => {
        #[cfg(feature = "tracing")]
        {
            $($statement)+;
        }
    };
}

#[cfg(feature = "admin")]
mod admin;
mod adopt;
mod audience;
mod audit;
mod balance;
mod bind;
pub mod broadcast;
mod buf;
mod calls;
mod caps;
mod census;
mod close;
mod closing;
#[cfg(any(feature = "hyper", feature = "tokio-io"))]
mod compat;
mod config;
mod conn;
mod connecting;
mod connections;
mod control;
mod core;
pub mod cores;
mod crew;
mod deadline;
pub mod doctor;
mod drain;
mod driver;
mod ending;
mod entry;
mod error;
mod executor;
mod expire;
mod group;
mod handle;
mod hooks;
#[cfg(feature = "hyper")]
pub mod http;
mod idle;
mod input;
mod inspect;
mod json;
mod leftover;
mod listen;
mod local;
mod machine;
mod mail;
mod mailbox;
mod memory;
mod moves;
pub mod net;
#[cfg(feature = "blocking")]
mod offload;
mod outbox;
mod pace;
mod pause;
mod per_ip;
mod post;
mod preflight;
mod pressure;
mod prometheus;
mod ready;
mod reason;
mod receive;
mod refusal;
mod refuse;
mod report;
#[cfg(feature = "hyper")]
mod requests;
mod route;
mod running;
mod send;
mod server;
mod share;
mod shutdown;
mod signals;
#[cfg(test)]
mod sim;
mod sizing;
mod socket_file;
mod spin;
mod split;
mod stalls;
mod stats;
mod stop;
mod sys;
#[cfg(feature = "systemd")]
pub mod systemd;
mod table;
pub mod task;
pub mod time;
#[cfg(feature = "rustls")]
pub mod tls;
mod token;
#[cfg(feature = "tracing")]
mod trace;
mod udp;
mod wait;
mod waker;
mod walk;
mod watchdog;
mod wheel;

// The public interface is:
#[cfg(feature = "admin")]
pub use admin::Admin;
pub use bind::ListenAddr;
pub use buf::{Chunk, SendBuf};
pub use census::{Ages, Census};
pub use closing::Closing;
pub use config::{Balance, Config, Explanation, HalfClose, Overload, ReportFormat};
pub use conn::{Connection, ConnectionId};
pub use connections::{ConnectionInfo, ConnectionState, Connections, Direction, SilentCore};
pub use deadline::DeadlineKind;
pub use drain::Phase;
pub use error::{Error, ErrorKind, Result};
pub use handle::Handle;
pub use leftover::TaskCount;
pub use report::{CloseCounts, CloseReason, CoreReport, DrainReport, PhaseTimes};
pub use running::Running;
pub use server::{CoreInfo, Server};
pub use spin::SpinState;
pub use split::{ReadHalf, WriteHalf};
pub use stalls::Stall;
pub use stats::{CoreStats, Stats};
pub use stop::StopMethod;

/// Compiles the examples of the guide to observability.
#[cfg(all(doctest, feature = "admin"))]
#[doc = include_str!("../docs/observability.md")]
#[derive(Debug)]
pub struct Observability;
/// Compiles the examples of the documents for those who come from elsewhere.
#[cfg(doctest)]
#[doc = include_str!("../docs/from-tokio.md")]
#[doc = include_str!("../docs/from-go.md")]
#[doc = include_str!("../docs/from-tokio-uring.md")]
#[derive(Debug)]
pub struct Migration;

/// Compiles the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[derive(Debug)]
pub struct Readme;

/// Compiles the examples of docs/tokio.md.
#[cfg(all(doctest, feature = "tokio-io"))]
#[doc = include_str!("../docs/tokio.md")]
#[derive(Debug)]
pub struct TokioGuide;
