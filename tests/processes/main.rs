//! Servers in processes of their own, which this program is started again as: signals, kills, limits
//! and surroundings that belong to a whole process. The processes of the tests disturb each other no
//! more than they would from several programs, so that they run beside each other.

#[path = "../common/mod.rs"]
mod common;

mod servers;
mod sigterm;
mod surroundings;
#[cfg(feature = "systemd")]
mod systemd;
