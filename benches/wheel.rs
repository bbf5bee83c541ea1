//! What does a deadline cost, and does it cost more when there are a million of them?
//!
//! `cargo bench -p slipring-benches --bench wheel`. The goal is 30 ns for each of insert, cancel
//! and rearm with 10⁶ live timers. The live timers lie up to 4 min ahead and were armed in random
//! order, so that the neighbours of a timer in its slot are anywhere in memory; `random` picks one
//! of all of them, which is the worst case, `recent` one of the last thousand.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use wheel::{Precision, TimerKey, Wheel};

#[path = "../src/wheel.rs"]
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "the wheel is private to the library; the bench uses a part of it, and not its tests"
)]
mod wheel;

/// As large as the payload the wheel's node is laid out for.
type Payload = [u64; 2];

const LIVE: [usize; 3] = [1, 10_000, 1_000_000];
const BATCH: usize = 1_000;

/// Numbers made beforehand, so that making them is not measured.
fn random_numbers(count: usize) -> Vec<u64> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..count).map(step).collect()
}

/// Deadlines from 1 ms to 4 min ahead.
fn deadlines_ms(count: usize) -> Vec<u64> {
    random_numbers(count).into_iter().map(|n| 1 + n % (1 << 18)).collect()
}

fn filled(live: usize) -> (Wheel<Payload>, Vec<TimerKey>) {
    let mut wheel = Wheel::new(0);
    let arm = |ms| wheel.insert(ms, Precision::Coarse, [ms, 0]);
    let keys = deadlines_ms(live).into_iter().map(arm).collect();
    (wheel, keys)
}

/// Arms and cancels batches of timers beside the live ones and times one of the two.
fn batches(wheel: &mut Wheel<Payload>, iterations: u64, time_insert: bool) -> Duration {
    let deadlines_ms = deadlines_ms(BATCH);
    let mut keys = Vec::with_capacity(BATCH);
    let mut spent = Duration::ZERO;
    let mut left = iterations as usize;
    while left > 0 {
        let count = left.min(BATCH);
        let start = Instant::now();
        for &ms in &deadlines_ms[..count] {
            keys.push(wheel.insert(ms, Precision::Coarse, [ms, 0]));
        }
        let armed = Instant::now();
        for key in keys.drain(..) {
            black_box(wheel.cancel(key));
        }
        spent += if time_insert { armed - start } else { armed.elapsed() };
        left -= count;
    }
    spent
}

fn arm(c: &mut Criterion) {
    let mut group = c.benchmark_group("wheel");
    group.throughput(Throughput::Elements(1));
    for live in LIVE {
        group.bench_function(BenchmarkId::new("insert", live), |b| {
            let (mut wheel, _) = filled(live);
            b.iter_custom(|iterations| batches(&mut wheel, iterations, true));
        });
        group.bench_function(BenchmarkId::new("cancel_recent", live), |b| {
            let (mut wheel, _) = filled(live);
            b.iter_custom(|iterations| batches(&mut wheel, iterations, false));
        });
        group.bench_function(BenchmarkId::new("insert_and_cancel", live), |b| {
            let (mut wheel, _) = filled(live);
            let mut deadlines_ms = deadlines_ms(BATCH).into_iter().cycle();
            b.iter(|| {
                let ms = deadlines_ms.next().unwrap();
                let key = wheel.insert(ms, Precision::Coarse, [ms, 0]);
                wheel.cancel(black_box(key))
            });
        });
        group.bench_function(BenchmarkId::new("cancel_and_insert_random", live), |b| {
            let (mut wheel, mut keys) = filled(live);
            let deadlines_ms = deadlines_ms(BATCH);
            let order = random_numbers(1 << 20);
            let mut turn = 0;
            b.iter(|| {
                let key = &mut keys[order[turn % order.len()] as usize % live];
                let payload = wheel.cancel(*key);
                let ms = deadlines_ms[turn % BATCH];
                *key = wheel.insert(ms, Precision::Coarse, [ms, 0]);
                turn += 1;
                payload
            });
        });
    }
}

/// Pushes timers back to a deadline of their own, as a write's progress does to its stall timer.
fn rearm(c: &mut Criterion) {
    let mut group = c.benchmark_group("wheel");
    group.throughput(Throughput::Elements(1));
    for live in LIVE {
        for (name, among) in [("rearm_recent", live.min(BATCH)), ("rearm_random", live)] {
            group.bench_function(BenchmarkId::new(name, live), |b| {
                let (mut wheel, keys) = filled(live);
                let deadlines_ms = deadlines_ms(BATCH);
                let order: Vec<_> = random_numbers(1 << 20)
                    .into_iter()
                    .map(|n| keys[live - 1 - n as usize % among])
                    .collect();
                let mut turn = 0;
                b.iter(|| {
                    let ms = deadlines_ms[turn % BATCH];
                    let alive = wheel.rearm(order[turn % order.len()], ms);
                    turn += 1;
                    alive
                });
            });
        }
        group.bench_function(BenchmarkId::new("rearm_random_within_slot", live), |b| {
            let (mut wheel, keys) = filled(live);
            for &key in &keys {
                wheel.rearm(key, 30_000);
            }
            let order = random_numbers(1 << 20).into_iter().map(|n| keys[n as usize % live]);
            let order: Vec<_> = order.collect();
            let mut turn = 0;
            b.iter(|| {
                turn += 1;
                wheel.rearm(order[turn % order.len()], 29_800 + (turn as u64 & 63))
            });
        });
    }
}

/// The least favourable turn: many timers due at once, as after accepting many peers together.
fn expire(c: &mut Criterion) {
    let mut group = c.benchmark_group("wheel");
    group.throughput(Throughput::Elements(256));
    for live in LIVE {
        group.bench_function(BenchmarkId::new("expire_256", live), |b| {
            let (mut wheel, _) = filled(live);
            let mut fired = Vec::with_capacity(256);
            let mut now_ms = 0;
            b.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    while wheel.len() < live.max(256) {
                        wheel.insert(now_ms + 30_000, Precision::Coarse, [0, 0]);
                    }
                    now_ms = wheel.next_expiry_ms().unwrap();
                    let start = Instant::now();
                    wheel.expire(now_ms, 256, &mut fired);
                    spent += start.elapsed();
                    fired.clear();
                }
                spent
            });
        });
        group.bench_function(BenchmarkId::new("next_expiry", live), |b| {
            let (wheel, _) = filled(live);
            b.iter(|| black_box(&wheel).next_expiry_ms());
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = arm, rearm, expire
}
criterion_main!(benches);
