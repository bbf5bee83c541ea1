//! Deadlines by hand, in virtual time: each ends whom it is for, when it should, and nobody else.
//! Scenarios are numbered as in `by_hand.rs`.

use std::time::Duration;

use super::hands::{Heard, connect, end_operations, entry, finish, say, settle};
use super::peer::Peer;
use super::rig::Rig;
use crate::config::{Config, HalfClose};
use crate::conn::Connection;
use crate::deadline::DeadlineKind;
use crate::error::{ErrorKind, Result};
use crate::listen::Listener;
use crate::report::CloseReason;
use crate::time::{sleep, timeout};
use crate::token::Kind;

/// No limit that a test does not set.
fn config() -> Config {
    let day_ms = 86_400_000;
    let config = Config::default().first_byte_ms(3_600_000).message_ms(day_ms).idle_ms(day_ms);
    let config = config.handler_ms(day_ms).write_stall_ms(3_600_000).half_close_ms(day_ms);
    config.min_rate_bytes_per_s(0).user_timeout_ms(0).lifetime_ms(365 * day_ms)
}

/// Lets `ms` pass, a bit each turn; in each bit the peers do something.
fn pass(rig: &Rig, ms: u64, mut act: impl FnMut(u64, &mut Peer)) {
    for now_ms in (0..ms).step_by(STEP_MS as usize) {
        rig.world.borrow_mut().pass_ms(STEP_MS);
        rig.world.borrow_mut().peers().for_each(|peer| act(now_ms, peer));
        for kind in [Kind::Receive, Kind::Send, Kind::Cancel, Kind::Hangup] {
            rig.world.borrow_mut().work_on_all(kind);
        }
        rig.turn();
        rig.turn();
    }
}

/// How long it takes until the one connection is ended, and why.
fn ended(rig: &Rig, mut act: impl FnMut(u64, &mut Peer)) -> Option<(CloseReason, u64)> {
    for now_ms in (0..100_000).step_by(STEP_MS as usize) {
        pass(rig, STEP_MS, |_, peer| act(now_ms, peer));
        let ended = rig.core.borrow_mut().table.iter().find_map(|(_, entry)| entry.ended);
        if let Some(reason) = ended {
            settle(rig);
            end_operations(rig);
            return Some((reason, now_ms + STEP_MS));
        }
    }
    None
}

fn assert_on_time(found: Option<(CloseReason, u64)>, reason: CloseReason, limit_ms: u64) {
    let (is, took_ms) = found.unwrap_or_else(|| panic!("never ended, instead of {reason:?}"));
    let range = limit_ms - STEP_MS..=limit_ms + limit_ms / 8 + 2 * STEP_MS;
    assert!(is == reason && range.contains(&took_ms), "{is:?} after {took_ms} ms, not {reason:?}");
}

/// However many deadlines pass in one moment, a turn ends few connections, and serves the others.
#[test]
fn deadlines_of_one_moment_end_a_few_connections_a_turn() {
    let heard = Heard::default();
    let rig = Rig::by_hand(config().first_byte_ms(1_000).check_ms(0), heard.reads_all());
    let active = connect(&rig);
    say(&rig, b"here");
    for _ in 0..CROWD {
        connect(&rig);
    }
    rig.world.borrow_mut().pass_ms(1_200);
    heard.take();
    let ended = || {
        let core = rig.core.borrow_mut();
        core.table.iter().filter(|(_, entry)| entry.ended.is_some()).count()
    };
    let mut turns = 0;
    while ended() < CROWD {
        let before = ended();
        rig.turn();
        turns += 1;
        assert!(ended() - before <= 16, "{} in a turn", ended() - before);
    }
    assert!(turns <= CROWD.div_ceil(16) + 2, "{turns} turns");
    entry(&rig, active, |entry| assert!(entry.ended.is_none()));
    end_operations(&rig);
    finish(&rig);
}

/// A future that is dropped waits for nothing.
#[test]
fn a_handler_that_has_given_up_waiting_has_the_handlers_limit_and_not_the_idle_one() {
    for (idle_ms, handler_ms) in [(3_000, 20_000), (20_000, 3_000)] {
        let rig =
            Rig::by_hand(config().idle_ms(idle_ms).handler_ms(handler_ms), |mut conn| async {
                conn.recv().await?;
                assert!(
                    timeout(Duration::from_secs(1), conn.recv()).await.is_err(),
                    "nothing comes"
                );
                sleep(Duration::from_secs(1_000_000)).await;
                drop(conn);
                Ok(())
            });
        connect(&rig);
        say(&rig, b"x");
        assert_on_time(ended(&rig, |_, _| ()), CloseReason::Handler, 1_000 + handler_ms);
        finish(&rig);
    }
}

