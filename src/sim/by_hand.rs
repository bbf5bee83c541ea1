//! Interleavings that a kernel may choose and a seed seldom finds, each made by hand: completions
//! that come late, twice or for somebody else, and what the connection's handler, its peer and the
//! books see of it.
//!
//! Numbers of cases are those of the list of adversarial cases, numbers of scenarios those of the
//! list of ends of connections, which the tests under `tests/` count by too.

use super::hands::{Gate, Heard, connect, end_operations, entry, finish};
use super::hands::{hang_up, pass_until, say, settle};
use super::peer::{Fate, Peer};
use super::rig::Rig;
use crate::config::Config;
use crate::driver::{Errno, Outcome, Wait};
use crate::entry::Receive;
use crate::error::ErrorKind;
use crate::report::CloseReason;
use crate::sys::gather::Gather;
use crate::table::Id;
use crate::token::{Kind, Token};

/// Case 25, scenario 54.
#[test]
fn a_completion_for_a_former_tenant_of_a_slot_does_not_touch_the_next_one() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config(), heard.reads_all());
    for round in 0..50u32 {
        let id = connect(&rig);
        say(&rig, b"mine");
        let late = Id { generation: id.generation.wrapping_sub(1 + round % 3), ..id };
        let token = |kind| Token::new(kind, late.index, late.generation);
        let reset = || Errno(libc::ECONNRESET);
        let buffer = rig.world.borrow_mut().take_buffers().pop();
        let outcomes = [
            (Kind::Receive, Outcome::Received(Ok(buffer))),
            (Kind::Receive, Outcome::Received(Ok(None))),
            (Kind::Receive, Outcome::Received(Err(reset()))),
            (Kind::Receive, Outcome::Received(Err(Errno(libc::ENOBUFS)))),
            (Kind::Send, Outcome::Sent(Err(reset()), Box::new(Gather::new()))),
            (Kind::Hangup, Outcome::Hangup(Ok(libc::POLLERR.into()))),
            (Kind::Cancel, Outcome::Cancelled(Ok(()))),
        ];
        for (kind, outcome) in outcomes {
            rig.world.borrow_mut().inject(token(kind), outcome);
        }
        let before = rig.stats();
        settle(&rig);
        let stats = rig.stats();
        assert_eq!(stats.stale - before.stale, 6, "those of a connection are counted");
        assert_eq!(stats.bytes_received, before.bytes_received, "the late bytes are nobody's");
        entry(&rig, id, |entry| assert_eq!((entry.ended, entry.eof), (None, false)));
        assert_eq!(heard.take(), [b"mine".to_vec()], "round {round}");
        hang_up(&rig);
        assert_eq!(rig.stats().closed.get(CloseReason::Finished), u64::from(round) + 1);
    }
    finish(&rig);
}

/// Case 26.
#[test]
fn a_slot_whose_generation_wraps_goes_on() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config(), heard.reads_all());
    let first = connect(&rig);
    hang_up(&rig);
    rig.core.borrow_mut().table.age(crate::token::GENERATION_MASK - 2);
    for round in 0..6 {
        let id = connect(&rig);
        assert_eq!((id.index, id == first), (first.index, round == 3));
        say(&rig, &[round]);
        assert_eq!(heard.take(), [vec![round]]);
        let before = rig.stats().stale;
        let last = id.generation.wrapping_sub(1);
        let token = Token::new(Kind::Receive, id.index, last);
        rig.world.borrow_mut().inject(token, Outcome::Received(Ok(None)));
        settle(&rig);
        assert_eq!(rig.stats().stale, before + 1);
        hang_up(&rig);
    }
    finish(&rig);
}

