//! Sends in flight. The kernel reads what they own.

use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use super::gather::Gather;
use crate::table::{Id, Table};
use crate::token::{Kind, Token};

/// Each has a slot of its own, as most connections have no send in flight.
#[derive(Debug, Default)]
pub(super) struct Sends(Table<Sending>);

#[derive(Debug)]
pub(super) struct Sending {
    /// The connection's.
    pub(super) token: Token,
    pub(super) gather: Box<Gather>,
}

impl Sends {
    /// The operation, by a token of its own.
    #[inline]
    pub(super) fn begin(&mut self, token: Token, fd: Fd, gather: Box<Gather>) -> squeue::Entry {
        let id = self.0.insert(Sending { token, gather });
        let gather = &mut self.0.get_mut(id).expect("invariant: inserted above").gather;
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let entry = match gather.single() {
            Some(bytes) => {
                opcode::Send::new(fd, bytes.as_ptr(), bytes.len() as u32).flags(flags).build()
            }
            None => opcode::SendMsg::new(fd, gather.header()).flags(flags as u32).build(),
        };
        entry.user_data(Token::new(Kind::Send, id.index, id.generation).bits())
    }

    /// It has ended, by the token that its completion carries. `None`: none such was in flight.
    #[inline]
    pub(super) fn end(&mut self, token: Token) -> Option<Sending> {
        self.0.remove(Id { index: token.slot(), generation: token.generation() })
    }
}
