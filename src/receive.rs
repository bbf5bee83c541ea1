//! Receiving: one receive in flight per connection, multishot into small buffers or one at a time
//! into large ones; paused when its handler falls behind, parked when the core's buffers run out.

use std::task::{Context, Poll};

use crate::buf::Chunk;
use crate::config::HalfClose;
use crate::core::{Core, NS_PER_MS};
use crate::deadline::Opened;
use crate::driver::{Errno, Group, Op, Socket};
use crate::ending::farewell_ns;
use crate::entry::{Entry, Hangup, Linger, Receive};
use crate::error::Result;
use crate::expire::UNHEARD_MS;
use crate::input::Input;
use crate::report::CloseReason;
use crate::sys::bufs::Lease;
use crate::table::Id;
use crate::token::{Kind, Token};

impl Core {
    /// The next received chunk; `None` at the end of the stream, or when the drain has come and
    /// the connection is idle: between messages. A call that has `mid_message` bytes of one
    /// already opens it if it has to wait for more.
    pub(crate) fn poll_receive(
        &mut self,
        id: Id,
        mid_message: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Chunk>>> {
        let draining = self.drain.is_draining();
        let Some(entry) = self.table.get_mut(id) else {
            return Poll::Ready(Err(CloseReason::PeerReset.to_error("recv", None)));
        };
        entry.farewell = false;
        if entry.had_its_last && entry.ended.is_none() {
            return Poll::Ready(Ok(None));
        }
        if let Some(input) = &mut entry.input
            && let Some(chunk) = input.pop()
        {
            if input.is_empty() {
                self.spare_inputs.extend(entry.input.take());
            }
            self.memory.give_back(chunk.len());
            if entry.receive == Receive::Off {
                self.resume_receive(id);
            }
            return Poll::Ready(Ok(Some(chunk)));
        }
        if let Some(reason) = entry.ended {
            let limits = Some((&entry.deadlines, &self.limits));
            return Poll::Ready(Err(reason.to_error("recv", limits)));
        }
        if entry.eof || entry.dismissed.is_some() {
            return Poll::Ready(Ok(None));
        }
        let opens = mid_message > 0 && !entry.deadlines.is_in_message();
        if opens {
            let began_bytes = entry.bytes_in - mid_message as u64;
            entry.deadlines.begin_message(self.stamp_ms, Opened::ByRead, began_bytes);
        }
        let mut idle = false;
        // Who has connected waits for an answer, however quiet it is.
        if (draining || entry.deadlines.is_retired())
            && !entry.busy
            && !entry.is_outbound()
            && !entry.deadlines.is_in_message()
            // What the kernel holds already will be here in the next turn, and is served; so is
            // what it has told of and nobody has heard.
            && entry.socket.as_ref().is_none_or(|socket| socket.unread_bytes() == 0)
        {
            let due_ns = farewell_ns(&self.drain, id, entry);
            let patience_ns = due_ns.saturating_add(UNHEARD_MS * NS_PER_MS);
            let heard_all = !self.more_completions || (draining && patience_ns <= self.now_ns);
            if heard_all && entry.deadlines.is_retired() {
                entry.dismissed = Some(CloseReason::Lifetime);
                return Poll::Ready(Ok(None));
            }
            idle = entry.deadlines.has_first_byte() || entry.deadlines.is_retired();
            if idle && heard_all && due_ns <= self.now_ns {
                entry.dismissed = Some(CloseReason::Drained);
                return Poll::Ready(Ok(None));
            }
        }
        let turns = !entry.busy && !entry.waits();
        let goes_on = turns && entry.deadlines.waits(self.now_ms);
        self.tasks.register(&mut entry.reader, cx.waker());
        entry.farewell = idle;
        if idle || goes_on || opens {
            self.arm_deadline(id);
        }
        Poll::Pending
    }

    /// The handler has given up to wait for input, and does something else.
    pub(crate) fn stop_waiting(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.farewell = false;
        if entry.waits() && !entry.is_closing() {
            self.tasks.discard(Some(std::mem::take(&mut entry.reader)));
            entry.deadlines.stops_waiting(self.now_ms);
            self.arm_deadline(id);
        }
    }

    pub(crate) fn arm_receive(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let Some(socket) = &entry.socket else { return };
        debug_assert!(matches!(entry.receive, Receive::Off | Receive::Parked));
        entry.receive = Receive::Armed;
        entry.in_flight += 1;
        let group = entry.sizing.arm();
        // A multishot receive fills buffers as long as there is something, which for one that
        // floods is many at a time while the others wait. A large one each turn is its share.
        let once = entry.receives_once || group == Group::Large;
        let op = Op::Receive { socket: socket.name(), once, group };
        self.driver.push(receive_token(id, group), op);
    }

    /// Arms a paused receive again once its handler has taken half of what had piled up.
    fn resume_receive(&mut self, id: Id) {
        // While memory is short, all of it.
        let half = if self.memory.is_short() { 0 } else { self.settings.receive_queue_bytes / 2 };
        if let Some(entry) = self.table.get_mut(id)
            && entry.receive == Receive::Off
            && entry.input_bytes() <= half
            && entry.input.as_ref().is_none_or(|input| input.len() <= CHUNKS_MAX / 2)
            && entry.ended.is_none()
        {
            self.arm_receive(id);
        }
    }

    pub(crate) fn cancel_receive(&mut self, id: Id) {
        if let Some(entry) = self.table.get_mut(id)
            && entry.receive == Receive::Armed
        {
            entry.receive = Receive::Cancelling;
            entry.in_flight += 1;
            let target = receive_token(id, entry.sizing.armed());
            self.driver.push(cancel_token(id), Op::Cancel { target });
        }
    }

    #[inline(always)]
    pub(crate) fn on_received(&mut self, id: Id, last: bool, result: Result<Option<Lease>, Errno>) {
        let Some(entry) = self.table.get_mut(id) else {
            self.counters.stale.add(1);
            return;
        };
        let cancelling = entry.receive == Receive::Cancelling;
        if last {
            entry.in_flight -= 1;
            entry.receive = Receive::Off;
        }
        match result {
            Ok(Some(lease)) => {
                let bytes = lease.len();
                self.counters.bytes_received.add(bytes as u64);
                entry.bytes_in += bytes as u64;
                if entry.is_closing() || entry.ended.is_some() {
                    self.throw_away(id, bytes);
                    return self.after_receive(id);
                }
                entry.sizing.received(bytes, lease.left_some(), self.settings.bulk_bytes());
                // From now on it may have to be asked for signs of life.
                let asks = !entry.deadlines.has_first_byte() && entry.deadlines.has_heartbeat();
                entry.deadlines.received(self.stamp_ms);
                self.tasks.wake(&mut entry.reader);
                entry.take_in(lease, || self.spare_inputs.pop().unwrap_or_default());
                let full = entry.is_full(self.settings.receive_queue_bytes);
                let goes_on = entry.receive == Receive::Armed && !entry.sizing.is_outgrown();
                self.take_memory(bytes);
                if asks {
                    self.arm_deadline(id);
                }
                if goes_on && !full && !self.memory.is_short() {
                    return;
                }
            }
            Ok(None) => {
                entry.eof = true;
                entry.receive = Receive::Over;
                // The end of what was asked for is no reason to hurry, or not to read it.
                let asked = entry.is_outbound();
                let busy = !entry.waits() && !asked;
                if !asked {
                    entry.deadlines.half_closed(self.now_ms);
                }
                self.tasks.wake(&mut entry.reader);
                self.arm_deadline(id);
                if busy && self.settings.half_close == HalfClose::Abort {
                    self.end(id, CloseReason::HalfClosed);
                }
            }
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => {}
            // Kernels before 6.5 say ENOBUFS for a cancelled receive too.
            Err(Errno(libc::ENOBUFS)) if cancelling => {}
            Err(Errno(libc::ENOBUFS)) if entry.sizing.large_is_missing() => {
                self.counters.large_buffers_missing.add(1);
            }
            Err(Errno(libc::ENOBUFS)) => {
                self.counters.buffers_missing.add(1);
                entry.receive = Receive::Parked;
                // One that got nothing when its turn came does not lose its place.
                if entry.rearmed {
                    self.parked.push_front(id);
                } else {
                    self.parked.push_back(id);
                }
            }
            Err(errno) => {
                if last {
                    entry.receive = Receive::Over;
                }
                let reason = entry.fault(errno, self.settings.user_timeout_ms);
                self.end(id, reason);
            }
        }
        self.after_receive(id);
    }

    /// Decides what a receive that has answered, or ended, does next.
    fn after_receive(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.ended.is_some() || (entry.is_closing() && entry.linger != Linger::Now) {
            self.advance_close(id);
            return;
        }
        let over = entry.is_full(self.settings.receive_queue_bytes)
            || (entry.input.is_some() && self.memory.is_short());
        let (outgrown, closing) = (entry.sizing.is_outgrown(), entry.is_closing());
        let receive = entry.receive;
        match receive {
            Receive::Over if closing => self.advance_close(id),
            Receive::Armed if over || outgrown => self.cancel_receive(id),
            Receive::Off if over => {
                self.counters.pauses.add(1);
                self.watch_hangup(id);
            }
            Receive::Off => self.arm_receive(id),
            // It may be long until somebody gives buffers back.
            Receive::Parked if self.free_buffers() == 0 => self.watch_hangup(id),
            _ => {}
        }
    }

    /// A connection that receives nothing would not notice that its peer is gone.
    fn watch_hangup(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let Some(socket) = &entry.socket else { return };
        if entry.hangup == Hangup::Off {
            entry.hangup = Hangup::Armed;
            entry.in_flight += 1;
            self.driver.push(hangup_token(id), Op::Hangup { socket: socket.name() });
        }
    }

    pub(crate) fn cancel_hangup(&mut self, id: Id) {
        if let Some(entry) = self.table.get_mut(id)
            && entry.hangup == Hangup::Armed
        {
            entry.hangup = Hangup::Cancelling;
            entry.in_flight += 1;
            self.driver.push(cancel_token(id), Op::Cancel { target: hangup_token(id) });
        }
    }

    pub(crate) fn on_hangup(&mut self, id: Id, result: Result<i32, Errno>) {
        let Some(entry) = self.table.get_mut(id) else {
            self.counters.stale.add(1);
            return;
        };
        entry.in_flight -= 1;
        entry.hangup = Hangup::Off;
        // The end of the stream comes after data that is still unread, so it waits for the receive
        // to be armed again, as does everything while one is.
        let broken = result.is_ok_and(|events| events & i32::from(libc::POLLERR) != 0);
        let deaf = matches!(entry.receive, Receive::Off | Receive::Parked);
        if broken && deaf && !entry.is_closing() {
            let errno = entry.socket.as_ref().map_or(Errno(0), Socket::take_error);
            let reason = entry.fault(errno, self.settings.user_timeout_ms);
            self.end(id, reason);
        }
        self.advance_close(id);
    }

    /// A cancellation has ended. One that came while its target was being worked on has missed
    /// it, and the target may go on for good: it is cancelled again.
    pub(crate) fn on_cancelled(&mut self, id: Id, result: Result<(), Errno>) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.in_flight -= 1;
        if result.is_err() {
            if entry.receive == Receive::Cancelling {
                entry.receive = Receive::Armed;
                self.cancel_receive(id);
            } else if entry.hangup == Hangup::Cancelling {
                entry.hangup = Hangup::Armed;
                self.cancel_hangup(id);
            }
        }
        self.advance_close(id);
    }

