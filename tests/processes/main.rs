//! Servers in processes of their own, which this program is started again as: signals, kills,
//! limits and surroundings that belong to a whole process.
//!
//! Its tests run beside each other, as only the processes that they start are signalled. SIGTERM
//! under load is in `turns`.

#[path = "../common/mod.rs"]
mod common;

mod servers;
mod surroundings;
#[cfg(feature = "systemd")]
mod systemd;
