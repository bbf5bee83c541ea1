//! Whether a core that has nothing to do looks out for news for a while before it blocks, and for
//! how long. Pure: it is told the time.
//!
//! A gap is the time from there being nothing to do to something having come. Gaps are measured
//! whether the core has spun or blocked; a blocked one contains what waking up took. Spinning pays
//! while nearly all recent gaps are short. A spin in vain is followed by a number of short gaps
//! that are sat out, twice as many each time; and its time is taken from a credit, which grows by a
//! twentieth of the time that passes, so that no pattern of arrivals makes a core waste more.
//!
//! A core that others keep from its CPU does not spin either: it rests from it for a second, then
//! for longer.

use std::fmt;

use crate::config::Settings;
use crate::machine::Facts;

#[cfg(test)]
mod tests;

/// Whether a core may spin before it blocks (`SLIPRING_SPIN_US`), and if not, why.
///
/// `Display` says it in words.
///
/// # Examples
///
/// ```no_run
/// # fn example(handle: slipring::Handle) {
/// let spin = handle.stats().total().spin;
/// if spin.is_refused() {
///     eprintln!("{spin}"); // refused: a cgroup's CPU quota would be used up by it
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum SpinState {
    /// It was not asked to; the default.
    #[default]
    Off,
    /// It spins while that pays.
    On,
    /// It was asked to, and does not: the process is under a cgroup's CPU quota.
    UnderQuota,
    /// It was asked to, and does not: the process may use one CPU only, or fewer than the server
    /// has cores.
    SharedCpus,
    /// It was asked to, and rests from it for some seconds: others wanted its CPU while it spun.
    Preempted,
}

impl SpinState {
    pub(crate) const ALL: [SpinState; 5] = [
        SpinState::Off,
        SpinState::On,
        SpinState::UnderQuota,
        SpinState::SharedCpus,
        SpinState::Preempted,
    ];

    /// Whether it was asked for and is not done. `SLIPRING_SPIN_SHARED=1` insists.
    #[must_use]
    pub fn is_refused(self) -> bool {
        self > SpinState::On
    }

    /// The name as it stands in JSON: lower case, words joined by `_`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            SpinState::Off => "off",
            SpinState::On => "on",
            SpinState::UnderQuota => "under_quota",
            SpinState::SharedCpus => "shared_cpus",
            SpinState::Preempted => "preempted",
        }
    }

    pub(crate) fn of(number: u64) -> SpinState {
        let known = SpinState::ALL.get(number as usize);
        known.copied().unwrap_or_default()
    }

    /// What becomes of a server's wish to spin with so many cores on this machine.
    pub(crate) fn judge(settings: &Settings, facts: &Facts, cores: usize) -> SpinState {
        if settings.spin_us == 0 {
            return SpinState::Off;
        }
        let refusal = SpinState::refusal(facts, cores).filter(|_| !settings.spin_shared);
        refusal.unwrap_or(SpinState::On)
    }

    /// Why cores should not spin on this machine.
    pub(crate) fn refusal(facts: &Facts, cores: usize) -> Option<SpinState> {
        let cpus = facts.allowed_cpus.as_ref().map_or(usize::MAX, Vec::len);
        if facts.quota_cpus.is_some() {
            return Some(SpinState::UnderQuota);
        }
        (cpus <= 1 || cores > cpus).then_some(SpinState::SharedCpus)
    }
}

impl fmt::Display for SpinState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SpinState::Off => "off",
            SpinState::On => "on",
            SpinState::UnderQuota => "refused: it would use up a cgroup's CPU quota",
            SpinState::SharedCpus => "refused: cores have to share their CPUs",
            SpinState::Preempted => "refused for now: others want the CPU",
        })
    }
}

/// One core's account of its gaps.
#[derive(Debug)]
pub(crate) struct Spin {
    /// The longest spin; 0 is none at all.
    most_ns: u64,
    /// The last eight gaps, the latest in the lowest bit: which of them were short.
    short: u8,
    /// How long the gaps are that spins have bridged, as a moving average.
    usual_ns: u64,
    /// Short gaps to sit out before the next spin.
    sits_out: u32,
    /// Spins in vain, less those that have found something.
    in_vain: u32,
    credit_ns: u64,
    credited_ns: u64,
    /// When it was last looked for others, and how long the thread had waited for them so far.
    looked: Option<(u64, u64)>,
    rests_until_ns: u64,
    rest_ns: u64,
}

