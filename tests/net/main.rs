//! Sockets beyond those of a TCP listener: outbound, proxied, of datagrams, on paths; and peers
//! that vanish from a real link, in processes of their own.
//!
//! Its tests run beside each other.

#[path = "../common/mod.rs"]
mod common;

mod connect;
mod connect_drain;
mod proxy;
mod udp;
mod unix_path;
mod vanish;
mod vanish_limits;
