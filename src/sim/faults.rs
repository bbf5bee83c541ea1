//! Whole runs in a simulated world whose kernel is short of something, or whose calls fail, as the
//! test orders. Cases and scenarios are numbered as in `by_hand.rs`.

use std::collections::VecDeque;

use super::peer::{Manner, Peer};
use super::promises::{assert_all_answered, echo, world};
use super::rig::Rig;
use super::rng::Rng;
use super::tests::for_seeds;
use crate::config::Config;
use crate::driver::Outcome;
use crate::local::Entered;
use crate::token::{Kind, Token};

/// Case 2, scenario 59: a core that is out of descriptors waits, longer each time.
#[test]
fn a_shortage_of_descriptors_is_met_by_few_tries_and_then_everyone_is_served() {
    for_seeds("shortage", 50, |seed| {
        let world = world(seed, 20, |rng| Peer::with(rng, Manner::Good, 100, 50));
        let end_ns = world.borrow().now_ns() + 50_000_000;
        world.borrow_mut().orders.no_descriptor_until_ns = end_ns;
        let rig = Rig::with(world, Config::default(), echo);
        rig.run(0);
        while rig.world.borrow().now_ns() < end_ns {
            rig.turn();
        }
        let tries = rig.stats().accept_errors;
        assert!((1..=5).contains(&tries), "{tries} tries in 50 ms");
        rig.turn_until("all are accepted", |rig| rig.stats().accepted == 20);
        let took_ms = (rig.world.borrow().now_ns() - end_ns) / 1_000_000;
        assert!(took_ms < 100, "accepted {took_ms} ms after the shortage");
        rig.run(100_000);
        assert_all_answered(&rig, 20);
    });
}

/// Cases 31 to 33: what was pushed before an error is in flight all the same, once.
#[test]
fn calls_that_are_interrupted_or_fail_in_bursts_lose_nothing_and_repeat_nothing() {
    for_seeds("interrupted", 50, |seed| {
        let world = world(seed, 20, |rng| Peer::with(rng, Manner::Good, 3_000, 400));
        world.borrow_mut().orders.interrupt_every = 3;
        let rig = Rig::with(world, Config::default().buffers(8).buffer_bytes(256), echo);
        rig.run(0);
        let mut rng = Rng::new(seed);
        for _ in 0..100_000 {
            if rig.world.borrow().is_quiet() {
                break;
            }
            if rng.percent(5) {
                let errors = [libc::EBUSY, libc::EAGAIN, libc::ENOMEM, libc::EINTR];
                let burst = (0..rng.below(8)).map(|_| errors[rng.below(4) as usize]);
                let burst: VecDeque<i32> = burst.collect();
                rig.world.borrow_mut().orders.enter_errors = burst;
            }
            rig.turn();
        }
        rig.world.borrow_mut().orders.enter_errors.clear();
        assert_all_answered(&rig, 20);
    });
}

/// Case 31: an error that no waiting helps ends the core, and still nothing is freed in flight.
#[test]
fn a_call_that_fails_for_good_ends_the_core_with_its_books_in_order() {
    for_seeds("broken ring", 200, |seed| {
        let world = world(seed, 10, Peer::new);
        let rig = Rig::with(world, Config::default(), echo);
        rig.run(seed as usize % 60);
        rig.world.borrow_mut().orders.enter_errors.push_back(libc::EBADF);
        {
            let _entered = Entered::new(&rig.core);
            let error = rig.core.turn().expect_err("the ring is gone");
            assert!(error.to_string().contains("io_uring_enter"), "{error}");
        }
        rig.shut_down();
        let stats = rig.stats();
        assert_eq!((stats.accepted, stats.live), (stats.closed.total(), 0));
        assert_eq!(rig.world.borrow().open_sockets(), 0);
        let (_, leased, _) = rig.core.borrow_mut().driver.pool().census();
        assert_eq!((leased, rig.core.borrow_mut().tasks.len()), (0, 0));
    });
}

/// Scenario 54: few slots and descriptors, thousands of tenants, and answers to former ones.
#[test]
fn thousands_of_tenants_of_three_slots_get_their_own_bytes_and_no_others() {
    for_seeds("churn", 10, |seed| {
        let peers = if cfg!(miri) { 20 } else { 1_000 };
        let mut kinds = Rng::new(seed);
        let world = world(seed, peers, |rng| {
            let manner = if kinds.percent(10) { Manner::Resets } else { Manner::Good };
            Peer::with(rng, manner, 60, 40)
        });
        let config = Config::default().connections_max(3).linger_ms(0);
        let rig = Rig::with(world, config, echo);
        rig.world.borrow_mut().fault_percent = seed % 10;
        rig.core.borrow_mut().table.age(0x00FF_FF00);
        rig.run(0);
        let mut rng = Rng::new(seed);
        let mut injected = 0;
        while !rig.world.borrow().is_quiet() {
            if rng.percent(20)
                && let Some(id) = rig.core.borrow_mut().table.ids().next()
            {
                let late = id.generation.wrapping_sub(1 + rng.below(3) as u32);
                let buffer = rig.world.borrow_mut().take_buffer();
                let token = Token::new(Kind::Receive, id.index, late);
                rig.world.borrow_mut().inject(token, Outcome::Received(Ok(buffer)));
                injected += 1;
            }
            rig.turn();
        }
        rig.turn();
        let stats = rig.stats();
        assert!(stats.stale >= injected / 2 && injected > 0, "{} of {injected}", stats.stale);
        assert!(stats.live_max <= 3);
        rig.drain(1_000);
        let world = rig.world.borrow();
        assert_eq!(world.past().len(), peers);
        for peer in world.past() {
            assert!(peer.plan.starts_with(&peer.received), "the bytes of another");
            assert!(peer.manner != Manner::Good || peer.is_answered());
        }
    });
}
