//! Stalls: who kept a core from everything else, and for how long. Known while it lasts, from
//! another thread, and remembered after it.

use std::collections::VecDeque;
use std::fmt;
use std::panic::Location;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::handle::Handle;
use crate::stats::Counter;
use crate::sys::clock::coarse_ms;
use crate::sys::place::{Place, PlaceCell};

/// A time during which a core did nothing for its other connections.
///
/// # Examples
///
/// ```no_run
/// # fn example(handle: slipring::Handle) {
/// for stall in handle.stalls() {
///     eprintln!("{stall}"); // core 0 was kept by src/main.rs:12:9 for 250 ms, 3.1 s ago
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stall {
    /// Which core, from 0.
    pub core: usize,
    /// Where the task was spawned whose single poll took so long; for a connection's handler, the
    /// place of the `listen` call. `None` when no single poll did, but a turn of the loop: many
    /// polls together, or a destructor.
    pub place: Option<&'static Location<'static>>,
    /// When it began. This and `lasted` are 10 ms off at most.
    pub began: Instant,
    /// How long it lasted, or has lasted so far.
    pub lasted: Duration,
    /// Whether it goes on.
    pub ongoing: bool,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stall { core, place, began, lasted, ongoing } = self;
        let kept = if *ongoing { "is" } else { "was" };
        write!(f, "core {core} {kept} kept by ")?;
        match place {
            Some(place) => write!(f, "{place}")?,
            None => f.write_str("one turn")?,
        }
        write!(f, " for {} ms", lasted.as_millis())?;
        if *ongoing {
            return Ok(());
        }
        let ago = began.elapsed().saturating_sub(*lasted);
        write!(f, ", {:.1} s ago", ago.as_secs_f64())
    }
}

impl Handle {
    /// The stalls of each core, the earliest first: the last 64 that are over, and what goes on.
    ///
    /// A stall is a poll of a task, or else a whole turn of the loop, that has taken
    /// `SLIPRING_STALL_MS` or longer. Handlers share their core: one that computes or blocks for so
    /// long makes all others wait. Move such work to a thread.
    #[must_use]
    pub fn stalls(&self) -> Vec<Stall> {
        let seats = self.control().seats().iter().enumerate();
        let mut stalls: Vec<Stall> =
            seats.flat_map(|(core, seat)| seat.watched(core)).map(|(_, stall)| stall).collect();
        stalls.sort_by_key(|stall| stall.began);
        stalls
    }
}

/// What a core lets others see of its turns and polls. One thread writes, others read.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// From when on it is a stall; 0 is never.
    limit_ms: Counter,
    /// When the turn began; 0 while the core waits.
    turn_ms: Counter,
    /// When the poll began; 0 while nothing is polled.
    poll_ms: Counter,
    /// A poll of this turn has been a stall.
    explained: Counter,
    past: Mutex<VecDeque<Past>>,
}

/// What makes a stall: when it began, and which poll it is, if it is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Past {
    since_ms: u64,
    lasted_ms: u64,
    place: Option<Place>,
}

impl Watch {
    pub(crate) fn set_limit(&self, limit_ms: u64) {
        self.limit_ms.set(limit_ms);
    }

    pub(crate) fn turn_begins(&self, now_ms: u64) {
        self.turn_ms.set(now_ms);
        self.explained.set(0);
    }

    /// The core is about to wait. True when the turn was a stall by itself.
    pub(crate) fn turn_ends(&self, now_ms: u64) -> bool {
        let since_ms = self.turn_ms.get();
        self.turn_ms.set(0);
        let stalled = self.explained.get() == 0 && self.is_long(since_ms, now_ms);
        if stalled {
            self.remember(since_ms, now_ms, None);
        }
        stalled
    }

    pub(crate) fn is_in_turn(&self) -> bool {
        self.turn_ms.get() != 0
    }

    /// Whether a turn goes on that has lasted so long already. Nobody knows where stalls are not
    /// watched for.
    pub(crate) fn turn_lasts(&self, now_ms: u64, ms: u64) -> bool {
        let since_ms = self.turn_ms.get();
        self.limit_ms.get() > 0 && since_ms > 0 && now_ms.saturating_sub(since_ms) >= ms
    }

    pub(crate) fn poll_begins(&self, now_ms: u64) {
        self.poll_ms.set(now_ms);
    }

    /// True when it was a stall.
    pub(crate) fn poll_ends(&self, place: Place, now_ms: u64) -> bool {
        let since_ms = self.poll_ms.get();
        self.poll_ms.set(0);
        let stalled = self.is_long(since_ms, now_ms);
        if stalled {
            self.explained.set(1);
            self.remember(since_ms, now_ms, Some(place));
        }
        stalled
    }

    fn is_long(&self, since_ms: u64, now_ms: u64) -> bool {
        let limit_ms = self.limit_ms.get();
        limit_ms > 0 && since_ms > 0 && now_ms.saturating_sub(since_ms) >= limit_ms
    }

    fn remember(&self, since_ms: u64, now_ms: u64, place: Option<Place>) {
        let mut past = self.past();
        if past.len() == PAST_MAX {
            past.pop_front();
        }
        past.push_back(Past { since_ms, lasted_ms: now_ms - since_ms, place });
    }

