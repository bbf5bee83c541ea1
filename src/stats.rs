//! What a core counts. Each counter has one writer, its core; everyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::report::{CloseCounts, CloseReason};
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
    ($($(#[doc = $doc:literal])+ $name:ident $merge:ident,)+) => {
        /// The live counters of one core, on cache lines of their own.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)+
            pub(crate) closed: [Counter; CloseReason::COUNT],
            pub(crate) running: PlaceCell,
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
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> CoreStats {
                let mut closed = CloseCounts::default();
                for reason in CloseReason::ALL {
                    closed.add(reason, self.closed[reason as usize].get());
                }
                CoreStats { $($name: self.$name.get(),)+ closed }
            }
        }

        impl CoreStats {
            /// Adds the figures of another core: sums, and the greater of the two for maxima.
            pub(crate) fn merge(&mut self, other: &CoreStats) {
                $(self.$name = $merge(self.$name, other.$name);)+
                self.closed.merge(&other.closed);
            }
        }
    };
}

counters! {
    /// Connections accepted.
    accepted sum,
    /// Connections in the table now.
    live sum,
    /// Tasks alive now, the connections' handlers included.
    tasks sum,
    /// Timers armed now: the connections' deadlines and whatever sleeps.
    timers sum,
    /// Bytes received.
    bytes_received sum,
    /// Bytes that the kernel took for sending.
    bytes_sent sum,
    /// Bytes that a handler had sent and the kernel had not taken when a connection was ended.
    bytes_abandoned sum,
    /// Calls of `io_uring_enter`.
    enters sum,
    /// Operations submitted.
    submissions sum,
    /// Completions taken.
    completions sum,
    /// Completions of operations that nobody waits for any more.
    stale sum,
    /// Completions that belonged to nothing. Always 0, unless the kernel misbehaves.
    unknown sum,
    /// Times that the completion queue overflowed; more than 0 asks for more `SLIPRING_CQ_ENTRIES`.
    overflows sum,
    /// Times that a receive found no buffer; many ask for more `SLIPRING_BUFFERS`.
    buffers_missing sum,
    /// Times that a connection's receive was paused because its handler fell behind.
    pauses sum,
    /// Errors of accept, such as the descriptors' limit.
    accept_errors sum,
    /// Times that a listener stopped accepting because the connections' limit was reached.
    accept_pauses sum,
    /// Polls of tasks.
    polls sum,
    /// Messages from other threads, wake-ups included.
    messages sum,
    /// Tasks that panicked.
    panics sum,
    /// Handlers and tasks that were dropped because the drain's deadline had come.
    tasks_forced sum,
    /// Operations whose end was never seen and whose memory is therefore leaked. Always 0, unless
    /// the kernel misbehaves.
    leaked_operations sum,
    /// The greatest number of connections at one time on one core.
    live_max greater,
}

impl Counters {
    pub(crate) fn close(&self, reason: CloseReason) {
        self.closed[reason as usize].add(1);
    }
}

/// The counters of a server at one moment.
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
        let mut total = CoreStats::default();
        for core in &self.cores {
            total.merge(core);
        }
        total
    }
}

fn sum(a: u64, b: u64) -> u64 {
    a.saturating_add(b)
}

fn greater(a: u64, b: u64) -> u64 {
    a.max(b)
}

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
    fn the_counters_of_two_cores_share_no_cache_line() {
        assert_eq!(align_of::<Counters>(), 128);
        assert_eq!(size_of::<Counters>() % 128, 0);
    }
}
