//! The places for connections that the cores of a server share.
//!
//! Each core leases some and gives back what it has too many of, so that an accept touches nothing
//! shared. A core that finds none says so, and those that end a connection then grant it theirs.
//!
//! ```text
//! core that finds no place         core that has one too many
//! 1. hungry = true, waiting += 1   1. free += 1
//! 2. free > 0? then take it        2. waiting > 0? then take it out again, for the hungry one
//! ```
//! Either the first sees the place or the second sees that it is waited for.

use std::fmt;
use std::sync::Arc;

#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use crate::per_ip::Sources;
#[cfg(not(loom))]
use crate::stats::LINE_BYTES;

/// All places of a server, but for those that its cores hold. What each accept reads lies on cache
/// lines that are next to never written.
#[repr(align(128))]
pub(crate) struct Places {
    max: usize,
    /// How many a core takes at a time.
    batch: usize,
    /// How many cores there are that have not ended.
    cores: AtomicUsize,
    /// How many connections each address has, if that is limited.
    sources: Option<Sources>,
    desks: Vec<Desk>,
    pool: Pool,
}

/// What changes with each batch.
#[repr(align(128))]
struct Pool {
    free: AtomicUsize,
    /// How many cores are hungry.
    waiting: AtomicUsize,
}

/// What one core asks for and gets, on cache lines of its own.
#[repr(align(128))]
struct Desk {
    hungry: AtomicBool,
    granted: AtomicUsize,
}

impl Places {
    pub(crate) fn new(max: usize, cores: usize, per_ip_max: u32) -> Places {
        let desk = || Desk { hungry: AtomicBool::new(false), granted: AtomicUsize::new(0) };
        Places {
            max,
            batch: (max / (64 * cores)).clamp(1, BATCH_MAX),
            cores: AtomicUsize::new(cores),
            sources: (per_ip_max > 0).then(|| Sources::new(per_ip_max)),
            desks: (0..cores).map(|_| desk()).collect(),
            pool: Pool { free: AtomicUsize::new(max), waiting: AtomicUsize::new(0) },
        }
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// The most connections that one core may have: half more than its share, as the kernel does
    /// not spread connections evenly.
    pub(crate) fn core_max(&self) -> usize {
        let cores = self.cores.load(SeqCst).max(1);
        self.max.min((3 * self.max).div_ceil(2 * cores))
    }

    /// Those that no core holds.
    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        let granted = self.desks.iter().map(|desk| desk.granted.load(SeqCst));
        self.pool.free.load(SeqCst) + granted.sum::<usize>()
    }

    pub(crate) fn sources(&self) -> Option<&Sources> {
        self.sources.as_ref()
    }

    fn take(&self, most: usize) -> usize {
        let mut free = self.pool.free.load(SeqCst);
        loop {
            let count = free.min(most);
            if count == 0 {
                return 0;
            }
            match self.pool.free.compare_exchange(free, free - count, SeqCst, SeqCst) {
                Ok(_) => return count,
                Err(now) => free = now,
            }
        }
    }

    /// Notes that a core has found no place. True if that is news.
    fn be_hungry(&self, core: usize) -> bool {
        let news = !self.desks[core].hungry.swap(true, SeqCst);
        if news {
            self.pool.waiting.fetch_add(1, SeqCst);
        }
        news
    }

    fn be_content(&self, core: usize) -> bool {
        let was_hungry = self.desks[core].hungry.swap(false, SeqCst);
        if was_hungry {
            self.pool.waiting.fetch_sub(1, SeqCst);
        }
        was_hungry
    }