impl Spin {
    pub(crate) fn new(most_ns: u64, now_ns: u64) -> Spin {
        Spin {
            most_ns,
            short: 0,
            usual_ns: most_ns,
            sits_out: 0,
            in_vain: 0,
            credit_ns: CREDIT_SPINS * most_ns,
            credited_ns: now_ns,
            looked: None,
            rests_until_ns: 0,
            rest_ns: REST_NS,
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.most_ns > 0
    }

    /// It has rested because others wanted the CPU, and may spin again.
    pub(crate) fn is_rested(&self, now_ns: u64) -> bool {
        self.rests_until_ns > 0 && now_ns >= self.rests_until_ns
    }

    /// There is nothing to do: how long to spin. 0 is to block at once.
    pub(crate) fn limit_ns(&mut self, now_ns: u64) -> u64 {
        let passed_ns = now_ns.saturating_sub(self.credited_ns);
        // What has passed is counted in whole units of the credit.
        self.credited_ns += passed_ns / VAIN_SHARE * VAIN_SHARE;
        self.credit_ns = (self.credit_ns + passed_ns / VAIN_SHARE).min(CREDIT_SPINS * self.most_ns);
        let limit_ns = (REACH * self.usual_ns).min(self.most_ns);
        let pays = self.short.count_ones() >= SHORT_MIN && self.sits_out == 0;
        let may = self.credit_ns >= limit_ns && now_ns >= self.rests_until_ns;
        if pays && may { limit_ns } else { 0 }
    }

    /// A spin has found something after so long.
    pub(crate) fn found(&mut self, gap_ns: u64) {
        self.heed(true);
        self.usual_ns = (7 * self.usual_ns + gap_ns.min(self.most_ns)).div_ceil(8);
        self.in_vain = self.in_vain.saturating_sub(1);
    }

    /// A spin of at most `limit_ns` has found nothing, and the core blocks. What the thread did not
    /// run in the meantime costs no credit.
    pub(crate) fn found_nothing(&mut self, limit_ns: u64) {
        self.credit_ns = self.credit_ns.saturating_sub(limit_ns);
        self.sits_out = 1 << self.in_vain;
        self.in_vain = (self.in_vain + 1).min(SITS_OUT_LOG2_MAX);
    }

    /// The core was blocked, and something has come: how long the whole gap was, with the spin
    /// before it if there was one.
    pub(crate) fn blocked(&mut self, gap_ns: u64) {
        let short = gap_ns <= self.most_ns.saturating_add(WAKE_UP_NS);
        self.heed(short);
        self.sits_out = self.sits_out.saturating_sub(short.into());
        if gap_ns <= self.most_ns {
            // The whole of a spin would have bridged it.
            self.usual_ns = self.usual_ns.max(gap_ns);
        }
    }

    fn heed(&mut self, short: bool) {
        self.short = self.short << 1 | u8::from(short);
    }

    /// Whether it is time to look for others that want the CPU.
    pub(crate) fn is_to_look(&self, now_ns: u64) -> bool {
        self.looked.is_none_or(|(looked_ns, _)| now_ns >= looked_ns.saturating_add(LOOK_NS))
    }

    /// How long the thread was ready to run and others had the CPU, since it began. True when it
    /// rests from spinning from now on.
    pub(crate) fn look(&mut self, now_ns: u64, waited_ns: u64) -> bool {
        let looked = self.looked.replace((now_ns, waited_ns));
        let Some((looked_ns, before_ns)) = looked else { return false };
        let passed_ns = now_ns.saturating_sub(looked_ns);
        if waited_ns.saturating_sub(before_ns) < passed_ns / WAITED_SHARE {
            self.rest_ns = (self.rest_ns / 2).max(REST_NS);
            return false;
        }
        self.rests_until_ns = now_ns.saturating_add(self.rest_ns);
        self.rest_ns = (2 * self.rest_ns).min(REST_NS_MAX);
        // What happens in the rest is not the spins' doing.
        self.looked = None;
        true
    }
}

/// A core spins in vain for one part in so many of its time at most,
const VAIN_SHARE: u64 = 20;
/// and for so many spins in a row, after it has not done so for long.
const CREDIT_SPINS: u64 = 4;
/// Of the last eight gaps, so many have to be short.
const SHORT_MIN: u32 = 6;
/// A gap of more than so many times the usual length is not worth spinning to its end: if gaps are
/// random, one in fifty is.
const REACH: u64 = 4;
/// What waking up takes at most where the machine is virtual: a gap that was blocked in is not
/// known more exactly.
const WAKE_UP_NS: u64 = 50_000;
/// At most 1024 short gaps are sat out.
const SITS_OUT_LOG2_MAX: u32 = 10;
const LOOK_NS: u64 = 100_000_000;
/// Who waits for its CPU for one part in so many of the time shares it. The kernel's own threads
/// take far less.
const WAITED_SHARE: u64 = 20;
const REST_NS: u64 = 1_000_000_000;
const REST_NS_MAX: u64 = 64_000_000_000;
