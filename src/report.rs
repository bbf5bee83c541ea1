//! The account of a drain: where every accepted connection went.

use std::fmt;
use std::time::Duration;

use crate::drain::{PHASES, Phase};
use crate::json::JsonObject;
use crate::stats::CoreStats;

macro_rules! close_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// Why a connection ended. Every connection has exactly one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum CloseReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl CloseReason {
            /// Every reason.
            pub const ALL: [CloseReason; CloseReason::COUNT] = [$(CloseReason::$name,)+];
            pub(crate) const COUNT: usize = [$($text),+].len();

            /// The name as it stands in the report: lower case, words joined by `_`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(CloseReason::$name => $text,)+
                }
            }
        }
    };
}

close_reasons! {
    /// The handler finished after the peer had ended its side.
    Finished = "finished",
    /// The handler finished first; the peer got everything and a FIN.
    Served = "served",
    /// The peer reset the connection or its machine is gone.
    PeerReset = "peer_reset",
    /// No first byte came in time.
    FirstByte = "first_byte",
    /// No byte went either way for too long.
    Idle = "idle",
    /// The peer did not take the output.
    WriteStall = "write_stall",
    /// The connection reached its greatest age.
    Lifetime = "lifetime",
    /// The handler returned an error.
    HandlerError = "handler_error",
    /// The handler panicked.
    HandlerPanic = "handler_panic",
    /// The drain closed it while it was idle.
    Drained = "drained",
    /// The drain's deadline came first.
    Forced = "forced",
}

/// Closed connections by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CloseCounts([u64; CloseReason::COUNT]);

impl CloseCounts {
    /// How many were closed for this reason.
    #[must_use]
    pub fn get(&self, reason: CloseReason) -> u64 {
        self.0[reason as usize]
    }

    /// How many were closed at all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    pub(crate) fn add(&mut self, reason: CloseReason, count: u64) {
        self.0[reason as usize] += count;
    }

    pub(crate) fn merge(&mut self, other: &CloseCounts) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }
}

/// What became of every connection, task and operation of a server.
///
/// `Display` says it in words, [`DrainReport::to_json`] in one line for machines.
///
/// # Examples
///
/// ```no_run
/// # fn example(running: slipring::Running) -> slipring::Result<()> {
/// let report = running.handle().drain(std::time::Duration::from_secs(10))?;
/// assert!(report.is_balanced(), "{report}");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DrainReport {
    pub(crate) cores: Vec<CoreReport>,
}

/// The account of one core.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CoreReport {
    /// The CPU that the core was started for.
    pub cpu: u16,
    /// Its counters at the end.
    pub stats: CoreStats,
    /// How long its phases took.
    pub phases: PhaseTimes,
    /// Where the task was spawned that kept the core from answering, if it did not answer. Its
    /// connections are still in `stats.live`.
    pub stuck: Option<String>,
    /// The error or panic that ended the core, if it did not end by a drain.
    pub failure: Option<String>,
}

/// How long a core was in each phase of its drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes(pub(crate) [u64; PHASES]);

impl PhaseTimes {
    /// The time spent in a phase; zero for [`Phase::Running`] and phases never entered.
    #[must_use]
    pub fn get(&self, phase: Phase) -> Duration {
        Duration::from_nanos(self.0[phase as usize])
    }
}

impl CoreReport {
    /// Whether every connection that was accepted is accounted for.
    #[must_use]
    pub fn is_balanced(&self) -> bool {
        self.stats.accepted == self.stats.closed.total() + self.stats.live
    }
}

impl DrainReport {
    /// The cores' accounts.
    #[must_use]
    pub fn cores(&self) -> &[CoreReport] {
        &self.cores
    }

    /// All cores' counters together.
    #[must_use]
    pub fn total(&self) -> CoreStats {
        let mut total = CoreStats::default();
        for core in &self.cores {
            total.merge(&core.stats);
        }
        total
    }

    /// Whether the books balance, on each core: what was accepted was closed, for a reason that is
    /// counted, and nothing is left, unless on a core that is reported as stuck.
    #[must_use]
    pub fn is_balanced(&self) -> bool {
        self.cores
            .iter()
            .all(|core| core.is_balanced() && (core.stats.live == 0 || core.stuck.is_some()))
    }

    /// Connections handed over to a successor.
    #[must_use]
    pub fn handed_over(&self) -> u64 {
        0
    }

    /// The longest that any core was in each phase.
    #[must_use]
    pub fn phases(&self) -> PhaseTimes {
        let mut longest = PhaseTimes::default();
        for core in &self.cores {
            for (mine, theirs) in longest.0.iter_mut().zip(core.phases.0) {
                *mine = theirs.max(*mine);
            }
        }
        longest
    }