/// Nor does it help a peer that is silent that its handler asks again and again.
#[test]
fn a_handler_that_waits_piece_by_piece_waits_all_in_all() {
    for pause_ms in [0, 500] {
        let rig = Rig::by_hand(config().idle_ms(10_000), move |mut conn| async move {
            conn.recv().await?;
            loop {
                match timeout(Duration::from_secs(1), conn.recv()).await {
                    Ok(chunk) => drop(chunk?),
                    Err(_) => sleep(Duration::from_millis(pause_ms)).await,
                }
            }
        });
        connect(&rig);
        say(&rig, b"x");
        let limit_ms = 10_000 + 10 * pause_ms;
        assert_on_time(ended(&rig, |_, _| ()), CloseReason::Idle, limit_ms);
        finish(&rig);
    }
}

/// Says a byte now and then.
fn drip(every_ms: u64, bytes: usize) -> impl FnMut(u64, &mut Peer) {
    move |now_ms, peer| {
        if now_ms % every_ms == 0 {
            peer.say(&vec![b'x'; bytes]);
        }
    }
}

fn nothing(_: u64, _: &mut Peer) {}

/// Scenario 46: however the bytes come, and whoever puts them together.
#[test]
fn a_message_that_drips_in_is_cut_off_at_its_absolute_deadline() {
    for layer in [false, true] {
        let rig = Rig::by_hand(config().message_ms(2_000), move |mut conn| async move {
            if !layer {
                return conn.read_until(b'\n', 10_000).await.map(drop);
            }
            conn.fill_buf().await?;
            conn.begin_message();
            while conn.recv().await?.is_some() {}
            Ok(())
        });
        connect(&rig);
        say(&rig, b"x");
        assert_on_time(ended(&rig, drip(50, 1)), CloseReason::Message, 2_000);
        finish(&rig);
    }
}

/// Scenario 46, the other side: messages may follow each other for ever, each in its own time.
#[test]
fn a_message_that_ends_in_time_leaves_nothing_behind() {
    let heard = Heard::default();
    let handle = heard.clone();
    let rig = Rig::by_hand(config().message_ms(1_000), move |mut conn| {
        let heard = handle.clone();
        async move {
            while let Some(line) = conn.read_until(b'\n', 10_000).await? {
                heard.hear(&line);
            }
            Ok(())
        }
    });
    connect(&rig);
    pass(&rig, 20_000, |now_ms, peer| match now_ms % 800 {
        0 => peer.say(b"a"),
        600 => peer.say(b"b\n"),
        _ => {}
    });
    assert_eq!(heard.take(), vec![b"ab\n".to_vec(); 25]);
    finish(&rig);
}

#[test]
fn a_handler_that_holds_a_connection_is_ended_and_one_that_is_heard_of_is_not() {
    let rig = Rig::by_hand(config().handler_ms(2_000), |mut conn| async move {
        match conn.recv().await?.as_deref() {
            Some(b"hold") => sleep(Duration::from_secs(1_000_000)).await,
            _ => {
                for _ in 0..10 {
                    sleep(Duration::from_millis(1_500)).await;
                    conn.write(b".").await?;
                }
            }
        }
        Ok(())
    });
    connect(&rig);
    say(&rig, b"hold");
    assert_on_time(ended(&rig, nothing), CloseReason::Handler, 2_000);
    pass(&rig, 1_000, nothing);
    connect(&rig);
    say(&rig, b"work");
    pass(&rig, 20_000, |_, peer| peer.take_output());
    assert_eq!(rig.stats().closed.get(CloseReason::Handler), 1);
    assert_eq!((rig.stats().closed.get(CloseReason::Served), rig.stats().live), (1, 0));
    finish(&rig);
}

