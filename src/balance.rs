//! Which core a new connection is for, where the least loaded is to have it: the load that each
//! core lets the others see, and the choice.
//!
//! A core that drains takes no more, and is down only when nothing is on its way to it any more:
//!
//! ```text
//! core that moves a connection      core that drains
//! 1. coming += 1                    1. closed = true
//! 2. closed? then coming -= 1,      2. coming > 0? then wait for it
//!    keep it, else send it
//! ```
//! Either the first sees that the second is closed, or the second that something is coming.

#[cfg(not(loom))]
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};

#[cfg(loom)]
use loom::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};

/// What one core lets the others see, on cache lines of its own: a request writes nothing here.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Load {
    /// Whether it takes no more connections that others have accepted. What comes before the core
    /// has begun waits for it.
    closed: AtomicBool,
    connections: AtomicUsize,
    /// Those that others have moved here and that it has not seen yet.
    coming: AtomicUsize,
    /// Until then it counts as busy, on the clock that the cores share.
    busy_until_ms: AtomicU64,
}

/// How much a core has to do. A busy one has more than any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Burden {
    pub(crate) busy: bool,
    /// Those that it has and those that are coming.
    pub(crate) connections: usize,
}

impl Load {
    pub(crate) fn close(&self) {
        // A swap, not a store, for the model's sake as well.
        self.closed.swap(true, SeqCst);
    }

    /// Takes some again, though it may be down.
    #[cfg(test)]
    pub(crate) fn open(&self) {
        self.closed.store(false, SeqCst);
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.closed.load(Relaxed)
    }

    pub(crate) fn set_connections(&self, count: usize) {
        self.connections.store(count, Relaxed);
    }

    pub(crate) fn be_busy_until(&self, until_ms: u64) {
        self.busy_until_ms.store(until_ms, Relaxed);
    }

    pub(crate) fn coming(&self) -> usize {
        self.coming.load(SeqCst)
    }

    pub(crate) fn burden(&self, now_ms: u64) -> Burden {
        let connections = self.connections.load(Relaxed) + self.coming.load(Relaxed);
        Burden { busy: now_ms < self.busy_until_ms.load(Relaxed), connections }
    }

    /// Says that a connection is about to be sent here. False when it must not be: then the core
    /// may have waited for it, and has to be woken.
    pub(crate) fn announce(&self) -> bool {
        self.coming.fetch_add(1, SeqCst);
        // Not a load, though one would do: the model knows of no order between loads.
        let open = !self.closed.fetch_or(false, SeqCst);
        if !open {
            self.arrived();
        }
        open
    }

    /// It is here, or won't come.
    pub(crate) fn arrived(&self) {
        self.coming.fetch_sub(1, SeqCst);
    }
}

/// The core that a new connection is better served by than by the one that has accepted it, if
/// there is one: after the move it has at least one less than that one would have without.
///
/// Few cores are all looked at, which makes few connections come out even to within one. Of many,
/// two at random are, which is nearly as good (the power of two choices) and costs two cache lines
/// instead of one each. `burden` is `None` for a core that takes none.
pub(crate) fn choose(
    me: usize,
    own: Burden,
    cores: usize,
    lot: u64,
    burden: impl Fn(usize) -> Option<Burden>,
) -> Option<usize> {
    let others = cores.saturating_sub(1);
    if others == 0 {
        return None;
    }
    let first = (lot % others as u64) as usize;
    let other = |n: usize| (me + 1 + (first + n) % others) % cores;
    let (looks, step) = if others <= LOOK_AT_ALL {
        (others, 1)
    } else {
        (2, 1 + ((lot >> 32) % (others as u64 - 1)) as usize)
    };
    let seen = (0..looks).map(|n| other(n * step)).filter_map(|core| Some((burden(core)?, core)));
    // Of those that are equal the first, and which one that is, the lot says.
    seen.min_by_key(|(burden, _)| *burden).filter(|(burden, _)| *burden < own).map(|(_, core)| core)
}

/// Measures how much of its time a core spends in its turns: in handlers, for the most part.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    since_ns: u64,
    worked_ns: u64,
}

impl Pulse {
    /// A turn has ended. True when it ends a stretch of time in which there were next to no pauses.
    pub(crate) fn turn(&mut self, begun_ns: u64, ended_ns: u64) -> bool {
        self.worked_ns += ended_ns.saturating_sub(begun_ns);
        let passed_ns = ended_ns.saturating_sub(self.since_ns);
        if passed_ns < STRETCH_NS {
            return false;
        }
        let busy = self.worked_ns >= passed_ns / 100 * BUSY_PERCENT;
        *self = Pulse { since_ns: ended_ns, worked_ns: 0 };
        busy
    }
}

/// How long a core counts as busy after a stretch in which it was: until the next one has ended.
pub(crate) const BUSY_MS: u64 = 120;
/// A turn that has lasted so long is no short one any more, whatever the coarse clock's ticks are.
pub(crate) const LONG_TURN_MS: u64 = 20;
const LOOK_AT_ALL: usize = 8;
const STRETCH_NS: u64 = 50_000_000;
const BUSY_PERCENT: u64 = 80;

