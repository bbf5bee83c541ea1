//! What the books say of a simulated core, against what is known from outside: the list of the
//! connections over thousands of seeds.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::World;
use super::peer::{Manner, Peer};
use super::rig::{House, Rig};
use super::rng::Rng;
use super::tests::for_seeds;
use crate::census::Census;
use crate::config::Config;
use crate::connections::{ConnectionInfo, ConnectionState, Connections, Direction};
use crate::core::Core;
use crate::driver::Op;
use crate::inspect::{inspect, list_now};
use crate::local::Entered;
use crate::report::CloseReason;
use crate::table::Id;

/// Lists the connections and checks the list against the table, the world and the gauges.
fn check_list(rig: &Rig) -> Connections {
    let list = list_now(&rig.core, &rig.control);
    let core = rig.core.borrow_mut();
    let listed: Vec<Id> = list.iter().map(|info| info.id.id).collect();
    assert_eq!(listed, core.table.ids().collect::<Vec<_>>(), "exactly the table");
    let world = rig.world.borrow();
    let mut received = 0;
    for info in &list {
        let entry = core.table.get(info.id.id).expect("it is in the table");
        let peer = entry.socket.as_ref().and_then(|socket| world.streams.get(&socket.name().0));
        check_info(info, peer);
        received += info.bytes_in;
    }
    assert!(received <= core.counters.snapshot().bytes_received);
    list
}

/// Whether what is listed can be true of this peer.
fn check_info(info: &ConnectionInfo, peer: Option<&Peer>) {
    assert!(info.age >= info.without_progress, "{info:?}");
    assert!(info.age > Duration::ZERO || info.without_progress.is_zero(), "{info:?}");
    assert_eq!(info.ended.is_some(), info.state == ConnectionState::Ended, "{info:?}");
    assert!(info.state == ConnectionState::Ended || peer.is_some(), "open: {info:?}");
    let Some(peer) = peer else { return };
    // What was sent is received, on its way, or with the kernel.
    assert!(info.bytes_in <= peer.sent() as u64, "{info:?}");
    match info.state {
        ConnectionState::New => assert_eq!(info.bytes_in, 0, "{info:?}"),
        ConnectionState::HalfClosed => assert!(peer.is_at_end(), "{info:?}"),
        ConnectionState::Sending => assert!(info.bytes_queued > 0, "{info:?}"),
        ConnectionState::Idle | ConnectionState::Receiving => {
            assert_eq!((info.bytes_unread, info.bytes_queued), (0, 0), "{info:?}");
            let owned = info.handler.is_some() || info.direction == Direction::Outbound;
            assert!(owned, "{info:?}");
        }
        _ => {}
    }
}

#[test]
fn the_list_is_exactly_the_table_and_its_states_fit_at_every_turn() {
    let seen = RefCell::new(BTreeSet::new());
    for_seeds("list", 1_000, |seed| {
        let rig = Rig::new(seed, House::Mixed);
        rig.run(0);
        for _ in 0..100 + seed % 400 {
            rig.turn();
            for info in check_list(&rig) {
                seen.borrow_mut().insert(info.state.as_str());
            }
        }
        rig.drain(seed % 5 * 200);
        assert!(check_list(&rig).is_empty());
    });
    if std::env::var_os("RING_TEST_SEED").is_none() && !cfg!(miri) {
        // The handlers there read no messages.
        let all = ConnectionState::ALL.len() - 1;
        assert_eq!(seen.borrow().len(), all, "the seeds have met {:?}", seen.borrow());
    }
}