/// Scenario 48.
#[test]
fn after_the_peers_end_a_busy_handler_finishes_unless_told_otherwise() {
    let rig = |config: Config| {
        let rig = Rig::by_hand(config, |mut conn| async move {
            let Some(word) = conn.recv().await? else { return Ok(()) };
            let ms = if &*word == b"hold" { 1_000_000 } else { 500 };
            sleep(Duration::from_millis(ms)).await;
            conn.write(b"answer").await
        });
        connect(&rig);
        rig
    };
    let end = |now_ms: u64, peer: &mut Peer| {
        if now_ms == 0 {
            peer.half_close();
        }
    };
    let finishes = rig(config().half_close_ms(2_000));
    say(&finishes, b"work");
    pass(&finishes, 1_000, |now_ms, peer| {
        end(now_ms, peer);
        assert!(now_ms < 600 || peer.received == b"answer");
    });
    assert_eq!(finishes.stats().closed.get(CloseReason::Finished), 1);
    assert_eq!(finishes.stats().closed.total(), 1);
    finish(&finishes);

    let holds = rig(config().half_close_ms(2_000));
    say(&holds, b"hold");
    assert_on_time(ended(&holds, end), CloseReason::HalfClosed, 2_000);
    finish(&holds);

    let aborts = rig(config().half_close(HalfClose::Abort));
    say(&aborts, b"work");
    let (reason, took_ms) = ended(&aborts, end).expect("it is ended");
    assert!(reason == CloseReason::HalfClosed && took_ms <= 2 * STEP_MS, "{took_ms} ms");
    finish(&aborts);

    // Who waits for input has heard the end, and is not busy.
    let waits = rig(config().half_close(HalfClose::Abort));
    pass(&waits, 100, end);
    assert_eq!(waits.stats().closed.get(CloseReason::Finished), 1);
    finish(&waits);
}

/// Scenario 47, and the same for what is received.
#[test]
fn the_least_rate_holds_in_both_directions() {
    let config = || config().min_rate_bytes_per_s(240).min_rate_grace_ms(2_000);
    let receives =
        |bytes| {
            let rig = Rig::by_hand(config(), |mut conn| async move {
                conn.read_exact(&mut [0; 1_000_000]).await
            });
            connect(&rig);
            let found = ended(&rig, drip(500, bytes));
            finish(&rig);
            found
        };
    assert_eq!(receives(150), None, "300 bytes a second");
    let (reason, took_ms) = receives(50).expect("100 bytes a second are too few");
    assert_eq!(reason, CloseReason::MinRate);
    assert!((2_000..6_000).contains(&took_ms), "{took_ms} ms");

    let sends = |every_ms| {
        let rig = Rig::by_hand(config().write_stall_ms(30_000), |mut conn| async move {
            conn.recv().await?;
            loop {
                conn.send(vec![7; 1000]).await?;
            }
        });
        connect(&rig);
        say(&rig, b"go");
        // Each time it makes room for 2 000 bytes.
        let found = ended(&rig, |now_ms, peer| {
            if now_ms % every_ms == 0 {
                peer.take_output();
            }
        });
        finish(&rig);
        found
    };
    assert_eq!(sends(6_000), None, "333 bytes a second");
    let (reason, took_ms) = sends(20_000).expect("100 bytes a second are too few");
    assert_eq!(reason, CloseReason::MinRate);
    // The first 2 000 were taken at once and are good for 8 s more.
    assert!((8_000..25_000).contains(&took_ms), "{took_ms} ms");
}

async fn echo(mut conn: Connection) -> Result<()> {
    while let Some(chunk) = conn.recv().await? {
        if &*chunk != b"pong" {
            conn.send(chunk).await?;
        }
    }
    Ok(())
}

/// A core whose listener asks for signs of life.
fn beating(config: Config, peers: usize) -> Rig {
    let rig = Rig::by_hand(config.heartbeat_ms(2_000).heartbeat_timeout_ms(500), echo);
    {
        let mut core = rig.core.borrow_mut();
        let listener: Listener = core.listeners.remove(0);
        core.listeners.push(listener.with_heartbeat(Some(b"ping".as_slice().into())));
    }
    for _ in 0..peers {
        connect(&rig);
    }
    pass(&rig, STEP_MS, |_, peer| peer.say(b"x"));
    rig
}

/// How often it was asked.
fn asked(peer: &Peer) -> usize {
    peer.received.windows(4).filter(|window| window == b"ping").count()
}

/// Scenario 43.
#[test]
fn a_peer_that_hangs_is_asked_and_ended_and_one_that_answers_anything_is_not() {
    let rig = beating(config(), 1);
    let mut asked_ms = None;
    let found = ended(&rig, |now_ms, peer| {
        peer.take_output();
        if asked(peer) > 0 {
            asked_ms.get_or_insert(now_ms);
        }
        assert!(asked(peer) <= 1, "it is asked once");
    });
    let asked_ms = asked_ms.expect("it is asked");
    assert!((1_800 - 2 * STEP_MS..=2_500).contains(&asked_ms), "asked after {asked_ms} ms");
    let (reason, took_ms) = found.expect("it is ended");
    assert_eq!(reason, CloseReason::Heartbeat);
    let answer_ms = took_ms - asked_ms;
    assert!((500 - 2 * STEP_MS..=570 + 2 * STEP_MS).contains(&answer_ms), "{answer_ms} ms");
    finish(&rig);

    let rig = beating(config(), 20);
    let mut answered = vec![0; 20];
    pass(&rig, 20_000, |_, peer| {
        peer.take_output();
        let count = asked(peer);
        if count > peer.sent() / 4 {
            peer.say(b"pong");
        }
        answered.push(count);
    });
    assert_eq!(rig.stats().live, 20);
    assert!(answered.iter().any(|count| *count >= 7), "each was asked every 2 s");
    finish(&rig);
}

