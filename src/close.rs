//! Closing: by the handler (flush, FIN, read out what is unread), or by a deadline, the peer or
//! the drain. A socket is closed when nothing is in flight on it and never before; its entry
//! leaves the table, and enters the books, when its last handle is gone too.

use std::time::Duration;

use crate::core::{Core, Timer};
use crate::deadline::{DeadlineKind, Deadlines, Expired};
use crate::driver::{Shut, Socket};
use crate::entry::{Linger, Receive};
use crate::error::{Error, ErrorKind};
use crate::report::CloseReason;
use crate::table::Id;
use crate::wheel::Precision;

impl Core {
    /// A hold on the connection is dropped. The last one closes it, at the end of the turn: by
    /// then it is known whether its handler has succeeded.
    pub(crate) fn release(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.handles -= 1;
        if entry.handles == 0 {
            self.released.push(id);
        }
    }

    /// Closes the connections that nobody holds any more.
    pub(crate) fn close_released(&mut self) {
        while let Some(id) = self.released.pop() {
            let Some(entry) = self.table.get_mut(id) else { continue };
            entry.discard_input();
            entry.served = !entry.eof;
            for child in entry.take_children() {
                self.graveyard.extend(self.tasks.abort(child));
            }
            self.advance_close(id);
        }
    }

    /// Notes that the handler did not succeed.
    pub(crate) fn fail(&mut self, id: Id, reason: CloseReason) {
        if let Some(entry) = self.table.get_mut(id) {
            entry.failed.get_or_insert(reason);
        }
    }

    /// Ends a connection that its handler has not: whoever waits for it is told.
    pub(crate) fn end(&mut self, id: Id, reason: CloseReason) {
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.ended.is_some() {
            return;
        }
        entry.ended = Some(reason);
        let abandoned = entry.abandon_output();
        self.counters.bytes_abandoned.add(abandoned as u64);
        if reason != CloseReason::PeerReset {
            // What came before a reset may still be read.
            entry.discard_input();
        }
        if let Some(socket) = &entry.socket {
            socket.shut(Shut::Both);
        }
        self.tasks.wake(&mut entry.reader);
        self.tasks.wake(&mut entry.writer);
        let watchers = entry.company.as_mut().map(|company| std::mem::take(&mut company.watchers));
        for watcher in watchers.into_iter().flatten() {
            if let Some(mut wake) = self.drain_waiters.remove(watcher) {
                self.tasks.wake(&mut wake);
            }
        }
        // A handler has a moment to notice a deadline, and as long as an idle connection to
        // notice a peer that went away while it does something else.
        let grace_ms = match reason {
            // The drain itself drops the handlers that it has forced, and counts them.
            CloseReason::Forced => u64::MAX,
            CloseReason::PeerReset => entry.deadlines.limit_ms(DeadlineKind::Idle),
            _ => self.settings.force_grace_ms,
        };
        let until_ms = self.now_ms.saturating_add(grace_ms);
        entry.deadlines.enter_last_stage(Expired::Grace, until_ms);
        self.arm_deadline(id);
        self.advance_close(id);
    }

    /// Takes the next step towards the close, if it is time for one. Called whenever an operation
    /// of a connection that is ending has ended.
    pub(crate) fn advance_close(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let graceful = entry.ended.is_none();
        if graceful && !entry.is_closing() {
            return;
        }
        if graceful && entry.queued_bytes() > 0 {
            self.start_send(id);
            return;
        }
        let reading = matches!(entry.receive, Receive::Armed | Receive::Parked);
        if graceful && entry.linger == Linger::Now && reading {
            return;
        }
        if graceful
            && !entry.eof
            && !entry.fin_sent
            && let Some(socket) = &entry.socket
        {
            entry.fin_sent = true;
            entry.unacknowledged = socket.unsent_bytes() > 0;
            socket.shut(Shut::Write);
        }
        if entry.receive == Receive::Parked {
            entry.receive = Receive::Off;
        }
        self.cancel_receive(id);
        self.cancel_hangup(id);
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.in_flight > 0 {
            return;
        }
        if let Some(socket) = &entry.socket {
            // Input that comes to a closed socket resets it, and destroys what the peer has not
            // taken yet; so the close waits while there is the one or the other.
            let unread = || entry.unread_seen || entry.unacknowledged || socket.unread_bytes() > 0;
            if graceful
                && !entry.eof
                && entry.linger == Linger::NotYet
                && self.settings.linger_ms > 0
                && unread()
            {
                self.linger(id);
                return;
            }
            if entry.ended == Some(CloseReason::WriteStall) {
                // Its peer takes nothing; a FIN behind the data would not reach it either.
                socket.abort_on_close();
            }
        }
        entry.socket = None;
        if entry.is_closing() {
            self.remove(id);
        }
    }

    fn linger(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.linger = Linger::Now;
        entry.linger_until_ms = self.now_ms + self.settings.linger_ms;
        entry.receive = Receive::Off;
        self.arm_linger(id);
        self.arm_receive(id);
    }

    /// Reminds us to look again, soon if an acknowledgement is all that is missing.
    fn arm_linger(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let soon_ms = if entry.unread_seen { u64::MAX } else { self.now_ms + LINGER_STEP_MS };
        let until_ms = entry.linger_until_ms.min(soon_ms);
        entry.deadlines.enter_last_stage(Expired::Linger, until_ms);
        self.arm_deadline(id);
    }

