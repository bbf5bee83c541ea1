//! Connections that one core has accepted and another one is to serve: wherever they are when
//! something ends, they are served or ended, and counted once.

use std::cell::Cell;
use std::sync::Arc;

use super::peer::{Fate, Manner, Peer};
use super::rig::Rig;
use super::tests::for_seeds;
use super::{Rng, World};
use crate::caps::Places;
use crate::config::{Balance, Config};
use crate::conn::Connection;
use crate::error::Result;
use crate::post::Message;
use crate::report::CloseReason;

async fn echo(mut conn: Connection) -> Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}

/// Cores of one server that move connections, and have none yet.
fn cores(seed: u64, count: usize, config: Config) -> Vec<Rig> {
    let worlds = (0..count as u64).map(|n| World::new(seed ^ (n << 32), 16, 256, Vec::new()));
    // How long a turn lasts in real time says nothing here.
    let config = config.balance(Balance::Least).stall_ms(0).buffer_bytes(256);
    // Each world has a clock of its own, and the silent are to stay.
    let config = config.first_byte_ms(3_600_000).idle_ms(3_600_000).lifetime_ms(3_600_000_000);
    let rigs = Rig::several(worlds.collect(), config, echo);
    rigs.iter().for_each(|rig| rig.run(0));
    rigs
}

/// A peer comes to a core, which accepts it and keeps it or moves it on.
fn arrive(rig: &Rig, peer: Peer) {
    let taken = |rig: &Rig| {
        let stats = rig.stats();
        stats.accepted - stats.moved_in + stats.moved_out
    };
    let before = taken(rig);
    rig.world.borrow_mut().arrive(peer);
    rig.turn_until("it is accepted", |rig| taken(rig) > before);
}

fn silent(rng: &mut Rng) -> Peer {
    Peer::with(rng, Manner::Silent, 0, 1)
}

fn places(rig: &Rig) -> Arc<Places> {
    Arc::clone(rig.core.borrow_mut().lease.places())
}

/// One core keeps the first, and the second one is on its way to the other core.
fn with_one_on_its_way(seed: u64, peer: Peer) -> (Rig, Rig) {
    let mut rigs = cores(seed, 2, Config::default().connections_max(10));
    let (there, here) = (rigs.pop().expect("the second"), rigs.pop().expect("the first"));
    arrive(&here, silent(&mut Rng::new(seed)));
    arrive(&here, peer);
    assert_eq!((here.stats().moved_out, here.stats().live), (1, 1), "seed {seed}");
    assert_eq!((there.stats().accepted, load_of(&there)), (0, 1), "seed {seed}");
    (here, there)
}

fn turn_all(rigs: &[Rig]) {
    for rig in rigs {
        rig.turn();
    }
}

/// How many are on their way to a core.
fn load_of(rig: &Rig) -> usize {
    rig.core.borrow_mut().post.load.coming()
}

#[test]
fn all_that_come_to_one_core_are_shared_by_three_and_served() {
    for_seeds("shared", 100, |seed| {
        let mut rng = Rng::new(seed);
        let rigs = cores(seed, 3, Config::default().connections_max(300));
        for n in 1..=30 {
            arrive(&rigs[0], Peer::with(&mut rng, Manner::Silent, 0, 1));
            turn_all(&rigs[1..]);
            let live: Vec<u64> = rigs.iter().map(|rig| rig.stats().live).collect();
            let apart = live.iter().max().unwrap() - live.iter().min().unwrap();
            assert!(apart <= 1 && live.iter().sum::<u64>() == n, "seed {seed}, {n}: {live:?}");
        }
        for _ in 0..9 {
            arrive(&rigs[0], Peer::with(&mut rng, Manner::Good, 400, 50));
        }
        let answered = |rig: &Rig| {
            let world = rig.world.borrow();
            world.past().iter().filter(|peer| peer.is_answered() && peer.fate == Fate::Fin).count()
        };
        for _ in 0..10_000 {
            turn_all(&rigs);
            if rigs.iter().map(answered).sum::<usize>() == 9 {
                break;
            }
        }
        let all: Vec<usize> = rigs.iter().map(answered).collect();
        assert!(all.iter().all(|count| *count > 0), "seed {seed}: {all:?}");
        assert_eq!(all.iter().sum::<usize>(), 9, "seed {seed}: {all:?}");
        rigs.iter().for_each(|rig| rig.drain(1_000));
    });
}

