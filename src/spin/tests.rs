//! A core's gaps, invented: steady, sparse, mixed, and made by an adversary who knows the account.

use super::*;
use crate::config::Config;
use crate::sim::Rng;

/// What became of a core's gaps.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    gaps: u64,
    found: u64,
    in_vain: u64,
    vain_ns: u64,
    passed_ns: u64,
}

/// A core that is told of gaps: how long they are really, knowing how long it would spin.
struct Bench {
    spin: Spin,
    now_ns: u64,
}

impl Bench {
    fn new(most_us: u64) -> Bench {
        Bench { spin: Spin::new(most_us * US, 0), now_ns: 0 }
    }

    fn run(&mut self, gaps: u64, mut gap_ns: impl FnMut(u64) -> u64) -> Outcome {
        let begin_ns = self.now_ns;
        let mut outcome = Outcome { gaps, ..Outcome::default() };
        for _ in 0..gaps {
            let limit_ns = self.spin.limit_ns(self.now_ns);
            assert!(limit_ns <= self.spin.most_ns);
            let gap_ns = gap_ns(limit_ns);
            if limit_ns > 0 && gap_ns <= limit_ns {
                outcome.found += 1;
                self.spin.found(gap_ns);
                self.now_ns += gap_ns;
            } else {
                if limit_ns > 0 {
                    outcome.in_vain += 1;
                    outcome.vain_ns += limit_ns;
                    self.spin.found_nothing(limit_ns);
                }
                self.spin.blocked(gap_ns + WOKEN_NS);
                self.now_ns += gap_ns + WOKEN_NS;
            }
            // What there is to do then.
            self.now_ns += WORK_NS;
        }
        outcome.passed_ns = self.now_ns - begin_ns;
        outcome
    }
}

#[test]
fn steady_short_gaps_are_bridged_from_the_seventh_on() {
    for gap_ns in [500, 5 * US, 20 * US, 50 * US] {
        let outcome = Bench::new(50).run(1_000, |_| gap_ns);
        assert_eq!((outcome.found, outcome.in_vain), (994, 0), "{gap_ns} ns");
    }
}

#[test]
fn arrivals_200_us_apart_are_never_spun_for() {
    let mut bench = Bench::new(50);
    let outcome = bench.run(10_000, |_| 180 * US);
    assert_eq!((outcome.found, outcome.in_vain), (0, 0));
    // After dense traffic, too, but for the moment at which it ends.
    assert!(bench.run(100, |_| 5 * US).found > 90);
    assert_eq!(bench.run(10_000, |_| 180 * US).in_vain, 1);
}

#[test]
fn an_idle_core_has_spun_once_after_the_traffic_and_never_again() {
    let mut bench = Bench::new(50);
    bench.run(1_000, |_| 5 * US);
    let outcome = bench.run(1_000, |_| 10_000 * US);
    assert_eq!((outcome.found, outcome.in_vain), (0, 1));
}

#[test]
fn gaps_that_are_just_too_long_are_tried_less_and_less_often() {
    // Blocked in, they look like gaps of 50 us.
    let mut bench = Bench::new(50);
    let outcome = bench.run(100_000, |_| 60 * US);
    assert_eq!(outcome.found, 0);
    assert!((90..120).contains(&outcome.in_vain), "{outcome:?}");
    assert!(outcome.vain_ns * 1_000 < outcome.passed_ns, "{outcome:?}");
    // It finds out that they have become short within 1 024 of them.
    let outcome = bench.run(2_100, |_| 10 * US);
    assert!(outcome.found > 1_000, "{outcome:?}");
}

#[test]
fn a_gap_that_is_long_for_once_hardly_matters() {
    let mut count = 0;
    let outcome = Bench::new(50).run(10_000, |_| {
        count += 1;
        if count % 50 == 0 { 4_000 * US } else { 5 * US }
    });
    assert!(outcome.found > 9_400, "{outcome:?}");
    let share = outcome.vain_ns * 1_000 / outcome.passed_ns;
    assert!(share < 20, "{share} per mille");
}

#[test]
fn a_spin_is_no_longer_than_the_gaps_are_worth() {
    let mut bench = Bench::new(100);
    bench.run(1_000, |_| 2 * US);
    let limit_ns = bench.spin.limit_ns(bench.now_ns);
    assert!((2 * US..10 * US).contains(&limit_ns), "{limit_ns} ns");
    // Gaps that grow are followed.
    let outcome = bench.run(2_000, |_| 60 * US);
    assert!(outcome.found > 1_900, "{outcome:?}");
}

