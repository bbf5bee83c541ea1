//! Sockets that a task opens by itself, on the core that it runs on, with the same rules for memory
//! as those of connections.

pub use crate::udp::{Datagram, UdpSocket};