#[cfg(not(loom))]
const _: () = assert!(size_of::<Load>() == crate::stats::LINE_BYTES);

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn idle(connections: usize) -> Burden {
        Burden { busy: false, connections }
    }

    fn busy(connections: usize) -> Burden {
        Burden { busy: true, connections }
    }

    /// A cheap source of lots (SplitMix64).
    fn lots(mut state: u64) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }
    }

    #[test]
    fn a_move_is_worth_it_when_the_other_has_less_and_never_to_oneself() {
        let two = |mine, theirs| choose(0, mine, 2, 7, |core| (core == 1).then_some(theirs));
        assert_eq!(two(idle(3), idle(3)), None);
        assert_eq!(two(idle(4), idle(3)), Some(1));
        assert_eq!(two(idle(2), idle(3)), None);
        assert_eq!(two(busy(1), idle(900)), Some(1), "who has time left is better");
        assert_eq!(two(idle(900), busy(0)), None);
        assert_eq!(two(busy(4), busy(3)), Some(1));
        assert_eq!(choose(0, idle(9), 2, 7, |_| None), None);
        assert_eq!(choose(0, idle(9), 1, 7, |_| unreachable!()), None);
    }

    /// Any number of cores, any loads: what is chosen takes some, has less, and is the least of all
    /// where all are looked at, or of two others where there are many.
    #[test]
    fn whoever_is_chosen_has_less_and_of_few_the_least() {
        let mut lot = lots(1);
        for round in 0..if cfg!(miri) { 200 } else { 20_000 } {
            let cores = 2 + (lot() % 20) as usize;
            let me = lot() as usize % cores;
            let mut draw =
                || Burden { busy: lot().is_multiple_of(4), connections: lot() as usize % 6 };
            let all: Vec<Burden> = (0..cores).map(|_| draw()).collect();
            let takes: Vec<bool> = (0..cores).map(|_| !lot().is_multiple_of(5)).collect();
            let looked = std::cell::RefCell::new(Vec::new());
            let chosen = choose(me, all[me], cores, lot(), |core| {
                looked.borrow_mut().push(core);
                takes[core].then_some(all[core])
            });
            let looked = looked.into_inner();
            assert!(!looked.contains(&me), "round {round}");
            let mut distinct = looked.clone();
            distinct.sort_unstable();
            distinct.dedup();
            let looks = if cores <= 9 { cores - 1 } else { 2 };
            assert_eq!((distinct.len(), looked.len()), (looks, looks), "round {round}");
            let best = looked.iter().filter(|core| takes[**core]).map(|core| all[*core]).min();
            let expected = best.filter(|best| *best < all[me]);
            assert_eq!(chosen.map(|core| all[core]), expected, "round {round}");
            assert!(chosen.is_none_or(|core| takes[core]), "round {round}");
        }
    }

    /// Whoever accepts: of few cores none ever has two more than another, of many hardly more than
    /// by chance of two choices.
    #[test]
    fn connections_that_stay_come_out_even_wherever_they_are_accepted() {
        let mut lot = lots(2);
        for cores in [2, 4, 9, 32] {
            let mut counts = vec![0; cores];
            for n in 1..=64 * cores {
                // Half of all come to one core.
                let me = if lot().is_multiple_of(2) { 0 } else { lot() as usize % cores };
                let own = idle(counts[me]);
                let chosen = choose(me, own, cores, lot(), |core| Some(idle(counts[core])));
                counts[chosen.unwrap_or(me)] += 1;
                let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
                assert_eq!(counts.iter().sum::<usize>(), n);
                let apart = if cores <= 9 { 1 } else { 12 };
                assert!(most - least <= apart, "{cores} cores, {n} connections: {counts:?}");
            }
        }
    }

    #[test]
    fn those_that_are_equal_are_taken_in_turn() {
        let mut lot = lots(3);
        let mut counts = [0; 4];
        for _ in 0..300 {
            counts[choose(1, idle(5), 4, lot(), |_| Some(idle(2))).unwrap()] += 1;
        }
        assert_eq!(counts[1], 0);
        assert!([0, 2, 3].iter().all(|core| (60..140).contains(&counts[*core])), "{counts:?}");
    }

    #[test]
    fn a_core_that_is_closed_is_sent_nothing_and_one_that_waits_sees_what_is_coming() {
        let load = Load::default();
        load.set_connections(3);
        assert!(load.announce());
        load.close();
        assert!(!load.announce());
        assert_eq!((load.coming(), load.burden(0)), (1, idle(4)));
        load.arrived();
        assert_eq!(load.burden(0), idle(3));
        load.be_busy_until(10);
        assert_eq!((load.burden(9).busy, load.burden(10).busy), (true, false));
    }

    #[test]
    fn busy_is_who_works_through_a_whole_stretch() {
        const MS: u64 = 1_000_000;
        let turns = |work_ms: u64, pause_ms: u64| {
            let (mut pulse, mut now_ns, mut busy) = (Pulse::default(), 1 << 40, 0);
            for _ in 0..100 {
                busy += u32::from(pulse.turn(now_ns, now_ns + work_ms * MS));
                now_ns += (work_ms + pause_ms) * MS;
            }
            busy
        };
        assert_eq!(turns(1, 1), 0);
        assert_eq!(turns(0, 10), 0);
        // The first stretch begins long ago.
        assert_eq!(turns(10, 0), 19);
        assert_eq!(turns(500, 1), 99, "one long turn is a stretch");
    }
}

/// Every interleaving of a core that moves a connection and one that drains: run with
/// `RUSTFLAGS="--cfg loom" cargo test --release --lib balance`.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;

    #[test]
    fn what_is_sent_to_a_core_that_drains_is_waited_for() {
        loom::model(|| {
            let load = Arc::new(Load::default());
            let sender = {
                let load = Arc::clone(&load);
                loom::thread::spawn(move || load.announce())
            };
            load.close();
            let waits = load.coming() > 0;
            let sent = sender.join().unwrap();
            assert!(waits || !sent, "it is down, and somebody is on the way");
            assert_eq!(load.coming(), usize::from(sent));
        });
    }
}
