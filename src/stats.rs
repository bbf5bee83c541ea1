//! What a core counts. Each counter has one writer, its core; everyone may read.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::census::{Census, CensusCell};
use crate::connections::{ConnectionState, duration};
use crate::drain::Phase;
use crate::json::{JsonObject, array};
use crate::prometheus::Metric;
use crate::report::{CloseCounts, CloseReason, closed_json};
use crate::spin::SpinState;
use crate::stalls::Watch;
use crate::sys::place::PlaceCell;

/// A counter that one thread writes and others read: no locked instruction, no shared line but
/// for the reader.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.set(self.get().wrapping_add(count));
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident $merge:ident $metric:literal,)+) => {
        /// The live counters of one core, on cache lines of their own.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)+
            pub(crate) closed: [Counter; CloseReason::COUNT],
            pub(crate) census: CensusCell,
            pub(crate) running: PlaceCell,
            pub(crate) watch: Watch,
            /// The drain's phase, as a number.
            pub(crate) phase: Counter,
            /// The [`SpinState`], as a number.
            pub(crate) spin: Counter,
            /// The first mismatches, in words.
            findings: Mutex<Vec<String>>,
        }

        /// The counters of a core, or of all cores together, at one moment.
        ///
        /// Read while the core goes on counting, so figures of one snapshot may be a few
        /// operations apart; those of a [`DrainReport`](crate::DrainReport) are exact.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct CoreStats {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// Closed connections by reason.
            pub closed: CloseCounts,
            /// Its connections by state and by age.
            pub census: Census,
            /// Whether it may spin before it blocks; of all cores together, what speaks most
            /// against it.
            pub spin: SpinState,
            /// Where it stands in a drain; of all cores together, the one that has got least far.
            pub phase: Phase,
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> CoreStats {
                let mut closed = CloseCounts::default();
                for reason in CloseReason::ALL {
                    closed.add(reason, self.closed[reason as usize].get());
                }
                let census = self.census.get();
                let spin = SpinState::of(self.spin.get());
                let phase = Phase::of(self.phase.get());
                CoreStats { $($name: self.$name.get(),)+ closed, census, spin, phase }
            }
        }

        impl CoreStats {
            /// The counters by name, those of the closes and the census apart.
            fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),+].into_iter()
            }

            /// The counters as metrics, in the same order.
            pub(crate) fn metrics(&self) -> impl Iterator<Item = Metric> {
                [$(Metric {
                    name: $metric,
                    help: concat!($($doc),+),
                    value: self.$name,
                    is_us: ends_in_us(stringify!($name)),
                }),+]
                .into_iter()
            }

            /// Adds the figures of another core: sums, and the greater of the two for maxima.
            fn merge(&mut self, other: &CoreStats) {
                $(self.$name = $merge(self.$name, other.$name);)+
                self.closed.merge(&other.closed);
                self.census.merge(&other.census);
                self.spin = self.spin.max(other.spin);
                self.phase = self.phase.min(other.phase);
            }
        }
    };
}

