//! Peers that vanish, or live and say nothing, found by our own limits where the kernel's are off:
//! over a real link, as in `vanish.rs`.

use std::io::{ErrorKind as IoKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use crate::common::late;
use crate::common::site::{Site, ask, await_stall, base, side_by_side};
use crate::common::world::in_a_world;
use slipring::{CloseReason, ErrorKind, HalfClose};

/// Scenario 39, without a user timeout: what the kernel holds and the peer does not take counts as
/// output that stalls.
#[test]
fn a_byte_that_is_never_acknowledged_ends_with_the_write_stall_too() {
    in_a_world("a_byte_that_is_never_acknowledged_ends_with_the_write_stall_too", |world| {
        side_by_side([1_000, 2_000, 3_000], |n, stall_ms| {
            let site = Site::new(world, n, base().write_stall_ms(stall_ms));
            let mut peer = site.connect(world);
            ask(&mut peer, b"g");
            world.vanish(n);
            let since = Instant::now();
            site.go.store(true, SeqCst);
            let took = site.await_end(CloseReason::WriteStall, since);
            assert!(took >= Duration::from_millis(stall_ms - 100), "case {n}: {took:?}");
            assert!(took <= quarter_more(stall_ms), "case {n}: {took:?}");
            assert_eq!(site.told(), Some(ErrorKind::TimedOut), "case {n}");
            site.end();
        });
    });
}

/// Scenario 48's other half: a peer that has ended its side and then vanishes says nothing more in
/// any case. Nothing is received any more, so only the limits can find it out.
#[test]
fn a_half_closed_peer_that_vanishes_is_found_whatever_its_handler_does() {
    in_a_world("a_half_closed_peer_that_vanishes_is_found_whatever_its_handler_does", |world| {
        let cases = [
            // The handler sleeps, or sends to somebody who is not there.
            (b"s", base().half_close_ms(2_000), CloseReason::HalfClosed),
            (b"s", base().half_close(HalfClose::Abort), CloseReason::HalfClosed),
            (b"w", base().half_close_ms(2_000), CloseReason::HalfClosed),
            (b"w", base().write_stall_ms(2_000), CloseReason::WriteStall),
            (b"w", base().user_timeout_ms(2_000), CloseReason::PeerDead),
        ];
        side_by_side(cases, |n, (command, config, reason)| {
            let site = Site::new(world, n, config);
            let mut peer = site.connect(world);
            let mut since = Instant::now();
            if command == b"s" {
                ask(&mut peer, command);
            } else {
                peer.write_all(command).expect("send");
                since = await_stall(&peer);
            }
            peer.shutdown(Shutdown::Write).expect("half-close");
            world.vanish(n);
            let took = site.await_end(reason, since);
            assert!(took <= quarter_more(2_000) + SLACK, "case {n}: {took:?}");
            site.end();
        });
    });
}

/// Scenario 43. Keepalive is answered by the peer's kernel; only the heartbeat asks its program.
#[test]
fn a_heartbeat_finds_who_does_not_answer_and_nobody_else() {
    in_a_world("a_heartbeat_finds_who_does_not_answer_and_nobody_else", |world| {
        #[derive(Clone, Copy, PartialEq)]
        enum Peer {
            Hangs,
            Vanishes,
            Answers,
            Chatters,
        }
        let beating = || base().heartbeat_ms(1_000).heartbeat_timeout_ms(1_000);
        let cases = [
            (Peer::Hangs, beating()),
            (Peer::Hangs, beating().keepalive_idle_s(1)),
            (Peer::Vanishes, beating()),
            (Peer::Answers, beating()),
            (Peer::Chatters, beating()),
        ];
        side_by_side(cases, |n, (peer, config)| {
            let site = Site::new(world, n, config);
            let mut stream = site.connect(world);
            ask(&mut stream, b"e");
            let since = Instant::now();
            match peer {
                Peer::Hangs => {}
                Peer::Vanishes => world.vanish(n),
                Peer::Answers => assert!(keep_alive(&mut stream, true) >= 3, "it was asked"),
                Peer::Chatters => assert_eq!(keep_alive(&mut stream, false), 0, "nobody asks"),
            }
            if matches!(peer, Peer::Answers | Peer::Chatters) {
                assert_eq!(site.total().live, 1, "case {n}");
                return site.end();
            }
            let took = site.await_end(CloseReason::Heartbeat, since);
            // The period may be a tenth shorter or longer, and each part an eighth late.
            assert!(took >= Duration::from_millis(1_850), "case {n}: {took:?}");
            assert!(took <= quarter_more(2_100), "case {n}: {took:?}");
            assert_eq!(site.told(), Some(ErrorKind::TimedOut), "case {n}");
            site.end();
        });
    });
}

/// For a while, answers what comes, or speaks without being asked. Returns how often it was asked.
fn keep_alive(stream: &mut TcpStream, answers: bool) -> usize {
    let until = Instant::now() + Duration::from_millis(4_500);
    stream.set_read_timeout(Some(Duration::from_millis(300))).expect("set a time limit");
    let mut asked = 0;
    while Instant::now() < until {
        let was_asked = match stream.read(&mut [0]) {
            Ok(count) => count,
            Err(error) if error.kind() == IoKind::WouldBlock => 0,
            Err(error) => panic!("{error}"),
        };
        asked += was_asked;
        if was_asked > 0 || !answers {
            stream.write_all(b"!").expect("send");
        }
    }
    asked
}

/// The most that a limit may take: looks at the output may be a quarter of it late.
fn quarter_more(ms: u64) -> Duration {
    Duration::from_millis(ms * 5 / 4) + Duration::from_millis(100) + late::allowance()
}

const SLACK: Duration = Duration::from_millis(1_000);
