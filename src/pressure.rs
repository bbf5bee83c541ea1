//! Who has to go when places or memory run out: connections that linger, then those that have been
//! idle for longest, and never one that was active a moment ago.
//!
//! Nobody keeps a list by age, which every byte would have to move a connection in. A hand goes
//! round over the table, some slots each turn, and takes what has been idle for longer than a limit
//! that is halved with each round: so the oldest go first, but for a factor of two.

use std::collections::VecDeque;

use crate::config::Settings;
use crate::core::{Core, Timer};
use crate::entry::{Entry, Linger};
use crate::executor::Wake;
use crate::memory::Memory;
use crate::report::CloseReason;
use crate::table::Id;
use crate::walk::Walk;
use crate::wheel::Precision;

/// Where a core's eviction stands.
#[derive(Debug, Default)]
pub(crate) struct Pressure {
    /// How many are to go, and for what.
    places_short: usize,
    memory_short: bool,
    /// From how much memory on some have to go.
    memory_high: usize,
    hand: Walk,
    idle_ms: u64,
    /// Connections that were told to go and are still in the table, and what the kernel still holds
    /// of their output.
    leaving: usize,
    leaving_bytes: usize,
    /// Nothing could be taken; the timer will look again.
    resting: bool,
    /// Those that linger, the oldest first, with some that no longer do.
    lingering: VecDeque<Id>,
}

impl Pressure {
    pub(crate) fn new(settings: &Settings) -> Pressure {
        let percent = settings.evict_percent as usize;
        let memory_high =
            if percent == 0 { usize::MAX } else { settings.memory_bytes_max / 100 * percent };
        Pressure { memory_high, ..Pressure::default() }
    }

    /// Whether there is more to do in the next turn.
    pub(crate) fn is_on(&self) -> bool {
        (self.places_short > 0 || self.memory_short) && !self.resting
    }

    /// Whether some would have to go, though perhaps nobody can.
    #[cfg(feature = "tracing")]
    pub(crate) fn is_felt(&self) -> bool {
        self.places_short > 0 || self.memory_short
    }

    /// The kernel has let go of so many bytes of one that was told to go.
    pub(crate) fn let_go(&mut self, bytes: usize) {
        self.leaving_bytes -= bytes;
    }

    /// How many are remembered for having lingered.
    #[cfg(test)]
    pub(crate) fn remembered(&self) -> usize {
        self.lingering.len()
    }
}

impl Core {
    /// Looks whether places or memory run out. Cheap enough for every lease, not for every accept.
    pub(crate) fn feel_pressure(&mut self) {
        let percent = self.settings.evict_percent as usize;
        if percent == 0 || self.drain.is_draining() {
            self.pressure.places_short = 0;
            self.pressure.memory_short = false;
            return;
        }
        let was_on = self.pressure.places_short > 0 || self.pressure.memory_short;
        let (high, low) = (percent, percent - percent.min(HYSTERESIS_PERCENT));
        let places = self.lease.places();
        let own = self.counters.live.get() as usize;
        let mine = own - self.refused.min(own);
        let all = self.control.seats().iter().map(|seat| seat.counters.live.get() as usize).sum();
        let goes_on = self.pressure.places_short > 0;
        let share = |used: usize, max: usize, own: usize| {
            let over = goes_on || used >= (max * high).div_ceil(100);
            let excess = used - used.min(max * low / 100);
            // Each core takes its part of what is too much for all.
            if over { (excess * own).div_ceil(used.max(1)) } else { 0 }
        };
        let short = share(all, places.max(), mine).max(share(mine, places.core_max(), mine));
        self.pressure.places_short = short.saturating_sub(self.pressure.leaving);
        let used = self.memory.used() - self.pressure.leaving_bytes;
        let (max, goes_on) = (self.settings.memory_bytes_max, self.pressure.memory_short);
        let limit = max / 100 * if goes_on { low } else { high };
        // Until nobody has to wait any more.
        let waits = goes_on || self.memory.is_short();
        self.pressure.memory_short = used >= limit || (waits && used > Memory::enough(max));
        if !was_on {
            self.pressure.idle_ms = (self.settings.idle_ms / 2).max(ACTIVE_MS);
            self.pressure.hand = Walk::over(self.table.slots());
        }
    }

    /// Memory was taken; most of the time there is enough.
    pub(crate) fn feel_memory(&mut self) {
        if self.memory.used() >= self.pressure.memory_high && !self.pressure.memory_short {
            self.feel_pressure();
        }
    }

    /// A connection has begun to linger.
    pub(crate) fn note_lingering(&mut self, id: Id) {
        let lingers = |id: &Id| self.table.get(*id).is_some_and(Entry::lingers);
        let lingering = &mut self.pressure.lingering;
        while lingering.front().is_some_and(|id| !lingers(id)) {
            lingering.pop_front();
        }
        // One that lingers for long does not keep those behind it that no longer do.
        if lingering.len() > 2 * self.table.len() + GONE_MAX {
            lingering.retain(lingers);
        }
        lingering.push_back(id);
    }

