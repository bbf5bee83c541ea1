//! What a protocol layer that parses requests by itself tells its core: when the peer owes the rest
//! of a message, when it is the handler's turn, and whether it is time to leave.

use std::task::Context;

use crate::conn::Link;
use crate::core::Core;
use crate::deadline::Opened;
use crate::error::Error;
use crate::executor::Wake;
use crate::table::Id;

/// What is to become of a connection that is being served.
#[derive(Debug)]
pub(crate) enum Stance {
    Stay,
    /// The requests at hand are the last ones.
    Leave,
    /// It is over, and why.
    Ended(Error),
}

impl Link {
    /// The peer owes the rest of a message.
    pub(crate) fn owes_message(&self) {
        let mut core = self.core.borrow_mut();
        if core.table.get(self.id).is_some_and(|entry| !entry.busy) {
            core.begin_message(self.id);
        }
    }

    /// A message has come whole, and the handler is at work on it.
    pub(crate) fn set_busy(&self) {
        self.core.borrow_mut().set_busy(self.id);
    }

    /// No request is left. Who is to leave hears of that where it waits for input.
    pub(crate) fn set_free(&self) {
        self.core.borrow_mut().set_free(self.id);
    }

    /// Whether no more requests are to follow.
    pub(crate) fn is_leaving(&self) -> bool {
        let core = self.core.borrow_mut();
        let retired = || core.table.get(self.id).is_some_and(|it| it.deadlines.is_retired());
        core.drain.is_draining() || retired()
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
        if draining || entry.deadlines.is_retired() { Stance::Leave } else { Stance::Stay }
    }
}

impl Core {
    pub(crate) fn set_busy(&mut self, id: Id) {
        if let Some(entry) = self.table.get_mut(id) {
            entry.busy = true;
            entry.deadlines.end_message(Opened::ByLayer);
            entry.deadlines.told(self.now_ms);
        }
    }

    fn set_free(&mut self, id: Id) {
        let draining = self.drain.is_draining();
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.busy = false;
        entry.deadlines.end_message(Opened::ByLayer);
        entry.deadlines.told(self.now_ms);
        if draining || entry.deadlines.is_retired() {
            self.tasks.wake(&mut entry.reader);
        }
    }
}