/// Cases 5, 6 and 36.
#[test]
fn what_is_accepted_while_a_drain_cancels_the_accept_ends_with_a_fin() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config(), heard.reads_all());
    rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
    settle(&rig);
    assert_eq!(rig.world.borrow().in_flight(Kind::Cancel), 0, "handshakes may be under way");
    rig.world.borrow_mut().pass_ms(10);
    settle(&rig);
    assert_eq!(rig.world.borrow().in_flight(Kind::Cancel), 1);
    rig.world.borrow_mut().orders.cancels_missed = 3;
    for _ in 0..3 {
        // The world itself would fail a close of the listener under its accept.
        rig.world.borrow_mut().work_on(Kind::Cancel);
        settle(&rig);
        let in_flight = |kind| rig.world.borrow().in_flight(kind);
        assert_eq!((in_flight(Kind::Accept), in_flight(Kind::Cancel)), (1, 1), "it missed");
    }
    // The accept takes one before its cancellation reaches it, and two more are behind that.
    for _ in 0..3 {
        rig.world.borrow_mut().arrive(Peer::by_hand());
    }
    rig.world.borrow_mut().work_on(Kind::Accept);
    settle(&rig);
    assert_eq!(rig.stats().accepted, 3);
    assert_eq!(rig.world.borrow_mut().peers().count(), 3);
    assert_eq!(rig.world.borrow().open_sockets(), 3, "theirs, and the listener is closed");
    finish(&rig);
    let world = rig.world.borrow();
    assert!(world.past().iter().all(|peer| peer.fate == Fate::Fin), "{:?}", world.past());
}

/// Case 13.
#[test]
fn what_came_before_a_reset_can_still_be_read() {
    let heard = Heard::default();
    let (gate, handle) = (Gate::default(), heard.clone());
    let opens = gate.clone();
    let rig = Rig::by_hand(config(), move |conn| {
        let (gate, heard) = (gate.clone(), handle.clone());
        async move {
            gate.passed().await;
            heard.read_all(conn).await
        }
    });
    let id = connect(&rig);
    say(&rig, b"one");
    say(&rig, b"two");
    rig.world.borrow_mut().peers().for_each(Peer::break_off);
    rig.world.borrow_mut().work_on(Kind::Receive);
    settle(&rig);
    entry(&rig, id, |entry| assert_eq!(entry.ended, Some(CloseReason::PeerReset)));
    opens.open();
    settle(&rig);
    assert_eq!(heard.take(), [b"one".to_vec(), b"two".to_vec()]);
    assert_eq!(heard.errors(), [ErrorKind::PeerReset]);
    assert_eq!((rig.stats().live, rig.stats().closed.get(CloseReason::PeerReset)), (0, 1));
    finish(&rig);
}

/// Case 12: the data, and the end with the next completion of the same batch.
#[test]
fn the_end_of_a_stream_comes_after_all_of_its_data() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config(), heard.reads_all());
    for round in 0..8 {
        connect(&rig);
        let text = vec![round; 256 * usize::from(round) + 1];
        rig.world.borrow_mut().peers().for_each(|peer| {
            peer.say(&text);
            peer.half_close();
        });
        while rig.world.borrow().in_flight(Kind::Receive) > 0 {
            rig.world.borrow_mut().work_on(Kind::Receive);
            if round % 2 == 0 {
                rig.turn();
            }
        }
        settle(&rig);
        assert_eq!(heard.take().concat(), text);
    }
    assert_eq!(rig.stats().closed.get(CloseReason::Finished), 8);
    finish(&rig);
}

/// Whoever waits is told at once, with the cause, and not by being dropped.
#[test]
fn a_deadline_wakes_the_reader_the_writer_and_whoever_waits_for_the_close() {
    let heard = Heard::default();
    let handle = heard.clone();
    let config = config().send_queue_bytes(1024).idle_ms(5_000).write_stall_ms(2_000);
    let config = config.handler_ms(5_000);
    let rig = Rig::by_hand(config, move |mut conn| {
        let heard = handle.clone();
        async move {
            while let Some(chunk) = conn.recv().await.inspect_err(|error| heard.fail(error))? {
                if &*chunk == b"send" {
                    loop {
                        conn.send(vec![7; 1000]).await.inspect_err(|error| heard.fail(error))?;
                    }
                }
                if &*chunk == b"wait" {
                    conn.closing().await;
                    heard.hear(b"closing");
                    return Ok(());
                }
            }
            Ok(())
        }
    });
    let timed_out = (vec![ErrorKind::TimedOut], vec![]);
    let closing = (vec![], vec![b"closing".to_vec()]);
    for (word, reason, expected) in [
        (b"read", CloseReason::Idle, &timed_out),
        (b"send", CloseReason::WriteStall, &timed_out),
        (b"wait", CloseReason::Handler, &closing),
    ] {
        connect(&rig);
        say(&rig, word);
        let before = rig.stats().closed.get(reason);
        let ended = || rig.core.borrow_mut().table.iter().any(|(_, e)| e.ended.is_some());
        pass_until(&rig, &ended);
        // No time passes from here on, so nobody is dropped by force.
        settle(&rig);
        assert_eq!((heard.errors(), heard.take()), *expected, "{reason:?}");
        end_operations(&rig);
        assert_eq!(rig.stats().closed.get(reason), before + 1);
        assert_eq!((rig.stats().live, rig.stats().tasks), (0, 0));
    }
    finish(&rig);
}

