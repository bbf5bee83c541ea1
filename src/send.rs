//! Sending: what handlers queue in a turn leaves as one send at its end, and never two at a time
//! on one connection, since the kernel keeps no order between them.

use std::task::{Context, Poll};

use crate::buf::SendBuf;
use crate::core::Core;
use crate::deadline::Limits;
use crate::driver::{Driver, Errno, Op};
use crate::entry::Entry;
use crate::error::{Error, ErrorKind, Result};
use crate::report::CloseReason;
use crate::sys::gather::Gather;
use crate::table::Id;
use crate::token::{Kind, Token};

impl Core {
    /// Takes the buffer over as soon as there is room for more output.
    pub(crate) fn poll_send(
        &mut self,
        id: Id,
        buf: &mut Option<SendBuf>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<()>> {
        std::task::ready!(self.poll_room(id, cx))?;
        if let Some(buf) = buf.take()
            && !buf.is_empty()
        {
            self.output(id, |output| output.push(buf));
        }
        Poll::Ready(Ok(()))
    }

    /// Copies as much as there is room for, at least one byte.
    pub(crate) fn poll_write(
        &mut self,
        id: Id,
        bytes: &[u8],
        cx: &mut Context<'_>,
    ) -> Poll<Result<usize>> {
        let room = std::task::ready!(self.poll_room(id, cx))?;
        let count = bytes.len().min(room);
        if count > 0 {
            self.output(id, |output| output.write(&bytes[..count]));
        }
        Poll::Ready(Ok(count))
    }

    /// Copies as much of several pieces as there is room for, as if they were one.
    #[cfg(any(feature = "hyper", feature = "tokio-io"))]
    pub(crate) fn poll_write_vectored(
        &mut self,
        id: Id,
        pieces: &[std::io::IoSlice<'_>],
        cx: &mut Context<'_>,
    ) -> Poll<Result<usize>> {
        let room = std::task::ready!(self.poll_room(id, cx))?;
        let count = pieces.iter().map(|piece| piece.len()).sum::<usize>().min(room);
        if count > 0 {
            self.output(id, |output| {
                let mut left = count;
                for piece in pieces {
                    let part = piece.len().min(left);
                    output.write(&piece[..part]);
                    left -= part;
                }
            });
        }
        Poll::Ready(Ok(count))
    }

    /// Copies all of it whether or not there is room, for a layer that has asked for room before
    /// it made these bytes of what it was given.
    #[cfg(feature = "rustls")]
    pub(crate) fn write_all(&mut self, id: Id, bytes: &[u8]) -> Result<()> {
        let Some(entry) = self.table.get(id) else {
            return Err(CloseReason::PeerReset.to_error("send", None));
        };
        if let Some(error) = entry.refuses_output(&self.limits) {
            return Err(error);
        }
        if !bytes.is_empty() {
            self.output(id, |output| output.write(bytes));
        }
        Ok(())
    }

    /// Waits until the kernel has taken all output.
    pub(crate) fn poll_flush(&mut self, id: Id, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(entry) = self.table.get_mut(id) else {
            return Poll::Ready(Err(CloseReason::PeerReset.to_error("flush", None)));
        };
        if let Some(reason) = entry.ended {
            let limits = Some((&entry.deadlines, &self.limits));
            return Poll::Ready(Err(reason.to_error("flush", limits)));
        }
        if entry.queued_bytes() == 0 {
            return Poll::Ready(Ok(()));
        }
        self.tasks.register(&mut entry.writer, cx.waker());
        Poll::Pending
    }

    /// How many bytes may be queued now, which is at least one.
    pub(crate) fn poll_room(&mut self, id: Id, cx: &mut Context<'_>) -> Poll<Result<usize>> {
        let Some(entry) = self.table.get_mut(id) else {
            return Poll::Ready(Err(CloseReason::PeerReset.to_error("send", None)));
        };
        if let Some(error) = entry.refuses_output(&self.limits) {
            return Poll::Ready(Err(error));
        }
        let queued = entry.queued_bytes();
        let full = entry.output.as_ref().is_some_and(|gather| gather.is_full());
        // Whoever has nothing queued may always queue something: so all get on.
        let short = queued > 0 && self.memory.is_short();
        match self.settings.send_queue_bytes.checked_sub(queued) {
            Some(room) if room > 0 && !full && !short => Poll::Ready(Ok(room)),
            _ => {
                if short && !entry.wants_memory {
                    entry.wants_memory = true;
                    self.memory.wait_for(id);
                }
                self.tasks.register(&mut entry.writer, cx.waker());
                Poll::Pending
            }
        }
    }

    /// Adds to the queue of a connection that is there.
    pub(crate) fn output(&mut self, id: Id, add: impl FnOnce(&mut Gather)) {
        let entry = self.table.get_mut(id).expect("invariant: the caller has seen the entry");
        if !std::mem::replace(&mut entry.dirty, true) {
            self.dirty.push(id);
        }
        let spare = &mut self.spare;
        let take_spare = || spare.pop().unwrap_or_else(|| Box::new(Gather::new()));
        let output = entry.output.get_or_insert_with(take_spare);
        let before = output.bytes();
        add(output);
        let bytes = output.bytes() - before;
        let begins = entry.deadlines.output_began(self.stamp_ms, entry.bytes_out);
        self.take_memory(bytes);
        if begins {
            self.arm_deadline(id);
        }
    }

    /// Starts a send on every connection that has got output in this turn.
    pub(crate) fn flush_outputs(&mut self) {
        let most = self.send_bytes_max();
        let mut dirty = std::mem::take(&mut self.dirty);
        for id in dirty.drain(..) {
            if let Some(entry) = self.table.get_mut(id) {
                entry.dirty = false;
                entry.send_queued(id, &mut self.driver, most);
            }
        }
        self.dirty = dirty;
    }

    /// Sends what is queued, unless a send is in flight already.
    pub(crate) fn start_send(&mut self, id: Id) {
        let most = self.send_bytes_max();
        if let Some(entry) = self.table.get_mut(id) {
            entry.send_queued(id, &mut self.driver, most);
        }
    }

    #[inline(always)]
    pub(crate) fn on_sent(
        &mut self,
        id: Id,
        result: Result<usize, Errno>,
        mut gather: Box<Gather>,
    ) {
        let (stamp_ms, most) = (self.stamp_ms, self.send_bytes_max());
        let Some(entry) = self.table.get_mut(id) else {
            self.counters.stale.add(1);
            return;
        };
        entry.in_flight -= 1;
        let sending = std::mem::take(&mut entry.sending_bytes);
        if entry.ended == Some(CloseReason::Evicted) {
            self.pressure.let_go(sending);
        }
        let sent = result.unwrap_or(0).min(gather.bytes());
        gather.advance(sent);
        self.memory.give_back(sent);
        self.counters.bytes_sent.add(sent as u64);
        entry.bytes_out += sent as u64;
        if sent > 0 {
            entry.deadlines.sent(stamp_ms);
        }
        if gather.is_empty() {
            let queued = entry.queued_bytes();
            if queued == 0 || queued < self.settings.send_queue_bytes / 2 {
                self.tasks.wake(&mut entry.writer);
            }
            let over = entry.is_closing() || entry.ended.is_some() || entry.finishing;
            if queued > 0 {
                entry.send_queued(id, &mut self.driver, most);
            }
            self.keep(gather);
            if queued == 0 && over {
                self.advance_close(id);
            }
            return;
        }
        let transient = matches!(result, Err(Errno(libc::EINTR | libc::EAGAIN)));
        if entry.ended.is_none() && (sent > 0 || transient) {
            // The kernel took a part: the rest goes out before anything else, or says why not.
            entry.send(id, gather, &mut self.driver, most);
            return;
        }
        let errno = result.err().unwrap_or(Errno(0));
        let reason = entry.fault(errno, self.settings.user_timeout_ms);
        self.counters.bytes_abandoned.add(gather.bytes() as u64);
        self.memory.give_back(gather.bytes());
        gather.clear();
        self.keep(gather);
        self.end(id, reason);
        self.advance_close(id);
    }

    /// What a connection may send at once. The kernel copies as much as the socket has room for,
    /// and meanwhile nobody else is served; if somebody waits for that, it is less.
    fn send_bytes_max(&self) -> usize {
        if self.heard > QUIET { SEND_BYTES_BUSY } else { SEND_BYTES_QUIET }
    }

    fn keep(&mut self, gather: Box<Gather>) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(gather);
        }
    }
}

