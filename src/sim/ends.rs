//! How connections end when there is no more time, or something unread: by hand, in a kernel that
//! does only what a test makes it do. Cases and scenarios are numbered as in `by_hand.rs`.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use super::World;
use super::hands::{Gate, Heard, connect, entry, finish, pass_until_reminded, say, settle};
use super::peer::{Fate, Peer};
use super::rig::{Rig, place};
use crate::config::{Config, Overload};
use crate::post::Message;
use crate::report::CloseReason;
use crate::time::sleep;
use crate::token::Kind;

/// Scenario 1, without time: who is still queued gets a FIN, and no handler that would be dropped.
#[test]
fn a_drain_without_time_begins_nothing_for_those_that_are_queued() {
    let begun = Rc::new(Cell::new(0));
    let count = Rc::clone(&begun);
    let rig = Rig::by_hand(Config::default(), move |conn| {
        count.set(count.get() + 1);
        async move {
            sleep(Duration::from_secs(1_000_000)).await;
            drop(conn);
            Ok(())
        }
    });
    connect(&rig);
    (0..200).for_each(|_| rig.world.borrow_mut().arrive(Peer::by_hand()));
    rig.world.borrow_mut().orders.by_hand = false;
    rig.drain(0);
    // An accept that was in flight may have brought another.
    assert!(begun.get() <= 2, "{} handlers were begun after the deadline", begun.get() - 1);
    assert_eq!(rig.stats().closed.get(CloseReason::Forced), 201);
    assert!(rig.world.borrow().past().iter().all(|peer| peer.fate == Fate::Fin));
}

/// As many peers as fill more than a turn, each of which has said something and was heard.
fn more_than_a_turn_hears(config: Config) -> (Rig, Heard) {
    let heard = Heard::default();
    let world = World::new(0, 32, 256, Vec::new());
    world.borrow_mut().orders.by_hand = true;
    let rig = Rig::with(world, config.completion_budget(16), heard.reads_all());
    rig.run(0);
    settle(&rig);
    for _ in 0..PEERS {
        connect(&rig);
    }
    say_to_all(&rig, b"first!");
    settle(&rig);
    assert_eq!(heard.take().len(), PEERS);
    (rig, heard)
}

fn say_to_all(rig: &Rig, text: &[u8]) {
    rig.world.borrow_mut().peers().for_each(|peer| peer.say(text));
    rig.world.borrow_mut().work_on_all(Kind::Receive);
}

/// Scenario 9, where more is heard of than one turn takes: the requests that the kernel has told of
/// and nobody has heard are answered like the others.
#[test]
fn what_the_kernel_has_told_of_when_the_drain_looks_is_heard() {
    let (rig, heard) = more_than_a_turn_hears(Config::default());
    say_to_all(&rig, b"second");
    rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
    settle(&rig);
    assert_eq!(heard.take(), vec![b"second".to_vec(); PEERS], "requests were thrown away");
    assert_eq!(rig.stats().idle_races, 0);
    finish(&rig);
}

/// The same for the end of idleness: what has come by then has put it off, however much else has.
#[test]
fn what_the_kernel_has_told_of_when_idleness_ends_is_heard() {
    let config = Config::default().idle_ms(5_000).user_timeout_ms(0);
    let (rig, heard) = more_than_a_turn_hears(config);
    pass_until_reminded(&rig, 6_000);
    say_to_all(&rig, b"second");
    settle(&rig);
    assert_eq!(heard.take(), vec![b"second".to_vec(); PEERS], "requests were thrown away");
    assert_eq!((rig.stats().closed.total(), heard.errors()), (0, vec![]));
    finish(&rig);
}

/// Scenario 11, for a layer that says where its messages end.
#[test]
fn of_pipelined_messages_only_the_one_at_hand_is_served_once_a_drain_runs() {
    for split in [1, 2, 3] {
        let (heard, gate) = (Heard::default(), Gate::default());
        let (handle, opens) = (heard.clone(), gate.clone());
        let rig = Rig::by_hand(Config::default().linger_ms(100), move |mut conn| {
            let (heard, gate) = (handle.clone(), gate.clone());
            async move {
                while !conn.fill_buf().await?.is_empty() {
                    conn.begin_message();
                    let mut message = [0; 3];
                    conn.read_exact(&mut message).await?;
                    heard.hear(&message);
                    gate.passed().await;
                    conn.end_message();
                    conn.write(&message).await?;
                }
                Ok(())
            }
        });
        let id = connect(&rig);
        for part in b"onetwosix".chunks(9 / split) {
            say(&rig, part);
        }
        rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
        settle(&rig);
        entry(&rig, id, |entry| assert!(entry.ended.is_none(), "it is amid a message"));
        opens.open();
        settle(&rig);
        assert_eq!(heard.take(), [b"one".to_vec()], "in {split} parts");
        finish(&rig);
        let world = rig.world.borrow();
        let peer = &world.past()[0];
        assert_eq!((peer.fate, &peer.received[..]), (Fate::Fin, &b"one"[..]), "{split} parts");
        assert_eq!(rig.stats().closed.get(CloseReason::Drained), 1);
        assert_eq!(rig.stats().idle_races, 1, "it had asked for more");
    }
}

