//! Cores of one server: side by side none of them works more for there being others, and what they
//! ask each other travels in bulk.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::peer::{Manner, Peer};
use super::rig::{Rig, place};
use super::tests::for_seeds;
use super::{Rng, World};
use crate::config::{Balance, Config};
use crate::conn::Connection;
use crate::cores;
use crate::error::{ErrorKind, Result};
use crate::executor::LocalFuture;
use crate::post::Message;
use crate::stats::CoreStats;

async fn echo(mut conn: Connection) -> Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}

/// Cores that take turns until the connections of all have ended: what each has counted, and the
/// digests of all that has happened in their worlds, which are the same at the start.
fn run(seed: u64, cores: usize, balance: Balance) -> (Vec<CoreStats>, Vec<u64>) {
    let peers = || {
        let mut rng = Rng::new(seed);
        (0..CONNECTIONS).map(|_| Peer::with(&mut rng, Manner::Good, BYTES, 64)).collect()
    };
    let worlds = (0..cores).map(|_| World::new(seed, 64, 256, peers())).collect();
    // Whatever depends on real time is off.
    let config = Config::default().balance(balance).stall_ms(0).check_ms(0).buffer_bytes(256);
    let rigs = Rig::several(worlds, config.connections_max(1_000 * cores), echo);
    rigs.iter().for_each(|rig| rig.run(0));
    while rigs.iter().any(|rig| !rig.world.borrow().is_quiet()) {
        for rig in &rigs {
            rig.turn();
        }
    }
    let stats: Vec<CoreStats> = rigs.iter().map(Rig::stats).collect();
    let bytes: u64 = stats.iter().map(|core| core.bytes_sent).sum();
    assert_eq!(bytes, (cores * CONNECTIONS) as u64 * BYTES, "all is echoed");
    (stats, rigs.iter().map(|rig| rig.world.borrow().trace).collect())
}

/// Where the kernel spreads connections: each of eight cores does to the last call what a core does
/// that is alone.
#[test]
fn a_core_of_eight_enters_the_kernel_as_often_as_one_alone() {
    for_seeds("as alone", 5, |seed| {
        let (alone, trace) = run(seed, 1, Balance::Hash);
        assert!(alone[0].enters > 100, "{alone:?}");
        for cores in [2, 4, 8] {
            let (stats, traces) = run(seed, cores, Balance::Hash);
            assert_eq!(stats, vec![alone[0]; cores]);
            assert_eq!(traces, vec![trace[0]; cores]);
        }
    });
}

/// Where they are moved to the core with the fewest, each has another share of the accepts, and its
/// connections come in another order, but the calls for each echo are as many.
#[test]
fn the_calls_for_an_echo_are_as_many_on_eight_cores_that_move_connections_as_on_one() {
    let mut each = Vec::new();
    for cores in [1, 2, 4, 8] {
        let (enters, bytes) = (Cell::new(0), Cell::new(0));
        for_seeds("moves", 3, |seed| {
            for core in run(seed, cores, Balance::Least).0 {
                enters.set(enters.get() + core.enters);
                bytes.set(bytes.get() + core.bytes_sent);
            }
        });
        each.push(enters.get() as f64 * 64.0 / bytes.get() as f64);
    }
    assert!(
        each.iter().all(|each_of| (each_of / each[0] - 1.0).abs() < 0.05),
        "for 64 bytes: {each:.4?}"
    );
}

