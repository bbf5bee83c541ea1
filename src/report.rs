//! The account of a drain: where every accepted connection went.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use crate::connections::ConnectionInfo;
use crate::drain::{PHASES, Phase};
use crate::json::{self, JsonObject};
use crate::leftover::{TaskCount, counts_json};
use crate::stats::CoreStats;
use crate::stop::StopMethod;
use crate::udp::account::Datagrams;

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
    /// The peer reset the connection; or it was there and took no output for
    /// `SLIPRING_USER_TIMEOUT_MS`, which is up to the kernel, and sooner up to
    /// `SLIPRING_WRITE_STALL_MS`.
    PeerReset = "peer_reset",
    /// The peer has vanished: it answered neither data nor keepalive probes.
    PeerDead = "peer_dead",
    /// No first byte came in time.
    FirstByte = "first_byte",
    /// A message was not complete in time.
    Message = "message",
    /// No byte went either way for too long.
    Idle = "idle",
    /// The handler was busy for too long without a byte.
    Handler = "handler",
    /// The peer did not take the output; it was reset.
    WriteStall = "write_stall",
    /// The peer sent a message, or took output, more slowly than the least rate; it was reset.
    MinRate = "min_rate",
    /// The peer had ended its side, and the handler was not done, or not to go on.
    HalfClosed = "half_closed",
    /// The connection reached its greatest age.
    Lifetime = "lifetime",
    /// The peer gave no sign of life when it was asked for one.
    Heartbeat = "heartbeat",
    /// The handler aborted the connection; the peer was reset.
    Aborted = "aborted",
    /// The handler returned an error.
    HandlerError = "handler_error",
    /// The handler panicked.
    HandlerPanic = "handler_panic",
    /// There was no place for it (`SLIPRING_OVERLOAD=reject`).
    Rejected = "rejected",
    /// Its address had as many as one may have.
    PerIp = "per_ip",
    /// It was idle and the server needed its place; or its peer took no output, the server needed
    /// the memory, and it was reset.
    Evicted = "evicted",
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
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CoreReport {
    /// The CPU that the core was started for.
    pub cpu: u16,
    /// Its counters at the end.
    pub stats: CoreStats,
    /// How long its phases took.
    pub phases: PhaseTimes,
    /// How new connections were kept away while its listeners were closed; `None` if it has
    /// none, or did not get that far.
    pub stop: Option<StopMethod>,
    /// How many hooks of [`Server::on_drain`](crate::Server::on_drain) were begun.
    pub hooks: u64,
    /// How many of them were dropped at the deadline.
    pub hooks_forced: u64,
    /// The handlers, tasks and hooks that were dropped at the deadline, by where they were spawned.
    pub forced_tasks: Vec<TaskCount>,
    /// What [`task::detach`](crate::task::detach) had started and was still there at the end.
    pub detached_tasks: Vec<TaskCount>,
    /// The oldest connection that was still there when the drain had no time left.
    pub oldest_survivor: Option<ConnectionInfo>,
    /// Where the task was spawned that kept the core from answering in time, if it did not; `none:
    /// it closes its connections` where they are too many for that. They are in `stats.live`.
    pub stuck: Option<String>,
    /// The error or panic that ended the core, if it did not end by a drain.
    pub failure: Option<String>,
    /// What its self-check has found not to fit, the first few; `stats.mismatches` counts all. Each
    /// is a bug of slipring.
    pub mismatches: Vec<String>,
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
    /// Whether every connection that was accepted or established is accounted for, and no
    /// self-check has found otherwise.
    #[must_use]
    pub fn is_balanced(&self) -> bool {
        let begun = self.stats.accepted + self.stats.connected;
        begun == self.stats.closed.total() + self.stats.live && self.stats.mismatches == 0
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
        CoreStats::total_of(self.cores.iter().map(|core| &core.stats))
    }

    /// Whether the books balance, on each core: what was accepted or established was closed, for a
    /// reason that is counted, and nothing is left, unless on a core that is reported as stuck.
    /// What one core has moved to another has come there.
    #[must_use]
    pub fn is_balanced(&self) -> bool {
        let (total, stuck) = (self.total(), self.cores.iter().any(|core| core.stuck.is_some()));
        let arrived = total.moved_out == total.moved_in || stuck;
        let balanced = |core: &CoreReport| core.is_balanced();
        let left = |core: &CoreReport| core.stats.live > 0 && core.stuck.is_none();
        arrived && self.cores.iter().all(balanced) && !self.cores.iter().any(left)
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

    /// The report as one line of JSON, with the keys `accepted`, `connected`, `closed` (by reason),
    /// `connect_failures` (by class), `handed_over`, `forced`, `tasks_forced`, `tasks_refused`,
    /// `abandoned_bytes`, `leaked_operations`, `idle_races`, `queue_abandoned`, `queue_left`,
    /// `datagrams` (what became of them), `phases_ms`, `cores`, `balanced`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let total = self.total();
        let cores: Vec<String> = self.cores.iter().map(CoreReport::to_json).collect();
        JsonObject::new()
            .number("accepted", total.accepted)
            .number("connected", total.connected)
            .raw("closed", &closed_json(&total.closed))
            .raw("connect_failures", &connects_json(&total))
            .number("handed_over", self.handed_over())
            .number("forced", total.closed.get(CloseReason::Forced))
            .number("tasks_forced", total.tasks_forced)
            .number("tasks_refused", total.tasks_refused)
            .number("abandoned_bytes", total.bytes_abandoned)
            .number("leaked_operations", total.leaked_operations)
            .number("idle_races", total.idle_races)
            .number("queue_abandoned", total.queue_abandoned)
            .number("queue_left", total.queue_left)
            .raw("datagrams", &Datagrams(&total).to_json())
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
            .number("connected", self.stats.connected)
            .number("closed", self.stats.closed.total())
            .number("live", self.stats.live)
            .number("queue_taken", self.stats.queue_taken)
            .number("moved_out", self.stats.moved_out)
            .number("moved_in", self.stats.moved_in)
            .raw_or_null("stop", self.stop.map(|stop| json::quoted(stop.as_str())));
        if self.hooks > 0 {
            json = json.number("hooks", self.hooks).number("hooks_forced", self.hooks_forced);
        }
        if !self.forced_tasks.is_empty() {
            json = json.raw("forced_tasks", &counts_json(&self.forced_tasks));
        }
        if !self.detached_tasks.is_empty() {
            json = json.raw("detached_tasks", &counts_json(&self.detached_tasks));
        }
        if let Some(oldest) = &self.oldest_survivor {
            json = json.raw("oldest_survivor", &oldest.to_json());
        }
        if let Some(stuck) = &self.stuck {
            json = json.string("stuck", stuck);
        }
        if let Some(failure) = &self.failure {
            json = json.string("failure", failure);
        }
        if !self.mismatches.is_empty() {
            json = json.raw(
                "mismatches",
                &json::array(self.mismatches.iter().map(|text| json::quoted(text))),
            );
        }
        json.bool("balanced", self.is_balanced()).finish()
    }
}

