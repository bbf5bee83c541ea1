//! The rules of outbound connections: attempts that complete, fail and are cancelled in any order,
//! and what a drain and a shortage of places make of those that are established.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use super::hands::{Gate, connect, drain_for_a_second, finish, settle};
use super::peer::{Fate, Manner, Peer};
use super::rig::{House, Rig};
use super::tests::for_seeds;
use super::{Met, Rng, World};
use crate::config::{Config, HalfClose};
use crate::conn::Connection;
use crate::error::ErrorKind;
use crate::net;
use crate::report::CloseReason;
use crate::time::timeout;
use crate::token::Kind;

/// What the handler of a test was told.
type Told = Rc<RefCell<Vec<Result<Vec<u8>, ErrorKind>>>>;

/// A core whose handlers connect within 10 ms and then receive once.
fn receives_once(config: Config, text: &'static str) -> (Rig, Told) {
    let told = Told::default();
    let tell = Rc::clone(&told);
    let rig = Rig::by_hand(config, move |client| {
        let tell = Rc::clone(&tell);
        async move {
            let result = async {
                let limit = Duration::from_millis(10);
                let mut upstream = net::connect(text).timeout(limit).await?;
                let chunk = upstream.recv().await?;
                Ok::<_, crate::Error>(chunk.map_or(Vec::new(), |chunk| chunk.to_vec()))
            };
            let result = result.await.map_err(|error| error.kind());
            tell.borrow_mut().push(result);
            drop(client);
            Ok(())
        }
    });
    (rig, told)
}

fn in_flight(rig: &Rig, kind: Kind) -> usize {
    rig.world.borrow().in_flight(kind)
}

fn work(rig: &Rig, kind: Kind) {
    rig.world.borrow_mut().work_on(kind);
    settle(rig);
}

/// Every receive gets what there is.
fn hear(rig: &Rig) {
    rig.world.borrow_mut().work_on_all(Kind::Receive);
    settle(rig);
}

fn meet(rig: &Rig, met: Met) {
    rig.world.borrow_mut().orders.connects.push_back(met);
}

/// Acts on the upstream, whose descriptor is the latest; on the client while there is none.
fn upstream(rig: &Rig, act: impl FnOnce(&mut Peer)) {
    let world: &mut World = &mut rig.world.borrow_mut();
    act(world.streams.values_mut().last().expect("it is connected"));
}

const ADDR: &str = "192.0.2.1:80";

/// `Rig::check` holds the attempts against the kernel and the counters after every turn.
#[test]
fn each_attempt_ends_in_one_class_whatever_the_kernel_does() {
    let classes = RefCell::new([0; 6]);
    for_seeds("connects", 600, |seed| {
        let mut rng = Rng::new(seed);
        let peers = (0..20).map(|_| Peer::new(&mut rng)).collect();
        let world = World::new(seed, 16, 256, peers);
        let most = 20 + rng.below(40) as usize;
        let rig = Rig::cores(vec![world], rng, House::Outbound, most).remove(0);
        rig.run(100 + seed as usize % 800);
        rig.drain(seed % 5 * 200);
        let stats = rig.stats();
        let failures = stats.connect_failures().map(|(_, count)| count);
        for (class, count) in [stats.connected].into_iter().chain(failures).enumerate() {
            classes.borrow_mut()[class] += count;
        }
    });
    let replays = std::env::var_os("RING_TEST_SEED").is_some() || cfg!(miri);
    let classes = classes.into_inner();
    assert!(replays || classes.iter().all(|count| *count > 20), "{classes:?}");
}

#[test]
fn whoever_waits_is_told_of_the_deadline_at_once_and_the_socket_outlives_its_operations() {
    let (rig, told) = receives_once(Config::default(), ADDR);
    connect(&rig);
    assert_eq!((in_flight(&rig, Kind::Connect), rig.stats().connecting), (1, 1));
    rig.world.borrow_mut().pass_ms(11);
    settle(&rig);
    assert_eq!(told.take(), [Err(ErrorKind::TimedOut)]);
    let stats = rig.stats();
    assert_eq!((stats.connects_timed_out, stats.connecting, stats.connected), (1, 0, 0));
    // The kernel still works on it: the world would fail a close of the socket now.
    assert_eq!(rig.core.borrow_mut().outbound.attempts.len(), 1);
    rig.world.borrow_mut().orders.cancels_missed = 3;
    for _ in 0..3 {
        work(&rig, Kind::CancelConnect);
        let both = [Kind::Connect, Kind::CancelConnect].map(|kind| in_flight(&rig, kind));
        assert_eq!(both, [1, 1], "it missed, and tries again");
    }
    work(&rig, Kind::CancelConnect);
    work(&rig, Kind::Connect);
    assert_eq!(rig.core.borrow_mut().outbound.attempts.len(), 0);
    finish(&rig);
}