/// It comes to a core that has begun to drain, and is served like one that was accepted then.
#[test]
fn who_is_on_the_way_to_a_core_that_drains_is_served_there() {
    for_seeds("drains meanwhile", 100, |seed| {
        let mut rng = Rng::new(!seed);
        let (here, there) = with_one_on_its_way(seed, Peer::with(&mut rng, Manner::Good, 1, 1));
        there.core.borrow_mut().retire_at(u64::MAX - 1);
        while there.turn() {}
        assert_eq!(there.shut_down(), None);
        let stats = there.stats();
        assert_eq!((stats.moved_in, stats.accepted, stats.closed.total()), (1, 1, 1));
        let world = there.world.borrow();
        assert!(world.past().iter().all(|peer| peer.is_answered() && peer.fate == Fate::Fin));
        // Nobody is moved to it any more.
        arrive(&here, silent(&mut rng));
        assert_eq!((here.stats().live, here.stats().moved_out), (2, 1));
        here.drain(1_000);
        assert_eq!(places(&here).free(), 10);
    });
}

/// The other core has said that it sends one, and takes its time.
#[test]
fn a_core_that_drains_waits_for_what_was_announced_and_for_no_more() {
    let there = cores(1, 2, Config::default()).remove(1);
    assert!(there.core.borrow_mut().post.load.announce());
    there.core.borrow_mut().retire_at(u64::MAX - 1);
    for _ in 0..100 {
        assert!(there.turn(), "somebody is on the way");
    }
    assert!(!there.core.borrow_mut().post.load.announce(), "nobody else may come");
    // It was kept after all, and the core is woken.
    there.core.borrow_mut().post.load.arrived();
    assert!(there.core.borrow_mut().post.post(Message::Look).is_ok());
    there.turn_until("it is down", |rig| {
        rig.core.borrow_mut().drain.phase() == crate::drain::Phase::Down
    });
}

/// A core that fails with a connection in its mail.
#[test]
fn who_is_on_the_way_to_a_core_that_fails_sees_a_fin_and_is_counted() {
    for_seeds("fails meanwhile", 100, |seed| {
        let mut rng = Rng::new(!seed);
        let (here, there) = with_one_on_its_way(seed, Peer::with(&mut rng, Manner::Good, 300, 50));
        assert_eq!(there.shut_down(), None);
        let stats = there.stats();
        assert_eq!((stats.moved_in, stats.accepted, load_of(&there)), (1, 1, 0));
        assert_eq!(stats.closed.get(CloseReason::Forced), 1);
        assert!(there.world.borrow().past().iter().all(|peer| peer.fate == Fate::Fin));
        // Whoever has not heard of it keeps what it can't deliver.
        there.core.borrow_mut().post.load.open();
        arrive(&here, silent(&mut rng));
        assert_eq!((here.stats().live, here.stats().moved_out, load_of(&there)), (2, 1, 0));
        here.drain(1_000);
        assert_eq!(places(&here).free(), 10);
    });
}

/// Scenario 64, in part.
#[test]
fn nobody_is_moved_in_a_drain() {
    for_seeds("no moves", 100, |seed| {
        let mut rng = Rng::new(seed);
        let rigs = cores(seed, 2, Config::default().lameduck_ms(5));
        arrive(&rigs[0], silent(&mut rng));
        rigs[0].control.begin_drain_at(rigs[0].world.borrow().now_ns() + 1_000_000_000);
        rigs[0].turn();
        let before = rigs[0].stats().accepted;
        for _ in 0..5 {
            rigs[0].world.borrow_mut().arrive(silent(&mut rng));
        }
        rigs.iter().for_each(|rig| rig.drain(1_000));
        let stats = rigs[0].stats();
        assert_eq!((stats.accepted - before, stats.moved_out), (5, 0), "seed {seed}");
    });
}

/// A core that has all that one core may have passes on what comes to it, as the others have room.
#[test]
fn a_full_core_passes_on_what_others_have_room_for() {
    for_seeds("full core", 50, |seed| {
        let mut rng = Rng::new(seed);
        let rigs = cores(seed, 2, Config::default().connections_max(20).evict_percent(0));
        // The second one is away while the first fills up, and then comes back.
        rigs[1].core.borrow_mut().post.load.close();
        (0..15).for_each(|_| arrive(&rigs[0], silent(&mut rng)));
        rigs[1].core.borrow_mut().post.load.open();
        arrive(&rigs[0], silent(&mut rng));
        arrive(&rigs[0], silent(&mut rng));
        rigs[1].turn();
        let live = |rig: &Rig| rig.stats().live;
        assert_eq!((live(&rigs[0]), live(&rigs[1])), (15, 2), "seed {seed}");
        rigs.iter().for_each(|rig| rig.drain(1_000));
        assert_eq!(places(&rigs[0]).free(), 20);
    });
}

