//! The examples, as processes of their own, driven by real clients as a person or a service manager
//! would. Those of `examples/apps` are tested there.
//!
//! `RING_TEST_EXAMPLES` names the folder of the built examples; by default it is the one that
//! `cargo test` builds them into. `cargo test --test examples` alone builds no examples.

#[path = "../common/mod.rs"]
mod common;

mod chat;
mod echo;
mod graceful;
#[cfg(feature = "hyper")]
mod http;
mod kv;
mod migrate;
mod net;
#[cfg(all(feature = "hyper", feature = "rustls"))]
mod tls;
mod udp_echo;
