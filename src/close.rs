//! Closing: by the handler (flush, FIN, read out what is unread), or by a deadline, the peer or
//! the drain. A socket is closed when nothing is in flight on it and never before; its entry
//! leaves the table, and enters the books, when its last handle is gone too.

use crate::core::Core;
use crate::deadline::{DeadlineKind, Expired, Verdict};
use crate::driver::{Shut, Socket};
use crate::entry::{Entry, Linger, Lingering, Receive};
use crate::report::CloseReason;
use crate::shutdown::UNREAD_MAX;
use crate::table::Id;
use crate::token::{Kind, Token};
use crate::wheel::TimerKey;

impl Core {
    /// A hold on the connection is dropped. The last one closes it, at the end of the turn: by
    /// then it is known whether its handler has succeeded.
    pub(crate) fn release(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.handles -= 1;
        if entry.handles == 0 {
            self.outbound.held -= usize::from(entry.is_outbound());
            self.released.push(id);
        }
    }

    /// Closes the connections that nobody holds any more.
    pub(crate) fn close_released(&mut self) {
        while let Some(id) = self.released.pop() {
            let Some(entry) = self.table.get_mut(id) else { continue };
            self.memory.give_back(entry.discard_input());
            entry.served = !entry.eof;
            for child in entry.take_children() {
                self.graveyard.extend(self.tasks.abort(child));
            }
            // Of one that has ended before only the entry is left.
            if entry.socket.is_some() {
                self.advance_close(id);
            } else {
                self.remove(id);
            }
        }
    }

    /// The owner sends no more: what is queued goes out, and our end behind it.
    pub(crate) fn finish(&mut self, id: Id) {
        if let Some(entry) = self.table.get_mut(id) {
            entry.finishing = true;
            self.advance_close(id);
        }
    }

    /// Notes that the handler did not succeed.
    pub(crate) fn fail(&mut self, id: Id, reason: CloseReason) {
        if let Some(entry) = self.table.get_mut(id) {
            entry.failed.get_or_insert(reason);
        }
    }

    /// The handler that is being polled did not succeed.
    pub(crate) fn fail_running_handler(&mut self) {
        if let Some(id) = self.tasks.running_handler() {
            self.fail(id, CloseReason::HandlerError);
        }
    }

    /// Ends a connection that its handler has not: whoever waits for it is told.
    pub(crate) fn end(&mut self, id: Id, reason: CloseReason) {
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.ended.is_some() {
            return;
        }
        entry.ended = Some(reason);
        entry.resets = reason.resets(entry.queued_bytes() > 0) || (entry.tied && reason.is_own());
        let abandoned = entry.abandon_output();
        self.counters.bytes_abandoned.add(abandoned as u64);
        self.memory.give_back(abandoned);
        if !reason.is_peers() {
            // What came before a reset may still be read.
            self.memory.give_back(entry.discard_input());
        }
        // A FIN would come before the reset that is meant, or to a peer that is gone; but only it
        // ends a send.
        let fin = !entry.resets && !reason.is_peers();
        let shut = fin || entry.sending_bytes > 0;
        if let Some(socket) = entry.socket.as_ref().filter(|_| shut) {
            socket.shut(Shut::Both);
        }
        self.tasks.wake(&mut entry.reader);
        self.tasks.wake(&mut entry.take_writer());
        self.tell_watchers(id);
        let Some(entry) = self.table.get_mut(id) else { return };
        // A handler has a moment to notice a deadline, and as long as an idle connection to
        // notice a peer that went away while it does something else.
        let grace_ms = match reason {
            // The drain itself drops the handlers that it has forced, and counts them.
            CloseReason::Forced => u64::MAX,
            _ if reason.is_peers() => entry.deadlines.limit_ms(&self.limits, DeadlineKind::Idle),
            _ => self.settings.force_grace_ms,
        };
        let until_ms = self.now_ms.saturating_add(grace_ms);
        entry.deadlines.enter_last_stage(Expired::Grace, until_ms);
        if entry.timer == TimerKey::NONE || entry.timer_ms > until_ms {
            self.arm_deadline(id);
        }
        self.advance_close(id);
    }

