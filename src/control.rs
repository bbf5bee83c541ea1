//! What the cores of a server agree on: when the drain is due, and who has ended.
//!
//! The whole order to drain is one atomic number, its deadline, which only ever falls. So no core
//! can see that a drain has begun without seeing its deadline, and a later order can only shorten
//! an earlier one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::post::{Message, Post};
use crate::report::{CoreReport, DrainReport, PhaseTimes};
use crate::stats::{Counters, Stats};

/// Shared by the cores of a server, its handles, and whoever waits for its end.
#[derive(Debug)]
pub(crate) struct Control {
    epoch: Instant,
    /// Nanoseconds since the epoch; `u64::MAX` while nobody has ordered a drain.
    deadline_ns: AtomicU64,
    seats: Vec<Seat>,
    ended: Mutex<Vec<Option<CoreReport>>>,
    news: Condvar,
}

/// How a core is reached and watched from outside.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) cpu: u16,
    pub(crate) post: Post,
    pub(crate) counters: Arc<Counters>,
}

impl Control {
    pub(crate) fn new(epoch: Instant, seats: Vec<Seat>) -> Control {
        let ended = Mutex::new(seats.iter().map(|_| None).collect());
        let deadline_ns = AtomicU64::new(u64::MAX);
        Control { epoch, deadline_ns, seats, ended, news: Condvar::new() }
    }

    pub(crate) fn seats(&self) -> &[Seat] {
        &self.seats
    }

    pub(crate) fn epoch(&self) -> Instant {
        self.epoch
    }

    pub(crate) fn deadline_ns(&self) -> u64 {
        self.deadline_ns.load(Ordering::Acquire)
    }

    /// Orders a drain, or shortens the one that runs. Any thread may, and does not wait.
    pub(crate) fn begin_drain(&self, within: Duration) {
        let deadline = self.epoch.elapsed().saturating_add(within).as_nanos();
        // u64::MAX stands for "no drain"; a drain in 584 years is none either.
        self.begin_drain_at(u64::try_from(deadline).unwrap_or(u64::MAX).min(u64::MAX - 1));
    }

    /// As [`Control::begin_drain`], with the deadline in nanoseconds since the epoch.
    pub(crate) fn begin_drain_at(&self, deadline_ns: u64) {
        self.deadline_ns.fetch_min(deadline_ns, Ordering::AcqRel);
        for seat in &self.seats {
            // A core that has ended already needs no telling.
            let _ = seat.post.post(Message::Look);
        }
        let _guard = self.lock();
        self.news.notify_all();
    }

    /// A core has ended: its ring is gone and its sockets are closed.
    pub(crate) fn report(&self, index: usize, report: CoreReport) {
        self.lock()[index] = Some(report);
        self.news.notify_all();
    }

    /// Waits until every core has ended; once a drain is ordered, no longer than its deadline and
    /// a little more. A core that has not answered by then is reported as stuck, with what it runs.
    pub(crate) fn wait(&self) -> DrainReport {
        let mut ended = self.lock();
        while ended.iter().any(Option::is_none) {
            let now_ns = self.epoch.elapsed().as_nanos() as u64;
            let give_up_ns = self.deadline_ns().saturating_add(STUCK_AFTER.as_nanos() as u64);
            if now_ns >= give_up_ns {
                break;
            }
            let wait = Duration::from_nanos(give_up_ns - now_ns);
            let waited = self.news.wait_timeout(ended, wait);
            ended = waited.map_or_else(|poison| poison.into_inner().0, |(guard, _)| guard);
        }
        let reports = ended.iter().zip(&self.seats);
        DrainReport {
            cores: reports.map(|(end, seat)| end.clone().unwrap_or_else(|| seat.stuck())).collect(),
        }
    }

    /// Whether the time is up that [`Control::wait`] would wait for at most.
    pub(crate) fn is_over(&self) -> bool {
        let now_ns = self.epoch.elapsed().as_nanos() as u64;
        now_ns >= self.deadline_ns().saturating_add(STUCK_AFTER.as_nanos() as u64)
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats { cores: self.seats.iter().map(|seat| seat.counters.snapshot()).collect() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<CoreReport>>> {
        self.ended.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Seat {
    fn stuck(&self) -> CoreReport {
        let task = self.counters.running.get();
        CoreReport {
            cpu: self.cpu,
            stats: self.counters.snapshot(),
            phases: PhaseTimes::default(),
            stuck: Some(task.map_or_else(|| "none".to_owned(), ToString::to_string)),
            failure: None,
        }
    }
}

/// How long after the deadline a core may still be closing its ring. Together with the turn that a
/// waiter needs to be scheduled, it keeps a drain within 100 ms of its deadline.
const STUCK_AFTER: Duration = Duration::from_millis(80);