#[test]
fn who_waits_for_the_rest_of_a_message_is_receiving_and_then_idle() {
    let config = Config::default().buffer_bytes(256);
    let world = World::new(7, 8, 256, vec![Peer::with(&mut Rng::new(7), Manner::Silent, 0, 1)]);
    let rig = Rig::with(world, config, |mut conn| async move {
        while conn.read_exact(&mut [0; 10]).await.is_ok() {}
        Ok(())
    });
    rig.run(0);
    let is = |rig: &Rig, state| check_list(rig).iter().any(|info| info.state == state);
    rig.turn_until("it is new", |rig| is(rig, ConnectionState::New));
    let send = |count: usize| {
        let mut world = rig.world.borrow_mut();
        let peer = world.streams.values_mut().next().expect("one peer");
        peer.say(&vec![b'x'; count]);
    };
    send(4);
    rig.turn_until("it is receiving", |rig| is(rig, ConnectionState::Receiving));
    send(6);
    rig.turn_until("it is idle", |rig| is(rig, ConnectionState::Idle));
    let list = check_list(&rig);
    assert_eq!((list.len(), list.as_slice()[0].bytes_in), (1, 10));
}

/// Two cores, one of which is not turned: whoever asks gets the other's list, and hears which one
/// is silent and how many it has.
#[test]
fn a_task_gets_the_list_of_the_cores_that_answer_within_their_time() {
    for deaf in [false, true] {
        let peers = |seed| {
            let mut rng = Rng::new(seed);
            World::new(seed, 16, 256, (0..3).map(|_| quiet(&mut rng)).collect())
        };
        let rigs = Rig::cores(vec![peers(1), peers(2)], Rng::new(3), House::Echo, 10);
        for rig in &rigs {
            rig.run(0);
            rig.turn_until("they are there", |rig| rig.core.borrow_mut().table.len() == 3);
        }
        let list: Rc<RefCell<Option<Connections>>> = Rc::default();
        {
            let _entered = Entered::new(&rigs[0].core);
            let (result, control) = (Rc::clone(&list), rigs[0].control.clone());
            let ask = async move { *result.borrow_mut() = Some(inspect(&control).await) };
            crate::task::spawn(ask).expect("a task");
        }
        let begun_ns = rigs[0].world.borrow().now_ns();
        for _ in 0..10_000 {
            rigs[0].turn();
            if !deaf {
                rigs[1].turn();
            }
            if list.borrow().is_some() {
                break;
            }
        }
        let took_ms = (rigs[0].world.borrow().now_ns() - begun_ns) / 1_000_000;
        let list = list.borrow_mut().take().expect("an answer");
        let silent = list.silent_cores().iter().map(|core| (core.core, core.connections));
        let (of_others, late) = if deaf { (vec![(1, 3)], 1_000) } else { (vec![], 0) };
        assert_eq!(silent.collect::<Vec<_>>(), of_others);
        assert_eq!(list.len(), if deaf { 3 } else { 6 });
        assert!(took_ms >= late && took_ms <= late + 100, "{took_ms} ms");
    }
}

/// Who asks and is dropped midway, as when its client has gone, leaves nothing with a core that
/// does not answer.
#[test]
fn nothing_is_kept_for_an_asker_that_is_gone() {
    struct Asker;
    impl Wake for Asker {
        fn wake(self: Arc<Self>) {}
    }
    let peers = |seed| World::new(seed, 16, 256, Vec::new());
    let rigs = Rig::cores(vec![peers(1), peers(2)], Rng::new(3), House::Echo, 10);
    let asker = Arc::new(Asker);
    let mut answer = Box::pin(inspect(&rigs[0].control));
    let waker = Waker::from(Arc::clone(&asker));
    // The second time with the list of the core that does answer.
    for _ in 0..2 {
        let entered = Entered::new(&rigs[0].core);
        assert!(answer.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(entered);
        rigs[0].turn();
    }
    assert!(Arc::strong_count(&asker) > 2, "it is waited for");
    let entered = Entered::new(&rigs[0].core);
    drop((answer, waker));
    drop(entered);
    rigs[0].turn();
    assert_eq!(Arc::strong_count(&asker), 1);
}

/// A core that goes down with a question in its mail has nothing to list, and nobody waits for it.
#[test]
fn a_question_that_finds_the_core_down_is_answered_at_once() {
    let rig = Rig::new(5, House::Echo);
    rig.run(10);
    rig.drain(0);
    let mut answer = pin!(async { inspect(&rig.control).await });
    let _entered = Entered::new(&rig.core);
    match answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(list) => assert!(list.is_empty() && list.silent_cores().is_empty()),
        Poll::Pending => panic!("it waits for a core that is down"),
    }
}