    /// Takes the next step towards the close, if it is time for one. Called whenever an operation
    /// of a connection that is ending has ended.
    pub(crate) fn advance_close(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let graceful = entry.ended.is_none();
        if graceful && !entry.is_closing() {
            if entry.finishing && entry.queued_bytes() == 0 {
                entry.send_fin();
            }
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
        if graceful && !entry.eof {
            entry.send_fin();
        }
        if graceful && entry.receive == Receive::Armed && self.has_to_linger(id) {
            // What is armed already need not be armed anew.
            self.linger(id);
            return;
        }
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.receive == Receive::Parked {
            entry.receive = Receive::Off;
        }
        self.cancel_receive(id);
        self.cancel_hangup(id);
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.in_flight > 0 {
            return;
        }
        if graceful && self.has_to_linger(id) {
            self.linger(id);
            return;
        }
        let Some(entry) = self.table.get_mut(id) else { return };
        if let Some(socket) = &entry.socket {
            if entry.resets {
                // A FIN behind data that the peer does not take would not reach it either.
                socket.abort_on_close();
            } else if entry.ended.map_or(entry.is_refused(), |reason| !reason.is_peers()) {
                // What nobody has read would make it a reset.
                socket.discard_unread(UNREAD_MAX);
            }
        }
        self.driver.forget(Token::new(Kind::Send, id.index, id.generation));
        if entry.socket.take().is_some() {
            // Of many that are reset at once some end in each turn, so the others need not wait.
            self.hears = self.hears.saturating_sub(END_IN_COMPLETIONS);
        }
        if entry.is_closing() {
            self.remove(id);
        }
    }

    /// Input that comes to a closed socket resets it, and destroys what the peer has not taken yet;
    /// so the close waits while there is the one or the other.
    fn has_to_linger(&self, id: Id) -> bool {
        let Some(entry) = self.table.get(id) else { return false };
        let Some(socket) = &entry.socket else { return false };
        let unread = || entry.unread_seen || entry.unacknowledged || socket.unread_bytes() > 0;
        let may = !entry.eof && entry.linger == Linger::NotYet && self.settings.linger_ms > 0;
        may && unread()
    }

    fn linger(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.linger = Linger::Now;
        let (until_ms, mark) = (self.now_ms + self.settings.linger_ms, u64::MAX);
        entry.company().lingering = Some(Lingering { until_ms, mark, bytes: 0 });
        let armed = entry.receive == Receive::Armed;
        self.note_lingering(id);
        self.arm_linger(id);
        if !armed {
            self.arm_receive(id);
        }
    }

    /// Reminds us to look again, soon if an acknowledgement is all that is missing.
    fn arm_linger(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let soon_ms = if entry.unread_seen { u64::MAX } else { self.now_ms + LINGER_STEP_MS };
        let linger_ms = entry.lingering().map_or(0, |lingering| lingering.until_ms);
        entry.deadlines.enter_last_stage(Expired::Linger, linger_ms.min(soon_ms));
        self.arm_deadline(id);
    }

    /// Lingers as long as there is something to wait for, and time for it: while the peer takes
    /// output, no slower than the least rate, there is.
    pub(crate) fn go_on_lingering(&mut self, id: Id) {
        let verdict = self.look_at_output(id);
        let Some(entry) = self.table.get_mut(id) else { return };
        let lifetime_end_ms = entry.deadlines.lifetime_end_ms(&self.limits);
        let unread_seen = entry.unread_seen;
        let unsent = entry.socket.as_ref().map_or(0, Socket::unsent_bytes);
        let taken = entry.socket.as_ref().map_or(0, |it| it.acknowledged_bytes(entry.bytes_out).0);
        let Some(lingering) = entry.lingering() else { return };
        let moved = std::mem::replace(&mut lingering.mark, taken) != taken;
        if unsent > 0 && verdict == Verdict::TooSlow {
            self.end(id, CloseReason::MinRate);
            return;
        }
        if unsent > 0 && moved {
            let until_ms = self.now_ms + self.settings.linger_ms;
            lingering.until_ms = until_ms.min(lifetime_end_ms);
        }
        if (unread_seen || unsent > 0) && self.now_ms < lingering.until_ms {
            self.arm_linger(id);
        } else {
            self.stop_lingering(id);
        }
    }

    /// Counts what is thrown away: a peer that sends and sends is not worth a linger.
    pub(crate) fn throw_away(&mut self, id: Id, bytes: usize) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.unread_seen = true;
        let now = entry.linger == Linger::Now;
        let Some(lingering) = entry.lingering() else { return };
        lingering.bytes += bytes as u64;
        if now && lingering.bytes > self.settings.linger_bytes {
            self.stop_lingering(id);
        }
    }