    /// How long the last one was that is over, and whose.
    #[cfg(feature = "tracing")]
    pub(crate) fn latest(&self) -> Option<(u64, Option<Place>)> {
        self.past().back().map(|past| (past.lasted_ms, past.place))
    }

    /// The stalls with the moments that tell them apart, those that are over first.
    pub(crate) fn all(&self, core: usize, running: &PlaceCell) -> Vec<(u64, Stall)> {
        // First what goes on: if it ends meanwhile, it is also among the others, and left out.
        let (now, now_ms) = (Instant::now(), coarse_ms());
        let current = self.current(now_ms, running);
        let at = |past: Past, ongoing| {
            let began =
                now.checked_sub(Duration::from_millis(now_ms.saturating_sub(past.since_ms)));
            let lasted = Duration::from_millis(past.lasted_ms);
            let began = began.unwrap_or(now);
            (past.since_ms, Stall { core, place: past.place, began, lasted, ongoing })
        };
        let mut stalls: Vec<_> = self.past().iter().map(|past| at(*past, false)).collect();
        let is_over = |now: &Past| stalls.iter().any(|(since_ms, _)| *since_ms == now.since_ms);
        if let Some(current) = current.filter(|current| !is_over(current)) {
            stalls.push(at(current, true));
        }
        stalls
    }

    /// What goes on and is a stall already.
    fn current(&self, now_ms: u64, running: &PlaceCell) -> Option<Past> {
        let (poll_ms, turn_ms, place) = (self.poll_ms.get(), self.turn_ms.get(), running.get());
        let long = |since_ms, place| {
            self.is_long(since_ms, now_ms).then(|| Past {
                since_ms,
                lasted_ms: now_ms - since_ms,
                place,
            })
        };
        if place.is_some() && self.is_long(poll_ms, now_ms) {
            // Unless it was another poll's place.
            return long(poll_ms, place).filter(|_| self.poll_ms.get() == poll_ms);
        }
        long(turn_ms, None).filter(|_| self.explained.get() == 0)
    }

    fn past(&self) -> MutexGuard<'_, VecDeque<Past>> {
        self.past.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

pub(crate) const PAST_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(limit_ms: u64) -> (Watch, PlaceCell) {
        let watch = Watch::default();
        watch.set_limit(limit_ms);
        (watch, PlaceCell::default())
    }

    #[test]
    fn a_long_poll_is_one_stall_and_its_turn_is_none() {
        let (watch, place) = (watch(100).0, Location::caller());
        watch.turn_begins(1_000);
        watch.poll_begins(1_000);
        assert!(!watch.poll_ends(place, 1_099));
        watch.poll_begins(1_100);
        assert!(watch.poll_ends(place, 1_200));
        assert!(!watch.turn_ends(1_300), "the poll explains it");
        let stalls = watch.all(3, &PlaceCell::default());
        assert_eq!(stalls.len(), 1);
        let (since_ms, stall) = stalls[0];
        assert_eq!((since_ms, stall.core, stall.place), (1_100, 3, Some(place)));
        assert_eq!((stall.lasted, stall.ongoing), (Duration::from_millis(100), false));
        assert!(stall.to_string().starts_with("core 3 was kept by src/stalls.rs:"), "{stall}");
    }

    #[test]
    fn a_long_turn_of_short_polls_is_a_stall_of_its_own() {
        let (watch, place) = (watch(100).0, Location::caller());
        assert!(!watch.turn_ends(5_000), "no turn has begun");
        watch.turn_begins(1_000);
        for now_ms in (1_000..1_200).step_by(50) {
            watch.poll_begins(now_ms);
            assert!(!watch.poll_ends(place, now_ms + 50));
        }
        assert!(watch.turn_ends(1_200));
        assert_eq!(watch.all(0, &PlaceCell::default())[0].1.place, None);
    }

    #[test]
    fn what_goes_on_is_seen_with_its_place_and_not_twice() {
        let ((watch, running), place) = (watch(100), Location::caller());
        let now_ms = coarse_ms();
        watch.turn_begins(now_ms - 500);
        assert!(watch.all(0, &running)[0].1.ongoing, "a turn");
        running.set(place);
        watch.poll_begins(now_ms - 400);
        let seen = watch.all(0, &running);
        assert_eq!((seen.len(), seen[0].0, seen[0].1.place), (1, now_ms - 400, Some(place)));
        assert!(seen[0].1.ongoing && seen[0].1.lasted >= Duration::from_millis(400));
        watch.poll_ends(place, now_ms);
        running.clear();
        let seen = watch.all(0, &running);
        assert_eq!((seen.len(), seen[0].1.ongoing), (1, false));
    }

    #[test]
    fn zero_is_off_and_the_log_is_bounded() {
        let (off, place) = (watch(0).0, Location::caller());
        off.poll_begins(1);
        assert!(!off.poll_ends(place, u64::MAX));
        let on = watch(1).0;
        for since_ms in 1..200 {
            on.poll_begins(since_ms);
            assert!(on.poll_ends(place, since_ms + 1));
        }
        let stalls = on.all(0, &PlaceCell::default());
        assert_eq!((stalls.len(), stalls[0].0), (PAST_MAX, 200 - PAST_MAX as u64));
    }
}