    /// The report as one line of JSON, with the keys `accepted`, `closed` (by reason),
    /// `handed_over`, `forced`, `abandoned_bytes`, `phases_ms`, `cores`, `balanced`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let total = self.total();
        let cores: Vec<String> = self.cores.iter().map(CoreReport::to_json).collect();
        JsonObject::new()
            .number("accepted", total.accepted)
            .raw("closed", &closed_json(&total.closed))
            .number("handed_over", self.handed_over())
            .number("forced", total.closed.get(CloseReason::Forced))
            .number("tasks_forced", total.tasks_forced)
            .number("abandoned_bytes", total.bytes_abandoned)
            .number("leaked_operations", total.leaked_operations)
            .raw("phases_ms", &phases_json(&self.phases()))
            .raw("cores", &format!("[{}]", cores.join(",")))
            .bool("balanced", self.is_balanced())
            .finish()
    }
}

impl CoreReport {
    fn to_json(&self) -> String {
        let mut json = JsonObject::new()
            .number("cpu", u64::from(self.cpu))
            .number("accepted", self.stats.accepted)
            .number("closed", self.stats.closed.total())
            .number("live", self.stats.live);
        if let Some(stuck) = &self.stuck {
            json = json.string("stuck", stuck);
        }
        if let Some(failure) = &self.failure {
            json = json.string("failure", failure);
        }
        json.bool("balanced", self.is_balanced()).finish()
    }
}

impl fmt::Display for DrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total();
        let verdict = if self.is_balanced() { "books balance" } else { "BOOKS DO NOT BALANCE" };
        write!(f, "{} accepted = {} closed", total.accepted, total.closed.total())?;
        if total.live > 0 {
            write!(f, " + {} live on stuck cores", total.live)?;
        }
        writeln!(f, ": {verdict}")?;
        for reason in CloseReason::ALL.into_iter().filter(|r| total.closed.get(*r) > 0) {
            writeln!(f, "  {:<14} {}", reason.as_str(), total.closed.get(reason))?;
        }
        if total.tasks_forced > 0 {
            writeln!(f, "  {} tasks dropped at the deadline", total.tasks_forced)?;
        }
        if total.bytes_abandoned > 0 {
            writeln!(f, "  {} bytes abandoned", total.bytes_abandoned)?;
        }
        if total.leaked_operations > 0 {
            writeln!(f, "  {} operations leaked", total.leaked_operations)?;
        }
        let phases = self.phases();
        f.write_str("phases:")?;
        for (phase, name) in PHASE_NAMES {
            write!(f, " {name} {:.1} ms", phases.get(phase).as_secs_f64() * 1e3)?;
        }
        for core in &self.cores {
            if let Some(stuck) = &core.stuck {
                write!(f, "\ncore on cpu {} did not answer; running task: {stuck}", core.cpu)?;
            }
            if let Some(failure) = &core.failure {
                write!(f, "\ncore on cpu {} failed: {failure}", core.cpu)?;
            }
        }
        Ok(())
    }
}

fn closed_json(closed: &CloseCounts) -> String {
    let mut json = JsonObject::new();
    for reason in CloseReason::ALL {
        json = json.number(reason.as_str(), closed.get(reason));
    }
    json.finish()
}

fn phases_json(phases: &PhaseTimes) -> String {
    let mut json = JsonObject::new();
    for (phase, name) in PHASE_NAMES {
        json = json.float(name, phases.get(phase).as_secs_f64() * 1e3);
    }
    json.finish()
}

const PHASE_NAMES: [(Phase, &str); 5] = [
    (Phase::LameDuck, "lame_duck"),
    (Phase::StopAccept, "stop_accept"),
    (Phase::DrainConnections, "drain_connections"),
    (Phase::Force, "force"),
    (Phase::Down, "down"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn report(accepted: u64, idle: u64, live: u64, stuck: bool) -> DrainReport {
        let mut stats = CoreStats { accepted, live, ..CoreStats::default() };
        stats.closed.add(CloseReason::Idle, idle);
        let stuck = stuck.then(|| "src/main.rs:7".to_owned());
        let phases = PhaseTimes::default();
        DrainReport { cores: vec![CoreReport { cpu: 0, stats, phases, stuck, failure: None }] }
    }

    #[test]
    fn a_connection_without_an_end_unbalances_the_books() {
        assert!(report(3, 3, 0, false).is_balanced());
        assert!(!report(3, 2, 0, false).is_balanced());
        assert!(!report(3, 2, 1, false).is_balanced(), "alive after the drain, and nobody stuck");
        assert!(report(3, 2, 1, true).is_balanced());
    }

    #[test]
    fn the_json_has_the_promised_keys() {
        let json = report(3, 3, 0, false).to_json();
        for key in [
            "accepted",
            "closed",
            "handed_over",
            "forced",
            "abandoned_bytes",
            "phases_ms",
            "cores",
            "balanced",
        ] {
            assert!(json.contains(&format!("\"{key}\":")), "{key} in {json}");
        }
        assert!(!json.contains('\n'));
    }

    #[test]
    fn a_stuck_core_is_named() {
        assert!(report(3, 2, 1, true).to_string().contains("src/main.rs:7"));
    }
}