    fn stop_lingering(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.linger = Linger::Done;
        let until_ms = self.now_ms + self.settings.force_grace_ms;
        entry.deadlines.enter_last_stage(Expired::Grace, until_ms);
        self.arm_deadline(id);
        self.advance_close(id);
    }

    fn remove(&mut self, id: Id) {
        let Some(mut entry) = self.table.remove(id) else { return };
        self.tasks.discard(Some(std::mem::take(&mut entry.reader)));
        self.tasks.discard(Some(entry.take_writer()));
        self.wheel.cancel(entry.timer);
        let raced = entry.dismissed.is_some() && entry.unread_seen;
        self.counters.idle_races.add(u64::from(raced));
        self.forget(&mut entry);
        self.counters.close(entry.reason());
        self.publish_live();
        self.give_back_places();
        self.accept_if_held_up();
    }

    /// The drain has come to a connection: its waiters look again. One that has not sent a byte
    /// is given a moment to.
    pub(crate) fn drain_connection(&mut self, id: Id) {
        let grace_ms = self.settings.new_grace_ms;
        let Some(entry) = self.table.get_mut(id).filter(|entry| !entry.is_outbound()) else {
            return;
        };
        if !entry.deadlines.has_first_byte() {
            let limit_ms = entry.deadlines.limit_ms(&self.limits, DeadlineKind::FirstByte);
            entry.deadlines.set(&self.limits, DeadlineKind::FirstByte, limit_ms.min(grace_ms));
            self.arm_deadline(id);
        }
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.deadlines.told(self.now_ms);
        // Whoever waits for input on asks again when to say farewell.
        entry.farewell = false;
        self.tasks.wake(&mut entry.reader);
    }

    /// Wakes those who wait for the connection to be closing.
    pub(crate) fn tell_watchers(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let watchers = entry.company.as_mut().map(|company| std::mem::take(&mut company.watchers));
        for watcher in watchers.into_iter().flatten() {
            if let Some(mut wake) = self.drain_waiters.remove(watcher) {
                self.tasks.wake(&mut wake);
            }
        }
    }

    /// Drops the tasks of a connection, outside of the borrow that this runs in.
    pub(crate) fn drop_tasks(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        let tasks = entry.handler.take().into_iter().chain(entry.take_children());
        for task in tasks {
            self.graveyard.extend(self.tasks.abort(task));
        }
    }
}

impl Entry {
    /// Ends our side, once.
    fn send_fin(&mut self) {
        if let Some(socket) = self.socket.as_ref().filter(|_| !self.fin_sent) {
            self.fin_sent = true;
            self.unacknowledged = socket.unsent_bytes() > 0;
            socket.shut(Shut::Write);
        }
    }
}

/// A close takes a few microseconds, about as long as hearing so many completions.
const END_IN_COMPLETIONS: u32 = 15;
/// A little more than the 40 ms by which an acknowledgement may be delayed.
const LINGER_STEP_MS: u64 = 50;