impl fmt::Display for DrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total();
        let verdict = if self.is_balanced() { "books balance" } else { "BOOKS DO NOT BALANCE" };
        write!(f, "{} accepted", total.accepted)?;
        if total.connected > 0 {
            write!(f, " + {} connected", total.connected)?;
        }
        write!(f, " = {} closed", total.closed.total())?;
        if total.live > 0 {
            write!(f, " + {} live on stuck cores", total.live)?;
        }
        writeln!(f, ": {verdict}")?;
        for reason in CloseReason::ALL.into_iter().filter(|r| total.closed.get(*r) > 0) {
            writeln!(f, "  {:<14} {}", reason.as_str(), total.closed.get(reason))?;
        }
        for (class, count) in total.connect_failures().into_iter().filter(|(_, n)| *n > 0) {
            writeln!(f, "  {count} attempts to connect: {}", class.replace('_', " "))?;
        }
        if total.moved_out > 0 {
            let (out, lost) = (total.moved_out, total.moved_out.saturating_sub(total.moved_in));
            write!(f, "  {out} were moved to cores with less to do")?;
            if lost > 0 {
                write!(f, ", {lost} of them to one that has not taken them")?;
            }
            writeln!(f)?;
        }
        if total.tasks_forced > 0 {
            writeln!(f, "  {} tasks dropped at the deadline", total.tasks_forced)?;
        }
        if total.tasks_refused > 0 {
            writeln!(f, "  {} tasks of other threads were not begun", total.tasks_refused)?;
        }
        if total.bytes_abandoned > 0 {
            writeln!(f, "  {} bytes abandoned", total.bytes_abandoned)?;
        }
        if total.idle_races > 0 {
            writeln!(f, "  {} were closed as idle when more came", total.idle_races)?;
        }
        if total.queue_abandoned > 0 {
            writeln!(f, "  {} were reset in a listener's queue", total.queue_abandoned)?;
        }
        if total.queue_left > 0 {
            writeln!(f, "  {} were left in queues that others keep", total.queue_left)?;
        }
        if total.leaked_operations > 0 {
            writeln!(f, "  {} operations leaked", total.leaked_operations)?;
        }
        if Datagrams(&total).is_any() {
            writeln!(f, "{}", Datagrams(&total))?;
        }
        let stops: BTreeSet<_> = self.cores.iter().filter_map(|core| core.stop).collect();
        if !stops.is_empty() {
            let stops: Vec<_> = stops.into_iter().map(StopMethod::as_str).collect();
            let taken = total.queue_taken;
            writeln!(f, "stop of accepting: {}, {taken} taken from queues", stops.join(" and "))?;
        }
        let phases = self.phases();
        f.write_str("phases:")?;
        for phase in &Phase::ALL[1..] {
            write!(f, " {} {:.1} ms", phase.as_str(), phases.get(*phase).as_secs_f64() * 1e3)?;
        }
        for core in &self.cores {
            core.name_the_left(f)?;
            if let Some(stuck) = &core.stuck {
                write!(f, "\ncore on cpu {} did not answer; running task: {stuck}", core.cpu)?;
            }
            if let Some(failure) = &core.failure {
                write!(f, "\ncore on cpu {} failed: {failure}", core.cpu)?;
            }
            for mismatch in &core.mismatches {
                write!(f, "\ncore on cpu {}: {mismatch}", core.cpu)?;
            }
        }
        Ok(())
    }
}

