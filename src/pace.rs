//! Whether somebody keeps up with a least rate. Pure: it is told the time, in milliseconds.
//!
//! A bucket of bytes: what moves is put in, and the rate is taken out for all the time that passes.
//! Whoever has let it run dry was slower than the rate, for at least the grace that it starts with.

/// Bytes a second, and for how long somebody may be slower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate {
    /// 0 is no rate at all.
    pub(crate) bytes_per_s: u64,
    pub(crate) grace_ms: u64,
}

impl Rate {
    pub(crate) fn is_on(&self) -> bool {
        self.bytes_per_s > 0
    }

    /// How often to look.
    pub(crate) fn step_ms(&self) -> u64 {
        (self.grace_ms / LOOKS_IN_GRACE).max(1)
    }

    /// The bytes of the grace: with fewer than these to come, nobody is late.
    pub(crate) fn grace_bytes(&self) -> u64 {
        self.bytes_per_s.saturating_mul(self.grace_ms) / 1000
    }
}

/// How far ahead of the rate one direction of a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pace {
    /// In thousandths of a byte, as a millisecond takes out so many of them as the rate has bytes.
    level: i64,
    at_ms: u64,
    bytes: u64,
}

impl Pace {
    /// Begins at `now_ms`, when `bytes` had moved.
    pub(crate) fn new(now_ms: u64, bytes: u64, rate: Rate) -> Pace {
        Pace { level: grace_level(rate), at_ms: now_ms, bytes }
    }

    pub(crate) fn looked_ms(&self) -> u64 {
        self.at_ms
    }

    /// By now `bytes` have moved. True when that is too few.
    ///
    /// What is ahead counts for `ahead_ms_max` at most: a peer's kernel may acknowledge a burst
    /// that the peer then takes its time to read, but no burst is good for ever.
    pub(crate) fn look(&mut self, now_ms: u64, bytes: u64, rate: Rate, ahead_ms_max: u64) -> bool {
        let passed_ms = now_ms.saturating_sub(self.at_ms);
        let moved = thousandths(bytes.saturating_sub(self.bytes));
        let due = signed(rate.bytes_per_s.saturating_mul(passed_ms));
        let most = signed(rate.bytes_per_s.saturating_mul(ahead_ms_max)).max(grace_level(rate));
        self.level = self.level.saturating_add(moved).min(most).saturating_sub(due);
        (self.at_ms, self.bytes) = (now_ms, bytes);
        self.level < 0
    }

    /// By now `bytes` have moved, and nobody was late: what was owed is forgiven.
    pub(crate) fn forgive(&mut self, now_ms: u64, bytes: u64, rate: Rate) {
        self.level = self.level.max(grace_level(rate));
        (self.at_ms, self.bytes) = (now_ms, bytes);
    }

    /// So much time does not count, as nobody was waited for.
    pub(crate) fn skip(&mut self, ms: u64) {
        self.at_ms = self.at_ms.saturating_add(ms);
    }

    /// Time until then does not count.
    pub(crate) fn skip_to(&mut self, ms: u64) {
        self.at_ms = self.at_ms.max(ms);
    }
}

fn grace_level(rate: Rate) -> i64 {
    signed(rate.bytes_per_s.saturating_mul(rate.grace_ms))
}

fn thousandths(bytes: u64) -> i64 {
    signed(bytes.saturating_mul(1000))
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// By so many looks the grace is divided, so that the one at which somebody is found slow comes at
/// most a quarter of it late.
const LOOKS_IN_GRACE: u64 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { bytes_per_s: 240, grace_ms: 5_000 };

    /// When a peer that moves so many bytes at a time, each so many milliseconds, is too slow.
    fn found_ms(burst: u64, every_ms: u64) -> Option<u64> {
        let mut pace = Pace::new(0, 0, RATE);
        let looks = (1..2_000).map(|look| look * RATE.step_ms());
        looks.into_iter().find(|now| pace.look(*now, now / every_ms * burst, RATE, 35_000))
    }

    #[test]
    fn nobody_at_the_rate_or_above_is_found_slow_however_unevenly_it_comes() {
        for (burst, every_ms) in [(240, 1_000), (300, 1_000), (1, 4), (1_200, 5_000)] {
            assert_eq!(found_ms(burst, every_ms), None, "{burst} bytes each {every_ms} ms");
        }
    }

    #[test]
    fn whoever_is_slower_is_found_after_the_grace_and_not_before() {
        for per_s in [0, 1, 50, 100, 200] {
            let found = found_ms(per_s, 1_000).expect("it is too slow");
            let grace_bytes = RATE.grace_bytes();
            // Every second it falls behind by so many bytes.
            let exact_ms = 1000 * grace_bytes / (RATE.bytes_per_s - per_s);
            let range = RATE.grace_ms.max(exact_ms - 2_000)..=exact_ms + 1_000 + RATE.step_ms();
            assert!(range.contains(&found), "{per_s} bytes a second: {found} is not in {range:?}");
        }
    }

    #[test]
    fn a_burst_is_good_for_a_bounded_time() {
        let mut pace = Pace::new(0, 0, RATE);
        assert!(!pace.look(1_000, 1_000_000_000, RATE, 35_000));
        assert!(!pace.look(35_000, 1_000_000_000, RATE, 35_000));
        assert!(pace.look(36_500, 1_000_000_000, RATE, 35_000));
    }

    #[test]
    fn the_extremes_do_not_overflow() {
        let rate = Rate { bytes_per_s: u64::MAX, grace_ms: u64::MAX };
        let mut pace = Pace::new(0, 0, rate);
        assert!(!pace.look(1, u64::MAX, rate, u64::MAX));
        pace.look(u64::MAX, 0, rate, u64::MAX);
    }
}
