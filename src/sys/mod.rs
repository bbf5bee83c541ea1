//! The ground floor: the only `unsafe` of the crate. It moves memory and descriptors between the
//! kernel and safe code, and decides nothing.
#![allow(unsafe_code, reason = "this is the one place for it; the crate root denies it elsewhere")]

pub(crate) mod affinity;
pub(crate) mod bufs;
pub(crate) mod clock;
mod connects;
pub(crate) mod datagram;
mod datagrams;
pub(crate) mod files;
pub(crate) mod filter;
pub(crate) mod gather;
#[cfg(feature = "systemd")]
pub(crate) mod inherit;
pub(crate) mod lazy;
pub(crate) mod limits;
mod pages;
pub(crate) mod place;
pub(crate) mod probe;
mod ring;
mod sends;
pub(crate) mod signal;
pub(crate) mod sock;
pub(crate) mod thread;
pub(crate) mod uring;
pub(crate) mod wake;
