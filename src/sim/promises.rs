//! What handlers, their futures and their connections are promised, over whole runs in a simulated
//! world. Cases and scenarios are numbered as in `by_hand.rs`.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use super::hands::{Gate, Heard};
use super::peer::{Fate, Manner, Peer};
use super::rig::{Rig, place};
use super::rng::Rng;
use super::tests::for_seeds;
use super::{World, WorldRef};
use crate::config::Config;
use crate::conn::Connection;
use crate::error::{ErrorKind, Result};
use crate::executor::LocalFuture;
use crate::local::Entered;
use crate::post::Message;
use crate::report::CloseReason;
use crate::time::{sleep, timeout};

/// A drain waits neither for those who never spoke nor for those who have stopped to.
#[test]
fn a_drain_of_peers_that_are_silent_or_gone_is_over_after_their_grace() {
    for_seeds("gone", 50, |seed| {
        let manner = |rng: &mut Rng| [Manner::Silent, Manner::Vanishes][rng.below(2) as usize];
        let world = world(seed, 20, |rng| {
            let manner = manner(rng);
            Peer::with(rng, manner, 100, 100)
        });
        let config = Config::default().new_grace_ms(500).linger_ms(1_000);
        let rig = Rig::with(world, config, echo);
        rig.run(0);
        rig.turn_until("all have come", |rig| rig.stats().live == 20);
        let begun_ns = rig.world.borrow().now_ns();
        rig.drain(10_000);
        let took_ms = (rig.world.borrow().now_ns() - begun_ns) / 1_000_000;
        // A coarse timer is up to an eighth late.
        assert!(took_ms < (500 + 1_000) * 9 / 8 + 100, "{took_ms} ms");
        let closed = rig.stats().closed;
        assert_eq!(closed.get(CloseReason::Drained), 20, "{closed:?}");
        assert!(rig.world.borrow().past().iter().all(|peer| peer.fate == Fate::Fin));
    });
}

/// Scenario 10, from the handler's side.
#[test]
fn a_handler_in_the_middle_of_a_message_is_told_that_it_is_forced() {
    let heard = Heard::default();
    let handle = heard.clone();
    let world = world(1, 5, |rng| Peer::with(rng, Manner::Vanishes, 10, 10));
    let rig = Rig::with(world, Config::default(), move |mut conn| {
        let heard = handle.clone();
        async move {
            // Five of ten bytes come.
            conn.read_exact(&mut [0; 10]).await.inspect_err(|error| heard.fail(error))
        }
    });
    rig.run(0);
    rig.turn_until("all have sent a part", |rig| rig.stats().bytes_received == 25);
    rig.drain(3_000);
    assert_eq!(heard.errors(), [ErrorKind::Forced; 5]);
    assert_eq!(rig.stats().closed.get(CloseReason::Forced), 5);
    assert_eq!(rig.stats().tasks_forced, 0, "each ended by itself when it was told");
}

/// What a handler has spawned to end with its connection does, whatever it waits for.
#[test]
fn children_end_with_their_connection() {
    for_seeds("children", 100, |seed| {
        let world = world(seed, 10, Peer::new);
        let rig = Rig::with(world, Config::default().linger_ms(100), |mut conn| async move {
            conn.spawn(std::future::pending::<()>())?;
            conn.spawn(sleep(Duration::from_secs(1_000_000)))?;
            while let Some(chunk) = conn.recv().await? {
                conn.send(chunk).await?;
            }
            Ok(())
        });
        rig.run(0);
        let mut turns = 0;
        while !rig.world.borrow().is_quiet() {
            rig.turn();
            turns += 1;
            assert!(turns < 100_000, "a child outlives its peer");
            let core = rig.core.borrow_mut();
            assert!(core.table.len() > 0 || core.tasks.len() == 0, "{} orphans", core.tasks.len());
        }
        rig.drain(100);
        assert_eq!(rig.stats().tasks_forced, 0);
    });
}

