//! Why a handler or a task should come to its end, and waiting for that.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::core::{Core, CoreRef};
use crate::executor::Wake;
use crate::report::CloseReason;
use crate::table::Id;

/// Why something is closing, as [`Connection::closing`](crate::Connection::closing) and
/// [`task::draining`](crate::task::draining) tell it.
///
/// What is ordered for the server holds for its cores, and what is ordered for a core holds for
/// its connections; so [`Handle::drain`](crate::Handle::drain) reaches all of them, and a
/// connection's end nobody but its own handler and tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Closing {
    /// Advisory: the server drains. Finish what is at hand, begin nothing new; there is time until
    /// the drain's deadline.
    Draining,
    /// Advisory: this core or connection alone is to leave, and the server goes on.
    Retired,
    /// Mandatory: the connection has ended for this reason, and nothing more can be received or
    /// sent.
    Ended(CloseReason),
}

impl Closing {
    /// Whether work may still be finished.
    #[must_use]
    pub fn is_advisory(self) -> bool {
        !matches!(self, Closing::Ended(_))
    }
}

impl Core {
    /// What is ordered for the whole core.
    fn core_closing(&self) -> Option<Closing> {
        let closing = if self.retired { Closing::Retired } else { Closing::Draining };
        self.drain.is_draining().then_some(closing)
    }

    /// What is ordered for a connection, or for the core where none is given.
    fn closing(&self, connection: Option<Id>) -> Option<Closing> {
        let Some(id) = connection else { return self.core_closing() };
        let Some(entry) = self.table.get(id) else {
            return Some(Closing::Ended(CloseReason::Finished));
        };
        let retired = || entry.deadlines.is_retired().then_some(Closing::Retired);
        entry.ended.map(Closing::Ended).or_else(|| self.core_closing()).or_else(retired)
    }
}

/// Resolves when the core begins to drain, or the connection has ended, if one is given.
pub(crate) fn until_closing(core: CoreRef, connection: Option<Id>) -> UntilClosing {
    UntilClosing { core, connection, waiter: None }
}

pub(crate) struct UntilClosing {
    core: CoreRef,
    connection: Option<Id>,
    waiter: Option<Id>,
}

impl Future for UntilClosing {
    type Output = Closing;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Closing> {
        let this = &mut *self;
        let core = &mut *this.core.borrow_mut();
        if let Some(closing) = core.closing(this.connection) {
            return Poll::Ready(closing);
        }
        let Core { drain_waiters, table, tasks, .. } = core;
        let waiter = match this.waiter {
            Some(waiter) if drain_waiters.contains(waiter) => waiter,
            _ => {
                let waiter = drain_waiters.insert(Wake::Nobody);
                if let Some(entry) = this.connection.and_then(|id| table.get_mut(id)) {
                    entry.company().watchers.push(waiter);
                }
                this.waiter = Some(waiter);
                waiter
            }
        };
        if let Some(wake) = drain_waiters.get_mut(waiter) {
            tasks.register(wake, cx.waker());
        }
        Poll::Pending
    }
}

impl Drop for UntilClosing {
    fn drop(&mut self) {
        let Some(waiter) = self.waiter else { return };
        let core = &mut *self.core.borrow_mut();
        let wake = core.drain_waiters.remove(waiter);
        core.tasks.discard(wake);
        let entry = self.connection.and_then(|id| core.table.get_mut(id));
        if let Some(company) = entry.and_then(|entry| entry.company.as_mut()) {
            company.watchers.retain(|watcher| *watcher != waiter);
        }
    }
}
