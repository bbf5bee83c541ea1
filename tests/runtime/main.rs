//! What the cores of a server do with one another, and what they tell of themselves: calls,
//! broadcasts, tasks, wakes, the list of connections and the counters.
//!
//! Its tests run beside each other.

#[path = "../common/mod.rs"]
mod common;

mod broadcast;
mod cores;
mod inspect;
mod metrics;
mod wake;
