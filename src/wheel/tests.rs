//! The wheel against an oracle that keeps every timer in a [`BTreeMap`] and knows no slots.
//!
//! `WHEEL_SEED=n cargo test wheel` repeats the random histories of one seed.

use std::collections::{BTreeMap, HashSet};

use super::*;

/// `splitmix64`: <https://prng.di.unimi.it/splitmix64.c>.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Every order of magnitude below 2^`bits` is as likely as any other.
    fn spread(&mut self, bits: u64) -> u64 {
        let width = self.below(bits) + 1;
        self.next() >> (64 - width)
    }

    fn precision(&mut self) -> Precision {
        if self.below(2) == 0 { Precision::Coarse } else { Precision::Exact }
    }
}

#[derive(Clone, Copy, Debug)]
struct Armed {
    key: TimerKey,
    precision: Precision,
    deadline_ms: u64,
    latest_ms: u64,
}

impl Armed {
    fn new(key: TimerKey, precision: Precision, now_ms: u64, deadline_ms: u64) -> Self {
        let latest_ms = latest_ms(precision, now_ms, deadline_ms);
        Self { key, precision, deadline_ms, latest_ms }
    }
}

/// When a timer must have fired at the latest. An exact one gets no tick of grace.
fn latest_ms(precision: Precision, now_ms: u64, deadline_ms: u64) -> u64 {
    match precision {
        Precision::Exact => deadline_ms.max(now_ms),
        Precision::Coarse => {
            let asked_ms = deadline_ms.saturating_sub(now_ms);
            deadline_ms.max(now_ms).saturating_add((asked_ms / 8).max(1))
        }
    }
}

/// A wheel, what it should hold, and the checks between the two.
struct Checked {
    seed: u64,
    random: Random,
    now_ms: u64,
    wheel: Wheel<u64>,
    armed: BTreeMap<u64, Armed>,
    fired: Vec<(TimerKey, u64)>,
    stale: Vec<TimerKey>,
    next_id: u64,
}