/// Case 8, scenario 65: without a buffer, nobody is tried again; with one, one is.
#[test]
fn connections_that_wait_for_buffers_rest_and_then_take_their_turns() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config(), heard.reads_all());
    let mut taken = rig.world.borrow_mut().take_buffers();
    assert_eq!(taken.len(), 8);
    for _ in 0..20 {
        connect(&rig);
        rig.world.borrow_mut().work_on(Kind::Receive);
        settle(&rig);
    }
    assert_eq!(rig.stats().buffers_missing, 20);
    for _ in 0..100 {
        rig.turn();
        assert_ne!(rig.world.borrow().last_wait(), Wait::No, "it spins");
    }
    assert_eq!(rig.stats().buffers_missing, 20, "tried without a buffer");
    assert_eq!(rig.world.borrow().in_flight(Kind::Receive), 0);
    let parked: Vec<Id> = rig.core.borrow_mut().parked.iter().copied().collect();
    drop(taken.pop());
    for (turn, next) in parked.into_iter().enumerate() {
        rig.turn();
        // Whoever is armed takes a buffer, if not at once; the others must not take them all.
        let armed = rig.world.borrow().in_flight(Kind::Receive);
        assert_eq!(armed, turn + 1, "one a turn, as no buffer is sure to be left for a second");
        entry(&rig, next, |entry| assert_eq!(entry.receive, Receive::Armed, "not in turn"));
    }
    drop(taken);
    finish(&rig);
}

/// Case 11.
#[test]
fn a_connection_that_waits_for_buffers_can_close_without_one() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config().idle_ms(2_000), heard.reads_all());
    let taken = rig.world.borrow_mut().take_buffers();
    let id = connect(&rig);
    rig.world.borrow_mut().work_on(Kind::Receive);
    settle(&rig);
    entry(&rig, id, |entry| assert_eq!(entry.receive, Receive::Parked));
    pass_until(&rig, &|| rig.world.borrow().in_flight(Kind::Cancel) > 0);
    settle(&rig);
    end_operations(&rig);
    assert_eq!(rig.stats().live, 0, "its time is over");
    assert_eq!(rig.world.borrow_mut().peers().count(), 0, "its socket is closed");
    drop(taken);
    for _ in 0..5 {
        rig.turn();
        assert_eq!(rig.world.borrow().in_flight(Kind::Receive), 0, "the dead is armed");
    }
    assert!(rig.core.borrow_mut().parked.is_empty());
    finish(&rig);
}

/// Cases 19 and 27, scenarios 55 and 57.
#[test]
fn a_receive_that_fills_a_buffer_while_it_is_cancelled_gives_it_back() {
    for (missed, ends) in [(0, false), (0, true), (1, false), (5, false), (5, true)] {
        let rig = Rig::by_hand(config().linger_ms(0), |mut conn| async move {
            conn.recv().await?;
            Ok(())
        });
        let id = connect(&rig);
        say(&rig, b"first");
        // The handler has gone, and the receive is being cancelled.
        rig.world.borrow_mut().orders.cancels_missed = missed;
        rig.world.borrow_mut().peers().for_each(|peer| peer.say(b"late"));
        match ends {
            true => rig.world.borrow_mut().work_last_on(Kind::Receive),
            false => rig.world.borrow_mut().work_on(Kind::Receive),
        }
        let mut cancels = 0;
        while rig.world.borrow().in_flight(Kind::Cancel) > 0 {
            rig.world.borrow_mut().work_on(Kind::Cancel);
            cancels += 1;
            settle(&rig);
            let open = rig.world.borrow_mut().peers().count();
            let in_flight = |kind| rig.world.borrow().in_flight(kind) > 0;
            let waits = in_flight(Kind::Receive) || in_flight(Kind::Cancel);
            assert_eq!(open, usize::from(waits), "closed under an operation, or not at all");
        }
        if !ends {
            assert_eq!(cancels, missed + 1, "a cancellation that missed is tried again");
            entry(&rig, id, |entry| assert_eq!(entry.in_flight, 1));
            rig.world.borrow_mut().work_on(Kind::Receive);
            settle(&rig);
        }
        assert_eq!((rig.stats().live, rig.stats().closed.get(CloseReason::Served)), (0, 1));
        let (kernel, leased, returned) = rig.core.borrow_mut().driver.pool().census();
        assert_eq!((leased, kernel + returned), (0, 8));
        finish(&rig);
    }
}

