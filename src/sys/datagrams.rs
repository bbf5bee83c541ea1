//! The part of the ring that carries datagrams: their receive buffers, and their sends in flight.

use std::io;
use std::rc::Rc;

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::bufs::{BufRing, Pool};
use super::datagram::{Outgoing, receive_header};
use crate::driver::{Errno, Name, Outcome};
use crate::token::{Kind, Token};

/// Nothing of it is freed unless the ring has seen the end of every operation.
pub(super) struct Datagrams {
    /// There are none before the first socket.
    bufs: Option<BufRing>,
    /// What receives ask for; the kernel has its own copy once they are submitted.
    header: Box<libc::msghdr>,
    /// Sends in flight, by slot. The kernel reads what they own.
    sends: Vec<Option<(Token, Box<Outgoing>)>>,
}

impl std::fmt::Debug for Datagrams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datagrams").field("bufs", &self.bufs).finish_non_exhaustive()
    }
}

impl Datagrams {
    pub(super) fn new() -> Datagrams {
        Datagrams { bufs: None, header: Box::new(receive_header()), sends: Vec::new() }
    }

    /// Gives the kernel the buffers that datagrams are received into, unless it has them.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(super) fn open(
        &mut self,
        uring: &IoUring,
        buffers: u16,
        buffer_bytes: u32,
    ) -> io::Result<()> {
        if self.bufs.is_none() {
            let bufs = BufRing::register(uring, GROUP, Pool::new(0, buffers, buffer_bytes)?)?;
            self.bufs = Some(bufs);
            self.publish();
        }
        Ok(())
    }

    /// Takes them back.
    pub(super) fn close(&self, uring: &IoUring) -> io::Result<()> {
        let registered = self.bufs.as_ref();
        registered.map_or(Ok(()), |_| uring.submitter().unregister_buf_ring(GROUP))
    }

    pub(super) fn pool(&self) -> Option<&Rc<Pool>> {
        self.bufs.as_ref().map(BufRing::pool)
    }

    /// Gives returned buffers to the kernel.
    pub(super) fn publish(&mut self) {
        if let Some(bufs) = &mut self.bufs {
            bufs.publish(usize::MAX);
        }
    }

    pub(super) fn receive_entry(&self, Name(fd): Name) -> squeue::Entry {
        // With MSG_TRUNC the kernel says how long a datagram was that did not fit: recvmsg(2).
        opcode::RecvMsgMulti::new(Fd(fd), &raw const *self.header, GROUP)
            .flags(libc::MSG_TRUNC as u32)
            .build()
    }

    pub(super) fn send_entry(
        &mut self,
        token: Token,
        Name(fd): Name,
        outgoing: Box<Outgoing>,
    ) -> squeue::Entry {
        let slot = token.slot() as usize;
        if slot >= self.sends.len() {
            self.sends.resize_with(slot + 1, || None);
        }
        assert!(self.sends[slot].is_none(), "two sends in flight in one slot");
        let (_, outgoing) = self.sends[slot].insert((token, outgoing));
        let flags = libc::MSG_NOSIGNAL as u32;
        opcode::SendMsg::new(Fd(fd), outgoing.header()).flags(flags).build()
    }

    /// Takes over what a completion carries. `None`: it belongs to nothing that is in flight.
    pub(super) fn outcome(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        last: bool,
    ) -> Option<Outcome> {
        let result = entry.result();
        let result = usize::try_from(result).map_err(|_| Errno(-result));
        if token.kind() == Some(Kind::SendDatagram) {
            let send = self.sends.get_mut(token.slot() as usize)?;
            let (_, outgoing) = send.take_if(|(sent, _)| last && *sent == token)?;
            return Some(Outcome::DatagramSent(result, outgoing));
        }
        // A buffer that the kernel has picked is ours again, whatever else the completion says.
        let lease = cqueue::buffer_select(entry.flags()).and_then(|buffer| {
            let len = *result.as_ref().unwrap_or(&0) as u32;
            self.bufs.as_ref()?.pool().lease(buffer, len)
        });
        Some(Outcome::Datagram(result.and_then(|_| lease.ok_or(Errno(libc::EIO)))))
    }
}

/// The number of their buffers' group, behind those of the connections' receives.
const GROUP: u16 = 2;