impl Checked {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let now_ms = random.spread(45);
        Self {
            seed,
            random,
            now_ms,
            wheel: Wheel::new(now_ms),
            armed: BTreeMap::new(),
            fired: Vec::new(),
            stale: Vec::new(),
            next_id: 0,
        }
    }

    fn any_deadline_ms(&mut self) -> u64 {
        match self.random.below(32) {
            0 => self.now_ms,
            1 => self.random.below(self.now_ms + 1),
            2 => u64::MAX - self.random.spread(63),
            // The ends of the levels, where rounding and clamping meet.
            3..8 => {
                let end_ms = 64 << (3 * self.random.below(9));
                self.now_ms + end_ms + self.random.spread(12) - self.random.below(end_ms / 8 + 1)
            }
            _ => self.now_ms + self.random.spread(32),
        }
    }

    fn any_id(&mut self) -> Option<u64> {
        let from = self.random.below(self.next_id + 1);
        self.armed.range(from..).next().map(|(&id, _)| id)
    }

    fn insert(&mut self) {
        let (deadline_ms, precision) = (self.any_deadline_ms(), self.random.precision());
        let key = self.wheel.insert(deadline_ms, precision, self.next_id);
        self.armed.insert(self.next_id, Armed::new(key, precision, self.now_ms, deadline_ms));
        self.next_id += 1;
    }

    fn cancel(&mut self) {
        let Some(id) = self.any_id() else { return };
        let Armed { key, .. } = self.armed.remove(&id).unwrap();
        assert_eq!(self.wheel.cancel(key), Some(id), "seed {}", self.seed);
        self.stale.push(key);
    }

    fn rearm(&mut self) {
        let Some(id) = self.any_id() else { return };
        let old = self.armed[&id];
        // A small push, to either side, is what stays in its slot.
        let deadline_ms = match self.random.below(4) {
            0 => old.deadline_ms.saturating_add(self.random.spread(10)),
            1 => old.deadline_ms.saturating_sub(self.random.spread(10)),
            _ => self.any_deadline_ms(),
        };
        assert!(self.wheel.rearm(old.key, deadline_ms), "seed {}", self.seed);
        self.armed.insert(id, Armed::new(old.key, old.precision, self.now_ms, deadline_ms));
    }

    /// Expires in slices of `budget`, doing other things between the slices.
    fn expire(&mut self, now_ms: u64, budget: usize) {
        self.now_ms = self.now_ms.max(now_ms);
        let mut slices = 0;
        loop {
            let before = self.fired.len();
            let more = self.wheel.expire(now_ms, budget, &mut self.fired);
            assert!(self.fired.len() - before <= budget, "seed {}: over budget", self.seed);
            self.check_fired();
            slices += 1;
            assert!(slices < 100_000, "seed {}: no end of slices", self.seed);
            if !more {
                break;
            }
            assert_eq!(self.wheel.next_expiry_ms(), Some(self.now_ms), "seed {}", self.seed);
            match self.random.below(6) {
                0 if slices < 50 => self.insert(),
                1 => self.cancel(),
                2 if slices < 50 => self.rearm(),
                _ => {}
            }
        }
        self.check_rest();
    }

    fn check_fired(&mut self) {
        let seed = self.seed;
        for (key, id) in self.fired.drain(..) {
            let Some(armed) = self.armed.remove(&id) else {
                panic!("seed {seed}: {id} fired twice, or after its end");
            };
            assert_eq!(armed.key, key, "seed {seed}");
            assert!(armed.deadline_ms <= self.now_ms, "seed {seed}: early: {armed:?}");
            self.stale.push(key);
        }
        assert_eq!(self.wheel.len(), self.armed.len(), "seed {seed}");
        assert_eq!(self.wheel.is_empty(), self.armed.is_empty(), "seed {seed}");
    }

    fn check_rest(&mut self) {
        let (seed, now_ms) = (self.seed, self.now_ms);
        for armed in self.armed.values() {
            assert!(armed.latest_ms > now_ms, "seed {seed}, now {now_ms}: late: {armed:?}");
            assert_eq!(self.wheel.deadline_ms(armed.key), Some(armed.deadline_ms), "seed {seed}");
        }
        for key in self.stale.drain(..) {
            assert_eq!(self.wheel.cancel(key), None, "seed {seed}");
            assert_eq!(self.wheel.deadline_ms(key), None, "seed {seed}");
            assert!(!self.wheel.rearm(key, now_ms + 1), "seed {seed}");
        }
        let needed_ms = self.armed.values().map(|armed| armed.latest_ms).min();
        let next_ms = self.wheel.next_expiry_ms();
        assert_eq!(next_ms.is_some(), needed_ms.is_some(), "seed {seed}: sleeps over a timer");
        if let (Some(next_ms), Some(needed_ms)) = (next_ms, needed_ms) {
            assert!(next_ms <= needed_ms, "seed {seed}: wakes at {next_ms} for {needed_ms}");
            assert!(next_ms > now_ms, "seed {seed}: wakes without need");
        }
    }

    fn next_now_ms(&mut self) -> u64 {
        match self.random.below(16) {
            // Backwards, which is ignored.
            0 => self.random.below(self.now_ms + 1),
            // Beyond the wheel's range of 2^27 ms.
            1 => self.now_ms + self.random.spread(34),
            2..6 => self.now_ms + self.random.spread(16),
            // To the promised moment or just short of it.
            6 => self.wheel.next_expiry_ms().map_or(self.now_ms, |ms| ms - 1),
            _ => self.wheel.next_expiry_ms().unwrap_or(self.now_ms),
        }
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            match self.random.below(8) {
                0..4 => self.insert(),
                4 => self.cancel(),
                5 => self.rearm(),
                _ => {
                    let (now_ms, budget) = (self.next_now_ms(), self.random.below(9) + 1);
                    self.expire(now_ms, budget as usize);
                }
            }
        }
        // Whatever was not set to the end of time comes if one sleeps as told.
        self.armed.retain(|_, armed| {
            let keep = armed.deadline_ms <= self.now_ms + (1 << 35);
            assert!(keep || self.wheel.cancel(armed.key).is_some());
            keep
        });
        while let Some(next_ms) = self.wheel.next_expiry_ms() {
            self.expire(next_ms, usize::MAX);
        }
        assert!(self.armed.is_empty(), "seed {}: lost: {:?}", self.seed, self.armed);
    }
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("WHEEL_SEED") {
        Ok(seed) => vec![seed.parse().expect("WHEEL_SEED is a number")],
        Err(_) => (0..if cfg!(miri) { 2 } else { count }).collect(),
    }
}

/// Scenario 51.
#[test]
fn random_histories_agree_with_the_oracle() {
    for seed in seeds(300) {
        Checked::new(seed).run(if cfg!(miri) { 100 } else { 600 });
    }
}

