//! The other end of a simulated connection: what it wants, and what it has seen.

use std::collections::VecDeque;

use super::Rng;
use crate::driver::{Errno, Shut};

/// How a connection ended in the eyes of its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Not ended, or ended by the peer.
    Open,
    /// The server's FIN came.
    Fin,
    /// The server reset it.
    Reset,
    /// Nobody listened.
    Refused,
}

/// What a peer is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Sends all it has, half-closes, reads to the end.
    Good,
    /// Connects and says nothing.
    Silent,
    /// Resets at some moment.
    Resets,
    /// Sends and never reads.
    Deaf,
    /// Sends a part, then neither sends nor closes.
    Vanishes,
}

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) manner: Manner,
    pub(crate) fate: Fate,
    /// What it sends in its life, and how much of that it has sent.
    pub(crate) plan: Vec<u8>,
    sent: usize,
    /// The most that it sends at once.
    piece_bytes_max: u64,
    /// What the server's kernel holds for the server.
    incoming: VecDeque<u8>,
    /// What has come from the server.
    pub(crate) received: Vec<u8>,
    /// What has come and takes up room as it was not read yet.
    unread_by_peer: usize,
    fin: bool,
    reset: bool,
    write_shut: bool,
    read_shut: bool,
}

impl Peer {
    pub(crate) fn new(rng: &mut Rng) -> Peer {
        let manner = match rng.below(10) {
            0 => Manner::Silent,
            1 | 2 => Manner::Resets,
            3 => Manner::Deaf,
            4 => Manner::Vanishes,
            _ => Manner::Good,
        };
        let len = if rng.percent(20) { rng.below(20_000) } else { rng.below(600) };
        Peer::with(rng, manner, len, 2_000)
    }

    /// A peer that sends `len` bytes, at most `piece_bytes_max` at once.
    pub(crate) fn with(rng: &mut Rng, manner: Manner, len: u64, piece_bytes_max: u64) -> Peer {
        Peer {
            manner,
            fate: Fate::Open,
            plan: (0..len).map(|_| rng.next() as u8).collect(),
            sent: 0,
            piece_bytes_max,
            incoming: VecDeque::new(),
            received: Vec::new(),
            unread_by_peer: 0,
            fin: false,
            reset: false,
            write_shut: false,
            read_shut: false,
        }
    }

    /// A peer that does nothing but what a test makes it do.
    pub(crate) fn by_hand() -> Peer {
        Peer::with(&mut Rng::new(0), Manner::Silent, 0, 1)
    }

    /// It ends its side.
    pub(crate) fn half_close(&mut self) {
        self.fin = true;
    }

    /// It resets. What the server's kernel has is lost with it.
    pub(crate) fn break_off(&mut self) {
        self.reset = true;
        self.incoming.clear();
    }

    /// It reads all that has come, and makes room for more.
    pub(crate) fn take_output(&mut self) {
        self.unread_by_peer = 0;
    }

    /// One step of the peer's own.
    pub(crate) fn act(&mut self, rng: &mut Rng) {
        if self.reset {
            return;
        }
        if self.manner != Manner::Deaf {
            self.unread_by_peer = 0;
        }
        let left = match self.manner {
            _ if self.fin => 0,
            Manner::Silent => 0,
            Manner::Vanishes => (self.plan.len() / 2).saturating_sub(self.sent),
            _ => self.plan.len() - self.sent,
        };
        if left > 0 {
            let most =
                if rng.percent(30) { 1 } else { 1 + rng.below(self.piece_bytes_max) as usize };
            let room = RECEIVE_WINDOW.saturating_sub(self.incoming.len());
            let count = left.min(most).min(room);
            self.incoming.extend(&self.plan[self.sent..self.sent + count]);
            self.sent += count;
        } else if matches!(self.manner, Manner::Good | Manner::Deaf) {
            self.fin = true;
        }
        if self.manner == Manner::Resets && rng.percent(5) {
            self.reset = true;
            self.incoming.clear();
        }
        // A peer that has seen the end ends its side too, unless it has vanished.
        if self.fate == Fate::Fin && !matches!(self.manner, Manner::Vanishes | Manner::Silent) {
            self.fin = true;
        }
    }

    /// Sends something that a test has thought of.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.incoming.extend(bytes);
        self.sent += bytes.len();
    }

    pub(crate) fn is_reset(&self) -> bool {
        self.reset
    }

    /// What a poll that asks for no event reports all the same.
    pub(crate) fn poll_events(&self) -> i32 {
        let at_end = self.fin || self.read_shut;
        let events = [
            (self.reset, libc::POLLERR | libc::POLLHUP | libc::POLLRDHUP),
            (at_end && self.write_shut, libc::POLLHUP),
            (at_end, libc::POLLRDHUP),
        ];
        events.into_iter().filter(|(is, _)| *is).fold(0, |all, (_, bits)| all | i32::from(bits))
    }

    pub(crate) fn sent(&self) -> usize {
        self.sent
    }

    pub(crate) fn unread(&self) -> usize {
        self.incoming.len()
    }

    pub(crate) fn read(&mut self, most: usize) -> Vec<u8> {
        let count = most.min(self.incoming.len());
        self.incoming.drain(..count).collect()
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.fin || self.read_shut
    }

    pub(crate) fn writable(&self) -> Result<(), Errno> {
        if self.reset {
            Err(Errno(libc::ECONNRESET))
        } else if self.write_shut {
            Err(Errno(libc::EPIPE))
        } else {
            Ok(())
        }
    }

    /// Takes what there is room for.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> usize {
        let room = SEND_WINDOW.saturating_sub(self.unread_by_peer);
        let count = bytes.len().min(room);
        self.received.extend_from_slice(&bytes[..count]);
        self.unread_by_peer += count;
        count
    }

    pub(crate) fn shut(&mut self, shut: Shut) {
        self.write_shut = true;
        self.read_shut |= shut == Shut::Both;
        if !self.reset && self.fate == Fate::Open {
            self.fate = Fate::Fin;
        }
    }

    /// The server closes: with a FIN, or a reset when it has left something unread.
    pub(crate) fn closed(mut self) -> Peer {
        if !self.incoming.is_empty() && !self.reset {
            self.fate = Fate::Reset;
        } else if self.fate == Fate::Open && !self.reset {
            self.fate = Fate::Fin;
        }
        self
    }

    pub(crate) fn reset_by_close(mut self) -> Peer {
        self.fate = Fate::Reset;
        self
    }

    pub(crate) fn refused(mut self) -> Peer {
        self.fate = Fate::Refused;
        self
    }

    /// Whether everything that it sent came back.
    pub(crate) fn is_answered(&self) -> bool {
        self.received == self.plan
    }
}

/// How much the server's kernel holds before the peer has to wait.
const RECEIVE_WINDOW: usize = 3_000;
/// How much the peer's kernel holds before the server has to wait.
const SEND_WINDOW: usize = 2_000;
