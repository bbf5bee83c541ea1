//! The shape of a core's connections: how many are in which state, how old, and for how long
//! without progress. A slow climb shows here long before a limit is reached.

use std::fmt;
use std::time::Duration;

use crate::connections::{ConnectionState, duration};
use crate::json::JsonObject;
use crate::stats::Counter;

/// The connections of a core, or of all cores together, by state, by age and by the time since
/// they made progress.
///
/// As of the last walk over the connections, which a core makes each `SLIPRING_CHECK_MS`: empty
/// before the first one, and when that is off.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
///
/// # fn example(handle: slipring::Handle) {
/// let census = handle.stats().total().census;
/// if census.age.at_least(Duration::from_secs(3600)) > 100 {
///     eprintln!("more than 100 connections are older than an hour");
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Census {
    /// Since they were accepted.
    pub age: Ages,
    /// Since a byte last went in either direction.
    pub without_progress: Ages,
    /// The age of the oldest, in milliseconds.
    pub oldest_age_ms: u64,
    states: [u64; ConnectionState::COUNT],
}

/// How many connections have reached which time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ages {
    counts: [u64; BUCKETS],
    sum_ms: u64,
}

impl Ages {
    /// The counts, each with the time below which its connections are; the last has no such bound.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> + use<> {
        let bounds = BOUNDS_S.into_iter().map(|s| Some(Duration::from_secs(s)));
        bounds.chain([None]).zip(self.counts)
    }

    /// How many have reached a time. Exact for the buckets' bounds; for a time in between, that of
    /// the bound above it.
    #[must_use]
    pub fn at_least(&self, time: Duration) -> u64 {
        let below = BOUNDS_S.partition_point(|s| Duration::from_secs(*s) < time) + 1;
        let below = if time.is_zero() { 0 } else { below };
        self.counts.iter().skip(below).sum()
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All times together, in milliseconds.
    pub(crate) fn sum_ms(&self) -> u64 {
        self.sum_ms
    }

    fn add(&mut self, time_ms: u64) {
        self.counts[BOUNDS_S.partition_point(|s| s * 1000 <= time_ms)] += 1;
        self.sum_ms = self.sum_ms.saturating_add(time_ms);
    }

    fn merge(&mut self, other: &Ages) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts) {
            *mine += theirs;
        }
        self.sum_ms = self.sum_ms.saturating_add(other.sum_ms);
    }

    /// An object with a key for each bucket: `below_5s`, and `more` for the last.
    pub(crate) fn to_json(self) -> String {
        let mut json = JsonObject::new();
        for (bound, count) in self.buckets() {
            let key =
                bound.map_or("more".to_owned(), |bound| format!("below_{}s", bound.as_secs()));
            json = json.number(&key, count);
        }
        json.finish()
    }
}

impl fmt::Display for Ages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.buckets().filter(|(_, count)| *count > 0).map(|(bound, count)| {
            let most = Duration::from_secs(BOUNDS_S[BUCKETS - 2]);
            match bound {
                Some(bound) => format!("{count} below {}", duration(bound)),
                None => format!("{count} from {} on", duration(most)),
            }
        });
        f.write_str(&counts.collect::<Vec<_>>().join(", "))
    }
}

impl Census {
    /// How many connections are in a state.
    #[must_use]
    pub fn state(&self, state: ConnectionState) -> u64 {
        self.states[state as usize]
    }

