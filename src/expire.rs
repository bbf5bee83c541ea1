//! What is done when a deadline of a connection passes, and how the wheel is told of the next.

use crate::core::{Core, NS_PER_MS, Timer};
use crate::deadline::{DeadlineKind, Expired, Moment, Next, Opened, Verdict};
use crate::ending::farewell_ns;
use crate::entry::{Entry, Receive};
use crate::executor::Wake;
use crate::report::CloseReason;
use crate::table::Id;
use crate::wheel::{Precision, TimerKey};

impl Core {
    /// Makes the wheel remind us of the connection's earliest deadline, if it would do so later.
    pub(crate) fn arm_deadline(&mut self, id: Id) {
        self.arm_deadline_by(id, u64::MAX);
    }

    /// Makes the wheel remind us of a new connection so soon that its first output, which most have
    /// at once, need not arm it again.
    pub(crate) fn arm_first_deadline(&mut self, id: Id) {
        let Some(entry) = self.table.get(id) else { return };
        let by_ms = entry.deadlines.first_look(&self.limits, self.now_ms).at_ms;
        self.arm_deadline_by(id, by_ms);
    }

    fn arm_deadline_by(&mut self, id: Id, by_ms: u64) {
        let Some(next) = self.next_deadline(id) else { return };
        let Some(entry) = self.table.get_mut(id) else { return };
        let at_ms = next.at_ms.min(by_ms);
        if entry.timer != TimerKey::NONE && entry.timer_ms <= next.latest_ms {
            return;
        }
        self.remind_of(id, at_ms);
    }

    /// Makes the wheel remind us of the connection then.
    fn remind_of(&mut self, id: Id, at_ms: u64) {
        let Some(entry) = self.table.get_mut(id) else { return };
        // The latest that the wheel may make of it.
        entry.timer_ms = at_ms.saturating_add(at_ms.saturating_sub(self.now_ms) / 8);
        if !self.wheel.rearm(entry.timer, at_ms) {
            let timer = Timer::Connection(id.index);
            entry.timer = self.wheel.insert(at_ms, Precision::Coarse, timer);
        }
    }

    /// The earliest moment at which something may have to be done about a connection, and what.
    pub(crate) fn next_deadline(&self, id: Id) -> Option<Next> {
        let entry = self.table.get(id)?;
        let next = entry.deadlines.next(&self.limits, self.moment(entry));
        if entry.farewell && entry.ended.is_none() {
            let farewell_ms = farewell_ns(&self.drain, id, entry).div_ceil(NS_PER_MS);
            if farewell_ms < next.at_ms {
                let expired = Expired::Farewell;
                return Some(Next { at_ms: farewell_ms, latest_ms: farewell_ms, expired });
            }
        }
        Some(next)
    }

    /// The handler sets a limit.
    pub(crate) fn set_deadline(&mut self, id: Id, kind: DeadlineKind, limit_ms: u64) {
        if let Some(entry) = self.table.get_mut(id) {
            entry.deadlines.set(&self.limits, kind, limit_ms);
            self.arm_deadline(id);
        }
    }

    /// A limit as it is for a connection.
    pub(crate) fn limit_ms(&self, id: Id, kind: DeadlineKind) -> u64 {
        self.table.get(id).map_or(0, |entry| entry.deadlines.limit_ms(&self.limits, kind))
    }

    /// How long until a deadline of a connection passes; `None` while it does not run.
    pub(crate) fn deadline_in_ms(&mut self, id: Id, kind: DeadlineKind) -> Option<u64> {
        if kind == DeadlineKind::WriteStall {
            self.judge_output(id);
            self.arm_deadline(id);
        }
        let entry = self.table.get(id).filter(|entry| entry.ended.is_none())?;
        let at_ms = entry.deadlines.at_ms(&self.limits, kind, entry.waits())?;
        Some(at_ms.saturating_sub(self.now_ms))
    }

