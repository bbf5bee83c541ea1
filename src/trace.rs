//! Events for `tracing`, where the feature of that name is on; otherwise none of this is compiled.
//!
//! All events have the target `slipring`. None is told for each operation or connection, and what
//! comes and goes is told when it begins and when it has been over for a second. Levels: an error
//! is a bug, of whomever, or means that something was lost; a warning says that somebody may have
//! to do something; information is what the log of a quiet day has; the rest is for debugging.
//! `docs/observability.md` lists them all.
//!
//! A subscriber is anyone's code: it runs when nobody has the core borrowed, and what it panics
//! with is its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::bind::ListenAddr;
use crate::config::Config;
use crate::control::Control;
use crate::drain::Phase;
use crate::executor::guarded;
use crate::report::{CloseReason, CoreReport, DrainReport};
use crate::spin::SpinState;

pub(crate) use self::core::CoreEvents;

mod core;

/// An event, by the level's name.
macro_rules! event {
    ($level:ident, $($body:tt)+) => {
        ::tracing::event!(target: "slipring", ::tracing::Level::$level, $($body)+)
    };
}
use event;

/// What a server tells as a whole.
#[derive(Debug, Default)]
pub(crate) struct ServerEvents {
    /// It is the admin listener of another server, and tells only its failure.
    quiet: AtomicBool,
    phases: Mutex<Phases>,
}

/// How far each core is, and what was told of all.
#[derive(Debug, Default)]
struct Phases {
    cores: Vec<Phase>,
    told: Phase,
}

impl ServerEvents {
    pub(crate) fn be_quiet(&self) {
        self.quiet.store(true, Ordering::Relaxed);
    }

    fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Relaxed)
    }

    fn say(&self, event: impl FnOnce()) {
        if !self.is_quiet() {
            guarded(event);
        }
    }

    pub(crate) fn started(
        &self,
        config: &Config,
        addrs: &[ListenAddr],
        cpus: &[u16],
        pinned: bool,
        spin: SpinState,
    ) {
        let addrs: Vec<String> = addrs.iter().map(ToString::to_string).collect();
        self.say(|| {
            event!(
                INFO,
                addresses = addrs.join(","),
                cores = cpus.len(),
                cpus = crate::machine::cpu_list(cpus),
                pinned,
                driver = "io_uring",
                spin = spin.as_str(),
                settings = config.changed(),
                "server started"
            );
            for warning in config.explain().warnings() {
                event!(WARN, warning = %warning, "configuration");
            }
            if spin.is_refused() {
                event!(WARN, spin = %spin, "spin refused");
            }
        });
    }

    /// A drain was ordered, or the one that runs was shortened.
    pub(crate) fn drain_ordered(&self, before_ns: u64, deadline_ns: u64, now: Duration) {
        let within = Duration::from_nanos(deadline_ns).saturating_sub(now);
        let deadline_ms = within.as_millis() as u64;
        if before_ns == u64::MAX {
            self.say(|| event!(INFO, deadline_ms, "drain begins"));
        } else if deadline_ns < before_ns {
            self.say(|| event!(INFO, deadline_ms, "drain shortened"));
        }
    }

    pub(crate) fn retire_ordered(&self, core: usize, within: Duration) {
        let deadline_ms = within.as_millis() as u64;
        self.say(|| event!(INFO, core, deadline_ms, "retire begins"));
    }

    /// A core has entered a phase. When it is the last one to, the server has.
    fn entered(&self, control: &Control, core: usize, phase: Phase, alone: bool) {
        let mut phases = self.lock();
        phases.cores.resize(control.seats().len(), Phase::Running);
        // One that leaves alone has nothing to say about the others.
        phases.cores[core] = if alone { Phase::Down } else { phase };
        let reached = phases.cores.iter().copied().min().unwrap_or_default();
        while phases.told < reached {
            let next = Phase::of(phases.told as u64 + 1);
            phases.told = next;
            // Not every phase is entered.
            if next == reached || next < Phase::Force {
                let live = control.seats().iter().map(|seat| seat.counters.live.get());
                let connections: u64 = live.sum();
                self.say(|| event!(INFO, phase = next.as_str(), connections, "drain phase"));
            }
        }
    }

    /// A core has ended. `all` is the account of the server if it was the last one.
    pub(crate) fn core_ended(&self, control: &Control, core: usize, report: &CoreReport) {
        let (stats, cpu) = (&report.stats, report.cpu);
        if let Some(error) = report.failure.as_deref() {
            guarded(|| match self.is_quiet() {
                false => event!(ERROR, core, cpu, error, "core failed"),
                true => event!(ERROR, error, "admin listener failed"),
            });
        }
        if stats.leaked_operations > 0 {
            let count = stats.leaked_operations;
            self.say(|| event!(ERROR, core, count, "operations leaked"));
        }
        let alone = control.deadline_ns() == u64::MAX;
        if alone && report.failure.is_none() {
            self.say(|| {
                event!(
                    INFO,
                    core,
                    cpu,
                    accepted = stats.accepted,
                    forced = stats.closed.get(CloseReason::Forced),
                    "core retired"
                );
            });
        }
        self.entered(control, core, Phase::Down, alone);
    }

    pub(crate) fn ended(&self, report: &DrainReport) {
        let total = report.total();
        self.say(|| {
            event!(
                INFO,
                accepted = total.accepted,
                closed = total.closed.total(),
                forced = total.closed.get(CloseReason::Forced),
                bytes_abandoned = total.bytes_abandoned,
                balanced = report.is_balanced(),
                "server ended"
            );
        });
    }

    /// Nobody waits any longer for a core that should have ended, if there is one.
    pub(crate) fn joined(&self, report: &DrainReport) {
        for (core, report) in report.cores().iter().enumerate() {
            let Some(running) = report.stuck.as_deref() else { continue };
            let (cpu, connections) = (report.cpu, report.stats.live);
            self.say(|| event!(ERROR, core, cpu, running, connections, "core did not answer"));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Phases> {
        self.phases.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}
