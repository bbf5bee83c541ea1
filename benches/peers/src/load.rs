//! The load generator: clients on one thread and one ring, written like the yardstick, so that it
//! is about as cheap as the cheapest server. Cheaper it cannot be: the network's work is the same
//! on either side.
//!
//! [`Session`] holds connected clients and drives them in a closed loop, pipelined or not, or by a
//! schedule; [`Churn`] connects, asks once and resets; [`Crowd`] holds connections that do nothing.
//! Each compares every byte that comes back.

use std::{io, net::SocketAddr};

mod churn;
mod client;
mod crowd;
mod sample;
mod script;
mod session;

pub use churn::Churn;
pub use crowd::Crowd;
pub use sample::Sample;
pub use script::{HELLO, Talk};
pub use session::Session;

/// The clients of a session, and what they say.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub address: SocketAddr,
    pub connections: usize,
    pub talk: Talk,
    /// Requests that a connection has under way: always in a closed loop, at most by a schedule.
    pub pipeline: usize,
    /// Look for completions again and again instead of sleeping until there are some.
    pub poll: bool,
}

impl Plan {
    fn check(&self) -> io::Result<()> {
        let outstanding = self.talk.request_bytes().saturating_mul(self.pipeline);
        let wrong = if !(1..=CONNECTIONS_MAX).contains(&self.connections) {
            format!("connections: 1 to {CONNECTIONS_MAX}")
        } else if !(1..=OUTSTANDING_BYTES_MAX).contains(&outstanding) {
            format!("bytes times pipeline: 1 to {OUTSTANDING_BYTES_MAX}")
        } else if !self.address.ip().is_loopback() {
            format!("{} is not on the loopback", self.address)
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, wrong))
    }
}

/// What a blocking read says when its time-out is over.
fn silent(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "the server is silent")
        }
        _ => error,
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub const CONNECTIONS_MAX: usize = 4096;
const OUTSTANDING_BYTES_MAX: usize = 1 << 20;
/// Longest silence of a server that owes replies.
const STALL_S_MAX: u64 = 5;
