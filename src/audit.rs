//! The self-check: a walk over a core's connections, in pieces, that holds the books against the
//! table, the timers, the owners and the kernel. What it finds is a bug, and is reported as one.
//!
//! It takes the census on its way, as it comes by everyone anyhow.

use crate::census::Census;
use crate::core::{Core, Timer};
use crate::driver::Socket;
use crate::entry::{Entry, Hangup, Linger, Receive};
use crate::table::Id;
use crate::walk::Walk;
use crate::wheel::Precision;

/// Where the self-check of one core stands.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    /// The timer for the next walk is armed, or the walk is under way.
    on: bool,
    walk: Walk,
    under_way: bool,
    census: Census,
    /// Which ones the kernel said are closed, in this walk and in the one before. What it has to
    /// say to us may be on its way the first time.
    closed: Vec<Id>,
    closed_before: Vec<Id>,
}

impl Audit {
    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way
    }
}

impl Core {
    /// There is a connection: the self-check goes on until there is none.
    pub(crate) fn arm_audit(&mut self) {
        let period_ms = self.settings.check_ms;
        if !self.audit.on && period_ms > 0 {
            self.audit.on = true;
            self.wheel.insert(self.now_ms + period_ms, Precision::Coarse, Timer::Audit);
        }
    }

    pub(crate) fn begin_audit(&mut self) {
        self.audit.walk = Walk::over(self.table.slots());
        self.audit.census = Census::default();
        self.audit.under_way = true;
    }

    /// Checks the next piece of the table, if a walk is under way.
    pub(crate) fn audit_piece(&mut self) {
        if !self.audit.under_way {
            return;
        }
        for index in self.audit.walk.piece(PIECE) {
            if let Some(id) = self.table.id_at(index) {
                self.audit_connection(id);
            }
        }
        if self.audit.walk.is_done() {
            self.end_audit();
        }
    }

    fn audit_connection(&mut self, id: Id) {
        let Some(entry) = self.table.get(id) else { return };
        let (accepted_ms, progress_ms) =
            (entry.deadlines.accepted_ms(), entry.deadlines.progress_ms());
        let since = |ms: u64| self.now_ms.saturating_sub(ms);
        self.audit.census.add(entry.state(), since(accepted_ms), since(progress_ms));

        let timer_ms = self.wheel.deadline_ms(entry.timer);
        let latest_ms = self.next_deadline(id).map(|next| next.latest_ms);
        // What a shorter drain has brought nearer is put right by a walk.
        let late = timer_ms > latest_ms && self.walks.is_done();
        let has_owner = !entry.is_forsaken() || self.released.contains(&id);
        let gone = entry.socket.as_ref().is_some_and(Socket::is_closed);
        let closed = entry.is_believed_open() && gone;
        // A walk goes by the index, so they are in its order.
        let before = &self.audit.closed_before;
        let at = before.binary_search_by_key(&id.index, |id| id.index);
        let lost = closed && at.is_ok_and(|at| before[at] == id);
        if closed {
            self.audit.closed.push(id);
        }
        let name = || format!("connection {}.{}.{}", self.serial(), id.index, id.generation);
        if timer_ms.is_none() {
            self.counters.mismatch(format!("{} has no timer", name()));
        }
        if late {
            self.counters.mismatch(format!("{} has a timer after its deadline", name()));
        }
        if !has_owner {
            self.counters.mismatch(format!("{} has no owner and nothing under way", name()));
        }
        if lost {
            self.counters.mismatch(format!("{} is closed in the kernel, and we wait", name()));
        }
    }

    fn end_audit(&mut self) {
        self.audit_totals();
        self.counters.census.set(&self.audit.census);
        self.audit.closed_before = std::mem::take(&mut self.audit.closed);
        self.audit.under_way = false;
        self.audit.on = false;
        if self.table.len() > 0 {
            self.arm_audit();
        }
    }

    /// What holds at every moment: slab = gauge = accepted + connected - closed; and each attempt
    /// to connect has come to one end, or is under way.
    pub(crate) fn audit_totals(&self) {
        let (sockets, gauge) = (self.udp.table.len() as u64, self.counters.udp_sockets.get());
        if sockets != gauge {
            self.counters.mismatch(format!("{sockets} UDP sockets, the gauge says {gauge}"));
        }
        let (stats, slab) = (self.counters.snapshot(), self.table.len() as u64);
        let open = (stats.accepted + stats.connected).wrapping_sub(stats.closed.total());
        if slab != stats.live || slab != open {
            let live = stats.live;
            self.counters.mismatch(format!(
                "the table has {slab} connections, the gauge says {live}, accepted + connected - \
                 closed {open}"
            ));
        }
        let attempts = self.outbound.attempts.iter();
        let under_way = attempts.filter(|(_, attempt)| attempt.is_open()).count() as u64;
        let begun = stats.connects;
        let ended = stats.connected + stats.connects_failed_total();
        if begun != ended + under_way {
            self.counters.mismatch(format!(
                "{begun} connects were begun, {ended} have ended, {under_way} are under way"
            ));
        }
    }
}

impl Entry {
    /// Nobody holds it, and nothing is under way that would end it.
    fn is_forsaken(&self) -> bool {
        self.is_closing() && self.in_flight == 0 && self.linger != Linger::Now
    }

    /// Neither side has said that it ends, and we would hear of it: who waits for buffers that are
    /// about to come does not.
    fn is_believed_open(&self) -> bool {
        let hears = self.receive != Receive::Parked || self.hangup != Hangup::Off;
        hears && self.ended.is_none() && !self.is_closing() && !self.eof && !self.fin_sent
    }
}

/// Slots that are looked at in one turn. A connection costs a system call, about a microsecond.
const PIECE: usize = 256;