    /// How many connections the walk has met.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.age.total()
    }

    pub(crate) fn add(&mut self, state: ConnectionState, age_ms: u64, without_progress_ms: u64) {
        self.states[state as usize] += 1;
        self.age.add(age_ms);
        self.without_progress.add(without_progress_ms);
        self.oldest_age_ms = self.oldest_age_ms.max(age_ms);
    }

    pub(crate) fn merge(&mut self, other: &Census) {
        for (mine, theirs) in self.states.iter_mut().zip(other.states) {
            *mine += theirs;
        }
        self.age.merge(&other.age);
        self.without_progress.merge(&other.without_progress);
        self.oldest_age_ms = self.oldest_age_ms.max(other.oldest_age_ms);
    }

    pub(crate) fn to_json(self) -> String {
        let mut states = JsonObject::new();
        for state in ConnectionState::ALL {
            states = states.number(state.as_str(), self.state(state));
        }
        JsonObject::new()
            .raw("states", &states.finish())
            .raw("age", &self.age.to_json())
            .raw("without_progress", &self.without_progress.to_json())
            .number("oldest_age_ms", self.oldest_age_ms)
            .finish()
    }
}

/// A census that one thread writes and others read, each figure by itself.
#[derive(Debug, Default)]
pub(crate) struct CensusCell {
    age: AgesCell,
    without_progress: AgesCell,
    oldest_age_ms: Counter,
    states: [Counter; ConnectionState::COUNT],
}

#[derive(Debug, Default)]
struct AgesCell {
    counts: [Counter; BUCKETS],
    sum_ms: Counter,
}

impl AgesCell {
    fn set(&self, ages: &Ages) {
        write(&self.counts, &ages.counts);
        self.sum_ms.set(ages.sum_ms);
    }

    fn get(&self) -> Ages {
        let counts = std::array::from_fn(|n| self.counts[n].get());
        Ages { counts, sum_ms: self.sum_ms.get() }
    }
}

fn write(cells: &[Counter], values: &[u64]) {
    cells.iter().zip(values).for_each(|(cell, value)| cell.set(*value));
}

impl CensusCell {
    pub(crate) fn set(&self, census: &Census) {
        self.age.set(&census.age);
        self.without_progress.set(&census.without_progress);
        write(&self.states, &census.states);
        self.oldest_age_ms.set(census.oldest_age_ms);
    }

    pub(crate) fn get(&self) -> Census {
        Census {
            age: self.age.get(),
            without_progress: self.without_progress.get(),
            oldest_age_ms: self.oldest_age_ms.get(),
            states: std::array::from_fn(|n| self.states[n].get()),
        }
    }
}

/// The bounds of the buckets, in seconds.
const BOUNDS_S: [u64; 9] = [1, 5, 15, 60, 300, 900, 3_600, 21_600, 86_400];
const BUCKETS: usize = BOUNDS_S.len() + 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_falls_into_the_bucket_whose_bound_it_is_below() {
        let mut ages = Ages::default();
        for ms in [0, 999, 1_000, 4_999, 5_000, 86_399_999, 86_400_000, u64::MAX] {
            ages.add(ms);
        }
        assert_eq!(ages.counts, [2, 2, 1, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(ages.total(), 8);
        let at_least = |s| ages.at_least(Duration::from_secs(s));
        assert_eq!([at_least(0), at_least(1), at_least(5), at_least(86_400)], [8, 6, 4, 2]);
        assert_eq!(at_least(2), at_least(5), "in between, the bound above");
        assert_eq!(at_least(90_000), 0);
    }

    #[test]
    fn what_was_set_is_read_and_merged() {
        let mut census = Census::default();
        census.add(ConnectionState::Idle, 7_000, 10);
        census.add(ConnectionState::Ended, 90_000, 90_000);
        let cell = CensusCell::default();
        cell.set(&census);
        assert_eq!(cell.get(), census);
        let mut both = census;
        both.merge(&cell.get());
        assert_eq!((both.total(), both.state(ConnectionState::Idle)), (4, 2));
        assert_eq!((both.oldest_age_ms, both.without_progress.total()), (90_000, 4));
        assert_eq!(both.age.to_string(), "2 below 15.0 s, 2 below 5 min");
        let json = both.to_json();
        assert!(json.contains("\"below_15s\":2") && json.contains("\"ended\":2"), "{json}");
    }
}
