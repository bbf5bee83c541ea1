//! A core's drain: hearing of it and going through its phases.
//!
//! What takes a look at every connection is done in pieces, some each turn, so that those who are
//! still being served do not wait for it.

use std::time::Duration;

use crate::core::{Core, NS_PER_MS};
use crate::drain::{Drain, Left, Phase};
use crate::entry::Entry;
use crate::report::{CloseReason, CoreReport, PhaseTimes};
use crate::table::Id;
use crate::walk::Walk;

/// Where a core's walks stand.
#[derive(Debug, Default)]
pub(crate) struct Walks {
    /// Over the connections: to end the idle ones, later to force what is left.
    connections: Walk,
    /// Over the tasks that wait for the drain.
    waiters: Walk,
}

impl Walks {
    pub(crate) fn is_done(&self) -> bool {
        self.connections.is_done() && self.waiters.is_done()
    }
}

impl Core {
    /// Hears of the drain's deadline. False while there is none.
    pub(crate) fn hear_of_drain(&mut self) -> bool {
        let all_ns = self.control.deadline_ns();
        let deadline_ns = all_ns.min(self.retire_ns);
        if deadline_ns < self.drain.deadline_ns() {
            if all_ns == u64::MAX {
                self.retired = true;
                self.drain.retire(self.now_ns, deadline_ns);
            } else {
                self.drain.order(self.now_ns, deadline_ns);
            }
            if self.drain.is_draining() && self.drain.phase() < Phase::Force {
                // Whoever was to be closed later may have to be closed sooner now.
                self.walks.connections = Walk::over(self.table.slots());
            }
        }
        let drains = self.drain.phase() > Phase::Running;
        if drains {
            self.post.load.close();
        }
        drains
    }

    /// Goes through the phases that are due.
    pub(crate) fn advance_drain(&mut self) {
        self.drain.expect(self.table.len());
        loop {
            if self.drain.end_hold(self.now_ns) {
                self.stop_accept();
            }
            let Some(phase) = self.drain.advance(self.now_ns, self.left()) else { break };
            match phase {
                Phase::StopAccept => {
                    self.hold_off();
                    // Who is accepted from now on knows that a drain runs.
                    self.walks.connections = Walk::over(self.table.slots());
                    self.walks.waiters = Walk::over(self.drain_waiters.slots());
                    self.tell_datagram_readers();
                }
                Phase::Force => {
                    self.abandon_starved_queues();
                    self.walks.connections = Walk::over(self.table.slots());
                }
                Phase::Down => self.control.say_quiet(self.info.index, true),
                _ => {}
            }
        }
        self.walk_on();
    }

    /// This core is to leave, by a deadline that later ones can only bring nearer.
    pub(crate) fn retire_at(&mut self, deadline_ns: u64) {
        self.retire_ns = self.retire_ns.min(deadline_ns);
    }

    pub(crate) fn left(&self) -> Left {
        let open = self.listeners.iter().filter(|listener| listener.is_open()).count();
        let starved = self.listeners.iter().filter(|listener| listener.is_starved()).count();
        // Outbound ones go with the tasks that hold them, and what nobody uses any more, such as
        // a pool of them, is nothing to wait for. What was sent is.
        let closing = self.table.len() - self.outbound.held + self.udp.leaving;
        let mut connections = closing + self.post.load.coming();
        let tasks = self.tasks.waited_for();
        if connections == 0 && tasks == 0 && self.drain.is_draining() {
            connections = self.still_sending();
        }
        let mut left =
            Left { listeners: open - starved, starved, connections, tasks, callers: false };
        let waits = self.drain.phase() == Phase::DrainConnections && left.is_quiet();
        left.callers = waits && self.may_be_called();
        left
    }

    /// Whether others of the server still have tasks or connections that may call this core, or
    /// have called it, and it has something to answer them. A core that leaves alone is not waited
    /// for by those who stay, and does not wait for them.
    fn may_be_called(&self) -> bool {
        let answers = !self.states.is_empty() || self.counters.calls_run.get() > 0;
        answers
            && !self.retired
            && (!self.control.are_others_quiet(self.info.index)
                || self.post.mailbox.has_mail()
                || !self.mail.is_empty())
    }

    /// Lets those who wait for it know whether this core may still call them.
    pub(crate) fn say_whether_quiet(&self) {
        if self.drain.phase() == Phase::DrainConnections {
            self.control.say_quiet(self.info.index, self.left().is_quiet());
        }
    }

    /// How many connections and UDP sockets have output that the kernel has not taken. Their
    /// holders, such as a core's state, may be dropped only with the core.
    fn still_sending(&self) -> usize {
        let connections = self.table.iter().filter(|(_, entry)| entry.queued_bytes() > 0).count();
        connections + self.udp.table.iter().filter(|(_, port)| port.sends > 0).count()
    }

    /// Goes a piece further over the connections, and over who waits for the drain.
    fn walk_on(&mut self) {
        for slot in self.walks.waiters.piece(WALK_PIECE) {
            let waiter = self.drain_waiters.id_at(slot);
            if let Some(mut wake) = waiter.and_then(|id| self.drain_waiters.remove(id)) {
                self.tasks.wake(&mut wake);
            }
        }
        for slot in self.walks.connections.piece(WALK_PIECE) {
            match self.table.id_at(slot) {
                Some(id) if self.drain.phase() >= Phase::Force => {
                    self.note_survivor(id);
                    self.end(id, CloseReason::Forced);
                }
                Some(id) => self.drain_connection(id),
                None => {}
            }
        }
    }

    /// The oldest of those that are forced is in the report.
    pub(crate) fn note_survivor(&mut self, id: Id) {
        let Some(entry) = self.table.get(id) else { return };
        let accepted_ms = entry.deadlines.accepted_ms();
        let oldest = self.oldest_survivor.as_ref().map(|info| info.age);
        let age = Duration::from_millis(self.now_ms.saturating_sub(accepted_ms));
        if entry.ended.is_none() && oldest.is_none_or(|oldest| age > oldest) {
            self.oldest_survivor = self.connection_info(self.info.index, id);
        }
    }

    /// Nanoseconds until the drain's deadline, if there is one.
    pub(crate) fn remaining_ns(&self) -> Option<u64> {
        (self.drain.phase() > Phase::Running)
            .then(|| self.drain.deadline_ns().saturating_sub(self.driver.now_ns()))
    }

    /// The books and how the drain went, for the report.
    pub(crate) fn account(&self) -> CoreReport {
        self.audit_totals();
        let phases = self.drain.durations_ns(self.driver.now_ns());
        CoreReport {
            stats: self.counters.snapshot(),
            phases: PhaseTimes(phases),
            stop: self.stop,
            mismatches: self.counters.findings(),
            hooks: self.hooks_run,
            hooks_forced: self.leftover.hooks(),
            forced_tasks: self.leftover.forced(),
            detached_tasks: self.leftover.detached(),
            oldest_survivor: self.oldest_survivor.clone(),
            ..CoreReport::default()
        }
    }
}

/// When a connection is to be closed by the drain, should it be idle then.
pub(crate) fn farewell_ns(drain: &Drain, id: Id, entry: &Entry) -> u64 {
    // Neighbouring slots get lots far apart, and any number of slots fills the spread evenly:
    // multiples of the golden section.
    let lot = id.index.wrapping_mul(0x9E37_79B9);
    drain.farewell_ns(entry.deadlines.progress_ms() * NS_PER_MS, lot)
}

/// How many slots a walk comes to in one turn. Ending a connection takes some tens of microseconds,
/// of which the peer takes a part where it is on the same machine.
const WALK_PIECE: usize = 64;
