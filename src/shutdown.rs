//! The end of a core, after a drain or a failure: whatever is left is ended, every operation's end
//! is seen, the queues are emptied, and the books are closed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::core::{Core, CoreCell, NS_PER_MS};
use crate::driver::{Shut, Socket, Wait};
use crate::executor::{drop_guarded, guarded, panic_text};
use crate::mail::drop_messages;
use crate::post::Message;
use crate::report::CloseReason;
use crate::table::Id;

impl CoreCell {
    /// Ends whatever the drain has left, sees every operation's end, and closes the books.
    ///
    /// After a bug of ours nothing is certain, so each stage is on its own: one that panics does
    /// not keep the next from its part. Returns what the first that did has said.
    pub(crate) fn shut_down(self: &Rc<CoreCell>) -> Option<String> {
        let stages: [fn(&Rc<CoreCell>); 6] = [
            CoreCell::drop_code_of_others,
            CoreCell::force_all,
            CoreCell::let_connections_go,
            |core| core.borrow_mut().quiesce(),
            |core| core.borrow_mut().empty_queues(),
            CoreCell::close_books,
        ];
        let mut failure = None;
        for stage in stages {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| stage(self))) {
                failure.get_or_insert(panic_text(&*panic));
            }
        }
        failure
    }

    fn drop_code_of_others(self: &Rc<CoreCell>) {
        self.borrow_mut().post.load.close();
        let leftover = self.borrow_mut().take_all_tasks();
        drop_guarded(leftover);
        // Handlers are anyone's code, and may own connections of the core.
        let handlers = self.borrow_mut().take_handlers();
        guarded(move || drop(handlers));
        let states = std::mem::take(&mut self.borrow_mut().states);
        guarded(move || drop(states));
    }

    /// Time is up for all: each connection is told, and those that end leave at once.
    fn force_all(self: &Rc<CoreCell>) {
        let left = self.borrow_mut().table.ids().collect::<Vec<_>>();
        for piece in left.chunks(PIECE) {
            let mut core = self.borrow_mut();
            piece.iter().for_each(|id| core.force(*id));
            core.hear(Wait::No);
        }
    }

    /// Handles that were dropped with their futures let their connections go.
    fn let_connections_go(self: &Rc<CoreCell>) {
        let give_up_ns = self.borrow_mut().driver.now_ns() + SHUT_DOWN_LIMIT_NS;
        loop {
            self.bury();
            let mut core = self.borrow_mut();
            // One whose socket is closed is only held by somebody who never lets it go.
            let closed = core.table.iter().all(|(_, entry)| entry.socket.is_none())
                && core.outbound.attempts.iter().all(|(_, attempt)| attempt.in_flight == 0)
                && core.udp.leaving == 0;
            if closed || core.driver.now_ns() >= give_up_ns {
                break;
            }
            core.close_released();
            let until_ns = core.driver.now_ns() + NS_PER_MS;
            core.hear(Wait::Until(until_ns));
        }
    }

    fn close_books(self: &Rc<CoreCell>) {
        let (late_mail, inspections) = {
            let mut core = self.borrow_mut();
            let leaked = core.counters.leaked_operations.get() > 0;
            core.drop_attempts(leaked);
            for id in core.table.ids().collect::<Vec<_>>() {
                core.remove_forced(id, leaked);
            }
            core.close_sockets(leaked);
            // First, so that nobody grants a place to a core that will not hear of it.
            let mut unread = core.post.mailbox.close();
            let mut unheard: Vec<Message> = std::mem::take(&mut core.mail).into();
            let moved = |message: &mut Message| matches!(message, Message::Moved(_));
            let late = unread.extract_if(.., moved).chain(unheard.extract_if(.., moved));
            late.for_each(|message| core.turn_away_late(message));
            let control = Arc::clone(&core.control);
            core.lease.end(|other| control.seats()[other].post.post(Message::Look).is_ok());
            let listeners = std::mem::take(&mut core.listeners);
            if leaked {
                // The kernel may still use their descriptors.
                std::mem::forget(listeners);
            }
            core.publish_counters();
            let spawns = |message: &&Message| matches!(message, Message::Spawn(..));
            let refused = unread.iter().chain(&unheard).filter(spawns).count();
            core.counters.tasks_refused.add(refused as u64);
            (unread.into_iter().chain(unheard), std::mem::take(&mut core.inspections))
        };
        drop_messages(late_mail);
        guarded(move || drop(inspections));
        self.post_mail();
        self.bury();
    }
}