/// Either half may go first.
#[test]
fn half_of_a_connection_keeps_it_open() {
    for reads_last in [true, false] {
        for_seeds("halves", 50, |seed| {
            let world = world(seed, 5, |rng| Peer::with(rng, Manner::Good, 1_000, 300));
            let rig = Rig::with(world, Config::default(), move |conn| async move {
                let (mut read, mut write) = conn.into_split();
                let mut all = Vec::new();
                if !reads_last {
                    while let Some(chunk) = read.recv().await? {
                        all.extend_from_slice(&chunk);
                    }
                    drop(read);
                    sleep(Duration::from_millis(20)).await;
                    for piece in all.chunks(100) {
                        write.write(piece).await?;
                        write.flush().await?;
                    }
                    return Ok(());
                }
                let mut first = [0; 100];
                read.read_exact(&mut first).await?;
                write.write(&first).await?;
                drop(write);
                sleep(Duration::from_millis(20)).await;
                while let Some(chunk) = read.recv().await? {
                    all.extend_from_slice(&chunk);
                }
                assert_eq!(all.len(), 900, "the end came early");
                Ok(())
            });
            rig.run(100_000);
            rig.drain(1_000);
            let stats = rig.stats();
            assert_eq!((stats.closed.get(CloseReason::Finished), stats.panics), (5, 0));
            for peer in rig.world.borrow().past() {
                let expected = if reads_last { &peer.plan[..100] } else { &peer.plan[..] };
                assert!(peer.received == expected, "{} bytes", peer.received.len());
            }
        });
    }
}

/// Case 30: futures that are dropped or forgotten half-way take nothing with them.
#[test]
fn futures_that_are_dropped_or_forgotten_lose_no_byte() {
    for_seeds("forgotten", 100, |seed| {
        let world = world(seed, 10, |rng| Peer::with(rng, Manner::Good, 2_000, 200));
        let rig = Rig::with(world, Config::default().buffers(8), |mut conn| async move {
            loop {
                let begun = {
                    let mut recv = Box::pin(conn.recv());
                    let polled = poll_fn(|cx| Poll::Ready(recv.as_mut().poll(cx))).await;
                    std::mem::forget(recv);
                    polled
                };
                let chunk = match begun {
                    Poll::Ready(chunk) => chunk?,
                    Poll::Pending => match timeout(Duration::from_micros(200), conn.recv()).await {
                        Ok(chunk) => chunk?,
                        Err(_) => continue,
                    },
                };
                let Some(chunk) = chunk else { return Ok(()) };
                conn.send(chunk).await?;
                let _ = timeout(Duration::ZERO, conn.flush()).await;
            }
        });
        rig.run(100_000);
        assert_all_answered(&rig, 10);
    });
}

/// Case 30: nobody will ever let go of a connection that is forgotten, and yet it ends.
#[test]
fn a_connection_that_is_forgotten_ends_by_its_deadline() {
    for_seeds("leaked", 50, |seed| {
        let world = world(seed, 10, |rng| Peer::with(rng, Manner::Silent, 0, 1));
        let config = Config::default().first_byte_ms(300).idle_ms(500);
        let rig = Rig::with(world, config, |conn: Connection| async {
            std::mem::forget(conn);
            Ok(())
        });
        rig.run(100);
        let begun_ns = rig.world.borrow().now_ns();
        let mut turns = 0;
        while !rig.world.borrow().is_quiet() {
            rig.turn();
            turns += 1;
            assert!(turns < 10_000, "its socket stays open");
        }
        let took_ms = (rig.world.borrow().now_ns() - begun_ns) / 1_000_000;
        assert!(took_ms < 500, "{took_ms} ms");
        rig.drain(200);
        assert_eq!(rig.stats().closed.get(CloseReason::FirstByte), 10);
    });
}

/// Case 41, scenario 52: deadlines that pass all at once are handled a budget at a time, and a
/// connection is served meanwhile.
#[test]
fn a_crowd_of_timers_of_one_moment_delays_nobody() {
    let crowd = if cfg!(miri) { 500 } else { 100_000 };
    let world = world(7, 1, |rng| Peer::with(rng, Manner::Good, 60, 1));
    let rig = Rig::with(world, Config::default().expiry_budget(256), echo);
    {
        let _entered = Entered::new(&rig.core);
        let gate = Gate::default();
        for _ in 0..crowd {
            let gate = gate.clone();
            crate::task::spawn(async move {
                sleep(Duration::from_millis(50)).await;
                drop(gate);
            })
            .expect("room for a task");
        }
    }
    rig.turn_until("all sleep", |rig| rig.core.borrow_mut().sleepers.len() == crowd);
    rig.world.borrow_mut().pass_ms(100);
    rig.run(0);
    let mut most = 0;
    let mut turns = 0;
    let mut answered_at = None;
    while rig.core.borrow_mut().sleepers.len() > 0 {
        let before = rig.core.borrow_mut().sleepers.len();
        rig.turn();
        turns += 1;
        most = most.max(before - rig.core.borrow_mut().sleepers.len());
        if answered_at.is_none() && rig.stats().bytes_sent > 0 {
            answered_at = Some(turns);
        }
        assert!(turns < 10 * crowd, "they never end");
    }
    assert_eq!(most, 256, "the budget");
    let answered_at = answered_at.expect("the connection was served among them");
    assert!(cfg!(miri) || answered_at < 50, "served in turn {answered_at} of {turns}");
    rig.run(100_000);
    assert_all_answered(&rig, 1);
}

