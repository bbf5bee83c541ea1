//! What a core tells: at the end of each turn it is compared with what was seen before.

use std::io;
use std::rc::Rc;

use tracing::level_filters::LevelFilter;

use super::event;
use crate::core::{Core, CoreCell};
use crate::drain::Phase;
use crate::executor::guarded;
use crate::report::CloseReason;
use crate::sys::place::Place;

/// What a core has seen of itself, and what it has to tell.
#[derive(Default)]
pub(crate) struct CoreEvents {
    seen: Seen,
    /// Where the task was spawned that has panicked last.
    pub(crate) panicked: Option<Place>,
    /// The listener whose accept has failed last, and the error's number.
    pub(crate) accept_failed: (u32, i32),
    panics: Pace,
    stalls: Pace,
    accept: Episode,
    overload: Episode,
    eviction: Episode,
    memory: Episode,
    /// Told when nobody has the core borrowed.
    waiting: Vec<Box<dyn FnOnce()>>,
}

/// Figures at the last look.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    phase: Phase,
    panics: u64,
    stalls: u64,
    mismatches: u64,
    accept_errors: u64,
    accept_pauses: u64,
    rejected: u64,
    memory_pauses: u64,
}

/// Something that comes and goes.
#[derive(Clone, Copy, Debug, Default)]
struct Episode {
    /// When it began, and when it was last there; `None` while there is none.
    during_ms: Option<(u64, u64)>,
    /// A figure as it was at the beginning.
    before: u64,
}

/// What an episode has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edge {
    Begins,
    /// How long it was, and what the figure has grown by.
    Ends {
        lasted_ms: u64,
        count: u64,
    },
}

impl Episode {
    /// It is there, or not; `figure` counts what it is about, `already` of which just now.
    fn look(&mut self, is_there: bool, now_ms: u64, figure: u64, already: u64) -> Option<Edge> {
        match &mut self.during_ms {
            None if is_there => {
                *self = Episode { during_ms: Some((now_ms, now_ms)), before: figure - already };
                Some(Edge::Begins)
            }
            Some((_, last_ms)) if is_there => {
                *last_ms = now_ms;
                None
            }
            Some((since_ms, last_ms)) if now_ms >= *last_ms + QUIET_MS => {
                let lasted_ms = *last_ms - *since_ms;
                self.during_ms = None;
                Some(Edge::Ends { lasted_ms, count: figure - self.before })
            }
            _ => None,
        }
    }
}

/// What may be told once a second.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    next_ms: u64,
}

impl Pace {
    fn allows(&mut self, now_ms: u64) -> bool {
        let allowed = now_ms >= self.next_ms;
        if allowed {
            self.next_ms = now_ms + QUIET_MS;
        }
        allowed
    }
}

impl std::fmt::Debug for CoreEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoreEvents").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl CoreCell {
    /// Tells what is new; called when nobody has the core borrowed.
    pub(crate) fn tell(self: &Rc<CoreCell>) {
        if LevelFilter::current() == LevelFilter::OFF {
            return;
        }
        let waiting = {
            let core = self.borrow_mut();
            if core.control.events.is_quiet() {
                return;
            }
            let mut events = core.events.borrow_mut();
            events.look(&core);
            std::mem::take(&mut events.waiting)
        };
        for event in waiting {
            guarded(event);
        }
    }
}

impl CoreEvents {
    fn look(&mut self, core: &Core) {
        self.look_at_phase(core);
        self.look_at_faults(core);
        self.look_at_accept(core);
        self.look_at_limits(core);
    }

    fn say(&mut self, event: impl FnOnce() + 'static) {
        self.waiting.push(Box::new(event));
    }

    fn look_at_phase(&mut self, core: &Core) {
        let (index, now) = (core.info.index, core.drain.phase());
        let before = std::mem::replace(&mut self.seen.phase, now);
        if before == now {
            return;
        }
        let (connections, tasks) = (core.table.len(), core.tasks.waited_for());
        let new = Phase::ALL.into_iter().filter(|it| *it > before && *it <= now);
        for phase in new.filter(|phase| core.drain.has_entered(*phase)) {
            self.say(move || {
                let phase = phase.as_str();
                event!(DEBUG, core = index, phase, connections, tasks, "core's drain phase");
            });
            if phase == Phase::Force {
                self.say(move || event!(WARN, core = index, connections, tasks, "drain forces"));
            }
        }
        let (control, alone) = (core.control.clone(), core.retired);
        self.say(move || control.events.entered(&control, index, now, alone));
    }