    /// Lingers as long as there is something to wait for, and time for it: while the peer takes
    /// output, there is.
    fn go_on_lingering(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let unsent = entry.socket.as_ref().map_or(0, Socket::unsent_bytes);
        if unsent > 0 && entry.takes_output() {
            let until_ms = self.now_ms + self.settings.linger_ms;
            entry.linger_until_ms = until_ms.min(entry.deadlines.lifetime_end_ms());
        }
        if (entry.unread_seen || unsent > 0) && self.now_ms < entry.linger_until_ms {
            self.arm_linger(id);
            return;
        }
        entry.linger = Linger::Done;
        let until_ms = self.now_ms + self.settings.force_grace_ms;
        entry.deadlines.enter_last_stage(Expired::Grace, until_ms);
        self.arm_deadline(id);
        self.advance_close(id);
    }

    fn remove(&mut self, id: Id) {
        let Some(mut entry) = self.table.remove(id) else { return };
        self.tasks.discard(Some(std::mem::take(&mut entry.reader)));
        self.tasks.discard(Some(std::mem::take(&mut entry.writer)));
        if let Some(timer) = entry.timer {
            self.wheel.cancel(timer);
        }
        self.counters.close(entry.reason());
        self.counters.live.set(self.table.len() as u64);
        self.accept_if_full();
    }

    /// Makes the wheel remind us of the connection's earliest deadline, if it would do so later.
    pub(crate) fn arm_deadline(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let (at_ms, _) = entry.deadlines.next();
        if entry.timer.is_some() && entry.timer_ms <= at_ms {
            return;
        }
        entry.timer_ms = at_ms;
        match entry.timer {
            Some(timer) => {
                self.wheel.rearm(timer, at_ms);
            }
            None => {
                let timer = self.wheel.insert(at_ms, Precision::Coarse, Timer::Connection(id));
                entry.timer = Some(timer);
            }
        }
    }

    /// The wheel reminds us of a connection. Most of the time it has been active since.
    pub(crate) fn on_deadline(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.timer = None;
        let (at_ms, expired) = entry.deadlines.next();
        if at_ms > self.now_ms {
            self.arm_deadline(id);
            return;
        }
        match expired {
            Expired::Kind(DeadlineKind::FirstByte) if self.drain.is_draining() => {
                // It had its grace to say something; now it is idle like the others.
                entry.deadlines.set(DeadlineKind::FirstByte, u64::MAX);
                entry.drained = true;
                self.tasks.wake(&mut entry.reader);
                self.arm_deadline(id);
            }
            Expired::Kind(kind) => self.end(id, kind.close_reason()),
            Expired::Look => {
                let moved = entry.takes_output();
                if entry.deadlines.looked_at_output(self.now_ms, moved) {
                    self.end(id, CloseReason::WriteStall);
                } else {
                    self.arm_deadline(id);
                }
            }
            Expired::Linger => self.go_on_lingering(id),
            Expired::Grace => {
                // A handle may have been moved out of the handler; then it is looked at again.
                let again_ms = self.now_ms + self.limits.idle_ms;
                entry.deadlines.enter_last_stage(Expired::Grace, again_ms);
                self.arm_deadline(id);
                self.drop_tasks(id);
                self.advance_close(id);
            }
        }
    }

    /// The drain has come to a connection: its waiters look again. One that has not sent a byte
    /// is given a moment to.
    pub(crate) fn drain_connection(&mut self, id: Id) {
        let grace_ms = self.settings.new_grace_ms;
        let Some(entry) = self.table.get_mut(id) else { return };
        if !entry.deadlines.has_first_byte() {
            let limit_ms = entry.deadlines.limit_ms(DeadlineKind::FirstByte).min(grace_ms);
            entry.deadlines.set(DeadlineKind::FirstByte, limit_ms);
            self.arm_deadline(id);
        }
        let Some(entry) = self.table.get_mut(id) else { return };
        self.tasks.wake(&mut entry.reader);
    }

    /// Drops the tasks of a connection, outside of the borrow that this runs in.
    fn drop_tasks(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let tasks = entry.handler.take().into_iter().chain(entry.take_children());
        for task in tasks {
            self.graveyard.extend(self.tasks.abort(task));
        }
    }
}

impl DeadlineKind {
    fn close_reason(self) -> CloseReason {
        match self {
            DeadlineKind::FirstByte => CloseReason::FirstByte,
            DeadlineKind::Idle => CloseReason::Idle,
            DeadlineKind::WriteStall => CloseReason::WriteStall,
            DeadlineKind::Lifetime => CloseReason::Lifetime,
        }
    }
}

impl CloseReason {
    /// The error that an operation on a connection that was ended for this reason gets.
    pub(crate) fn to_error(self, operation: &'static str, deadlines: Option<&Deadlines>) -> Error {
        let late = |kind, words: &str, variable: &str| {
            let limit_ms = deadlines.map_or(0, |deadlines| deadlines.limit_ms(kind));
            Error::new(ErrorKind::TimedOut, operation)
                .because(format!("{words} for {:?} ({variable})", Duration::from_millis(limit_ms)))
        };
        match self {
            CloseReason::FirstByte => {
                late(DeadlineKind::FirstByte, "no first byte came", "SLIPRING_FIRST_BYTE_MS")
            }
            CloseReason::Idle => {
                late(DeadlineKind::Idle, "no byte went either way", "SLIPRING_IDLE_MS")
            }
            CloseReason::WriteStall => {
                late(DeadlineKind::WriteStall, "the peer took no output", "SLIPRING_WRITE_STALL_MS")
            }
            CloseReason::Lifetime => {
                late(DeadlineKind::Lifetime, "the connection has lived", "SLIPRING_LIFETIME_MS")
            }
            CloseReason::Forced => {
                Error::new(ErrorKind::Forced, operation).because("the drain's deadline has come")
            }
            _ => Error::new(ErrorKind::PeerReset, operation)
                .because("the peer reset the connection, or its machine is gone"),
        }
    }
}

/// A little more than the 40 ms by which an acknowledgement may be delayed.
const LINGER_STEP_MS: u64 = 50;
