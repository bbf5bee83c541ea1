//! The addresses of connects in flight: the kernel may read one until its operation has ended.

use io_uring::{opcode, squeue, types::Fd};
use socket2::SockAddr;

use crate::driver::Name;
use crate::token::Token;

/// By slot.
#[derive(Debug, Default)]
pub(super) struct Connects(Vec<Option<(Token, Box<SockAddr>)>>);

impl Connects {
    /// The operation that connects a socket to an address, which stays here until it has ended.
    pub(super) fn begin(
        &mut self,
        token: Token,
        Name(fd): Name,
        to: Box<SockAddr>,
    ) -> squeue::Entry {
        let slot = token.slot() as usize;
        if slot >= self.0.len() {
            self.0.resize_with(slot + 1, || None);
        }
        assert!(self.0[slot].is_none(), "two connects in flight on one socket");
        let (_, to) = self.0[slot].insert((token, to));
        opcode::Connect::new(Fd(fd), to.as_ptr().cast(), to.len()).build()
    }

    /// It has ended. False if no such one was in flight.
    pub(super) fn end(&mut self, token: Token) -> bool {
        let Some(slot) = self.0.get_mut(token.slot() as usize) else { return false };
        slot.take_if(|(mine, _)| *mine == token).is_some()
    }
}