impl Core {
    /// Ends a connection in the cheapest way, as there may be very many: the close says to the peer
    /// that it is over, and only a send in flight has to be cut off before.
    fn force(&mut self, id: Id) {
        // All that a complete drain leaves is held by nobody who would use it.
        let reason =
            if self.drain.is_complete() { CloseReason::Drained } else { CloseReason::Forced };
        if reason == CloseReason::Forced {
            self.note_survivor(id);
        }
        let Some(entry) = self.table.get_mut(id) else { return };
        entry.ended.get_or_insert(reason);
        if let Some(socket) = entry.socket.as_ref().filter(|_| entry.sending_bytes > 0) {
            socket.shut(Shut::Both);
        }
        let (unsent, unread) = (entry.abandon_output(), entry.discard_input());
        self.counters.bytes_abandoned.add(unsent as u64);
        self.memory.give_back(unsent + unread);
        self.tell_watchers(id);
        self.advance_close(id);
    }

    /// Submits what is queued, and hears what has ended.
    fn hear(&mut self, wait: Wait) {
        let _ = self.driver.enter(wait);
        while let Some(completion) = self.driver.next() {
            self.dispatch(completion);
        }
    }

    fn quiesce(&mut self) {
        self.udp.over = true;
        let (limit, mut last) = (Duration::from_nanos(SHUT_DOWN_LIMIT_NS), Vec::new());
        let leaked = self.driver.quiesce(limit, &mut last);
        self.counters.leaked_operations.add(leaked as u64);
        for completion in last {
            self.dispatch(completion);
        }
    }

    /// What a drain would have taken from the queues, and a core that has failed has left there,
    /// gets a FIN; a close of the listeners would reset it.
    fn empty_queues(&mut self) {
        for index in 0..self.listeners.len() {
            let listener = &mut self.listeners[index];
            let kept = listener.is_kept();
            self.counters.queue_left.add(listener.left_queued());
            let Some(socket) = listener.take_socket() else { continue };
            let ours = if kept { 0 } else { self.settings.backlog };
            for _ in 0..ours {
                let Ok(connection) = socket.accept_now() else { break };
                self.turn_away(connection);
            }
            let reset = if kept { 0 } else { socket.queued_connections() };
            self.counters.queue_abandoned.add(reset);
            if self.counters.leaked_operations.get() > 0 {
                // The kernel may still use its descriptor.
                std::mem::forget(socket);
            }
        }
    }

    /// A message that came too late and has a connection in it.
    fn turn_away_late(&mut self, message: Message) {
        if let Message::Moved(moved) = message {
            self.turn_away_moved(moved);
        }
    }

    /// A connection that nobody is left to serve.
    pub(crate) fn turn_away(&mut self, socket: Socket) {
        self.counters.accepted.add(1);
        self.counters.close(CloseReason::Forced);
        socket.shut(Shut::Write);
        socket.discard_unread(UNREAD_MAX);
    }

    /// Closes the books on a connection whose operations did not all end.
    fn remove_forced(&mut self, id: Id, leak: bool) {
        if let Some(mut entry) = self.table.remove(id) {
            self.tasks.discard(Some(std::mem::take(&mut entry.reader)));
            self.tasks.discard(Some(std::mem::take(&mut entry.writer)));
            if leak {
                // The kernel may still use the descriptor: never close it.
                std::mem::forget(entry.socket.take());
            }
            self.forget(&mut entry);
            self.counters.close(entry.reason());
            self.publish_live();
        }
    }
}

/// How long a core that is down waits for the last completions before it leaks; twice at most.
const SHUT_DOWN_LIMIT_NS: u64 = 30 * NS_PER_MS;
/// How many connections are ended before the kernel is heard again.
const PIECE: usize = 512;
/// A default receive buffer of the kernel holds no more (tcp(7), `tcp_rmem`).
pub(crate) const UNREAD_MAX: usize = 1 << 20;
