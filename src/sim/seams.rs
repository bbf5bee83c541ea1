//! Where two rules meet, by hand: eviction and the end of a linger, the self-check and a deadline
//! that comes nearer, a heartbeat and a handler that has gone. Scenarios are numbered as in
//! `by_hand.rs`.

use std::time::Duration;

use super::World;
use super::hands::{Heard, connect, entry, finish, settle};
use super::peer::Peer;
use super::rig::{Rig, place};
use crate::config::Config;
use crate::conn;
use crate::deadline::DeadlineKind;
use crate::driver::{Socket, Wait};
use crate::entry::{Linger, Receive};
use crate::error::ErrorKind;
use crate::listen::Listener;
use crate::report::CloseReason;
use crate::table::Id;
use crate::time::{sleep, timeout};
use crate::token::Kind;

fn config() -> Config {
    Config::default().buffer_bytes(256).large_buffer_bytes(256)
}

/// Lets time pass in steps of 10 ms; in each of them the peers do something.
fn pass(rig: &Rig, ms: u64, mut act: impl FnMut(&mut Peer)) {
    for _ in 0..ms / 10 {
        rig.world.borrow_mut().pass_ms(10);
        rig.world.borrow_mut().peers().for_each(&mut act);
        for kind in [Kind::Receive, Kind::Send, Kind::Cancel, Kind::Hangup] {
            rig.world.borrow_mut().work_on_all(kind);
        }
        rig.turn();
        rig.turn();
    }
}

/// The latest peer sends.
fn say_latest(rig: &Rig, text: &[u8]) {
    rig.world.borrow_mut().peers().last().expect("a peer").say(text);
    rig.world.borrow_mut().work_on(Kind::Receive);
    settle(rig);
}

/// The first listener's place in the frame's stead.
fn beat_with(rig: &Rig, frame: &'static [u8]) {
    let mut core = rig.core.borrow_mut();
    let listener = core.listeners.remove(0);
    core.listeners.push(listener.with_heartbeat(Some(frame.into())));
}

/// Scenario 65: an address that is flooded must not keep the core from the others.
#[test]
fn listeners_take_turns_when_the_budget_is_too_small_for_all() {
    let rig = Rig::by_hand(config().accept_budget(2), |_| std::future::pending());
    {
        let mut core = rig.core.borrow_mut();
        let handler = conn::handler(|_| std::future::pending());
        for _ in 0..2 {
            let socket = Socket::Sim(World::listen(&rig.world));
            core.listeners.push(Listener::new(socket, handler.clone(), place()));
        }
        // All of them find the world's one queue, so whoever comes first takes the budget.
        core.start_accept();
        for _ in 0..60 {
            rig.world.borrow_mut().arrive(Peer::by_hand());
        }
        for _ in 0..30 {
            core.take_connections();
        }
        let taken = |index| core.table.iter().filter(|(_, e)| e.listener == index).count();
        assert_eq!([0, 1, 2].map(taken), [20, 20, 20]);
    }
}

/// Who has sent its answer and has gone waits for the peer, and nobody asks that for more.
#[test]
fn a_heartbeat_is_no_busy_loop_while_a_last_answer_is_on_its_way() {
    let config = config().heartbeat_ms(1_000).write_stall_ms(60_000);
    let rig = Rig::by_hand(config, |mut conn| async move {
        conn.recv().await?;
        conn.send(vec![7; 9_000]).await
    });
    beat_with(&rig, b"ping");
    connect(&rig);
    say_latest(&rig, b"x");
    pass(&rig, 3_000, |_| {});
    assert_eq!(rig.stats().live, 1);
    for _ in 0..10 {
        let soon_ns = rig.world.borrow().now_ns + 10_000_000;
        rig.turn();
        let wait = rig.world.borrow().last_wait();
        assert!(matches!(wait, Wait::Until(due_ns) if due_ns >= soon_ns), "it spins: {wait:?}");
    }
    finish(&rig);
}

/// The kernel raises its flag after it has queued the work that the flag tells of, and a core that
/// was quicker has done that by then. Until there is more, the flag means nothing.
#[test]
fn a_core_that_spins_blocks_where_the_kernel_tells_of_work_that_is_done() {
    let config = config().spin_us(500).spin_shared(true);
    let rig = Rig::by_hand(config, |_conn| async move { Ok(()) });
    rig.world.borrow_mut().orders.cries_wolf = true;
    for _ in 0..100 {
        rig.turn();
        assert_ne!(rig.world.borrow().last_wait(), Wait::No, "it goes round and round");
    }
    rig.world.borrow_mut().orders.cries_wolf = false;
    finish(&rig);
}

/// Scenario 43, for a handler that never sends: the self-check holds the timer against the times.
#[test]
fn a_heartbeat_begins_with_the_first_byte_whatever_the_handler_does() {
    let heard = Heard::default();
    let day_ms = 86_400_000;
    let config = config().heartbeat_ms(1_000).check_ms(50).first_byte_ms(3_600_000);
    let config = config.idle_ms(day_ms).handler_ms(day_ms);
    let rig = Rig::by_hand(config, heard.reads_all());
    beat_with(&rig, b"ping");
    connect(&rig);
    say_latest(&rig, b"x");
    let mut asked = false;
    pass(&rig, 1_500, |peer| asked |= peer.received.starts_with(b"ping"));
    assert!(asked, "nobody asks it");
    finish(&rig);
}