/// What a core asks another in a turn leaves at the end of it in one piece, and so do the answers:
/// whoever sleeps is woken once.
#[test]
fn calls_of_a_turn_leave_together_and_so_do_their_answers() {
    let worlds = (0..2).map(|_| World::new(0, 64, 256, Vec::new())).collect();
    let rigs = Rig::several(worlds, Config::default().stall_ms(0).check_ms(0), echo);
    rigs.iter().for_each(|rig| rig.run(0));
    let control = Arc::clone(&rigs[0].control);
    let has_mail = |core: usize| control.seats()[core].post.mailbox.has_mail();
    let answered = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&answered);
    let make = move || -> LocalFuture {
        Box::pin(async move {
            let calls: Vec<_> = (0..CALLS).map(|number| cores::call(1, move || number)).collect();
            for call in calls {
                count.fetch_add(call.await.expect("an answer"), SeqCst);
            }
        })
    };
    let sent = control.seats()[0].post.post(Message::Spawn(place(), Box::new(make)));
    sent.expect("the core is up");
    rigs[0].turn();
    assert_eq!((rigs[0].stats().calls, has_mail(1)), (CALLS, false), "not before the turn's end");
    rigs[0].turn();
    assert!(has_mail(1));
    rigs[1].turn();
    assert_eq!((rigs[1].stats().calls_run, has_mail(0)), (CALLS, false), "nor do the answers");
    rigs[1].turn();
    assert!(has_mail(0));
    rigs[0].turn();
    assert_eq!(rigs[0].stats().calls_answered, CALLS);
    assert_eq!(answered.load(SeqCst), (0..CALLS).sum::<u64>());
    assert!(!has_mail(1));
}

/// Two cores of which the second does nothing, and a task on the first that has run.
fn with_deaf_core<M, F>(make: M) -> Vec<Rig>
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = ()> + 'static,
{
    let worlds = (0..2).map(|_| World::new(0, 64, 256, Vec::new())).collect();
    let rigs = Rig::several(worlds, Config::default().stall_ms(0).check_ms(0), echo);
    rigs.iter().for_each(|rig| rig.run(0));
    let make = || -> LocalFuture { Box::pin(make()) };
    let post = &rigs[0].control.seats()[0].post;
    post.post(Message::Spawn(place(), Box::new(make))).expect("the core is up");
    rigs[0].turn();
    assert_eq!((rigs[0].stats().panics, rigs[0].stats().tasks), (0, 0), "the task has ended");
    rigs
}

/// Calls a core when it is dropped.
struct CallsBack;

impl Drop for CallsBack {
    fn drop(&mut self) {
        drop(cores::call(1, || ()));
    }
}

/// What the closure of a call that is refused has captured may use the core when it is dropped.
#[test]
fn a_call_that_is_refused_is_dropped_when_nobody_has_the_core_borrowed() {
    with_deaf_core(|| async {
        let call = |core| {
            let captured = CallsBack;
            cores::call(core, move || drop(captured))
        };
        assert_eq!(call(2).await.expect_err("no such core").kind(), ErrorKind::Misuse);
        let unanswered: Vec<_> = (0..UNANSWERED).map(|_| cores::call(1, || ())).collect();
        assert_eq!(call(1).await.expect_err("too many").kind(), ErrorKind::Resource);
        drop(unanswered);
    });
}

#[test]
fn calls_that_are_given_up_while_they_are_queued_leave_nothing_behind() {
    let rigs = with_deaf_core(|| async {
        for _ in 0..UNANSWERED {
            drop(cores::call(1, || ()));
        }
    });
    let core = &mut *rigs[0].core.borrow_mut();
    let queued = core.calls.lane(1).queue.len();
    assert!(queued < 1_000, "{queued} places in the queue, and nobody waits");
}

#[test]
fn futures_for_a_core_that_does_not_hear_are_refused_when_too_many_wait() {
    let heard = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&heard);
    let rigs = with_deaf_core(|| async move {
        for _ in 0..UNANSWERED + 100 {
            let count = Arc::clone(&count);
            drop(cores::spawn(1, move || async move {
                count.fetch_add(1, SeqCst);
            }));
        }
        let refused = cores::spawn(1, || async {}).await.expect_err("too many");
        assert_eq!(refused.kind(), ErrorKind::Resource, "{refused}");
    });
    (0..UNANSWERED / 256 + 2).for_each(|_| {
        rigs[0].turn();
        rigs[1].turn();
    });
    assert_eq!(heard.load(SeqCst), UNANSWERED, "those that were taken are run");
    let unheard = rigs[0].core.borrow_mut().calls.lane(1).unheard();
    assert_eq!(unheard, 0, "there is room again");
}

/// In one turn; a core hears no more messages than 256.
const CALLS: u64 = 200;
/// On each core.
const CONNECTIONS: usize = 32;
const BYTES: u64 = 20_000;
/// So many calls of a core may be unanswered, and so many spawned futures unheard.
const UNANSWERED: u64 = 65_536;