impl Entry {
    /// Why no more may be sent, if that is so.
    fn refuses_output(&self, limits: &Limits) -> Option<Error> {
        if let Some(reason) = self.ended {
            return Some(reason.to_error("send", Some((&self.deadlines, limits))));
        }
        let misuse = || Error::new(ErrorKind::Misuse, "send");
        self.finishing.then(|| misuse().because("this side was shut down before"))
    }

    fn send_queued(&mut self, id: Id, driver: &mut Driver, most: usize) {
        if self.sending_bytes > 0 || self.ended.is_some() {
            return;
        }
        if let Some(gather) = self.output.take_if(|gather| !gather.is_empty()) {
            self.send(id, gather, driver, most);
        }
    }

    #[inline]
    fn send(&mut self, id: Id, mut gather: Box<Gather>, driver: &mut Driver, most: usize) {
        let Some(socket) = &self.socket else { return };
        gather.bound(most);
        self.sending_bytes = gather.bytes();
        self.in_flight += 1;
        let token = Token::new(Kind::Send, id.index, id.generation);
        driver.push(token, Op::Send { socket: socket.name(), gather });
    }

    /// Forgets what was not sent, and says how much that was.
    pub(crate) fn abandon_output(&mut self) -> usize {
        self.output.take().map_or(0, |gather| gather.bytes())
    }
}

/// So few completions in a turn are of one or two connections, or of none that is in a hurry.
const QUIET: u32 = 4;
const SEND_BYTES_QUIET: usize = 1024 * 1024;
/// The 99th percentile of others beside large responses is about as long as this takes.
const SEND_BYTES_BUSY: usize = 64 * 1024;
/// More emptied queues than this are freed; each may have room for a few KiB.
const SPARE_MAX: usize = 1024;