/// Case 20, scenario 56.
#[test]
fn a_send_that_is_cut_off_is_accounted_for_and_followed_by_nothing() {
    let rig = Rig::by_hand(config().write_stall_ms(2_000), |mut conn| async move {
        for byte in 0..9 {
            conn.send(vec![byte; 1000]).await?;
        }
        conn.recv().await.map(drop)
    });
    connect(&rig);
    rig.world.borrow_mut().work_on(Kind::Send);
    settle(&rig);
    let ended = || rig.core.borrow_mut().table.iter().any(|(_, e)| e.ended.is_some());
    pass_until(&rig, &ended);
    settle(&rig);
    // The peer has room again, too late.
    rig.world.borrow_mut().peers().for_each(Peer::take_output);
    rig.world.borrow_mut().work_on(Kind::Send);
    settle(&rig);
    assert_eq!(rig.world.borrow().in_flight(Kind::Send), 0, "it is sent after, all the same");
    end_operations(&rig);
    let stats = rig.stats();
    assert_eq!((stats.bytes_sent, stats.bytes_abandoned), (2000, 7000));
    assert_eq!((stats.live, stats.closed.get(CloseReason::WriteStall)), (0, 1));
    finish(&rig);
    let world = rig.world.borrow();
    let peer = &world.past()[0];
    assert_eq!(peer.received, [[0; 1000], [1; 1000]].concat());
    assert_eq!(peer.fate, Fate::Reset, "a FIN would say that this was all");
}

/// Case 21: one send at a time, and the rest of a short one before anything else.
#[test]
fn what_is_sent_while_a_send_is_short_stays_behind_it() {
    let rig = Rig::by_hand(config(), |mut conn| async move {
        while let Some(chunk) = conn.recv().await? {
            conn.send(chunk).await?;
        }
        Ok(())
    });
    connect(&rig);
    let mut all = Vec::new();
    for n in 0..20u8 {
        let text: Vec<u8> = (0..250).map(|i| n.wrapping_mul(31) ^ i).collect();
        all.extend(&text);
        say(&rig, &text);
        assert_eq!(rig.world.borrow().in_flight(Kind::Send), 1, "one at a time");
        // From the thirteenth on there is room for a part only, and then for none.
        if n % 3 == 0 {
            rig.world.borrow_mut().work_last_on(Kind::Send);
            settle(&rig);
        }
    }
    while rig.world.borrow().in_flight(Kind::Send) > 0 {
        rig.world.borrow_mut().peers().for_each(Peer::take_output);
        rig.world.borrow_mut().work_on(Kind::Send);
        settle(&rig);
    }
    hang_up(&rig);
    finish(&rig);
    assert!(rig.world.borrow().past()[0].received == all, "the order is another");
    assert_eq!(rig.stats().bytes_sent, all.len() as u64);
}

/// Scenario 53.
#[test]
fn data_in_the_turn_of_a_deadline_wins_and_after_it_is_given_back() {
    let heard = Heard::default();
    for data_first in [true, false] {
        let rig = Rig::by_hand(config().idle_ms(4_000), heard.reads_all());
        let id = connect(&rig);
        say(&rig, b"a");
        assert_eq!(heard.take(), [b"a".to_vec()]);
        // Late enough for a coarse timer.
        rig.world.borrow_mut().pass_ms(6_000);
        if !data_first {
            rig.turn();
        }
        rig.world.borrow_mut().peers().for_each(|peer| peer.say(b"b"));
        rig.world.borrow_mut().work_on(Kind::Receive);
        settle(&rig);
        let (kernel, leased, returned) = rig.core.borrow_mut().driver.pool().census();
        assert_eq!((leased, kernel + returned), (0, 8), "the buffer is back, once");
        if data_first {
            assert_eq!(heard.take(), [b"b".to_vec()]);
            entry(&rig, id, |entry| assert_eq!(entry.ended, None));
            hang_up(&rig);
            assert_eq!(rig.stats().closed.get(CloseReason::Finished), 1);
        } else {
            assert_eq!((heard.take(), heard.errors()), (vec![], vec![ErrorKind::TimedOut]));
            end_operations(&rig);
            assert_eq!(rig.stats().closed.get(CloseReason::Idle), 1);
        }
        assert_eq!(rig.stats().closed.total(), 1);
        finish(&rig);
    }
}

