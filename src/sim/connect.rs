//! Whom outbound connections of a simulated core meet.

use std::io;

use socket2::SockAddr;

use super::{Peer, World};
use crate::driver::{Errno, Name, Op, Outcome};
use crate::token::Token;

/// What an attempt to connect meets.
#[derive(Debug)]
pub(crate) enum Met {
    Peer(Peer),
    Error(i32),
}

impl World {
    /// A socket that is to be connected.
    pub(super) fn open(&mut self) -> i32 {
        let fd = self.free_fd();
        self.unconnected.insert(fd);
        fd
    }

    pub(super) fn work_connect(
        &mut self,
        token: Token,
        socket: Name,
        to: Box<SockAddr>,
        cancelled: bool,
    ) {
        assert!(self.unconnected.contains(&socket.0), "connect on {socket:?}, which is closed");
        let ended = cancelled && (self.orders.by_hand || self.rng.percent(60));
        let met = match self.orders.connects.pop_front() {
            Some(met) => Some(met),
            None if ended => Some(Met::Error(libc::ECANCELED)),
            None if self.orders.by_hand => None,
            None => self.chance(),
        };
        match met {
            None => self.again(token, Op::Connect { socket, to }, 0, cancelled),
            Some(Met::Error(errno)) => {
                self.complete(token, true, Outcome::Connected(Err(Errno(errno))));
            }
            Some(Met::Peer(peer)) => {
                self.meet(socket.0, peer);
                self.complete(token, true, Outcome::Connected(Ok(())));
            }
        }
    }

    /// A Unix socket, which nobody waits for.
    pub(super) fn connect_now(&mut self, fd: i32) -> io::Result<()> {
        let by_hand = self.orders.by_hand;
        let met = self.orders.connects.pop_front();
        match met.or_else(|| if by_hand { None } else { self.chance() }) {
            None => Err(io::ErrorKind::WouldBlock.into()),
            Some(Met::Error(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Met::Peer(peer)) => {
                self.meet(fd, peer);
                Ok(())
            }
        }
    }

    fn meet(&mut self, fd: i32, peer: Peer) {
        self.unconnected.remove(&fd);
        self.streams.insert(fd, peer);
    }

    /// Whom the seed lets it meet; nobody yet, most of the time.
    fn chance(&mut self) -> Option<Met> {
        Some(match self.rng.below(20) {
            0 => Met::Error(libc::ECONNREFUSED),
            1 => Met::Error(libc::EHOSTUNREACH),
            2 => Met::Error(libc::ETIMEDOUT),
            3 => Met::Error(libc::EADDRNOTAVAIL),
            4..12 => Met::Peer(Peer::new(&mut self.rng)),
            _ => return None,
        })
    }
}