    fn look_at_faults(&mut self, core: &Core) {
        let (index, now_ms, counters) = (core.info.index, core.now_ms, &core.counters);
        let panics = counters.panics.get();
        if self.seen.panics != panics && self.panics.allows(now_ms) {
            self.seen.panics = panics;
            let place = self.panicked.map(tracing::field::display);
            self.say(move || event!(ERROR, core = index, place, panics, "task panicked"));
        }
        let stalls = counters.stalls.get();
        if self.seen.stalls != stalls && self.stalls.allows(now_ms) {
            self.seen.stalls = stalls;
            if let Some((lasted_ms, place)) = counters.watch.latest() {
                let place = place.map(tracing::field::display);
                self.say(move || event!(WARN, core = index, place, lasted_ms, stalls, "stall"));
            }
        }
        let mismatches = counters.mismatches.get();
        if self.seen.mismatches != mismatches {
            self.seen.mismatches = mismatches;
            let finding = counters.findings().pop().unwrap_or_default();
            self.say(move || {
                event!(ERROR, core = index, finding, mismatches, "self-check failed");
            });
        }
    }

    fn look_at_accept(&mut self, core: &Core) {
        let (index, errors) = (core.info.index, core.counters.accept_errors.get());
        let new = errors - self.seen.accept_errors;
        self.seen.accept_errors = errors;
        let fails = self.accept.during_ms.is_some() || new > 0;
        let starved = fails && core.listeners.iter().any(|listener| listener.is_starved());
        match self.accept.look(starved, core.now_ms, errors, new) {
            Some(Edge::Begins) => {
                let (listener, errno) = self.accept_failed;
                let address = core.control.addr(listener as u16).map(tracing::field::display);
                let error = io::Error::from_raw_os_error(errno);
                self.say(move || event!(WARN, core = index, address, %error, "accept fails"));
            }
            Some(Edge::Ends { lasted_ms, count }) => self.say(move || {
                event!(INFO, core = index, lasted_ms, errors = count, "accept works again");
            }),
            None => {}
        }
    }

    fn look_at_limits(&mut self, core: &Core) {
        let (index, now_ms, counters) = (core.info.index, core.now_ms, &core.counters);
        let connections = core.table.len();
        let closed = |reason| counters.closed[reason as usize].get();

        let (pauses, rejected) = (counters.accept_pauses.get(), closed(CloseReason::Rejected));
        let new = rejected - self.seen.rejected;
        let turned_away = new > 0 || pauses > self.seen.accept_pauses;
        (self.seen.accept_pauses, self.seen.rejected) = (pauses, rejected);
        let full = turned_away || core.listeners.iter().any(|listener| listener.is_full());
        match self.overload.look(full, now_ms, rejected, new) {
            Some(Edge::Begins) => {
                self.say(move || event!(WARN, core = index, connections, "overload begins"));
            }
            Some(Edge::Ends { lasted_ms, count }) => self.say(move || {
                event!(INFO, core = index, lasted_ms, rejected = count, "overload has ended");
            }),
            None => {}
        }

        let evicted = closed(CloseReason::Evicted);
        match self.eviction.look(core.pressure.is_felt(), now_ms, evicted, 0) {
            Some(Edge::Begins) => {
                self.say(move || event!(WARN, core = index, connections, "eviction begins"));
            }
            Some(Edge::Ends { lasted_ms, count }) => self.say(move || {
                event!(INFO, core = index, lasted_ms, evicted = count, "eviction has ended");
            }),
            None => {}
        }

        let pauses = counters.memory_pauses.get();
        let new = pauses - self.seen.memory_pauses;
        self.seen.memory_pauses = pauses;
        let bytes = core.memory.used();
        match self.memory.look(new > 0 || core.memory.is_short(), now_ms, pauses, new) {
            Some(Edge::Begins) => {
                self.say(move || event!(WARN, core = index, bytes, "memory limit reached"));
            }
            Some(Edge::Ends { lasted_ms, count }) => self.say(move || {
                event!(INFO, core = index, lasted_ms, pauses = count, "memory limit left");
            }),
            None => {}
        }
    }
}

/// For how long something has to be over before it is told so, and how often a fault is told.
const QUIET_MS: u64 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_flutters_is_one_episode_and_over_when_it_has_been_quiet() {
        let mut episode = Episode::default();
        assert_eq!(episode.look(false, 0, 5, 0), None);
        assert_eq!(episode.look(true, 10, 8, 3), Some(Edge::Begins));
        for now_ms in (20..5_000).step_by(500) {
            assert_eq!(episode.look(true, now_ms, 9, 1), None);
            assert_eq!(episode.look(false, now_ms + 400, 9, 0), None);
        }
        let ends = Edge::Ends { lasted_ms: 4_510, count: 4 };
        assert_eq!(episode.look(false, 5_519, 9, 0), None);
        assert_eq!(episode.look(false, 5_520, 9, 0), Some(ends));
        assert_eq!(episode.look(false, 9_000, 9, 0), None);
        assert_eq!(episode.look(true, 9_001, 9, 0), Some(Edge::Begins), "and it may come again");
    }

    #[test]
    fn faults_are_told_once_a_second() {
        let mut pace = Pace::default();
        let told = (5_000..8_000).filter(|now_ms| pace.allows(*now_ms)).count();
        assert_eq!(told, 3);
    }
}
