//! Tests that measure time, or load the machine so much that others could not: drains, stops,
//! deadlines, overload, spreads over the cores.
//!
//! They take turns: each begins with `common::turn`, so that no two of them run at the same time. A
//! test that takes none would run beside those that measure, and belongs into another program.

#[path = "../common/mod.rs"]
mod common;

mod activation;
mod backlog;
mod balance;
#[cfg(feature = "blocking")]
mod blocking;
mod close_now;
mod deadlines;
mod drain;
mod drain_phases;
mod fairness;
#[cfg(feature = "hyper")]
mod http_drain;
mod idle_race;
mod many;
mod memory;
mod overload;
mod retire;
mod sigterm;
mod spin;
mod stalls;
mod stop_accept;