#[test]
fn a_connection_that_is_established_too_late_is_closed_and_nobodys() {
    for dropped in [false, true] {
        let (rig, told) = receives_once(Config::default(), ADDR);
        connect(&rig);
        if dropped {
            // Its client's handler is dropped with everything that it waits for.
            let id = rig.core.borrow_mut().table.ids().next().expect("the client");
            rig.core.borrow_mut().drop_tasks(id);
            rig.core.bury();
        } else {
            rig.world.borrow_mut().pass_ms(11);
        }
        settle(&rig);
        meet(&rig, Met::Peer(Peer::by_hand()));
        work(&rig, Kind::Connect);
        assert_eq!(rig.stats().connected, 0, "dropped: {dropped}");
        work(&rig, Kind::CancelConnect);
        assert_eq!(rig.core.borrow_mut().outbound.attempts.len(), 0);
        let stats = rig.stats();
        let classes = (stats.connects_timed_out, stats.connects_cancelled);
        assert_eq!(classes, if dropped { (0, 1) } else { (1, 0) });
        assert_eq!(told.take().len(), usize::from(!dropped));
        finish(&rig);
        let world = rig.world.borrow();
        assert!(world.past().iter().all(|peer| peer.fate == Fate::Fin), "{:?}", world.past());
    }
}

#[test]
fn a_connection_that_is_established_in_the_turn_of_its_deadline_is_in_time() {
    let (rig, told) = receives_once(Config::default(), ADDR);
    connect(&rig);
    meet(&rig, Met::Peer(Peer::by_hand()));
    rig.world.borrow_mut().work_on(Kind::Connect);
    rig.world.borrow_mut().pass_ms(1_000);
    settle(&rig);
    assert_eq!((rig.stats().connected, told.borrow().len()), (1, 0));
    upstream(&rig, |peer| peer.say(b"hello"));
    hear(&rig);
    assert_eq!(told.take(), [Ok(b"hello".to_vec())]);
    finish(&rig);
}

