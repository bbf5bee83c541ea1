//! The timer wheel: many deadlines, few of which ever pass.
//!
//! Most timers of a server are cancelled or pushed back long before they are due, so arming and
//! cancelling must cost next to nothing, and firing may be a little late. The wheel has the shape
//! of the Linux kernel's (`kernel/time/timer.c`, since 4.8): eight levels of 64 slots, each level
//! eight times as coarse as the one below. A timer goes into the finest level that reaches its
//! deadline:
//!
//! ```text
//! level   one slot is      for timers this far ahead
//!     0          1 ms              1 ms ..=  64 ms
//!     1          8 ms             65 ms ..= 512 ms
//!     2         64 ms            513 ms ..=   4 s
//!     3        512 ms              4 s  ..=  32 s
//!     4          4 s              32 s  ..=   4 min
//!     5         32 s               4 min ..= 34 min
//!     6          4 min            34 min ..=  4 h
//!     7         34 min             4 h  ..=  37 h, and whatever lies beyond
//! ```
//!
//! [`Precision::Coarse`] rounds the deadline *up* to a slot and stays there until it fires: never
//! early, and late by less than one slot, which is less than an eighth of the time asked for.
//! [`Precision::Exact`] rounds *down*, and moves to a finer level when its slot comes: at most
//! four moves, never early, and on time if [`Wheel::expire`] is called on time.
//! A timer that does not fit into the 64 slots ahead (beyond 37 h, or a coarse one that would
//! round up into the slot after the last) waits in the last of them and is placed anew from there.
//!
//! The wheel never reads a clock: time is what [`Wheel::advance`] and [`Wheel::expire`] are told,
//! in milliseconds since any epoch, and one millisecond is one tick. Every slot that time has
//! passed is appended, whole, to one list of due timers, so that a jump of the clock by days costs
//! at most 512 list operations, and a call that has used up its budget leaves nothing behind but
//! the head of that list.

#[cfg(test)]
// Said outright, because the bench includes this file by path, which changes the default.
#[path = "wheel/tests.rs"]
mod tests;

/// Timers of one core, each with a deadline and a payload that says whose it is.
#[derive(Debug)]
pub(crate) struct Wheel<T: Copy> {
    /// Everything before and at this moment has been moved to the due list.
    now_ms: u64,
    /// Before this moment no slot comes to its turn.
    slot_ms: u64,
    /// Before this moment no timer has to be looked at.
    wake_ms: u64,
    len: usize,
    /// The first node nobody uses; the others follow by `next`.
    free: u32,
    nodes: Vec<Node<T>>,
    /// A bit per list that is not empty; the due list is bit 0 of a ninth word.
    occupied: [u64; LEVELS + 1],
    heads: Box<[Head; DUE + 1]>,
}

/// Names one timer; a key outlives its timer harmlessly, because no key is ever given out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TimerKey {
    index: u32,
    generation: u32,
}

/// How late a timer may fire; none may be early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Precision {
    /// Late by at most 12.5 % of the time asked for, or one tick: for timeouts, whose wake-ups
    /// are thereby shared.
    Coarse,
    /// On the tick: for sleeps and heartbeats, at the cost of up to four moves.
    Exact,
}

impl<T: Copy> Wheel<T> {
    /// Makes an empty wheel; its memory grows with the timers and is never given back.
    pub(crate) fn new(now_ms: u64) -> Self {
        Self {
            now_ms: now_ms.min(LAST_MS),
            slot_ms: u64::MAX,
            wake_ms: u64::MAX,
            len: 0,
            free: NONE,
            nodes: Vec::new(),
            occupied: [0; LEVELS + 1],
            heads: Box::new(std::array::from_fn(Head::empty)),
        }
    }

    /// Arms a timer; a deadline that is not ahead of the wheel's time fires at the next
    /// [`expire`](Self::expire).
    ///
    /// How coarse a timer gets depends on how far its deadline lies ahead of the time the wheel
    /// knows, so a caller that has slept says [`advance`](Self::advance) first.
    ///
    /// # Panics
    ///
    /// With 2³¹ timers alive, which is 80 GiB of them.
    pub(crate) fn insert(
        &mut self,
        deadline_ms: u64,
        precision: Precision,
        payload: T,
    ) -> TimerKey {
        let place = self.locate(deadline_ms, precision);
        let index = self.free;
        let key = if index == NONE {
            let key = TimerKey { index: self.nodes.len() as u32, generation: 0 };
            assert!(self.nodes.len() < HEAD_BIT as usize, "too many timers");
            self.nodes.push(Node {
                payload,
                deadline_ms,
                prev: NONE,
                next: NONE,
                generation: key.generation,
                head: place.head,
                precision,
            });
            key
        } else {
            let node = &mut self.nodes[index as usize];
            self.free = node.next;
            node.payload = payload;
            node.deadline_ms = deadline_ms;
            node.precision = precision;
            TimerKey { index, generation: node.generation }
        };
        self.link(key.index, place);
        self.len += 1;
        key
    }