    /// Gives those who wait for buffers another try, in their order, and no more of them than can
    /// all be served.
    ///
    /// A receive is tried when it is submitted, before the kernel serves those that are armed
    /// already. They would take all buffers, again and again, if this one waited for data first.
    pub(crate) fn rearm_parked(&mut self) {
        let free = self.free_buffers();
        if free == 0 {
            return;
        }
        for _ in 0..(free / TAKEN_AT_ONCE_MAX).max(1) {
            let Some(id) = self.parked.pop_front() else { return };
            if let Some(entry) = self.table.get_mut(id)
                && entry.receive == Receive::Parked
            {
                entry.rearmed = true;
                self.arm_receive(id);
            }
        }
    }

    /// Whether somebody waits for buffers that are there.
    pub(crate) fn has_parked(&self) -> bool {
        !self.parked.is_empty() && self.free_buffers() > 0
    }

    fn free_buffers(&self) -> u32 {
        let pool = self.driver.pool();
        pool.buffers() - pool.leased()
    }
}

impl Entry {
    /// Puts what was received into its queue.
    #[inline]
    fn take_in(&mut self, lease: Lease, spare: impl FnOnce() -> Box<Input>) {
        self.rearmed = false;
        self.farewell = false;
        let input = self.input.get_or_insert_with(spare);
        input.push(Chunk::new(lease));
    }