/// The books are right all the time, also for who asks the kernel early.
#[test]
fn a_look_at_the_output_out_of_turn_sets_the_reminder_for_the_next() {
    let config = config().check_ms(50).write_stall_ms(60_000);
    let rig = Rig::by_hand(config, |mut conn| async move {
        conn.recv().await?;
        conn.send(vec![7; 9_000]).await?;
        sleep(Duration::from_millis(300)).await;
        assert!(conn.deadline(DeadlineKind::WriteStall).is_some());
        sleep(Duration::from_secs(1_000)).await;
        Ok(())
    });
    connect(&rig);
    say_latest(&rig, b"x");
    pass(&rig, 2_000, |_| {});
    finish(&rig);
}

/// A second order brings farewells nearer, one connection after the other; until all have heard of
/// it nobody is late.
#[test]
fn a_drain_that_is_shortened_amid_a_self_check_leaves_nothing_to_find() {
    let heard = Heard::default();
    let config = config().check_ms(10).close_spread_ms(40_000).connections_max(1_000);
    let rig = Rig::by_hand(config.idle_ms(600_000), heard.reads_all());
    for _ in 0..200 {
        connect(&rig);
        say_latest(&rig, b"x");
    }
    let in_ms = |ms: u64| rig.world.borrow().now_ns() + ms * 1_000_000;
    rig.control.begin_drain_at(in_ms(60_000));
    pass(&rig, 100, |_| {});
    rig.control.begin_drain_at(in_ms(5_000));
    pass(&rig, 100, |_| {});
    finish(&rig);
}

/// Case 11, scenario 45: nothing is received, and the reset is heard all the same.
#[test]
fn a_reset_is_heard_while_a_connection_waits_for_buffers() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config().check_ms(10), heard.reads_all());
    let taken = rig.world.borrow_mut().take_buffers();
    let id = connect(&rig);
    rig.world.borrow_mut().work_on(Kind::Receive);
    settle(&rig);
    entry(&rig, id, |entry| assert_eq!(entry.receive, Receive::Parked));
    rig.world.borrow_mut().peers().for_each(Peer::break_off);
    rig.world.borrow_mut().work_on(Kind::Hangup);
    settle(&rig);
    assert_eq!(heard.errors(), [ErrorKind::PeerReset]);
    assert_eq!((rig.stats().live, rig.stats().closed.get(CloseReason::PeerReset)), (0, 1));
    drop(taken);
    pass(&rig, 200, |_| {});
    finish(&rig);
}

/// A connection that lingers, with its receive armed.
fn lingering(rig: &Rig) -> Id {
    let id = connect(rig);
    rig.world.borrow_mut().peers().last().expect("a peer").say(b"quit");
    rig.world.borrow_mut().work_on(Kind::Receive);
    rig.world.borrow_mut().peers().last().expect("a peer").say(b"more");
    settle(rig);
    assert_eq!(rig.world.borrow().in_flight(Kind::Cancel), 0, "its receive goes on");
    entry(rig, id, |entry| assert_eq!(entry.linger, Linger::Now, "{entry:?}"));
    id
}

/// Whom a lingering connection was ended by is not counted as leaving for another.
#[test]
fn an_eviction_counts_nobody_who_is_ending_for_another_reason() {
    let config = config().connections_max(10).evict_percent(80).first_byte_ms(600_000);
    let rig =
        Rig::by_hand(
            config.linger_ms(60_000),
            |mut conn| async move { conn.recv().await.map(drop) },
        );
    for _ in 0..6 {
        connect(&rig);
    }
    rig.world.borrow_mut().pass_ms(5_000);
    let id = lingering(&rig);
    rig.core.borrow_mut().end(id, CloseReason::MinRate);
    connect(&rig);
    pass(&rig, 100, |_| {});
    connect(&rig);
    pass(&rig, 100, |_| {});
    assert_eq!(rig.stats().closed.get(CloseReason::MinRate), 1);
    assert!(rig.stats().live < 8, "{:?}", rig.stats().closed);
    finish(&rig);
}

/// What is remembered of those that linger is bounded by how many there are.
#[test]
fn one_that_lingers_for_long_keeps_no_memory_of_those_after_it() {
    let rig =
        Rig::by_hand(
            config().linger_ms(60_000),
            |mut conn| async move { conn.recv().await.map(drop) },
        );
    let id = lingering(&rig);
    let mut core = rig.core.borrow_mut();
    for generation in 1..100_000 {
        core.note_lingering(Id { generation, ..id });
    }
    assert!(core.pressure.remembered() < 1_000, "{}", core.pressure.remembered());
    drop(core);
    finish(&rig);
}

/// A read that was given up leaves its message open; the handler may say that it is over.
#[test]
fn a_message_that_a_read_has_left_open_can_be_ended() {
    let rig = Rig::by_hand(config().message_ms(2_000), |mut conn| async move {
        let _ = timeout(Duration::from_millis(100), conn.read_until(b'\n', 100)).await;
        conn.end_message();
        while conn.recv().await?.is_some() {}
        Ok(())
    });
    connect(&rig);
    say_latest(&rig, b"x");
    let mut turn = 0;
    pass(&rig, 10_000, |peer| {
        turn += 1;
        if turn % 50 == 0 {
            peer.say(b"y");
        }
    });
    assert_eq!(rig.stats().closed.get(CloseReason::Message), 0);
    finish(&rig);
}
