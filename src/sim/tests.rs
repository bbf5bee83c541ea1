//! The core's rules over thousands of seeds of the simulated kernel.
//!
//! After every turn: every buffer is in one place, every descriptor has an owner and nothing in
//! flight when it is closed, every operation is counted once, every connection has a deadline, and
//! the books balance. `RING_TEST_SEED=n` replays one seed, `RING_TEST_LONG=n` runs n times as many.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::World;
use super::peer::{Fate, Manner, Peer};
use super::rig::{House, Rig};
use super::rng::Rng;
use crate::report::CloseReason;

/// Runs many seeds and prints the one that fails.
pub(crate) fn for_seeds(name: &str, count: u64, run: impl Fn(u64)) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let count = if cfg!(miri) { 3 } else { count * number("RING_TEST_LONG").unwrap_or(1) };
    let seeds = number("RING_TEST_SEED").map_or(0..count, |seed| seed..seed + 1);
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("{name}: seed {seed} failed; replay with RING_TEST_SEED={seed}");
            resume_unwind(panic);
        }
    }
}

fn assert_prefix(peer: &Peer) {
    assert!(peer.plan.starts_with(&peer.received), "not what {:?} had sent", peer.manner);
}

#[test]
fn every_good_peer_gets_all_its_bytes_back_over_any_kernel() {
    for_seeds("echo", 2_000, |seed| {
        let rig = Rig::new(seed, House::Echo);
        rig.run(100_000);
        assert!(rig.world.borrow().is_quiet(), "peers are left after 100 000 turns");
        rig.drain(1_000);
        for peer in rig.world.borrow().past() {
            assert_prefix(peer);
            if peer.manner == Manner::Good {
                assert!(peer.is_answered(), "{} of {}", peer.received.len(), peer.plan.len());
                assert_eq!(peer.fate, Fate::Fin);
            }
        }
        let closed = rig.core.borrow_mut().counters.snapshot().closed;
        assert_eq!(closed.get(CloseReason::Forced), 0);
        let world = rig.world.borrow();
        let count =
            |is: &dyn Fn(&Peer) -> bool| world.past().iter().filter(|peer| is(peer)).count() as u64;
        let mute = count(&|peer| !matches!(peer.manner, Manner::Good | Manner::Deaf));
        let late = closed.get(CloseReason::Idle) + closed.get(CloseReason::FirstByte);
        assert!(late <= mute, "{late} timed out of {mute} that may: {closed:?}");
        let stalled = count(&|peer| peer.manner == Manner::Deaf && peer.plan.len() > 8_000);
        let taken_too_slowly =
            closed.get(CloseReason::WriteStall) + closed.get(CloseReason::MinRate);
        assert!(taken_too_slowly >= stalled, "stalled {stalled}: {closed:?}");
        let reset = count(&|peer| peer.fate == Fate::Reset);
        assert!(reset >= taken_too_slowly, "reset {reset}: {closed:?}");
    });
}

#[test]
fn a_drain_at_any_moment_ends_by_its_deadline_and_resets_nobody() {
    for_seeds("drain", 2_000, |seed| {
        let rig = Rig::new(seed, House::Echo);
        rig.run(seed as usize % 200);
        rig.drain(seed % 7 * 300);
        for peer in rig.world.borrow().past() {
            assert_prefix(peer);
            // Only the deadline cuts a peer off that has still something to say, or a configuration
            // that reads nothing out.
            let lingers = rig.core.borrow_mut().settings.linger_ms > 0;
            let forced = seed % 7 < 5;
            let good = matches!(peer.manner, Manner::Good | Manner::Silent);
            let served = forced || !lingers || !good || peer.fate != Fate::Reset;
            let story =
                (peer.manner, peer.sent(), peer.plan.len(), peer.received.len(), peer.unread());
            let closed = rig.core.borrow_mut().counters.snapshot().closed;
            assert!(served, "reset: {story:?}, {closed:?}");
        }
    });
}