    /// Disarms a timer and returns its payload, or `None` if it has fired or been cancelled:
    /// whoever gets the payload is the only one who does.
    pub(crate) fn cancel(&mut self, key: TimerKey) -> Option<T> {
        self.node(key)?;
        self.unlink(key.index);
        Some(self.release(key.index))
    }

    /// Gives a live timer another deadline and returns true, or false if the key is stale.
    ///
    /// A timer that stays in its slot is not relinked, so that pushing back an idle timeout touches
    /// one node and not its neighbours, which among many timers are cache misses.
    pub(crate) fn rearm(&mut self, key: TimerKey, deadline_ms: u64) -> bool {
        let Some(node) = self.node(key) else { return false };
        let place = self.locate(deadline_ms, node.precision);
        if node.head == place.head {
            // Or else the node is in the due list already, which finds it a place as well.
            let head = &mut self.heads[usize::from(place.head)];
            head.wake_ms = head.wake_ms.min(place.wake_ms);
            if self.is_waiting(place.head) {
                self.wake_ms = self.wake_ms.min(place.wake_ms);
            }
        } else {
            self.unlink(key.index);
            self.link(key.index, place);
        }
        self.nodes[key.index as usize].deadline_ms = deadline_ms;
        true
    }

    /// Returns the deadline as it was asked for, not as it was rounded, or `None` if the key is
    /// stale.
    pub(crate) fn deadline_ms(&self, key: TimerKey) -> Option<u64> {
        self.node(key).map(|node| node.deadline_ms)
    }

    /// Returns the latest moment at which [`expire`](Self::expire) keeps every promise, or `None`
    /// if no timer is armed: it is how long the core may sleep.
    ///
    /// A cancelled or re-armed exact timer can make the answer earlier than necessary, never later.
    pub(crate) fn next_expiry_ms(&self) -> Option<u64> {
        match self.occupied[LEVELS] {
            0 if self.wake_ms == u64::MAX => None,
            0 => Some(self.wake_ms),
            _ => Some(self.now_ms),
        }
    }

    /// Finds out anew when the next slot comes, and when a timer has to be looked at.
    fn look_ahead(&mut self) {
        (self.slot_ms, self.wake_ms) = (u64::MAX, u64::MAX);
        for (level, &occupied) in self.occupied[..LEVELS].iter().enumerate() {
            if occupied == 0 {
                continue;
            }
            // Slots are read in the order in which they come: the one after the current granule
            // first. Within a level, no timer of a later slot is needed before one of an earlier.
            let shift = GRANULE_SHIFT * level as u32;
            let first = (self.now_ms >> shift) + 1;
            let ahead = occupied.rotate_right((first % SLOTS as u64) as u32).trailing_zeros();
            let granule = first + u64::from(ahead);
            self.slot_ms = self.slot_ms.min(granule << shift);
            self.wake_ms = self.wake_ms.min(self.heads[head_of(level, granule) as usize].wake_ms);
        }
    }

    /// Tells the wheel the time without firing anything; time that goes backwards is ignored.
    ///
    /// To be said when the turn's time is read, so that timers armed before the turn's
    /// [`expire`](Self::expire) are measured from now and not from before the core slept.
    #[inline]
    pub(crate) fn advance(&mut self, now_ms: u64) {
        let now_ms = now_ms.min(LAST_MS);
        if now_ms >= self.slot_ms {
            self.pass(now_ms);
        }
        self.now_ms = self.now_ms.max(now_ms);
    }