#[test]
fn whatever_comes_a_twentieth_of_the_time_is_spun_in_vain_at_most() {
    for seed in 0..if cfg!(miri) { 3 } else { 300 } {
        let mut rng = Rng::new(seed);
        let most_us = 1 + rng.below(200);
        let mut bench = Bench::new(most_us);
        let (kind, odds) = (rng.below(4), rng.below(100));
        let steady_ns = rng.below(400 * US);
        let outcome = bench.run(5_000, |limit_ns| match kind {
            // Long as soon as it spins, just too long for it, and else short.
            0 => {
                if limit_ns > 0 && rng.percent(odds) {
                    limit_ns + 1
                } else {
                    rng.below(2 * US)
                }
            }
            // Two kinds of gaps in a random order.
            1 => {
                if rng.percent(odds) {
                    500 * US
                } else {
                    rng.below(30 * US)
                }
            }
            2 => rng.below(steady_ns.max(1)),
            // Powers of two, from a ns to 0.5 ms.
            _ => 1 << rng.below(20),
        });
        let most_ns = outcome.passed_ns / VAIN_SHARE + CREDIT_SPINS * most_us * US;
        assert!(outcome.vain_ns <= most_ns, "seed {seed}: {outcome:?}, {most_ns} ns");
    }
}

#[test]
fn a_core_that_is_preempted_rests_for_longer_each_time() {
    let mut bench = Bench::new(50);
    bench.run(100, |_| 5 * US);
    let (mut waited_ns, mut rests_ms) = (0, Vec::new());
    for _ in 0..9 {
        assert!(bench.spin.is_to_look(bench.now_ns));
        assert!(!bench.spin.look(bench.now_ns, waited_ns), "one look says nothing");
        assert!(!bench.spin.is_to_look(bench.now_ns + LOOK_NS - 1));
        bench.now_ns += LOOK_NS;
        waited_ns += LOOK_NS / WAITED_SHARE;
        assert!(bench.spin.look(bench.now_ns, waited_ns));
        let began_ns = bench.now_ns;
        while bench.spin.limit_ns(bench.now_ns) == 0 {
            bench.now_ns += US * 1_000;
        }
        rests_ms.push((bench.now_ns - began_ns) / US / 1_000);
    }
    assert_eq!(rests_ms[..4], [1_000, 2_000, 4_000, 8_000]);
    assert_eq!(rests_ms[8], 64_000);
    // To wait for less is nothing, and shortens the next rest.
    bench.spin.look(bench.now_ns, waited_ns);
    bench.now_ns += 10 * LOOK_NS;
    assert!(!bench.spin.look(bench.now_ns, waited_ns + 10 * LOOK_NS / WAITED_SHARE - 1));
    assert!(bench.spin.limit_ns(bench.now_ns) > 0);
    assert_eq!(bench.spin.rest_ns, REST_NS_MAX / 2);
}

#[test]
fn off_is_off() {
    let mut bench = Bench::new(0);
    assert!(!bench.spin.is_on());
    assert_eq!(bench.run(1_000, |_| 1).found, 0);
}

#[test]
fn neither_a_quota_nor_a_shared_cpu_is_spun_on_unless_it_is_asked_for() {
    let facts = |quota_cpus, cpus: u16| Facts {
        quota_cpus,
        allowed_cpus: Some((0..cpus).collect()),
        ..Facts::default()
    };
    for (facts, cores, state) in [
        (facts(None, 2), 2, SpinState::On),
        (facts(None, 2), 1, SpinState::On),
        (facts(None, 2), 3, SpinState::SharedCpus),
        (facts(None, 1), 1, SpinState::SharedCpus),
        (facts(Some(0.5), 4), 1, SpinState::UnderQuota),
        (facts(Some(8.0), 8), 4, SpinState::UnderQuota),
    ] {
        let judge = |config: Config| {
            SpinState::judge(&config.settings().expect("valid settings"), &facts, cores)
        };
        assert_eq!(judge(Config::default()), SpinState::Off);
        assert_eq!(judge(Config::default().spin_us(50)), state, "{facts:?}, {cores} cores");
        assert_eq!(judge(Config::default().spin_us(50).spin_shared(true)), SpinState::On);
        assert_eq!(state.is_refused(), state.to_string().starts_with("refused"));
    }
}

#[test]
fn a_state_has_a_number_of_its_own() {
    for state in SpinState::ALL {
        assert_eq!(SpinState::of(state as u64), state);
    }
}

const US: u64 = 1_000;
/// How long it takes to wake up.
const WOKEN_NS: u64 = 25 * US;
const WORK_NS: u64 = 10 * US;
