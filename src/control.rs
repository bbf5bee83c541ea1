//! What the cores of a server agree on: when the drain is due, and who has ended.
//!
//! The whole order to drain is one atomic number, its deadline, which only ever falls. So no core
//! can see that a drain has begun without seeing its deadline, and a later order can only shorten
//! an earlier one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use crate::bind::ListenAddr;
use crate::drain::Phase;
use crate::post::{Message, Post};
use crate::report::{CoreReport, DrainReport};
use crate::signals::Signals;
use crate::socket_file::SocketFile;
use crate::stalls::Stall;
use crate::stats::{Counters, LINE_BYTES, Stats};
use crate::sys::clock::Epoch;

/// Shared by the cores of a server, its handles, and whoever waits for its end. On cache lines of
/// its own: while the server runs, cores only read it.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Control {
    epoch: Epoch,
    /// Nanoseconds since the epoch; `u64::MAX` while nobody has ordered a drain.
    deadline_ns: AtomicU64,
    seats: Vec<Seat>,
    /// Where the server listens, in the order of the cores' listeners; set before they accept.
    addrs: OnceLock<Vec<ListenAddr>>,
    /// The sockets that were passed in, with the cores that accept from each.
    kept: OnceLock<Vec<(ListenAddr, Vec<usize>)>>,
    ended: Mutex<Vec<Option<CoreReport>>>,
    belongings: Mutex<Option<Belongings>>,
    /// Which cores were told to leave while the others go on.
    leaving: Mutex<Vec<bool>>,
    /// Which cores have said in a drain that they have nothing left that could call another.
    quiet: Box<[AtomicBool]>,
    news: Condvar,
    #[cfg(feature = "tracing")]
    pub(crate) events: crate::trace::ServerEvents,
}

/// What a server has of the process and the file system until its last core has ended.
#[derive(Debug)]
pub(crate) struct Belongings {
    pub(crate) signals: Option<Signals>,
    pub(crate) files: Vec<SocketFile>,
    #[cfg(feature = "admin")]
    pub(crate) admin: Option<crate::admin::Farewell>,
}

/// How a core is reached and watched from outside.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) cpu: u16,
    pub(crate) post: Post,
    pub(crate) counters: Arc<Counters>,
}

impl Control {
    pub(crate) fn new(epoch: Epoch, seats: Vec<Seat>) -> Control {
        let leaving = Mutex::new(vec![false; seats.len()]);
        let quiet = seats.iter().map(|_| AtomicBool::new(false)).collect();
        let ended = Mutex::new(seats.iter().map(|_| None).collect());
        let deadline_ns = AtomicU64::new(u64::MAX);
        let (addrs, kept) = (OnceLock::new(), OnceLock::new());
        let (news, belongings) = (Condvar::new(), Mutex::new(None));
        Control {
            epoch,
            deadline_ns,
            seats,
            addrs,
            kept,
            ended,
            belongings,
            leaving,
            quiet,
            news,
            #[cfg(feature = "tracing")]
            events: Default::default(),
        }
    }

    pub(crate) fn set_listeners(
        &self,
        addrs: Vec<ListenAddr>,
        kept: Vec<(ListenAddr, Vec<usize>)>,
    ) {
        self.addrs.get_or_init(|| addrs);
        self.kept.get_or_init(|| kept);
    }

    pub(crate) fn keep(&self, belongings: Belongings) {
        *self.belongings() = Some(belongings);
    }

    /// Gives back what the server had. It waits for the signals' thread, which needs no core.
    pub(crate) fn let_go(&self) {
        let belongings = self.belongings().take();
        let Some(Belongings {
            signals,
            files,
            #[cfg(feature = "admin")]
            admin,
        }) = belongings
        else {
            return;
        };
        #[cfg(feature = "admin")]
        drop(admin);
        drop(signals);
        drop(files);
    }