    /// Moves all slots that have come to the due list.
    fn pass(&mut self, now_ms: u64) {
        for level in 0..LEVELS {
            let shift = GRANULE_SHIFT * level as u32;
            let first = (self.now_ms >> shift) + 1;
            let passed = (now_ms >> shift) + 1 - first;
            if passed == 0 {
                // No granule of a coarser level has passed either.
                break;
            }
            let window = u64::MAX >> (SLOTS as u64 - passed.min(SLOTS as u64));
            let first_slot = (first % SLOTS as u64) as u32;
            let mut due = self.occupied[level].rotate_right(first_slot) & window;
            while due != 0 {
                self.make_due(head_of(level, first + u64::from(due.trailing_zeros())));
                due &= due - 1;
            }
        }
        self.now_ms = now_ms;
        self.look_ahead();
    }

    /// Advances to `now_ms`, appends what is due to `fired`, and returns true if the budget ran
    /// out before the due timers did.
    ///
    /// `budget` bounds the work of one call, so timers that only move to a finer level count too.
    /// What was left over comes first in the next call. Fired keys are stale from here on.
    pub(crate) fn expire(
        &mut self,
        now_ms: u64,
        budget: usize,
        fired: &mut Vec<(TimerKey, T)>,
    ) -> bool {
        self.advance(now_ms);
        for _ in 0..budget {
            let index = self.heads[DUE].first;
            if index & HEAD_BIT != 0 {
                return false;
            }
            self.unlink(index);
            let Node { deadline_ms, precision, generation, .. } = self.nodes[index as usize];
            if deadline_ms <= self.now_ms {
                fired.push((TimerKey { index, generation }, self.release(index)));
            } else {
                let place = self.locate(deadline_ms, precision);
                self.link(index, place);
            }
        }
        self.occupied[LEVELS] != 0
    }

    /// Returns how many timers are armed, including those that are due and have not been fired.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns true if no timer is armed.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn node(&self, key: TimerKey) -> Option<&Node<T>> {
        self.nodes.get(key.index as usize).filter(|node| node.generation == key.generation)
    }

    /// Finds the list for a deadline, and when that list must be looked at for its sake.
    fn locate(&self, deadline_ms: u64, precision: Precision) -> Place {
        if deadline_ms <= self.now_ms {
            return Place { head: DUE as u16, slot_ms: self.now_ms, wake_ms: self.now_ms };
        }
        let level = level_of(deadline_ms - self.now_ms);
        let shift = GRANULE_SHIFT * level as u32;
        let granule = match precision {
            Precision::Coarse => ((deadline_ms - 1) >> shift) + 1,
            Precision::Exact => deadline_ms >> shift,
        };
        let furthest = (self.now_ms >> shift) + SLOTS as u64;
        let fits = granule <= furthest;
        let granule = granule.min(furthest);
        let wake_ms = match precision {
            Precision::Exact if fits => deadline_ms,
            _ => granule << shift,
        };
        Place { head: head_of(level, granule), slot_ms: granule << shift, wake_ms }
    }

    /// Appends a node to the list found for it.
    fn link(&mut self, index: u32, place: Place) {
        let head_link = HEAD_BIT | u32::from(place.head);
        let head = &mut self.heads[usize::from(place.head)];
        let word = &mut self.occupied[usize::from(place.head) / SLOTS];
        let bit = 1 << (usize::from(place.head) % SLOTS);
        if *word & bit == 0 || place.wake_ms < head.wake_ms {
            head.wake_ms = place.wake_ms;
        }
        *word |= bit;
        if usize::from(place.head) != DUE {
            self.slot_ms = self.slot_ms.min(place.slot_ms);
            self.wake_ms = self.wake_ms.min(place.wake_ms);
        }
        let last = std::mem::replace(&mut head.last, index);
        let node = &mut self.nodes[index as usize];
        node.prev = last;
        node.next = head_link;
        node.head = place.head;
        self.set_next(last, index);
    }

    /// Takes a node out of whatever list it is in. The links tell which one: a list's ends point
    /// to its head, so nodes need not be told when their list becomes part of the due list.
    fn unlink(&mut self, index: u32) {
        let Node { prev, next, .. } = self.nodes[index as usize];
        self.set_next(prev, next);
        self.set_prev(next, prev);
        if prev == next {
            // Only the head itself is on both sides of a node.
            let head = (prev & !HEAD_BIT) as usize;
            self.mark_empty(head as u16);
            if head != DUE && self.heads[head].wake_ms <= self.wake_ms {
                self.look_ahead();
            }
        }
    }

    /// Appends all of a slot to the due list, in constant time.
    fn make_due(&mut self, head: u16) {
        let Head { first, last, .. } = self.heads[usize::from(head)];
        self.heads[usize::from(head)] = Head::empty(usize::from(head));
        self.mark_empty(head);
        let due_last = self.heads[DUE].last;
        self.set_next(due_last, first);
        self.set_prev(first, due_last);
        self.set_next(last, HEAD_BIT | DUE as u32);
        self.heads[DUE].last = last;
        self.occupied[LEVELS] = 1;
    }

    /// Whether a slot has timers whose turn has not come.
    fn is_waiting(&self, head: u16) -> bool {
        let head = usize::from(head);
        head != DUE && self.occupied[head / SLOTS] & (1 << (head % SLOTS)) != 0
    }

    fn mark_empty(&mut self, head: u16) {
        self.occupied[usize::from(head) / SLOTS] &= !(1 << (usize::from(head) % SLOTS));
    }

    fn set_next(&mut self, link: u32, next: u32) {
        if link & HEAD_BIT != 0 {
            self.heads[(link & !HEAD_BIT) as usize].first = next;
        } else {
            self.nodes[link as usize].next = next;
        }
    }

    fn set_prev(&mut self, link: u32, prev: u32) {
        if link & HEAD_BIT != 0 {
            self.heads[(link & !HEAD_BIT) as usize].last = prev;
        } else {
            self.nodes[link as usize].prev = prev;
        }
    }

    /// Makes the keys of an unlinked node stale and its memory free.
    fn release(&mut self, index: u32) -> T {
        let node = &mut self.nodes[index as usize];
        node.generation += 1;
        // A node that has used up its generations is given up, or an old key would be valid again:
        // 40 bytes in four billion timers.
        if node.generation != RETIRED {
            node.next = std::mem::replace(&mut self.free, index);
        }
        self.len -= 1;
        node.payload
    }
}