#[test]
fn no_handler_upsets_the_books() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<&str>();
        if text != Some(&"a handler that panics") {
            hook(info);
        }
    }));
    for_seeds("mixed", 2_000, |seed| {
        let rig = Rig::new(seed, House::Mixed);
        rig.run(300 + seed as usize % 2_000);
        if seed % 8 == 0 {
            // Whatever the handlers do, the deadlines end every connection.
            let left = || rig.core.borrow_mut().table.len() > 0;
            for _ in 0..20_000 {
                if rig.world.borrow().is_quiet() && !left() {
                    break;
                }
                rig.turn();
            }
            assert!(!left(), "a handler outlives its deadlines");
        }
        rig.drain(seed % 5 * 200);
    });
}

#[test]
fn cores_that_spin_before_they_block_are_among_those() {
    let (found, in_vain) = (Cell::new(0), Cell::new(0));
    for_seeds("spins", 20, |seed| {
        let rig = Rig::new(seed, House::Mixed);
        rig.run(1_000);
        let stats = rig.stats();
        found.set(found.get() + stats.spins_found);
        in_vain.set(in_vain.get() + stats.spins_in_vain);
        rig.drain(100);
    });
    let replays = std::env::var_os("RING_TEST_SEED").is_some() || cfg!(miri);
    let (found, in_vain) = (found.get(), in_vain.get());
    assert!(replays || (found > 0 && in_vain > 0), "{found}, {in_vain}");
}

#[test]
fn a_seed_replays_exactly() {
    let trace = |seed| {
        let rig = Rig::new(seed, House::Mixed);
        rig.run(500);
        rig.drain(100);
        let world = rig.world.borrow();
        (world.trace, world.now_ns())
    };
    for seed in [1, 77, 4242] {
        assert_eq!(trace(seed), trace(seed), "seed {seed}");
    }
    assert_ne!(trace(1), trace(2));
}

/// Two cores whose turns alternate, each with its half of the peers; all get their bytes back.
fn serve_on_two_cores(seed: u64, mut peer: impl FnMut(&mut Rng) -> Peer, peers: usize) {
    let mut rng = Rng::new(seed);
    let worlds = (0..2).map(|core| {
        let coming = (0..peers / 2).map(|_| peer(&mut rng)).collect();
        World::new(seed + core, 64, 1024, coming)
    });
    let rigs = Rig::cores(worlds.collect(), Rng::new(seed), House::Echo, peers);
    for rig in &rigs {
        rig.run(0);
    }
    while rigs.iter().any(|rig| !rig.world.borrow().is_quiet()) {
        for rig in &rigs {
            rig.turn();
        }
    }
    let mut ended = 0;
    for rig in &rigs {
        rig.drain(1_000);
        for peer in rig.world.borrow().past() {
            assert_prefix(peer);
            assert!(peer.manner != Manner::Good || peer.is_answered());
            ended += 1;
        }
    }
    assert_eq!(ended, peers);
}

#[test]
fn five_megabytes_each_way_through_200_connections_on_2_simulated_cores() {
    for_seeds("5 MB", 1, |seed| {
        serve_on_two_cores(seed, |rng| Peer::with(rng, Manner::Good, 25_000, 4_000), 200);
    });
}

#[test]
fn one_byte_writes_are_answered_over_the_simulator() {
    for_seeds("bytes", 4, |seed| {
        serve_on_two_cores(seed, |rng| Peer::with(rng, Manner::Good, 300, 1), 20);
    });
}

#[test]
fn ten_thousand_connects_that_reset_leave_nothing_in_the_simulator() {
    for_seeds("resets", 1, |seed| {
        let peers = if cfg!(miri) { 20 } else { 10_000 };
        serve_on_two_cores(seed, |rng| Peer::with(rng, Manner::Resets, 8, 8), peers);
    });
}