    /// Whether its handler has to catch up before more is received.
    fn is_full(&self, receive_queue_bytes: usize) -> bool {
        self.input
            .as_ref()
            .is_some_and(|input| input.bytes() > receive_queue_bytes || input.len() >= CHUNKS_MAX)
    }

    /// Why an operation of this connection has failed.
    pub(crate) fn fault(&self, errno: Errno, user_timeout_ms: u64) -> CloseReason {
        CloseReason::of_fault(errno, || {
            self.socket.as_ref().is_some_and(|socket| socket.is_given_up(user_timeout_ms))
        })
    }

    /// Forgets what was received and nobody will read, and says how much that was.
    pub(crate) fn discard_input(&mut self) -> usize {
        let input = self.input.take();
        self.unread_seen |= input.is_some();
        input.map_or(0, |input| input.bytes())
    }
}

/// The most buffers that a multishot receive fills before others have their turn
/// (`MULTISHOT_MAX_RETRY` in the kernel's io_uring/net.c).
const TAKEN_AT_ONCE_MAX: u32 = 32;

/// However small they are, so many chunks are enough: each costs a buffer or an allocation.
const CHUNKS_MAX: usize = 128;

fn receive_token(id: Id, group: Group) -> Token {
    let kind = match group {
        Group::Small => Kind::Receive,
        Group::Large => Kind::BulkReceive,
    };
    Token::new(kind, id.index, id.generation)
}

fn hangup_token(id: Id) -> Token {
    Token::new(Kind::Hangup, id.index, id.generation)
}

fn cancel_token(id: Id) -> Token {
    Token::new(Kind::Cancel, id.index, id.generation)
}