    /// Takes places back: one for each hungry core while they last, the rest for all. Calls `wake`
    /// for each core that was granted one; when it can't be, as it has ended, it gets none.
    fn give(&self, count: usize, from: usize, mut wake: impl FnMut(usize) -> bool) {
        self.pool.free.fetch_add(count, SeqCst);
        // Not a load, though one would do: the model knows of no order between loads.
        if self.pool.waiting.fetch_add(0, SeqCst) == 0 {
            return;
        }
        // Beginning with the next one, so that none is always the last.
        let cores = self.desks.len();
        for core in (1..cores).map(|n| (from + n) % cores) {
            if !self.desks[core].hungry.load(SeqCst) {
                continue;
            }
            if self.take(1) == 0 {
                return;
            }
            if !self.be_content(core) {
                // It has just found one by itself.
                self.pool.free.fetch_add(1, SeqCst);
                continue;
            }
            self.desks[core].granted.fetch_add(1, SeqCst);
            if !wake(core) {
                self.pool.free.fetch_add(self.desks[core].granted.swap(0, SeqCst), SeqCst);
            }
        }
    }
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Places({} of {} free)", self.pool.free.load(SeqCst), self.max)
    }
}

/// The places that one core holds.
#[derive(Debug)]
pub(crate) struct Lease {
    places: Arc<Places>,
    core: usize,
    held: usize,
    /// It has been said that this core is hungry, and it has not found a place since.
    asked: bool,
}

/// Whether a core may have another connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Yes,
    /// The core has as many as one core may have.
    CoreFull,
    /// All places are taken. With the word that this is news, for the other cores to hear.
    ServerFull(bool),
}

impl Lease {
    pub(crate) fn new(places: Arc<Places>, core: usize) -> Lease {
        Lease { places, core, held: 0, asked: false }
    }

    pub(crate) fn places(&self) -> &Arc<Places> {
        &self.places
    }

    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Whether there is a place beyond those used. Takes some of the shared ones if need be.
    pub(crate) fn room(&mut self, used: usize) -> Room {
        if used >= self.places.core_max() {
            return Room::CoreFull;
        }
        self.room_beyond(used)
    }

    /// As [`Lease::room`], however many the core has: for a connection that another one will have.
    pub(crate) fn room_beyond(&mut self, used: usize) -> Room {
        if self.finds_one(used) {
            // One that its own connection has left needs no grant.
            if std::mem::take(&mut self.asked) {
                self.places.be_content(self.core);
                self.held += self.collect();
            }
            return Room::Yes;
        }
        let news = self.places.be_hungry(self.core);
        self.asked = true;
        // Whoever gives one from now on sees that it is waited for; what was given before is here.
        if self.finds_one(used) {
            self.asked = false;
            self.places.be_content(self.core);
            return Room::Yes;
        }
        Room::ServerFull(news)
    }

    /// Whether there is an unused place, here or among the shared ones.
    fn finds_one(&mut self, used: usize) -> bool {
        if used < self.held {
            return true;
        }
        self.held += self.collect();
        // A drain may have accepted more than the core holds.
        let short = (used + 1).saturating_sub(self.held);
        let most =
            self.places.batch.min(self.places.core_max().saturating_sub(self.held)).max(short);
        self.held += self.places.take(most);
        used < self.held
    }

    /// Lets another core have a place beyond those used. False if there is none.
    pub(crate) fn lend(&mut self, used: usize) -> bool {
        let spare = self.held > used;
        self.held -= usize::from(spare);
        spare
    }

    /// Takes over a place that came with a connection. True as often as a lease would be taken for
    /// connections of its own.
    pub(crate) fn take_over(&mut self) -> bool {
        self.held += 1;
        self.held.is_multiple_of(self.places.batch)
    }

    pub(crate) fn core(&self) -> usize {
        self.core
    }

    /// Takes over what was granted.
    fn collect(&self) -> usize {
        self.places.desks[self.core].granted.swap(0, SeqCst)
    }

    /// Takes over what was granted, and gives back what is too much.
    pub(crate) fn hear(&mut self, used: usize, wake: impl FnMut(usize) -> bool) {
        self.held += self.collect();
        self.give_back(used, wake);
    }

    /// Gives back what is too much: all that is unused when another core waits for it.
    pub(crate) fn give_back(&mut self, used: usize, wake: impl FnMut(usize) -> bool) {
        let spare = self.held.saturating_sub(used);
        let keep = match self.places.pool.waiting.load(SeqCst) {
            0 if spare <= 2 * self.places.batch => return,
            0 => self.places.batch,
            _ => 0,
        };
        if spare > keep {
            self.held -= spare - keep;
            self.places.give(spare - keep, self.core, wake);
        }
    }