    /// A protocol layer says that a message begins.
    pub(crate) fn begin_message(&mut self, id: Id) {
        let stamp_ms = self.stamp_ms;
        if let Some(entry) = self.table.get_mut(id) {
            let began_bytes = entry.bytes_in - entry.input_bytes() as u64;
            entry.deadlines.begin_message(stamp_ms, Opened::ByLayer, began_bytes);
            self.arm_deadline(id);
        }
    }

    pub(crate) fn end_message(&mut self, id: Id, by: Opened) {
        if let Some(entry) = self.table.get_mut(id) {
            entry.deadlines.end_message(by);
        }
    }

    /// A protocol layer says that its message has come to its end. Once there is to be an end, it
    /// was the last one: what is queued behind it is not begun. True when that is so.
    pub(crate) fn end_layers_message(&mut self, id: Id) -> bool {
        self.end_message(id, Opened::ByLayer);
        let draining = self.drain.is_draining();
        let Some(entry) = self.table.get_mut(id) else { return true };
        if entry.is_outbound() {
            return false;
        }
        entry.had_its_last = draining || entry.deadlines.is_retired();
        if entry.deadlines.is_retired() {
            entry.dismissed.get_or_insert(CloseReason::Lifetime);
        } else if draining {
            entry.dismissed.get_or_insert(CloseReason::Drained);
        }
        entry.had_its_last
    }

    /// Bytes of a connection were received and will not be read.
    pub(crate) fn note_unread(&mut self, id: Id) {
        if let Some(entry) = self.table.get_mut(id) {
            entry.unread_seen = true;
        }
    }

    fn moment(&self, entry: &Entry) -> Moment {
        Moment {
            now_ms: self.now_ms,
            waits: entry.waits(),
            resumed_ms: self.pauses.resumed_ns().div_ceil(NS_PER_MS),
        }
    }

    /// The wheel reminds us of a connection. Most of the time it has been active since. True if its
    /// time is over.
    pub(crate) fn on_deadline(&mut self, slot: u32, timer: TimerKey) -> bool {
        let Some(id) = self.table.id_if(slot, |entry| entry.timer == timer) else { return false };
        let Some(next) = self.next_deadline(id) else { return false };
        let Some(entry) = self.table.get_mut(id) else { return false };
        entry.timer = TimerKey::NONE;
        // What would put it off may be among what the kernel has told of and nobody has heard.
        let patience_ms = next.latest_ms.saturating_add(UNHEARD_MS);
        let unheard = self.more_completions && self.now_ms < patience_ms;
        let postponed = unheard && next.expired.is_put_off_by_input();
        let passed = next.at_ms <= self.now_ms;
        if passed && postponed {
            // Not in each of the turns until then.
            self.remind_of(id, self.now_ms + 1);
            return false;
        }
        if passed {
            self.expired(id, next.expired);
        }
        self.arm_deadline(id);
        passed
    }

    fn expired(&mut self, id: Id, expired: Expired) {
        let Some(entry) = self.table.get_mut(id) else { return };
        match expired {
            Expired::Kind(DeadlineKind::FirstByte) if self.drain.is_draining() => {
                // It had its grace to say something; now it is idle like the others.
                entry.deadlines.excuse_first_byte();
                if entry.socket.as_ref().is_none_or(|socket| socket.unread_bytes() == 0) {
                    entry.dismissed = Some(CloseReason::Drained);
                }
                self.tasks.wake(&mut entry.reader);
            }
            Expired::Kind(DeadlineKind::Lifetime) => self.retire(id),
            // Its protocol layer has the last word. One that says nothing is idle for once more.
            Expired::Kind(DeadlineKind::Idle) if entry.says_farewell && !entry.idle_over => {
                entry.idle_over = true;
                entry.deadlines.told(self.now_ms);
                self.tasks.wake(&mut entry.reader);
            }
            Expired::Kind(kind) => self.end(id, kind.close_reason()),
            Expired::Retired => self.end(id, CloseReason::Lifetime),
            Expired::Output => self.judge_output(id),
            Expired::Input => {
                if self.is_message_slow(id) {
                    self.end(id, CloseReason::MinRate);
                }
            }
            Expired::Beat => self.beat(id),
            Expired::Heartbeat if entry.receive == Receive::Armed => {
                self.end(id, CloseReason::Heartbeat);
            }
            Expired::Heartbeat => entry.deadlines.postpone_heartbeat(&self.limits, self.now_ms),
            Expired::Farewell => {
                entry.farewell = false;
                self.tasks.wake(&mut entry.reader);
            }
            Expired::Linger => self.go_on_lingering(id),
            Expired::Grace => {
                // A handle may have been moved out of the handler; then it is looked at again.
                let again_ms = self.now_ms + self.settings.idle_ms;
                entry.deadlines.enter_last_stage(Expired::Grace, again_ms);
                self.drop_tasks(id);
                self.advance_close(id);
            }
        }
    }