/// There is no place for the one that waits at it, until one ends elsewhere: then its core is
/// told, and looks at once, not when it would have looked again.
#[test]
fn a_full_core_that_is_granted_a_place_passes_the_next_one_on_at_once() {
    for_seeds("granted", 50, |seed| {
        let mut rng = Rng::new(seed);
        let rigs = cores(seed, 2, Config::default().connections_max(20).evict_percent(0));
        rigs[1].core.borrow_mut().post.load.close();
        (0..15).for_each(|_| arrive(&rigs[0], silent(&mut rng)));
        rigs[1].core.borrow_mut().post.load.open();
        (0..5).for_each(|_| arrive(&rigs[1], silent(&mut rng)));
        let live = || [rigs[0].stats().live, rigs[1].stats().live];
        assert_eq!(live(), [15, 5], "seed {seed}");
        let before = rigs[0].stats().accept_pauses;
        rigs[0].world.borrow_mut().arrive(silent(&mut rng));
        rigs[0].turn_until("it waits for a place", |rig| rig.stats().accept_pauses > before);
        rigs[1].turn();
        // One place is for the next that comes there.
        rigs[1].world.borrow_mut().peers().take(2).for_each(Peer::half_close);
        rigs[1].turn_until("two have left", |rig| rig.stats().live == 3);
        let begun_ns = rigs[0].world.borrow().now_ns();
        rigs[0].turn_until("it is passed on", |rig| rig.stats().moved_out == 1);
        let took_ms = (rigs[0].world.borrow().now_ns() - begun_ns) / 1_000_000;
        assert!(took_ms < 20, "seed {seed}: after {took_ms} ms");
        rigs[1].turn_until("it is there", |rig| rig.stats().live == 4);
        rigs.iter().for_each(|rig| rig.drain(1_000));
        assert_eq!(places(&rigs[0]).free(), 20);
    });
}

/// Peers of all manners come to three cores that share few places, and a drain begins at any
/// moment, with connections on their way in any direction.
#[test]
fn a_drain_in_the_middle_of_moves_loses_nobody() {
    let moved = Cell::new(0);
    for_seeds("drain amid moves", 200, |seed| {
        let mut rng = Rng::new(seed);
        let config = Config::default().connections_max(18).accept_budget(1 + rng.below(8) as u32);
        let config = config.overload(match rng.below(2) {
            0 => crate::config::Overload::Queue,
            _ => crate::config::Overload::Reject,
        });
        let rigs = cores(seed, 3, config);
        for rig in &rigs {
            rig.world.borrow_mut().fault_percent = rng.below(12);
        }
        let total = 60;
        let mut come = 0;
        let until = rng.below(300);
        for turn in 0..until {
            while come < total && come < turn * total / 200 {
                let core = if rng.percent(70) { 0 } else { rng.below(3) as usize };
                let peer = Peer::new(&mut rng);
                rigs[core].world.borrow_mut().arrive(peer);
                come += 1;
            }
            let rig = rng.below(3) as usize;
            rigs[rig].turn();
        }
        let deadline_ns = rigs[0].world.borrow().now_ns() + rng.below(100) * 1_000_000;
        rigs[0].control.begin_drain_at(deadline_ns);
        let mut up = [true; 3];
        for turns in 0.. {
            assert!(turns < 100_000, "seed {seed}: the drain goes on for ever");
            let core = rng.below(3) as usize;
            up[core] = up[core] && rigs[core].turn();
            if up == [false; 3] {
                break;
            }
        }
        for rig in &rigs {
            assert_eq!(rig.shut_down(), None, "seed {seed}");
        }
        let stats: Vec<_> = rigs.iter().map(Rig::stats).collect();
        let sum = |of: fn(&crate::stats::CoreStats) -> u64| stats.iter().map(of).sum::<u64>();
        assert_eq!(sum(|core| core.moved_out), sum(|core| core.moved_in), "seed {seed}");
        assert!(stats.iter().all(|core| core.accepted == core.closed.total()), "seed {seed}");
        assert_eq!(sum(|core| core.accepted) + sum(|core| core.queue_abandoned), come);
        assert_eq!(rigs.iter().map(load_of).sum::<usize>(), 0, "seed {seed}");
        assert_eq!(places(&rigs[0]).free(), 18, "seed {seed}");
        moved.set(moved.get() + sum(|core| core.moved_out));
    });
    assert!(moved.get() > 0 || std::env::var("RING_TEST_SEED").is_ok(), "nothing was tried");
}