    /// Evicts some, if there is need.
    pub(crate) fn relieve_pressure(&mut self) {
        if self.memory.is_short() && !self.pressure.memory_short {
            // Everyone waits, so nobody takes any and looks.
            self.feel_pressure();
        }
        let mut evictions = EVICTIONS_MAX;
        while self.pressure.is_on() && self.pressure.places_short > 0 && evictions > 0 {
            let Some(id) = self.pressure.lingering.pop_front() else { break };
            if self.table.get(id).is_some_and(Entry::lingers) {
                evictions -= 1;
                self.evict(id);
            }
        }
        if self.pressure.is_on() && evictions > 0 {
            self.turn_hand(evictions);
        }
    }

    /// Goes a piece further round the table.
    fn turn_hand(&mut self, mut evictions: usize) {
        for slot in self.pressure.hand.piece(SLOTS_MAX) {
            let Some(id) = self.table.id_at(slot) else { continue };
            if evictions > 0 && self.pressure.is_on() && self.is_victim(id) {
                evictions -= 1;
                self.evict(id);
                // One may have held so much that it was enough.
                self.feel_pressure();
            }
        }
        self.feel_pressure();
        if !self.pressure.is_on() || !self.pressure.hand.is_done() {
            return;
        }
        self.pressure.hand = Walk::over(self.table.slots());
        if self.pressure.idle_ms > ACTIVE_MS {
            self.pressure.idle_ms = (self.pressure.idle_ms / 2).max(ACTIVE_MS);
        } else {
            self.pressure.resting = true;
            let at_ms = self.now_ms + REST_MS;
            self.wheel.insert(at_ms, Precision::Coarse, Timer::Pressure);
        }
    }

    /// The rest is over.
    pub(crate) fn end_rest(&mut self) {
        self.pressure.resting = false;
        self.feel_pressure();
    }

    /// Whether a connection has been of no use for long enough.
    fn is_victim(&mut self, id: Id) -> bool {
        let (short, idle_ms, now_ms) =
            (self.pressure.places_short > 0, self.pressure.idle_ms, self.now_ms);
        let Some(entry) = self.table.get(id) else { return false };
        // One whose handler has finished lingers, or has output that its peer does not take.
        let lingers = entry.is_closing() && entry.queued_bytes() == 0;
        if entry.ended.is_some() || lingers || entry.quiet_ms(now_ms) < idle_ms {
            return false;
        }
        if entry.holds_bytes() {
            // One send can be long: it is what the peer takes that counts.
            return self.pressure.memory_short && entry.queued_bytes() > 0 && {
                self.look_at_output(id);
                self.arm_deadline(id);
                let entry = self.table.get(id);
                entry.is_some_and(|it| it.deadlines.output_stuck_ms(now_ms) >= idle_ms)
            };
        }
        // Who has connected waits for an answer.
        short && !entry.is_outbound() && entry.is_idle()
    }

    fn evict(&mut self, id: Id) {
        self.pressure.places_short = self.pressure.places_short.saturating_sub(1);
        self.pressure.leaving += 1;
        self.end(id, CloseReason::Evicted);
        let sending = self.table.get(id).map_or(0, |entry| entry.sending_bytes);
        self.pressure.leaving_bytes += sending;
    }

    /// One that was told to go is gone.
    pub(crate) fn note_gone(&mut self, entry: &Entry) {
        if entry.ended == Some(CloseReason::Evicted) {
            self.pressure.leaving -= 1;
        }
    }
}

impl Entry {
    /// Whether it lingers, and nothing else has ended it. One that was refused has no place that
    /// another could have.
    fn lingers(&self) -> bool {
        self.linger == Linger::Now && self.ended.is_none() && !self.is_refused()
    }

    /// How long it has made no progress.
    fn quiet_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.deadlines.progress_ms())
    }

    fn holds_bytes(&self) -> bool {
        self.input.is_some() || self.queued_bytes() > 0
    }

    /// Whether its handler waits for the next message, and none is on its way.
    fn is_idle(&self) -> bool {
        let listens = !self.busy && !matches!(self.reader, Wake::Nobody);
        listens
            && !self.deadlines.is_in_message()
            && self.socket.as_ref().is_some_and(|socket| socket.unread_bytes() == 0)
    }
}

/// Whoever was active so lately is spared.
const ACTIVE_MS: u64 = 1_000;
/// Eviction goes on until this much less is in use than where it began.
const HYSTERESIS_PERCENT: usize = 5;
/// How long it pauses when nobody can go.
const REST_MS: u64 = 250;
/// Bounds for one turn.
const EVICTIONS_MAX: usize = 32;
const SLOTS_MAX: usize = 256;
/// So many that no longer linger may be remembered, beside twice as many as there are connections.
const GONE_MAX: usize = 64;