    /// The core has ended: its share is the others', who are all woken, as some may have had as
    /// many as one core may have.
    pub(crate) fn end(&mut self, mut wake: impl FnMut(usize) -> bool) {
        self.places.be_content(self.core);
        self.places.cores.fetch_sub(1, SeqCst);
        let count = std::mem::take(&mut self.held) + self.collect();
        self.places.give(count, self.core, &mut wake);
        for core in (0..self.places.desks.len()).filter(|core| *core != self.core) {
            wake(core);
        }
    }
}

/// Leases are no larger, so that they do not hide the server's free places from one another.
const BATCH_MAX: usize = 64;

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Pool>() == LINE_BYTES && size_of::<Desk>() == LINE_BYTES);
    assert!(align_of::<Places>() == LINE_BYTES);
};

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU64;

    fn nobody(_: usize) -> bool {
        panic!("nobody waits")
    }

    #[test]
    fn one_core_may_have_all_and_no_more() {
        let places = Arc::new(Places::new(10, 1, 0));
        let mut lease = Lease::new(Arc::clone(&places), 0);
        for used in 0..10 {
            assert_eq!(lease.room(used), Room::Yes, "{used}");
        }
        assert_eq!(lease.room(10), Room::CoreFull);
        lease.end(nobody);
        assert_eq!(places.pool.free.load(SeqCst), 10);
    }

    #[test]
    fn a_core_gets_half_more_than_its_share() {
        let places = Arc::new(Places::new(100, 4, 0));
        let mut lease = Lease::new(Arc::clone(&places), 2);
        let mut most = || (0..).take_while(|used| lease.room(*used) == Room::Yes).count();
        assert_eq!(most(), 38);
        // And more when others have left.
        for (core, expected) in [(0, 50), (3, 75), (1, 100)] {
            let mut woken = Vec::new();
            Lease::new(Arc::clone(&places), core).end(|other| {
                woken.push(other);
                true
            });
            assert_eq!((woken.len(), most()), (3, expected));
        }
    }

    #[test]
    fn the_last_place_is_found_wherever_it_is() {
        let places = Arc::new(Places::new(100, 2, 0));
        let mut leases = [0, 1].map(|core| Lease::new(Arc::clone(&places), core));
        // One core has leased more than it uses.
        assert_eq!(leases[0].room(0), Room::Yes);
        let full = (0..).find(|used| leases[1].room(*used) != Room::Yes);
        assert_eq!(full, Some(75));
        let spare = leases[0].held();
        assert!(spare > 0);
        let full = (0..).find(|used| leases[0].room(*used) != Room::Yes);
        assert_eq!(full, Some(25));
        assert_eq!(leases[0].room(25), Room::ServerFull(false), "it was said before");
        let mut woken = Vec::new();
        leases[1].give_back(74, |core| {
            woken.push(core);
            true
        });
        assert_eq!(woken, [0]);
        assert_eq!(leases[0].room(25), Room::Yes);
        assert_eq!(leases[0].room(26), Room::ServerFull(true));
    }

    #[test]
    fn a_core_that_has_ended_keeps_no_place_from_the_others() {
        let places = Arc::new(Places::new(2, 2, 0));
        let mut leases = [0, 1].map(|core| Lease::new(Arc::clone(&places), core));
        assert_eq!((leases[0].room(0), leases[0].room(1)), (Room::Yes, Room::Yes));
        assert_eq!(leases[1].room(0), Room::ServerFull(true));
        leases[0].give_back(1, |_| false);
        assert_eq!(places.pool.free.load(SeqCst), 1);
        leases[1].end(|_| true);
        assert_eq!(leases[0].room(1), Room::Yes);
    }

    /// Scenario 61: what a core was granted and no longer waits for is nobody's otherwise.
    #[test]
    fn a_core_that_has_helped_itself_is_granted_nothing_that_others_wait_for() {
        let places = Arc::new(Places::new(2, 2, 0));
        let mut leases = [0, 1].map(|core| Lease::new(Arc::clone(&places), core));
        let wake = |_: usize| true;
        assert_eq!([leases[0].room(0), leases[1].room(0)], [Room::Yes; 2]);
        // The first is full, and then has its own connection end.
        assert_eq!(leases[0].room(1), Room::ServerFull(true));
        leases[0].give_back(0, wake);
        assert_eq!(leases[0].room(0), Room::Yes);
        // So does the second.
        assert_eq!(leases[1].room(1), Room::ServerFull(true));
        leases[1].give_back(0, wake);
        assert_eq!(leases[1].room(0), Room::Yes, "the other one's place is in use, this is free");
        assert_eq!(places.pool.waiting.load(SeqCst), 0);
    }

    /// Scenario 61, `reject`: who was turned away once may never come again.
    #[test]
    fn a_place_that_was_granted_to_a_core_that_needs_none_reaches_the_next() {
        let places = Arc::new(Places::new(2, 2, 0));
        let mut leases = [0, 1].map(|core| Lease::new(Arc::clone(&places), core));
        let wake = |_: usize| true;
        assert_eq!([leases[0].room(0), leases[0].room(1)], [Room::Yes; 2]);
        assert_eq!(leases[1].room(0), Room::ServerFull(true));
        leases[0].give_back(1, wake);
        // The second hears of it and has nobody for it; the first calls for it.
        assert_eq!(leases[0].room(1), Room::ServerFull(true));
        leases[1].hear(0, wake);
        assert_eq!(leases[0].room(1), Room::Yes);
    }

    /// Scenario 61: exact after churn, with several threads at once.
    #[test]
    fn threads_that_churn_never_have_more_than_there_are_and_leave_none_behind() {
        const CORES: usize = 3;
        let (max, rounds) = (17, if cfg!(miri) { 200 } else { 100_000 });
        let places = Arc::new(Places::new(max, CORES, 0));
        let (live, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let grants = Mutex::new([0u64; CORES]);
        let refused = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for core in 0..CORES {
                let (places, live, most) = (Arc::clone(&places), &live, &most);
                let (grants, refused) = (&grants, &refused);
                scope.spawn(move || {
                    let mut lease = Lease::new(places, core);
                    let (mut used, mut state) = (0, core as u64 + 1);
                    let wake = |other: usize| {
                        grants.lock().unwrap()[other] += 1;
                        true
                    };
                    for _ in 0..rounds {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        if state >> 63 == 0 {
                            if lease.room(used) == Room::Yes {
                                used += 1;
                                most.fetch_max(live.fetch_add(1, SeqCst) + 1, SeqCst);
                            } else {
                                refused.fetch_add(1, SeqCst);
                            }
                        } else if used > 0 {
                            used -= 1;
                            live.fetch_sub(1, SeqCst);
                            lease.give_back(used, wake);
                        }
                    }
                    live.fetch_sub(used, SeqCst);
                    lease.end(wake);
                });
            }
        });
        assert!(most.load(SeqCst) <= max, "{most:?} at a time");
        assert_eq!(places.pool.waiting.load(SeqCst), 0);
        // What was granted to a core that had ended by then lies on its desk still.
        assert_eq!(places.free(), max);
    }
}

/// Every interleaving of a core that asks and one that gives: run with
/// `RUSTFLAGS="--cfg loom" cargo test --release --lib caps`.
#[cfg(all(test, loom))]
mod model {
    use super::*;

    #[test]
    fn a_core_that_finds_no_place_is_granted_the_one_that_is_given_meanwhile() {
        loom::model(|| {
            let places = Arc::new(Places::new(1, 2, 0));
            let mut giver = Lease::new(Arc::clone(&places), 0);
            assert_eq!(giver.room(0), Room::Yes);
            let woken = Arc::new(AtomicBool::new(false));
            let thread = {
                let woken = Arc::clone(&woken);
                loom::thread::spawn(move || {
                    giver.end(|core| {
                        assert_eq!(core, 1);
                        woken.store(true, SeqCst);
                        true
                    });
                })
            };
            let mut asker = Lease::new(places, 1);
            let room = asker.room(0);
            thread.join().unwrap();
            assert!(room == Room::Yes || woken.load(SeqCst), "it waits in vain");
            assert_eq!(asker.room(0), Room::Yes);
            assert_eq!(asker.held(), 1);
        });
    }
}