#[test]
fn an_established_connection_that_nobody_takes_is_closed() {
    let gate = Gate::default();
    let opens = gate.clone();
    let rig = Rig::by_hand(Config::default(), move |client| {
        let gate = gate.clone();
        async move {
            let mut attempt = std::pin::pin!(net::connect(ADDR).into_future());
            // Asked once, and then forgotten.
            let first = std::future::poll_fn(|cx| {
                assert!(attempt.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            });
            first.await;
            gate.passed().await;
            drop(client);
            Ok(())
        }
    });
    connect(&rig);
    meet(&rig, Met::Peer(Peer::by_hand()));
    work(&rig, Kind::Connect);
    assert_eq!((rig.stats().connecting, rig.stats().connected), (1, 0));
    rig.world.borrow_mut().pass_ms(1_500);
    settle(&rig);
    assert_eq!((rig.stats().connecting, rig.stats().connects_timed_out), (0, 1));
    opens.open();
    settle(&rig);
    assert_eq!(rig.core.borrow_mut().outbound.attempts.len(), 0);
    finish(&rig);
}

#[test]
fn a_unix_socket_that_has_no_room_is_tried_again_until_its_deadline() {
    for room in [false, true] {
        let (rig, told) = receives_once(Config::default(), "unix:@x");
        connect(&rig);
        assert_eq!((in_flight(&rig, Kind::Connect), rig.stats().connecting), (0, 1));
        for ms in 1..=11 {
            if room && ms == 3 {
                meet(&rig, Met::Peer(Peer::by_hand()));
            }
            rig.world.borrow_mut().pass_ms(1);
            rig.turn();
        }
        settle(&rig);
        assert_eq!(rig.stats().connected, u64::from(room));
        assert_eq!(rig.stats().connects_timed_out, u64::from(!room));
        if room {
            upstream(&rig, |peer| peer.say(b"hello"));
            hear(&rig);
        }
        let outcome = if room { Ok(b"hello".to_vec()) } else { Err(ErrorKind::TimedOut) };
        assert_eq!(told.take(), [outcome]);
        finish(&rig);
    }
}

#[test]
fn who_waits_for_an_answer_is_not_told_of_a_drain_or_a_shortage_but_gets_it() {
    let (rig, told) = receives_once(Config::default().evict_percent(10).connections_max(2), ADDR);
    // The accept keeps a place, so there is none for the upstream.
    connect(&rig);
    assert_eq!(told.take(), [Err(ErrorKind::Resource)]);
    finish(&rig);
    assert_eq!((rig.stats().connects_failed, rig.stats().connects), (1, 1));

    let (rig, told) = receives_once(Config::default().evict_percent(10).connections_max(20), ADDR);
    connect(&rig);
    upstream(&rig, |client| client.say(b"question"));
    hear(&rig);
    meet(&rig, Met::Peer(Peer::by_hand()));
    work(&rig, Kind::Connect);
    // Of 20 places 3 are taken, which is more than a tenth; nobody else is idle.
    for _ in 0..200 {
        rig.world.borrow_mut().pass_ms(200);
        rig.turn();
    }
    assert_eq!((rig.stats().live, told.borrow().len()), (2, 0), "it is not evicted");
    rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
    for _ in 0..100 {
        rig.world.borrow_mut().pass_ms(10);
        rig.turn();
    }
    assert_eq!(told.borrow().len(), 0, "it still waits");
    upstream(&rig, |peer| peer.say(b"answer"));
    hear(&rig);
    assert_eq!(told.take(), [Ok(b"answer".to_vec())]);
    finish(&rig);
    let closed = rig.stats().closed;
    let reasons = [CloseReason::Served, CloseReason::Drained, CloseReason::Evicted];
    // The client says no more, and is lingered for.
    assert_eq!(reasons.map(|reason| closed.get(reason)), [1, 0, 0], "{closed:?}");
}

#[test]
fn the_end_of_an_answer_ends_no_connection_whose_handler_is_busy_with_it() {
    let (gate, got) = (Gate::default(), Rc::<RefCell<Vec<u8>>>::default());
    let (opens, gets) = (gate.clone(), Rc::clone(&got));
    let config = Config::default().half_close(HalfClose::Abort).half_close_ms(10);
    let rig = Rig::by_hand(config, move |client| {
        let (gate, got) = (gate.clone(), Rc::clone(&gets));
        async move {
            let mut upstream = net::connect(ADDR).await?;
            gate.passed().await;
            while let Some(chunk) = upstream.recv().await? {
                got.borrow_mut().extend_from_slice(&chunk);
            }
            drop(client);
            Ok(())
        }
    });
    connect(&rig);
    meet(&rig, Met::Peer(Peer::by_hand()));
    work(&rig, Kind::Connect);
    upstream(&rig, |peer| peer.say(b"all of it"));
    hear(&rig);
    upstream(&rig, Peer::half_close);
    hear(&rig);
    rig.world.borrow_mut().pass_ms(1_000);
    settle(&rig);
    opens.open();
    settle(&rig);
    assert_eq!(got.borrow().as_slice(), b"all of it");
    finish(&rig);
    let closed = rig.stats().closed;
    assert_eq!(closed.get(CloseReason::HalfClosed), 0, "{closed:?}");
}

#[test]
fn what_is_connected_is_given_the_time_that_a_caller_leaves() {
    // A caller's own limit around the whole cancels it, and is no failure of the upstream's.
    let rig = Rig::by_hand(Config::default(), |client| async move {
        let late = timeout(Duration::from_millis(5), net::connect(ADDR).into_future()).await;
        assert_eq!(late.map(drop).expect_err("late").kind(), ErrorKind::TimedOut);
        drop(client);
        Ok(())
    });
    connect(&rig);
    rig.world.borrow_mut().pass_ms(6);
    settle(&rig);
    assert_eq!((rig.stats().connects_cancelled, rig.stats().connects_timed_out), (1, 0));
    finish(&rig);
}

/// Whoever holds it, such as a core's state, may go only with the core: what was sent on it is
/// waited for as long as there is time.
#[test]
fn a_drain_waits_for_what_was_sent_on_a_connection_that_outlives_its_handler() {
    for in_time in [true, false] {
        // It goes with the handler, when the core does.
        let held = Rc::<RefCell<Vec<Connection>>>::default();
        let config = Config::default().send_queue_bytes(1 << 20);
        let rig = Rig::by_hand(config, move |client| {
            let held = Rc::clone(&held);
            async move {
                let mut upstream = net::connect(ADDR).await?;
                upstream.send(vec![7; 20_000]).await?;
                held.borrow_mut().push(upstream);
                drop(client);
                Ok(())
            }
        });
        connect(&rig);
        upstream(&rig, Peer::half_close);
        hear(&rig);
        // One that is deaf is so when it is up to itself, too.
        meet(&rig, Met::Peer(Peer::with(&mut Rng::new(0), Manner::Deaf, 0, 1)));
        work(&rig, Kind::Connect);
        work(&rig, Kind::Send);
        drain_for_a_second(&rig);
        assert_eq!((rig.stats().live, in_flight(&rig, Kind::Send)), (1, 1));
        if in_time {
            while in_flight(&rig, Kind::Send) > 0 {
                upstream(&rig, Peer::take_output);
                rig.world.borrow_mut().work_on(Kind::Send);
                rig.turn();
            }
        }
        finish(&rig);
        let (stats, world) = (rig.stats(), rig.world.borrow());
        let got = world.past().iter().map(|peer| peer.received.len()).sum::<usize>();
        let reason = if in_time { CloseReason::Drained } else { CloseReason::Forced };
        assert_eq!(got == 20_000, in_time, "{got} bytes");
        assert_eq!(stats.closed.get(reason), 1, "{:?}", stats.closed);
    }
}