    fn is_message_slow(&mut self, id: Id) -> bool {
        let Some(moment) = self.table.get(id).map(|entry| self.moment(entry)) else { return false };
        let Some(entry) = self.table.get_mut(id) else { return false };
        let (hears, bytes) = (entry.receive == Receive::Armed, entry.bytes_in);
        entry.deadlines.looked_at_input(&self.limits, moment, hears, bytes)
    }

    /// Looks how much of the output the peer has taken.
    pub(crate) fn look_at_output(&mut self, id: Id) -> Verdict {
        let Some(entry) = self.table.get_mut(id) else { return Verdict::Fine };
        let Some(socket) = &entry.socket else { return Verdict::Fine };
        let (acknowledged, exact) = socket.acknowledged_bytes(entry.bytes_out);
        let total = entry.bytes_out + entry.queued_bytes() as u64;
        let (deadlines, limits) = (&mut entry.deadlines, &self.limits);
        deadlines.looked_at_output(limits, self.now_ms, acknowledged, total, exact)
    }

    fn judge_output(&mut self, id: Id) {
        match self.look_at_output(id) {
            Verdict::Fine => {}
            Verdict::Stalled => self.end(id, CloseReason::WriteStall),
            Verdict::TooSlow => self.end(id, CloseReason::MinRate),
        }
    }

    /// A connection has reached its greatest age. Whoever waits for its next message is done; who
    /// is in the middle of one may finish it.
    fn retire(&mut self, id: Id) {
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.deadlines.retire(&self.limits, self.now_ms);
        self.tasks.wake(&mut entry.reader);
        self.tell_watchers(id);
    }

    /// Asks a silent peer for a sign of life, unless there is something before that in its way: it
    /// would come behind output that the peer does not take, or amid what a busy handler says.
    fn beat(&mut self, id: Id) {
        self.judge_output(id);
        let Some(entry) = self.table.get_mut(id) else { return };
        if entry.ended.is_some() {
            return;
        }
        let hears = entry.waits() && entry.receive == Receive::Armed;
        let in_time = hears && !entry.is_closing() && !entry.finishing;
        let frame = self.listeners.get(usize::from(entry.listener)).and_then(|of| of.heartbeat());
        match frame {
            Some(frame) if in_time && !entry.deadlines.has_output() => {
                entry.deadlines.asked(self.now_ms);
                self.output(id, |output| output.push(frame.into()));
            }
            _ => entry.deadlines.postpone_heartbeat(&self.limits, self.now_ms),
        }
    }
}

impl Entry {
    /// Whether it waits for input, and has nothing else to do. One without a handler never has.
    pub(crate) fn waits(&self) -> bool {
        self.is_closing() || (!self.busy && !matches!(self.reader, Wake::Nobody))
    }
}

/// For how long a completion that waits behind others may keep a deadline from being judged.
pub(crate) const UNHEARD_MS: u64 = 100;