// An entry: what it counts, its name, how those of several cores make one, and what it is called as
// a metric, where the ending `_total` says that it only grows. Time is counted in microseconds, and
// is in seconds there.
counters! {
    /// Connections accepted, those that another core has accepted and moved here included.
    accepted sum "connections_accepted_total",
    /// Connections that this core has accepted and moved to one that has less to do
    /// (`SLIPRING_BALANCE=least`); it is there that they count as accepted.
    moved_out sum "connections_moved_out_total",
    /// Connections that other cores have moved here.
    moved_in sum "connections_moved_in_total",
    /// Outbound connections established ([`net::connect`](crate::net::connect)).
    connected sum "outbound_connections_total",
    /// Attempts to connect begun, one for each address tried. Each is established, or counts in
    /// exactly one of the counters below, or is still `connecting`.
    connects sum "outbound_attempts_total",
    /// Attempts under way now.
    connecting sum "outbound_attempts",
    /// Attempts that met nobody who listens.
    connects_refused sum "outbound_attempts_refused_total",
    /// Attempts that found no way to the address.
    connects_unreachable sum "outbound_attempts_unreachable_total",
    /// Attempts that had no answer in time, such as `SLIPRING_CONNECT_MS`.
    connects_timed_out sum "outbound_attempts_timed_out_total",
    /// Attempts that failed for another reason, such as no place, descriptor or port.
    connects_failed sum "outbound_attempts_failed_total",
    /// Attempts that were given up, or lost the race against another address.
    connects_cancelled sum "outbound_attempts_cancelled_total",
    /// Connections in the table now, accepted and outbound ones.
    live sum "connections",
    /// Tasks alive now, the connections' handlers included.
    tasks sum "tasks",
    /// Timers armed now: the connections' deadlines, whatever sleeps, and the self-check.
    timers sum "timers",
    /// Bytes received.
    bytes_received sum "received_bytes_total",
    /// Bytes that the kernel took for sending.
    bytes_sent sum "sent_bytes_total",
    /// Bytes that a handler had sent and the kernel had not taken when a connection was ended.
    bytes_abandoned sum "abandoned_bytes_total",
    /// UDP sockets open now.
    udp_sockets sum "udp_sockets",
    /// Datagrams received.
    datagrams_received sum "datagrams_received_total",
    /// Received datagrams that were longer than their buffer, so that their end is lost
    /// (`SLIPRING_LARGE_BUFFER_BYTES`).
    datagrams_truncated sum "datagrams_truncated_total",
    /// Datagrams that the kernel has dropped as a UDP socket had no room for them (`SO_RCVBUF`,
    /// socket(7)), as far as it has told: with the next datagram, and when the socket is closed.
    datagrams_lost sum "datagrams_lost_total",
    /// Datagrams that the kernel took for sending.
    datagrams_sent sum "datagrams_sent_total",
    /// Datagrams that it did not take.
    datagrams_unsent sum "datagrams_unsent_total",
    /// Times that the handler of `Server::serve_udp` has failed or panicked.
    udp_handler_failures sum "udp_handler_failures_total",
    /// Turns of the loop.
    turns sum "turns_total",
    /// Calls of `io_uring_enter`.
    enters sum "enters_total",
    /// Spins before blocking that have found something to do.
    spins_found sum "spins_found_total",
    /// Spins before blocking that have found nothing.
    spins_in_vain sum "spins_in_vain_total",
    /// Time spun, either way, in microseconds.
    spin_us sum "spin_seconds_total",
    /// Operations submitted.
    submissions sum "submissions_total",
    /// Completions taken.
    completions sum "completions_total",
    /// Completions of operations that nobody waits for any more.
    stale sum "stale_completions_total",
    /// Completions that belonged to nothing. Always 0, unless the kernel misbehaves.
    unknown sum "unknown_completions_total",
    /// Times that the completion queue overflowed; more than 0 asks for more `SLIPRING_CQ_ENTRIES`.
    overflows sum "completion_queue_overflows_total",
    /// Times that a receive found no buffer; many ask for more `SLIPRING_BUFFERS`.
    buffers_missing sum "buffers_missing_total",
    /// Times that a connection that receives in bulk found no large buffer and went on with small
    /// ones; many ask for more `SLIPRING_LARGE_BUFFERS`.
    large_buffers_missing sum "large_buffers_missing_total",
    /// Times that the receive of a connection or a UDP socket was paused because its handler fell
    /// behind.
    pauses sum "receive_pauses_total",
    /// Errors of accept, such as the descriptors' limit.
    accept_errors sum "accept_errors_total",
    /// Times that a listener stopped accepting because the connections' limit was reached.
    accept_pauses sum "accept_pauses_total",
    /// Connections that were reset in a listener's queue, as a drain had no time left to take them
    /// or no descriptor.
    queue_abandoned sum "queue_abandoned_total",
    /// Connections left in the queues of sockets that were passed in, for whoever keeps those. Of
    /// Unix sockets the kernel does not say.
    queue_left sum "queue_left_total",
    /// Connections taken from the listeners' queues after they had stopped accepting.
    queue_taken sum "queue_taken_total",
    /// Connections on which input came after they had been closed as idle: it was not read.
    idle_races sum "idle_races_total",
    /// Polls of tasks.
    polls sum "polls_total",
    /// Bytes that connections have queued now, in either direction.
    memory_bytes sum "queued_bytes",
    /// Times that queues reached `SLIPRING_MEMORY_BYTES_MAX`, so that receives and sends waited.
    memory_pauses sum "memory_pauses_total",
    /// Messages from other threads, wake-ups included.
    messages sum "messages_total",
    /// Calls that this core has sent to others, to itself, or to the pool for blocking work.
    calls sum "calls_total",
    /// Those of them that were answered.
    calls_answered sum "calls_answered_total",
    /// Those of them that failed: the core had ended, or what it was to run panicked or
    /// was dropped.
    calls_failed sum "calls_failed_total",
    /// Those of them whose caller did not wait for the answer.
    calls_dropped sum "calls_dropped_total",
    /// Calls that this core has run for others, or for itself.
    calls_run sum "calls_run_total",
    /// Values of broadcasts that receivers on this core have missed, as they were too slow.
    broadcast_missed sum "broadcast_values_missed_total",
    /// Tasks that panicked.
    panics sum "panics_total",
    /// Tasks that other threads had spawned and that were not begun: the core had
    /// `SLIPRING_TASKS_MAX`, or its drain's deadline had come.
    tasks_refused sum "tasks_refused_total",
    /// Handlers and tasks that were dropped because the drain's deadline had come.
    tasks_forced sum "tasks_forced_total",
    /// Operations whose end was never seen and whose memory is therefore leaked. Always 0, unless
    /// the kernel misbehaves.
    leaked_operations sum "leaked_operations_total",
    /// What the self-check has found not to fit. Always 0, unless slipring has a bug.
    mismatches sum "mismatches_total",
    /// Times that one task, or one turn, kept its core for `SLIPRING_STALL_MS` or longer.
    stalls sum "stalls_total",
    /// The longest turn of the loop, from the kernel's answer to the next question, in
    /// microseconds.
    turn_longest_us greater "turn_longest_seconds",
    /// The greatest number of connections at one time on one core.
    live_max greater "connections_peak",
}