/// One timer. Its neighbours are indices of nodes, or of heads with [`HEAD_BIT`] set.
#[derive(Clone, Copy, Debug)]
struct Node<T> {
    payload: T,
    deadline_ms: u64,
    prev: u32,
    next: u32,
    generation: u32,
    /// The list it was put into; it may have become part of the due list since.
    head: u16,
    precision: Precision,
}

/// Both ends of one list; those of an empty list point to the head itself.
#[derive(Clone, Copy, Debug)]
struct Head {
    first: u32,
    last: u32,
    /// No timer of the list has to be looked at before. Kept here so that an exact timer wakes
    /// the core once, at its deadline, and not at each of the granules it is rounded down to.
    wake_ms: u64,
}

impl Head {
    fn empty(head: usize) -> Self {
        let link = HEAD_BIT | head as u32;
        Self { first: link, last: link, wake_ms: 0 }
    }
}

/// Where a timer belongs.
#[derive(Clone, Copy, Debug)]
struct Place {
    head: u16,
    slot_ms: u64,
    wake_ms: u64,
}

/// The finest level whose 64 slots reach `ahead_ms`, which is not 0.
///
/// The kernel lets a level end a slot earlier, so that rounding up cannot pass the last slot;
/// then the error is 1/7.875 rather than 1/8, and an exact eighth is easier to promise.
fn level_of(ahead_ms: u64) -> usize {
    let granules = (ahead_ms - 1) / SLOTS as u64;
    let bits = u64::BITS - granules.leading_zeros();
    (bits.div_ceil(GRANULE_SHIFT) as usize).min(LEVELS - 1)
}

fn head_of(level: usize, granule: u64) -> u16 {
    (level * SLOTS) as u16 + (granule % SLOTS as u64) as u16
}

const LEVELS: usize = 8;
/// One bit each in a level's word.
const SLOTS: usize = u64::BITS as usize;
/// Each level is 2³ times as coarse as the one below.
const GRANULE_SHIFT: u32 = 3;
/// The head of the due list, after those of the slots.
const DUE: usize = LEVELS * SLOTS;
/// Tells the index of a head from the index of a node.
const HEAD_BIT: u32 = 1 << 31;
/// The end of the free list; no index of a node, because it has [`HEAD_BIT`] set.
const NONE: u32 = u32::MAX;
/// A generation no key has.
const RETIRED: u32 = u32::MAX;
/// The wheel's time stops here, 292 million years after the epoch, so that no sum overflows;
/// a deadline beyond is one that never comes.
const LAST_MS: u64 = u64::MAX >> 1;

// With a payload of 16 bytes, three nodes share two cache lines.
const _: () = assert!(size_of::<Node<[u64; 2]>>() <= 40);