/// With all kinds of peers and handlers, at walks as frequent as can be. `Rig::check` fails at the
/// first mismatch, here and in the thousands of seeds of the other tests.
#[test]
fn the_self_check_finds_nothing_at_any_turn_and_counts_everyone() {
    let walks = RefCell::new(0);
    for_seeds("audit", 300, |seed| {
        let rig = Rig::new(seed, House::Mixed);
        rig.core.borrow_mut().settings.check_ms = 10 + seed % 300;
        rig.run(200 + seed as usize % 400);
        let census = rig.stats().census;
        let table = rig.core.borrow_mut().table.len() as u64;
        assert!(census.total() <= rig.stats().live_max, "{census:?}");
        assert_eq!(census.age.total(), census.without_progress.total(), "{census:?}");
        *walks.borrow_mut() += u64::from(census.total() > 0);
        if rig.world.borrow().is_quiet() && table == 0 {
            // The walk after the last connection meets nobody, and is the last.
            rig.turn_until("there is no timer", |rig| rig.core.borrow_mut().wheel.is_empty());
            assert_eq!(rig.stats().census, Census::default());
        }
        rig.drain(seed % 5 * 200);
    });
    assert!(cfg!(miri) || *walks.borrow() > 0, "no seed has had a walk");
}

/// What a bug would do, one at a time, to a core with idle connections.
#[test]
fn the_self_check_finds_each_fault_that_is_injected() {
    type Fault = (&'static str, fn(&mut Core, &mut World, Id));
    let faults: [Fault; 7] = [
        ("has no timer", |core, _, id| {
            let timer = core.table.get(id).map(|entry| entry.timer);
            core.wheel.cancel(timer.expect("it is there"));
        }),
        ("a timer after its deadline", |core, _, id| {
            let timer = core.table.get(id).map(|entry| entry.timer);
            core.wheel.rearm(timer.expect("it is there"), u64::MAX / 2);
        }),
        ("no owner", |core, _, id| {
            let entry = core.table.get_mut(id).expect("it is there");
            (entry.handles, entry.in_flight) = (0, 0);
        }),
        ("the gauge says 1", |core, _, _| core.counters.live.set(1)),
        ("connected - closed 1", |core, _, _| core.counters.close(CloseReason::Idle)),
        ("1 connects were begun, 0 have", |core, _, _| core.counters.connects.add(1)),
        ("closed in the kernel", |_, world, _| {
            // The news of it was lost on its way to us.
            world.running.retain(|running| !matches!(running.op, Op::Receive { .. }));
            world.streams.values_mut().for_each(Peer::break_off);
        }),
    ];
    for (words, inject) in faults {
        let mut rng = Rng::new(1);
        let world = World::new(1, 8, 256, vec![quiet(&mut rng), quiet(&mut rng)]);
        let config = Config::default().buffer_bytes(256).check_ms(100);
        let rig = Rig::with(world, config, |mut conn| async move { conn.recv().await.map(drop) });
        rig.run(0);
        rig.turn_until("a walk has met both", |rig| rig.stats().census.total() == 2);
        {
            let (core, world) = (&mut *rig.core.borrow_mut(), &mut *rig.world.borrow_mut());
            let id = core.table.ids().next().expect("the first");
            inject(core, world, id);
        }
        let _entered = Entered::new(&rig.core);
        for _ in 0..1_000 {
            // Without the rig's own checks, which would find it first.
            rig.core.turn().expect("no error");
            if rig.stats().mismatches > 0 {
                break;
            }
        }
        let findings = rig.core.borrow_mut().counters.findings();
        assert!(findings.iter().any(|text| text.contains(words)), "{words}: {findings:?}");
        // The simulated kernel would not let such a core go.
        rig.over.set(true);
        std::mem::forget((rig.core.clone(), rig.world.clone()));
    }
}

fn quiet(rng: &mut Rng) -> Peer {
    Peer::with(rng, Manner::Silent, 0, 1)
}