impl Counters {
    pub(crate) fn close(&self, reason: CloseReason) {
        self.closed[reason as usize].add(1);
    }

    /// The self-check has found something that should not be.
    pub(crate) fn mismatch(&self, finding: String) {
        self.mismatches.add(1);
        let mut findings = self.findings.lock().unwrap_or_else(|poison| poison.into_inner());
        if findings.len() < FINDINGS_MAX {
            findings.push(finding);
        }
    }

    pub(crate) fn findings(&self) -> Vec<String> {
        self.findings.lock().unwrap_or_else(|poison| poison.into_inner()).clone()
    }
}

/// The counters of a server at one moment.
///
/// `Display` prints a table with a column for each core, [`Stats::to_json`] one line for machines.
///
/// # Examples
///
/// ```no_run
/// # fn example(handle: slipring::Handle) {
/// let stats = handle.stats();
/// eprintln!("{stats}");
/// assert_eq!(stats.total().mismatches, 0, "{}", stats.to_json());
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub(crate) cores: Vec<CoreStats>,
}

impl Stats {
    /// Each core's counters, in the order of the cores.
    #[must_use]
    pub fn cores(&self) -> &[CoreStats] {
        &self.cores
    }

    /// All cores together.
    #[must_use]
    pub fn total(&self) -> CoreStats {
        CoreStats::total_of(&self.cores)
    }

    /// The counters as one line of JSON, with the keys `total` and `cores`, in each of which every
    /// counter has its name; `closed` is by reason, `census` by state and by age, `spin` is
    /// the name of a [`SpinState`] and `phase` that of a [`Phase`].
    #[must_use]
    pub fn to_json(&self) -> String {
        JsonObject::new()
            .raw("total", &self.total().to_json())
            .raw("cores", &array(self.cores.iter().map(|core| core.to_json())))
            .finish()
    }
}