#[test]
fn an_exact_timer_wakes_once_and_fires_on_its_tick() {
    for seed in seeds(2_000) {
        let mut random = Random(seed);
        let now_ms = random.spread(45);
        let deadline_ms = now_ms + 1 + random.spread(27) % (64 << 21);
        let mut wheel = Wheel::new(now_ms);
        let mut fired = Vec::new();
        let key = wheel.insert(deadline_ms, Precision::Exact, 7);
        assert_eq!(wheel.next_expiry_ms(), Some(deadline_ms), "seed {seed}");
        // Early calls move it to finer levels; that changes nothing for the caller.
        for _ in 0..random.below(5) {
            let early_ms = now_ms + random.below(deadline_ms - now_ms);
            assert!(!wheel.expire(early_ms, 1, &mut fired), "seed {seed}");
            assert_eq!((wheel.next_expiry_ms(), fired.len()), (Some(deadline_ms), 0), "{seed}");
        }
        wheel.expire(deadline_ms, 1, &mut fired);
        assert_eq!(fired, [(key, 7)], "seed {seed}");
    }
}

#[test]
fn a_coarse_timer_is_late_by_less_than_an_eighth_and_a_short_one_not_at_all() {
    for now_ms in [0, 1, 7, 63, 511, 99_999] {
        for ahead_ms in (1..5_000).chain((1..400).map(|n| n * 331_337)) {
            let (mut wheel, mut fired) = (Wheel::new(now_ms), Vec::new());
            wheel.insert(now_ms + ahead_ms, Precision::Coarse, ());
            while fired.is_empty() {
                let next_ms = wheel.next_expiry_ms().unwrap();
                wheel.expire(next_ms, 1, &mut fired);
            }
            let late_ms = wheel.now_ms.checked_sub(now_ms + ahead_ms).expect("not early");
            assert!(late_ms * 8 < ahead_ms, "{now_ms} + {ahead_ms}: late by {late_ms}");
            assert!(ahead_ms > 64 || late_ms == 0, "{now_ms} + {ahead_ms}: late by {late_ms}");
            if cfg!(miri) && ahead_ms > 200 {
                break;
            }
        }
    }
}

#[test]
fn a_deadline_that_is_not_ahead_fires_at_the_next_call() {
    let (mut wheel, mut fired) = (Wheel::new(1_000), Vec::new());
    for deadline_ms in [0, 999, 1_000] {
        wheel.insert(deadline_ms, Precision::Coarse, deadline_ms);
        wheel.insert(deadline_ms, Precision::Exact, deadline_ms);
    }
    assert_eq!(wheel.next_expiry_ms(), Some(1_000));
    assert!(!wheel.expire(1_000, 6, &mut fired));
    assert_eq!(fired.len(), 6);
    assert_eq!(wheel.next_expiry_ms(), None);
}

#[test]
fn a_timer_beyond_the_range_waits_and_is_never_early() {
    let far_ms = 1_000 * 24 * 3_600 * 1_000;
    let (mut wheel, mut fired) = (Wheel::new(5), Vec::new());
    wheel.insert(far_ms, Precision::Exact, 1);
    let never = wheel.insert(u64::MAX, Precision::Coarse, 2);
    let mut wakes = 0;
    while fired.is_empty() {
        let next_ms = wheel.next_expiry_ms().unwrap();
        assert!(next_ms <= far_ms);
        wheel.expire(next_ms, 8, &mut fired);
        wakes += 1;
    }
    assert_eq!(wheel.now_ms, far_ms);
    assert!(wakes < 1_000, "{wakes} wake-ups in a thousand days");
    // To the end of time and beyond.
    assert!(!wheel.expire(u64::MAX, 8, &mut fired));
    assert_eq!(wheel.deadline_ms(never), Some(u64::MAX));
    assert!(wheel.next_expiry_ms().is_some_and(|ms| ms > wheel.now_ms));
    assert_eq!((fired.len(), wheel.cancel(never)), (1, Some(2)));
}

#[test]
fn slices_of_seven_fire_the_same_timers_as_one_call() {
    let mut random = Random(7);
    let (mut sliced, mut whole) = (Wheel::new(0), Wheel::new(0));
    for id in 0..1_000 {
        let (deadline_ms, precision) = (random.spread(20), random.precision());
        sliced.insert(deadline_ms, precision, id);
        whole.insert(deadline_ms, precision, id);
    }
    for now_ms in [0, 100, 5_000, 5_001, 1 << 19, 1 << 21] {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let mut calls = 1;
        while sliced.expire(now_ms, 7, &mut a) {
            assert!(a.len() <= calls * 7);
            calls += 1;
        }
        assert!(!whole.expire(now_ms, usize::MAX, &mut b));
        let [a, b] = [a, b].map(|fired| fired.into_iter().collect::<HashSet<_>>());
        assert_eq!(a, b, "at {now_ms}");
    }
    assert!(sliced.is_empty() && whole.is_empty());
}