impl CoreReport {
    /// Names what the drain did not see the end of.
    fn name_the_left(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpu = self.cpu;
        for tasks in &self.forced_tasks {
            write!(f, "\ncore on cpu {cpu} dropped tasks at the deadline: {tasks}")?;
        }
        for tasks in &self.detached_tasks {
            write!(f, "\ncore on cpu {cpu} ended detached tasks: {tasks}")?;
        }
        if let Some(oldest) = &self.oldest_survivor {
            let peer = oldest.peer.map_or_else(|| "no address".to_owned(), |peer| peer.to_string());
            write!(f, "\ncore on cpu {cpu} forced connections; the oldest: {peer}, ")?;
            write!(f, "{:.1} s old, {}", oldest.age.as_secs_f64(), oldest.state)?;
        }
        Ok(())
    }
}

pub(crate) fn closed_json(closed: &CloseCounts) -> String {
    let mut json = JsonObject::new();
    for reason in CloseReason::ALL {
        json = json.number(reason.as_str(), closed.get(reason));
    }
    json.finish()
}

fn connects_json(total: &CoreStats) -> String {
    let failures = total.connect_failures().into_iter();
    failures.fold(JsonObject::new(), |json, (class, count)| json.number(class, count)).finish()
}

fn phases_json(phases: &PhaseTimes) -> String {
    let mut json = JsonObject::new();
    for phase in &Phase::ALL[1..] {
        json = json.float(phase.as_str(), phases.get(*phase).as_secs_f64() * 1e3);
    }
    json.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(accepted: u64, idle: u64, live: u64, stuck: bool) -> DrainReport {
        let mut stats = CoreStats { accepted, live, ..CoreStats::default() };
        stats.closed.add(CloseReason::Idle, idle);
        let stuck = stuck.then(|| "src/main.rs:7".to_owned());
        DrainReport { cores: vec![CoreReport { stats, stuck, ..CoreReport::default() }] }
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
            "connected",
            "connect_failures",
            "closed",
            "handed_over",
            "forced",
            "tasks_forced",
            "abandoned_bytes",
            "leaked_operations",
            "idle_races",
            "queue_abandoned",
            "queue_left",
            "phases_ms",
            "cores",
            "balanced",
        ] {
            assert!(json.contains(&format!("\"{key}\":")), "{key} in {json}");
        }
        assert!(!json.contains('\n'));
    }

    #[test]
    fn what_the_self_check_has_found_unbalances_the_books_and_is_shown() {
        let mut report = report(3, 3, 0, false);
        report.cores[0].stats.mismatches = 1;
        report.cores[0].mismatches.push("connection 0.1.2 has no \"timer\"".to_owned());
        assert!(!report.is_balanced());
        let (text, json) = (report.to_string(), report.to_json());
        assert!(text.contains("BOOKS DO NOT BALANCE") && text.contains("0.1.2"), "{text}");
        assert!(json.contains(r#""mismatches":["connection 0.1.2 has no \"timer\""]"#), "{json}");
        assert!(json.contains(r#""balanced":false"#), "{json}");
    }

    #[test]
    fn whom_the_kernel_has_reset_or_an_end_has_crossed_is_told_of() {
        let mut report = report(3, 3, 0, false);
        let clean = report.to_string();
        assert!(!clean.contains("queue") && !clean.contains("idle when"), "{clean}");
        report.cores[0].stats.idle_races = 2;
        (report.cores[0].stats.queue_abandoned, report.cores[0].stats.queue_left) = (5, 7);
        let text = report.to_string();
        assert!(text.contains("2 were closed as idle when more came"), "{text}");
        assert!(text.contains("5 were reset in a listener's queue"), "{text}");
        assert!(text.contains("7 were left in queues that others keep"), "{text}");
    }

    #[test]
    fn a_stuck_core_is_named() {
        assert!(report(3, 2, 1, true).to_string().contains("src/main.rs:7"));
    }
}