/// Case 41.
#[test]
fn sleeps_of_nothing_and_of_for_ever_and_ones_dropped_after_they_fired_are_all_fine() {
    let heard = Heard::default();
    let rig = Rig::with(world(3, 0, Peer::new), Config::default(), echo);
    let log = heard.clone();
    {
        let _entered = Entered::new(&rig.core);
        let spawned = crate::task::spawn(async move {
            sleep(Duration::ZERO).await;
            log.hear(b"zero");
            for long in
                [Duration::MAX, Duration::from_nanos(u64::MAX), Duration::from_secs(1 << 40)]
            {
                let ended = timeout(Duration::from_millis(2), sleep(long)).await;
                log.fail(&ended.expect_err("a sleep of 584 years"));
            }
            // The timer has fired in the turn in which its sleep is dropped.
            for _ in 0..100 {
                let two = [sleep(Duration::from_millis(1)), sleep(Duration::from_millis(1))];
                let mut two = two.map(Box::pin);
                poll_fn(|cx| {
                    let done = two
                        .iter_mut()
                        .map(|one| one.as_mut().poll(cx))
                        .filter(Poll::is_ready)
                        .count();
                    if done > 0 { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
                drop(two);
            }
            assert!(timeout(Duration::MAX, async {}).await.is_ok());
            log.hear(b"done");
        });
        drop(spawned.expect("room for a task"));
    }
    rig.turn_until("the task is done", |rig| rig.core.borrow_mut().tasks.len() == 0);
    assert_eq!(heard.take(), [b"zero".to_vec(), b"done".to_vec()]);
    assert_eq!(heard.errors(), [ErrorKind::TimedOut; 3]);
    let core = rig.core.borrow_mut();
    assert_eq!((core.sleepers.len(), core.wheel.len()), (0, 0));
}

/// Case 37: a flood of messages is heard a budget at a time, so that no turn is as long as the
/// flood, and what a core that is down has not heard is dropped.
#[test]
fn a_flood_of_messages_holds_up_neither_connections_nor_the_end() {
    let rig =
        Rig::with(world(5, 1, |rng| Peer::with(rng, Manner::Good, 60, 1)), Config::default(), echo);
    let held = Arc::new(());
    let flood = || {
        for _ in 0..20_000 {
            let held = Arc::clone(&held);
            let make = Box::new(move || -> LocalFuture { Box::pin(async move { drop(held) }) });
            let sent = rig.control.seats()[0].post.post(Message::Spawn(place(), make));
            sent.expect("the core is up");
        }
    };
    flood();
    rig.run(0);
    let mut turns = 0;
    while rig.stats().closed.total() == 0 {
        let before = rig.stats().messages;
        rig.turn();
        assert!(rig.stats().messages - before <= 256, "one turn heard too many");
        turns += 1;
        assert!(turns < 10_000, "its connection starves");
    }
    rig.turn_until("all is heard", |_| Arc::strong_count(&held) == 1);
    flood();
    rig.turn();
    assert!(Arc::strong_count(&held) > 1);
    rig.drain(0);
    assert_eq!(Arc::strong_count(&held), 1, "a message outlives its core");
}

pub(super) async fn echo(mut conn: Connection) -> Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}

/// A world with so many peers to come.
pub(super) fn world(seed: u64, peers: usize, mut peer: impl FnMut(&mut Rng) -> Peer) -> WorldRef {
    let mut rng = Rng::new(seed ^ 0xCA5E);
    World::new(seed, 16, 256, (0..peers).map(|_| peer(&mut rng)).collect())
}

/// Drains, and checks that every peer got all its bytes and a FIN.
pub(super) fn assert_all_answered(rig: &Rig, peers: usize) {
    assert!(rig.world.borrow().is_quiet(), "not all were served");
    rig.drain(1_000);
    let world = rig.world.borrow();
    let good = world.past().iter().filter(|peer| peer.is_answered() && peer.fate == Fate::Fin);
    assert_eq!(good.count(), peers, "{:?}", rig.stats().closed);
    assert_eq!(rig.stats().bytes_abandoned, 0);
}