    fn belongings(&self) -> MutexGuard<'_, Option<Belongings>> {
        self.belongings.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// The address of a listener.
    pub(crate) fn addr(&self, listener: u16) -> Option<ListenAddr> {
        self.addrs.get()?.get(usize::from(listener)).cloned()
    }

    /// Whether connections can come in.
    #[cfg(feature = "admin")]
    pub(crate) fn is_listening(&self) -> bool {
        self.addrs.get().is_some()
    }

    /// Since the epoch.
    #[cfg(feature = "admin")]
    pub(crate) fn elapsed(&self) -> Duration {
        self.epoch.elapsed()
    }

    pub(crate) fn seats(&self) -> &[Seat] {
        &self.seats
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn deadline_ns(&self) -> u64 {
        self.deadline_ns.load(Ordering::Acquire)
    }

    /// Orders a drain, or shortens the one that runs. Any thread may, and does not wait.
    pub(crate) fn begin_drain(&self, within: Duration) {
        self.begin_drain_at(self.deadline_within(within));
    }

    fn deadline_within(&self, within: Duration) -> u64 {
        let deadline = self.epoch.elapsed().saturating_add(within).as_nanos();
        // u64::MAX stands for "no drain"; a drain in 584 years is none either.
        u64::try_from(deadline).unwrap_or(u64::MAX).min(u64::MAX - 1)
    }

    /// As [`Control::begin_drain`], with the deadline in nanoseconds since the epoch.
    pub(crate) fn begin_drain_at(&self, deadline_ns: u64) {
        let _before_ns = self.deadline_ns.fetch_min(deadline_ns, Ordering::AcqRel);
        traced!(self.events.drain_ordered(_before_ns, deadline_ns, self.epoch.elapsed()));
        for seat in &self.seats {
            // A core that has ended already needs no telling.
            let _ = seat.post.post(Message::Look);
        }
        let _guard = self.lock();
        self.news.notify_all();
    }

    /// Tells one core to leave, and returns by when.
    ///
    /// # Errors
    /// Why it has to stay: no other core would be left, or none at a socket that was passed in, and
    /// nobody would serve its queue.
    pub(crate) fn retire(&self, core: usize, within: Duration) -> Result<u64, String> {
        let mut leaving = self.leaving.lock().unwrap_or_else(|poison| poison.into_inner());
        let stays = |(other, leaves): (usize, &bool)| other != core && !leaves;
        if !leaving.iter().enumerate().any(stays) {
            return Err("no other core would be left; drain the server instead".to_owned());
        }
        for (addr, users) in self.kept.get().into_iter().flatten() {
            let alone = !users.iter().any(|other| stays((*other, &leaving[*other])));
            if alone && users.contains(&core) {
                return Err(format!(
                    "nobody else accepts from its socket of {addr}, which was passed in and stays \
                     open; drain the server instead"
                ));
            }
        }
        leaving[core] = true;
        let deadline_ns = self.deadline_within(within);
        drop(leaving);
        traced!(self.events.retire_ordered(core, within));
        // A core that has ended already needs no telling.
        let _ = self.seats[core].post.post(Message::Retire(deadline_ns));
        Ok(deadline_ns)
    }

    /// Waits for one core's end as [`Control::wait`] does for all.
    pub(crate) fn wait_for(&self, core: usize, deadline_ns: u64) -> CoreReport {
        let mut ended = self.lock();
        loop {
            if let Some(report) = &ended[core] {
                return report.clone();
            }
            let deadline_ns = deadline_ns.min(self.deadline_ns());
            let Some(wait) = self.time_until_stuck(deadline_ns) else { break };
            let waited = self.news.wait_timeout(ended, wait);
            ended = waited.map_or_else(|poison| poison.into_inner().0, |(guard, _)| guard);
        }
        self.seats[core].stuck()
    }

    /// How much longer a core may take whose deadline this is.
    fn time_until_stuck(&self, deadline_ns: u64) -> Option<Duration> {
        let now_ns = self.epoch.elapsed_ns();
        let give_up_ns = deadline_ns.saturating_add(STUCK_AFTER.as_nanos() as u64);
        (now_ns < give_up_ns).then(|| Duration::from_nanos(give_up_ns - now_ns))
    }

    /// Where the core stands that has got least far in the drain of the whole server.
    pub(crate) fn phase(&self) -> Phase {
        if self.deadline_ns() == u64::MAX {
            return Phase::Running;
        }
        let ended = self.lock();
        let up = self.seats.iter().zip(ended.iter()).filter(|(_, end)| end.is_none());
        let phases = up.map(|(seat, _)| Phase::of(seat.counters.phase.get()));
        phases.min().map_or(Phase::Down, |phase| phase.max(Phase::LameDuck))
    }

    /// Tells the cores that a listener of one of them has gone.
    pub(crate) fn put_steering_right(&self) {
        for seat in &self.seats {
            let _ = seat.post.post(Message::Steer);
        }
    }

    /// A core has nothing left that could call another, or has something again. The last that is
    /// quiet wakes those who have waited for it.
    pub(crate) fn say_quiet(&self, core: usize, quiet: bool) {
        // Each says it first and then looks at the others, so that one of two sees both.
        let news = self.quiet[core].swap(quiet, Ordering::SeqCst) != quiet;
        if news && self.quiet.iter().all(|quiet| quiet.load(Ordering::SeqCst)) {
            for seat in &self.seats {
                // A core that has ended already waits for nobody.
                let _ = seat.post.post(Message::Look);
            }
        }
    }

    /// Whether all cores but this one have nothing left that could call it.
    pub(crate) fn are_others_quiet(&self, core: usize) -> bool {
        let mut others = self.quiet.iter().enumerate().filter(|(other, _)| *other != core);
        others.all(|(_, quiet)| quiet.load(Ordering::SeqCst))
    }

    /// A core has ended: its ring is gone and its sockets are closed.
    pub(crate) fn report(&self, index: usize, report: CoreReport) {
        self.say_quiet(index, true);
        traced!(self.events.core_ended(self, index, &report));
        let mut ended = self.lock();
        let others = ended.iter().enumerate().filter(|(core, _)| *core != index);
        if others.map(|(_, end)| end).all(Option::is_some) {
            drop(ended);
            // Before anyone hears that the server has ended: its addresses are free then.
            self.let_go();
            traced!(self.events.ended(&self.account_with(index, &report)));
            ended = self.lock();
        }
        ended[index] = Some(report);
        self.news.notify_all();
    }

    /// The account of the server, with that of the core that ends last.
    #[cfg(feature = "tracing")]
    fn account_with(&self, last: usize, report: &CoreReport) -> DrainReport {
        let mut cores: Vec<CoreReport> = self.lock().iter().flatten().cloned().collect();
        cores.insert(last, report.clone());
        DrainReport { cores }
    }

    /// Waits until every core has ended; once a drain is ordered, no longer than its deadline and
    /// a little more. A core that has not answered by then is reported as stuck, with what it runs.
    pub(crate) fn wait(&self) -> DrainReport {
        let mut ended = self.lock();
        while ended.iter().any(Option::is_none) {
            let Some(wait) = self.time_until_stuck(self.deadline_ns()) else { break };
            let waited = self.news.wait_timeout(ended, wait);
            ended = waited.map_or_else(|poison| poison.into_inner().0, |(guard, _)| guard);
        }
        let reports = ended.iter().zip(&self.seats);
        DrainReport {
            cores: reports.map(|(end, seat)| end.clone().unwrap_or_else(|| seat.stuck())).collect(),
        }
    }

    /// Waits for the server's end, no longer than so long. True when it has ended, or a core is so
    /// late that nobody waits for it.
    pub(crate) fn has_ended_within(&self, time: Duration) -> bool {
        self.has_ended_or(time, || false)
    }

    /// As [`Control::has_ended_within`]; but it also comes back when a drain is ordered, or one
    /// with another deadline.
    #[cfg(feature = "systemd")]
    pub(crate) fn has_ended_or_is_ordered(&self, known_ns: u64, time: Duration) -> bool {
        self.has_ended_or(time, || self.deadline_ns() != known_ns)
    }

    fn has_ended_or(&self, time: Duration, enough: impl Fn() -> bool) -> bool {
        let begun = Instant::now();
        let mut ended = self.lock();
        loop {
            if ended.iter().all(Option::is_some) || self.is_over() {
                return true;
            }
            let left = time.saturating_sub(begun.elapsed());
            if left.is_zero() || enough() {
                return false;
            }
            let waited = self.news.wait_timeout(ended, left);
            ended = waited.map_or_else(|poison| poison.into_inner().0, |(guard, _)| guard);
        }
    }

    /// Whether the time is up that [`Control::wait`] would wait for at most.
    pub(crate) fn is_over(&self) -> bool {
        self.time_until_stuck(self.deadline_ns()).is_none()
    }

    /// How many turns each core has made; `None` for those that have ended.
    #[cfg(feature = "systemd")]
    pub(crate) fn turns(&self) -> Vec<Option<u64>> {
        let ended = self.lock();
        let up = |(seat, end): (&Seat, &Option<CoreReport>)| {
            end.is_none().then(|| seat.counters.turns.get())
        };
        self.seats.iter().zip(ended.iter()).map(up).collect()
    }

    /// Why a core has failed, if one has.
    #[cfg(feature = "systemd")]
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().iter().flatten().find_map(|report| report.failure.clone())
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats { cores: self.seats.iter().map(|seat| seat.counters.snapshot()).collect() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<CoreReport>>> {
        self.ended.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Seat {
    /// The core's stalls, with the moments that tell them apart.
    pub(crate) fn watched(&self, core: usize) -> Vec<(u64, Stall)> {
        self.counters.watch.all(core, &self.counters.running)
    }

    fn stuck(&self) -> CoreReport {
        let task = self.counters.running.get();
        let closes = Phase::of(self.counters.phase.get()) == Phase::Down;
        let otherwise = if closes { "none: it closes its connections" } else { "none" };
        CoreReport {
            cpu: self.cpu,
            stats: self.counters.snapshot(),
            stuck: Some(task.map_or_else(|| otherwise.to_owned(), ToString::to_string)),
            mismatches: self.counters.findings(),
            ..CoreReport::default()
        }
    }
}

/// How long after the deadline a core may still be closing its ring. Together with the turn that a
/// waiter needs to be scheduled, it keeps a drain within 100 ms of its deadline.
const STUCK_AFTER: Duration = Duration::from_millis(80);

const _: () = assert!(align_of::<Control>() == LINE_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario 18: the order is its deadline, so whoever sees the one sees the other.
    #[test]
    fn nobody_sees_a_drain_without_its_deadline_and_the_deadline_only_falls() {
        for _ in 0..if cfg!(miri) { 2 } else { 200 } {
            let control = Control::new(Epoch::now(), Vec::new());
            std::thread::scope(|scope| {
                for n in 0..3 {
                    let control = &control;
                    scope.spawn(move || {
                        (0..100).for_each(|m| control.begin_drain_at(1_000_000 - 100 * n - m));
                    });
                }
                let mut last_ns = u64::MAX;
                while last_ns > 1_000_000 - 299 {
                    let deadline_ns = control.deadline_ns();
                    assert!(deadline_ns <= last_ns);
                    let order = 1_000_000 - 299..=1_000_000;
                    assert!(deadline_ns == u64::MAX || order.contains(&deadline_ns));
                    last_ns = deadline_ns;
                }
            });
        }
    }
}