/// Scenario 44, here with a few; `tests/turns/deadlines.rs` stops a process with a thousand.
#[test]
fn after_a_pause_of_the_core_nobody_is_blamed_who_could_not_be_heard() {
    for asked_before in [false, true] {
        let rig = beating(config(), 30);
        let answer = |_: u64, peer: &mut Peer| {
            peer.take_output();
            if asked(peer) > peer.sent() / 4 {
                peer.say(b"pong");
            }
        };
        // Stopped amid the questions, or long before them.
        pass(&rig, if asked_before { 2_000 } else { 500 }, nothing);
        rig.world.borrow_mut().pass_ms(6_000);
        pass(&rig, 10_000, answer);
        assert_eq!(rig.stats().live, 30, "asked before: {asked_before} {:?}", rig.stats().closed);
        // It does find out afterwards.
        pass(&rig, 10_000, nothing);
        assert_eq!(rig.stats().closed.get(CloseReason::Heartbeat), 30);
        finish(&rig);
    }
}

/// The end of a lifetime is a drain for one: nobody is cut off in the middle of a message, and no
/// two end together.
#[test]
fn a_lifetime_ends_between_messages_and_never_in_one() {
    let heard = Heard::default();
    let handle = heard.clone();
    let config = || config().lifetime_ms(10_000).drain_ms(3_000);
    let rig = Rig::by_hand(config(), move |mut conn| {
        let heard = handle.clone();
        async move {
            while let Some(line) = conn.read_until(b'\n', 100).await? {
                conn.write(&line).await?;
            }
            assert!(conn.is_draining());
            heard.hear(b"told");
            Ok(())
        }
    });
    let mut ends = Vec::new();
    for _ in 0..20 {
        connect(&rig);
    }
    pass(&rig, 10_000, |now_ms, peer| {
        // Each is amid a message whenever its time may be over.
        match now_ms {
            8_800 => peer.say(b"half"),
            10_000 => peer.say(b"whole\n"),
            _ => {}
        }
    });
    assert_eq!(rig.stats().live, 20, "all were amid a message");
    pass(&rig, 1_500, |now_ms, peer| {
        peer.take_output();
        if now_ms == 0 {
            peer.say(b"whole\n");
        }
        if now_ms == 1_000 {
            ends.push(peer.received == b"halfwhole\n");
        }
    });
    end_operations(&rig);
    assert_eq!(rig.stats().closed.get(CloseReason::Lifetime), 20, "{:?}", rig.stats().closed);
    assert_eq!(heard.take(), vec![b"told".to_vec(); 20]);
    assert!(ends.iter().all(|whole| *whole), "whoever is left has its answer");
    finish(&rig);

    // A handler that hears of nothing has the drain's time, and no more.
    let heard = Heard::default();
    let handle = heard.clone();
    let rig = Rig::by_hand(config(), move |mut conn| {
        let heard = handle.clone();
        async move {
            conn.set_deadline(DeadlineKind::Lifetime, Duration::from_secs(5))?;
            conn.extend_deadline(DeadlineKind::Lifetime, Duration::from_secs(1))?;
            conn.recv().await?;
            let left = conn.deadline(DeadlineKind::Lifetime).expect("it always runs");
            assert!((5_900..=6_000).contains(&left.as_millis()), "{left:?}");
            assert_eq!(conn.deadline(DeadlineKind::Message), None);
            conn.closing().await;
            heard.hear(b"told");
            conn.recv().await.inspect_err(|error| heard.fail(error))?;
            sleep(Duration::from_secs(1_000_000)).await;
            Ok(())
        }
    });
    connect(&rig);
    say(&rig, b"x");
    let (reason, took_ms) = ended(&rig, drip(100, 1)).expect("it ends");
    assert_eq!(reason, CloseReason::Lifetime);
    assert!((9_000 - STEP_MS..=9_000 * 9 / 8).contains(&took_ms), "{took_ms} ms");
    settle(&rig);
    assert_eq!((heard.take(), heard.errors()), (vec![b"told".to_vec()], Vec::<ErrorKind>::new()));
    finish(&rig);
}

const STEP_MS: u64 = 10;
const CROWD: usize = 200;