/// A FIN over input that nobody has read would be a reset.
#[test]
fn whom_a_deadline_or_a_drain_ends_gets_a_fin_though_input_is_unread() {
    for forced in [true, false] {
        let config = Config::default().receive_queue_bytes(256).buffer_bytes(256);
        let rig = Rig::by_hand(config.handler_ms(1_000), |conn| async move {
            sleep(Duration::from_secs(1_000_000)).await;
            drop(conn);
            Ok(())
        });
        connect(&rig);
        for _ in 0..10 {
            say(&rig, &[b'x'; 200]);
        }
        rig.world.borrow_mut().work_on_all(Kind::Cancel);
        settle(&rig);
        say(&rig, b"this stays with the kernel");
        assert_eq!(rig.stats().pauses, 1, "the receive is paused");
        if !forced {
            rig.world.borrow_mut().pass_ms(2_000);
            settle(&rig);
        }
        finish(&rig);
        let reason = if forced { CloseReason::Forced } else { CloseReason::Handler };
        assert_eq!(rig.stats().closed.get(reason), 1, "{:?}", rig.stats().closed);
        assert_eq!(rig.world.borrow().past()[0].fate, Fate::Fin, "{reason:?}");
    }
}

/// Whatever another thread was told is accepted is begun, or counted.
#[test]
fn tasks_of_other_threads_that_are_never_begun_are_counted() {
    let rig = Rig::by_hand(Config::default().tasks_max(5), Heard::default().reads_all());
    let spawn = || {
        let message = Message::Spawn(place(), Box::new(|| Box::pin(std::future::pending())));
        rig.core.borrow_mut().post.mailbox.post(message).expect("the core is up");
    };
    (0..7).for_each(|_| spawn());
    settle(&rig);
    assert_eq!((rig.stats().tasks, rig.stats().tasks_refused), (5, 2));
    (0..3).for_each(|_| spawn());
    rig.world.borrow_mut().orders.by_hand = false;
    rig.drain(0);
    assert_eq!((rig.stats().tasks_forced, rig.stats().tasks_refused), (5, 5));
}

/// Who was refused lingers for a moment and has no place: it is not who makes room.
#[test]
fn those_that_were_refused_are_not_evicted_for_room() {
    let config = Config::default().connections_max(3).overload(Overload::Reject);
    let rig = Rig::by_hand(config.evict_percent(50), Heard::default().reads_all());
    (0..3).for_each(|_| {
        connect(&rig);
    });
    let refused = connect(&rig);
    (0..20).for_each(|_| settle(&rig));
    entry(&rig, refused, |entry| assert_eq!(entry.ended, None, "evicted for room"));
    finish(&rig);
    assert_eq!(rig.stats().closed.get(CloseReason::Evicted), 0);
}

/// However many peers are gone in one moment, a turn ends few connections: 16 completions each.
#[test]
fn resets_of_one_moment_end_a_few_connections_a_turn() {
    const CROWD: usize = 300;
    let heard = Heard::default();
    let rig = Rig::by_hand(Config::default().completion_budget(1_024), heard.reads_all());
    for _ in 0..CROWD {
        connect(&rig);
    }
    rig.world.borrow_mut().peers().for_each(Peer::break_off);
    rig.world.borrow_mut().work_on_all(Kind::Receive);
    let (mut turns, mut left) = (0, CROWD);
    while left > 0 {
        rig.turn();
        let live = rig.stats().live as usize;
        assert!(left - live <= 1_024 / 16, "{} in a turn", left - live);
        left = live;
        turns += 1;
        assert!(turns < 100, "{left} are left");
    }
    // Nor fewer than that, but for the first turn and the last.
    assert!(turns <= CROWD / 64 + 2, "it took {turns} turns");
    assert_eq!(rig.stats().closed.get(CloseReason::PeerReset), CROWD as u64);
    finish(&rig);
}

const PEERS: usize = 20;