/// Case 41, scenario 51.
#[test]
fn a_million_timers_fire_once_each_and_in_time() {
    let count: u32 = if cfg!(miri) { 300 } else { 1_000_000 };
    let mut random = Random(42);
    let mut wheel = Wheel::new(0);
    // Per timer, the window in which it must fire; emptied when it has.
    let mut windows = Vec::with_capacity(count as usize);
    for id in 0..count {
        let precision = if id % 16 == 0 { Precision::Exact } else { Precision::Coarse };
        let deadline_ms = random.next() >> (36 + id % 8);
        let key = wheel.insert(deadline_ms, precision, id);
        if id % 4 == 3 {
            assert_eq!(wheel.cancel(key), Some(id));
        }
        windows.push(Some(deadline_ms..=latest_ms(precision, 0, deadline_ms)));
    }
    let mut left = (count - count / 4) as usize;
    let (mut now_ms, mut fired) = (0, Vec::new());
    while let Some(next_ms) = wheel.next_expiry_ms() {
        assert_eq!(wheel.len(), left);
        // As told at first; then rather too late, so that the test ends.
        let told = now_ms < 2_000;
        now_ms = if told { next_ms } else { next_ms + random.below(200_000) };
        while wheel.expire(now_ms, 10_000, &mut fired) {}
        left -= fired.len();
        for (_, id) in fired.drain(..) {
            let window = windows[id as usize].take().expect("fires once");
            assert!(*window.start() <= now_ms, "{id} at {now_ms} is early: {window:?}");
            assert!(*window.end() >= next_ms, "{id} at {now_ms} is late: {window:?}");
        }
    }
    assert_eq!((left, wheel.len()), (0, 0));
    assert!(windows.iter().enumerate().all(|(id, window)| window.is_some() == (id % 4 == 3)));
}

#[test]
fn churn_does_not_grow_the_memory() {
    let mut wheel = Wheel::new(0);
    let mut keys: Vec<_> = (0..100).map(|n| wheel.insert(n, Precision::Coarse, n)).collect();
    let capacity = wheel.nodes.capacity();
    let (mut random, mut fired) = (Random(1), Vec::new());
    for now_ms in 0..if cfg!(miri) { 100 } else { 20_000 } {
        let index = random.below(keys.len() as u64) as usize;
        wheel.cancel(keys.swap_remove(index));
        wheel.expire(now_ms, 5, &mut fired);
        keys.retain(|&key| wheel.deadline_ms(key).is_some());
        while keys.len() < 100 {
            keys.push(wheel.insert(now_ms + random.spread(14), random.precision(), now_ms));
        }
    }
    assert_eq!((wheel.len(), wheel.nodes.len(), wheel.nodes.capacity()), (100, 100, capacity));
}

#[test]
fn an_empty_wheel_lets_the_core_sleep() {
    let mut wheel = Wheel::new(3);
    assert_eq!(wheel.next_expiry_ms(), None);
    let key = wheel.insert(90_000, Precision::Coarse, ());
    assert!(wheel.next_expiry_ms().is_some());
    wheel.cancel(key);
    assert_eq!(wheel.next_expiry_ms(), None);
    assert!(!wheel.expire(1 << 50, 1, &mut Vec::new()) && wheel.is_empty());
    assert_eq!(wheel.next_expiry_ms(), None);
}

#[test]
fn advancing_measures_timers_from_now() {
    let (mut wheel, mut fired) = (Wheel::new(0), Vec::new());
    wheel.insert(20_000, Precision::Coarse, 1);
    wheel.advance(40_000);
    wheel.insert(40_064, Precision::Coarse, 2);
    assert_eq!(wheel.next_expiry_ms(), Some(40_000));
    assert!(!wheel.expire(40_000, 9, &mut fired));
    assert_eq!(wheel.next_expiry_ms(), Some(40_064));
}

#[test]
fn a_node_out_of_generations_is_not_used_again() {
    let mut wheel = Wheel::new(0);
    let key = wheel.insert(1, Precision::Coarse, 1);
    wheel.nodes[0].generation = RETIRED - 1;
    let last = TimerKey { generation: RETIRED - 1, ..key };
    assert_eq!((wheel.cancel(last), wheel.cancel(last)), (Some(1), None));
    assert_eq!(wheel.insert(1, Precision::Coarse, 2).index, 1);
}