impl CoreStats {
    /// Several cores together.
    pub(crate) fn total_of<'a>(cores: impl IntoIterator<Item = &'a CoreStats>) -> CoreStats {
        let mut cores = cores.into_iter();
        let mut total = cores.next().copied().unwrap_or_default();
        cores.for_each(|core| total.merge(core));
        total
    }

    /// Attempts to connect that have come to nothing, of all classes.
    pub(crate) fn connects_failed_total(&self) -> u64 {
        self.connect_failures().into_iter().map(|(_, count)| count).sum()
    }

    /// The same by class.
    pub(crate) fn connect_failures(&self) -> [(&'static str, u64); 5] {
        [
            ("refused", self.connects_refused),
            ("unreachable", self.connects_unreachable),
            ("timed_out", self.connects_timed_out),
            ("failed", self.connects_failed),
            ("cancelled", self.connects_cancelled),
        ]
    }

    fn to_json(self) -> String {
        let mut json = JsonObject::new();
        for (name, value) in self.named() {
            json = json.number(name, value);
        }
        json.raw("closed", &closed_json(&self.closed))
            .raw("census", &self.census.to_json())
            .string("spin", self.spin.as_str())
            .string("phase", self.phase.as_str())
            .finish()
    }

    /// All figures with their names, for the table.
    fn rows(&self) -> Vec<(String, u64)> {
        let counters = self.named().map(|(name, value)| (name.to_owned(), value));
        let closed = CloseReason::ALL
            .into_iter()
            .map(|reason| (format!("closed: {}", reason.as_str()), self.closed.get(reason)));
        let states = ConnectionState::ALL
            .into_iter()
            .map(|state| (format!("state: {state}"), self.census.state(state)));
        let ages = [("age", self.census.age), ("no progress", self.census.without_progress)];
        let ages = ages.into_iter().flat_map(|(name, ages)| {
            ages.buckets().map(move |(below, count)| match below {
                Some(below) => (format!("{name}: below {}", duration(below)), count),
                None => (format!("{name}: more"), count),
            })
        });
        let oldest = ("oldest_age_ms".to_owned(), self.census.oldest_age_ms);
        counters.chain(closed).chain(states).chain(ages).chain([oldest]).collect()
    }
}

/// A line for each figure that is not 0 on every core, and one if a wish to spin was refused.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<28}{:>14}", "", "total")?;
        (0..self.cores.len()).try_for_each(|core| write!(f, "{:>14}", format!("core {core}")))?;
        let cores: Vec<_> = self.cores.iter().map(CoreStats::rows).collect();
        for (row, (name, total)) in self.total().rows().into_iter().enumerate() {
            if total > 0 {
                write!(f, "\n{name:<28}{total:>14}")?;
                cores.iter().try_for_each(|rows| write!(f, "{:>14}", rows[row].1))?;
            }
        }
        let spin = self.total().spin;
        if spin.is_refused() {
            write!(f, "\n{:<28}{spin}", "spin")?;
        }
        Ok(())
    }
}

const fn ends_in_us(name: &str) -> bool {
    matches!(name.as_bytes(), [.., b'_', b'u', b's'])
}

fn sum(a: u64, b: u64) -> u64 {
    a.saturating_add(b)
}

fn greater(a: u64, b: u64) -> u64 {
    a.max(b)
}

/// What is written by one core and read by others is aligned to so many bytes and fills them: two
/// cache lines, as processors fetch them in pairs. The attribute takes a number only.
pub(crate) const LINE_BYTES: usize = 128;

const _: () = assert!(align_of::<Counters>() == LINE_BYTES);

/// More of them say nothing new.
const FINDINGS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_sums_counts_and_takes_the_greatest_of_maxima() {
        let counters = Counters::default();
        counters.accepted.add(3);
        counters.live_max.set(7);
        counters.close(CloseReason::Idle);
        let one = counters.snapshot();
        let total = Stats { cores: vec![one, one] }.total();
        assert_eq!((total.accepted, total.live_max), (6, 7));
        assert_eq!(total.closed.get(CloseReason::Idle), 2);
        assert_eq!(total.closed.total(), 2);
    }

    #[test]
    fn a_snapshot_is_printed_as_a_table_and_as_json() {
        let counters = Counters::default();
        counters.accepted.add(3);
        counters.close(CloseReason::Idle);
        let mut census = Census::default();
        census.add(ConnectionState::Busy, 100_000, 2_000);
        counters.census.set(&census);
        let stats = Stats { cores: vec![counters.snapshot(), CoreStats::default()] };
        let text = stats.to_string();
        let line = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.unwrap_or_else(|| panic!("{name} in {text}")).split_whitespace().rev().take(3)
        };
        assert_eq!(line("accepted").collect::<Vec<_>>(), ["0", "3", "3"], "{text}");
        for name in ["closed: idle", "state: busy", "age: below 5 min", "no progress: below 5.0 s"]
        {
            assert_eq!(line(name).collect::<Vec<_>>(), ["0", "1", "1"], "{text}");
        }
        assert!(!text.contains("panics"), "what is 0 everywhere is left out: {text}");
        let json = stats.to_json();
        for part in [r#"{"total":{"accepted":3,"#, r#""cores":[{"#, r#""idle":1"#, r#""busy":1"#] {
            assert!(json.contains(part), "{part} in {json}");
        }
        assert!(!json.contains('\n') && json.ends_with("}]}"), "{json}");
    }
}
