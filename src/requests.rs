//! What a protocol layer that parses requests by itself tells its core: when the peer owes the rest
//! of a message, when it is the handler's turn, and whether it is time to leave.

use std::task::Context;

use crate::conn::Link;
use crate::core::Core;
use crate::deadline::Opened;
use crate::error::Error;
use crate::executor::Wake;
use crate::report::CloseReason;
use crate::table::Id;

/// What is to become of a connection that is being served.
#[derive(Debug)]
pub(crate) enum Stance {
    Stay,
    /// The requests at hand are the last ones.
    Leave,
    /// No request is at hand, and none has come for too long.
    Idle,
    /// It is over, and why.
    Ended(Error),
}

/// How far a message has come for whose rest nobody waits at the moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SoFar {
    /// For how long the peer was waited for.
    ms: u64,
    /// What had been received before it.
    from_bytes: u64,
}

impl Link {
    /// The peer owes the rest of a message, which may have come so far before.
    pub(crate) fn owes_message(&self, so_far: Option<SoFar>) {
        self.core.borrow_mut().owes_message(self.id, so_far);
    }

    /// The handler is at work on a message, and nobody waits for the peer. Says how far the message
    /// has come, if it was waited for.
    pub(crate) fn set_busy(&self) -> Option<SoFar> {
        self.core.borrow_mut().set_busy(self.id)
    }

    /// No request is left. Who is to leave hears of that where it waits for input.
    pub(crate) fn set_free(&self) {
        self.core.borrow_mut().set_free(self.id);
    }

    /// The protocol has pings of its own: bytes alone do not keep the connection from being idle.
    pub(crate) fn asks_by_itself(&self) {
        let mut core = self.core.borrow_mut();
        if let Some(entry) = core.table.get_mut(self.id) {
            entry.deadlines.ignores_bytes_when_idle();
            core.arm_deadline(self.id);
        }
    }

    /// Whether it is told when it has been idle for too long, to end it by itself.
    pub(crate) fn says_farewell(&self, says: bool) {
        if let Some(entry) = self.core.borrow_mut().table.get_mut(self.id) {
            (entry.says_farewell, entry.idle_over) = (says, false);
        }
    }

    /// It was idle for too long, and there is nothing to say: it ends at once.
    pub(crate) fn end_idle(&self) {
        self.core.borrow_mut().end(self.id, CloseReason::Idle);
    }

    /// It was idle for too long, and has been told that: it ends behind what was said. This is what
    /// its handler is to return.
    pub(crate) fn leave_idle(&self) -> Error {
        let core = &mut *self.core.borrow_mut();
        core.fail(self.id, CloseReason::Idle);
        let limits = core.table.get(self.id).map(|entry| (&entry.deadlines, &core.limits));
        CloseReason::Idle.to_error("serve", limits)
    }

    /// Nobody waits for input any more.
    pub(crate) fn stop_waiting(&self) {
        self.core.borrow_mut().stop_waiting(self.id);
    }

    /// What the polling task is to do with the connection. It is woken when that changes, whether
    /// or not it waits for input.
    pub(crate) fn stance(&self, cx: &mut Context<'_>) -> Stance {
        let core = &mut *self.core.borrow_mut();
        let draining = core.drain.is_draining();
        let Some(entry) = core.table.get_mut(self.id) else { return Stance::Stay };
        if let Some(reason) = entry.ended {
            let limits = Some((&entry.deadlines, &core.limits));
            return Stance::Ended(reason.to_error("serve", limits));
        }
        if matches!(entry.reader, Wake::Nobody) {
            core.tasks.register(&mut entry.reader, cx.waker());
        }
        if draining || entry.deadlines.is_retired() {
            Stance::Leave
        } else if entry.idle_over {
            Stance::Idle
        } else {
            Stance::Stay
        }
    }
}

impl Core {
    fn owes_message(&mut self, id: Id, so_far: Option<SoFar>) {
        let stamp_ms = self.stamp_ms;
        let Some(entry) = self.table.get_mut(id) else { return };
        (entry.busy, entry.idle_over) = (false, false);
        entry.deadlines.told(self.now_ms);
        let taken = entry.bytes_in - entry.input_bytes() as u64;
        let SoFar { ms, from_bytes } = so_far.unwrap_or(SoFar { ms: 0, from_bytes: taken });
        let since_ms = stamp_ms.saturating_sub(ms);
        entry.deadlines.begin_message(since_ms, Opened::ByLayer, from_bytes);
        self.arm_deadline(id);
    }

    fn set_busy(&mut self, id: Id) -> Option<SoFar> {
        let entry = self.table.get_mut(id)?;
        (entry.busy, entry.idle_over) = (true, false);
        let so_far = entry.deadlines.message(self.now_ms);
        entry.deadlines.end_message(Opened::ByLayer);
        entry.deadlines.told(self.now_ms);
        so_far.map(|(ms, from_bytes)| SoFar { ms, from_bytes })
    }

    fn set_free(&mut self, id: Id) {
        let draining = self.drain.is_draining();
        let Some(entry) = self.table.get_mut(id) else { return };
        (entry.busy, entry.idle_over) = (false, false);
        entry.deadlines.end_message(Opened::ByLayer);
        entry.deadlines.told(self.now_ms);
        if draining || entry.deadlines.is_retired() {
            self.tasks.wake(&mut entry.reader);
        }
    }
}