/// Scenario 45, and the bound on what a connection piles up.
#[test]
fn a_receiver_that_is_paused_holds_no_more_than_its_queue_and_hears_of_a_reset() {
    let gate = Gate::default();
    let shut = gate.clone();
    let config = config().receive_queue_bytes(1024).buffer_bytes(256);
    let rig = Rig::by_hand(config, move |conn| {
        let gate = shut.clone();
        async move {
            conn.closing().await;
            gate.passed().await;
            Ok(())
        }
    });
    let id = connect(&rig);
    rig.world.borrow_mut().orders.cancels_missed = 2;
    for _ in 0..50 {
        rig.world.borrow_mut().peers().for_each(|peer| peer.say(&[1; 256]));
        if rig.world.borrow().in_flight(Kind::Receive) > 0 {
            rig.world.borrow_mut().work_on(Kind::Receive);
            settle(&rig);
        }
        if rig.world.borrow().in_flight(Kind::Cancel) > 0 {
            rig.world.borrow_mut().work_on(Kind::Cancel);
            settle(&rig);
        }
    }
    assert_eq!(rig.stats().pauses, 1);
    entry(&rig, id, |entry| {
        assert!(entry.input_bytes() <= 1024 + 256 * 3, "{} bytes", entry.input_bytes())
    });
    assert_eq!(rig.world.borrow().in_flight(Kind::Receive), 0);
    assert_eq!(rig.world.borrow().in_flight(Kind::Hangup), 1, "nobody would notice its peer's end");
    rig.world.borrow_mut().peers().for_each(Peer::break_off);
    rig.world.borrow_mut().work_on(Kind::Hangup);
    settle(&rig);
    // No time has passed: the socket is closed, and the handler, which was told, may take its own.
    entry(&rig, id, |entry| assert_eq!(entry.ended, Some(CloseReason::PeerReset)));
    assert_eq!(rig.world.borrow_mut().peers().count(), 0);
    gate.open();
    settle(&rig);
    assert_eq!((rig.stats().live, rig.stats().closed.get(CloseReason::PeerReset)), (0, 1));
    finish(&rig);
}

/// Scenario 9: the request is among the completions of the turn in which the drain closes what is
/// idle, or in the kernel by then.
#[test]
fn a_request_that_has_completed_when_the_drain_looks_is_handled_once_and_answered() {
    for completed in [true, false] {
        let heard = Heard::default();
        let handle = heard.clone();
        let rig = Rig::by_hand(config().idle_min_keep_ms(0), move |mut conn| {
            let heard = handle.clone();
            async move {
                while let Some(request) = conn.recv().await? {
                    heard.hear(&request);
                    conn.write(b"answer").await?;
                }
                Ok(())
            }
        });
        connect(&rig);
        say(&rig, b"first");
        rig.world.borrow_mut().work_on(Kind::Send);
        settle(&rig);
        assert_eq!(heard.take(), [b"first".to_vec()]);
        rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
        rig.world.borrow_mut().peers().for_each(|peer| peer.say(b"second"));
        if completed {
            rig.world.borrow_mut().work_on(Kind::Receive);
            rig.turn();
        } else {
            rig.turn();
            rig.world.borrow_mut().work_on(Kind::Receive);
        }
        settle(&rig);
        assert_eq!(heard.take(), [b"second".to_vec()], "once");
        rig.world.borrow_mut().work_on(Kind::Send);
        finish(&rig);
        let (stats, world) = (rig.stats(), rig.world.borrow());
        assert_eq!((stats.idle_races, stats.closed.get(CloseReason::Drained)), (0, 1));
        let peer = &world.past()[0];
        assert_eq!((&*peer.received, peer.fate), (&b"answeranswer"[..], Fate::Fin));
    }
}

fn config() -> Config {
    // Without large buffers, for which a receive would be cancelled and armed again.
    Config::default().buffer_bytes(256).large_buffer_bytes(256)
}
