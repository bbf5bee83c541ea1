//! Peers that vanish, over a link that really loses what is sent: each is found in bounded time,
//! in whatever state its connection is, is counted under its reason, and its handler is told.
//!
//! 1. A server with small limits starts on one side of the link, a peer connects from the other.
//! 2. The peer's connection is brought into a state, confirmed by a byte or by a counter.
//! 3. The peer's address is deleted, and the time until the connection has ended is measured.
//!
//! The limits are whole seconds, so the cases of a test run side by side, each on its own subnet.

use std::io::{Read, Write};
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::site::{ANSWER, Site, ask, await_stall, base, side_by_side};
use crate::common::world::in_a_world;
use crate::common::{late, limit, wait_until};
use slipring::{CloseReason, ErrorKind, Server};
use socket2::SockRef;

/// Scenario 38. With a user timeout the kernel counts time instead of probes, upward too, and
/// `Config::explain` says what comes of it.
#[test]
fn an_idle_peer_that_vanishes_is_found_when_explain_says_so() {
    in_a_world("an_idle_peer_that_vanishes_is_found_when_explain_says_so", |world| {
        let keepalive = |idle_s, interval_s, count| {
            let config = base().keepalive_idle_s(idle_s).keepalive_interval_s(interval_s);
            config.keepalive_count(count)
        };
        let cases = [
            (keepalive(2, 1, 3).user_timeout_ms(0), 5),
            (keepalive(1, 1, 2).user_timeout_ms(0), 3),
            (keepalive(2, 1, 3).user_timeout_ms(5_000), 5),
            (keepalive(2, 1, 9).user_timeout_ms(3_000), 3),
            (keepalive(1, 1, 1).user_timeout_ms(4_000), 4),
        ];
        side_by_side(cases, |n, (config, seconds)| {
            let facts = config.explain().to_string();
            let said = format!("idle connection: found after about {seconds} s");
            assert!(facts.contains(&said), "{said:?} is not in: {facts}");
            let site = Site::new(world, n, config);
            let mut peer = site.connect(world);
            ask(&mut peer, b"e");
            let since = Instant::now();
            world.vanish(n);
            let took = site.await_end(CloseReason::PeerDead, since);
            // The last thing that the peer sent, an acknowledgement, may be a little older.
            let least = Duration::from_millis(1_000 * seconds - 300);
            let most = Duration::from_millis(1_000 * seconds + 1_000) + late::allowance();
            assert!(took >= least && took <= most, "case {n}: {took:?} instead of {seconds} s");
            assert_eq!(site.told(), Some(ErrorKind::PeerDead), "case {n}");
            site.end();
        });
    });
}

/// Scenario 39. Keepalive does not probe while data is unacknowledged.
#[test]
fn unacknowledged_data_ends_with_the_user_timeout() {
    in_a_world("unacknowledged_data_ends_with_the_user_timeout", |world| {
        side_by_side([1_000, 2_000, 3_000], |n, user_timeout_ms| {
            let site = Site::new(world, n, base().user_timeout_ms(user_timeout_ms));
            let mut peer = site.connect(world);
            ask(&mut peer, b"g");
            world.vanish(n);
            let since = Instant::now();
            site.go.store(true, SeqCst);
            let took = site.await_end(CloseReason::PeerDead, since);
            let least = Duration::from_millis(user_timeout_ms - 100);
            let most = Duration::from_millis(user_timeout_ms + 1_000) + late::allowance();
            assert!(took >= least && took <= most, "{took:?} instead of {user_timeout_ms} ms");
            assert_eq!(site.told(), Some(ErrorKind::PeerDead));
            site.end();
        });
    });
}

/// Scenario 40. Either limit suffices: the kernel's, or the server's own look at what the peer
/// takes; also when the handler has finished and only its output is left.
#[test]
fn a_peer_that_vanishes_with_its_window_shut_is_found_by_either_limit() {
    in_a_world("a_peer_that_vanishes_with_its_window_shut_is_found_by_either_limit", |world| {
        let (kernel, ours) = (base().user_timeout_ms(2_000), base().write_stall_ms(2_000));
        let cases = [
            (b"w", kernel.clone(), CloseReason::PeerDead, Some(ErrorKind::PeerDead)),
            (b"w", ours.clone(), CloseReason::WriteStall, Some(ErrorKind::TimedOut)),
            (
                b"w",
                ours.clone().user_timeout_ms(10_000),
                CloseReason::WriteStall,
                Some(ErrorKind::TimedOut),
            ),
            (b"b", kernel, CloseReason::PeerDead, None),
            (b"b", ours, CloseReason::WriteStall, None),
        ];
        side_by_side(cases, |n, (command, config, reason, told)| {
            let site = Site::new(world, n, config);
            let mut peer = site.connect(world);
            peer.write_all(command).expect("send");
            let since = await_stall(&peer);
            world.vanish(n);
            let took = site.await_end(reason, since);
            // A stall is noticed at most a quarter late; the kernel probes less and less often.
            let most = Duration::from_millis(2_500 + 1_000) + late::allowance();
            assert!(took <= most, "case {n}: {took:?}");
            assert_eq!(site.told(), told, "case {n}");
            site.end();
        });
    });
}

/// Scenario 41. The user timeout limits a slow reader too, as its documentation says; without it
/// only the write stall does.
#[test]
fn a_peer_that_reads_nothing_is_ended_by_the_documented_limits_alone() {
    in_a_world("a_peer_that_reads_nothing_is_ended_by_the_documented_limits_alone", |world| {
        let cases = [
            // A send that was cut short swallows the kernel's reason, and this peer was there.
            (base().user_timeout_ms(2_000), Some(CloseReason::PeerReset)),
            (base().write_stall_ms(2_000), Some(CloseReason::WriteStall)),
            (base(), None),
            (base().write_stall_ms(60_000).user_timeout_ms(30_000), None),
        ];
        side_by_side(cases, |n, (config, reason)| {
            let site = Site::new(world, n, config);
            let mut peer = site.connect(world);
            peer.write_all(b"b").expect("send");
            let since = await_stall(&peer);
            let Some(reason) = reason else {
                thread::sleep(Duration::from_millis(4_000));
                let mut received = Vec::new();
                peer.read_to_end(&mut received).expect("a slow reader gets everything");
                assert_eq!(received.len(), 1 + ANSWER, "case {n}");
                assert!(received[1..].iter().all(|byte| *byte == b'w'), "case {n}");
                site.await_end(CloseReason::Served, since);
                return site.end();
            };
            let took = site.await_end(reason, since);
            let most = Duration::from_millis(2_500 + 1_000) + late::allowance();
            assert!(took <= most, "case {n}: {took:?}");
            site.end();
        });
    });
}

/// Scenario 45. A paused receive delivers no error; a poll for one is armed in its place.
#[test]
fn a_peer_that_goes_away_while_it_is_not_listened_to_is_noticed() {
    in_a_world("a_peer_that_goes_away_while_it_is_not_listened_to_is_noticed", |world| {
        let keepalive = || base().keepalive_idle_s(1).keepalive_interval_s(1).keepalive_count(2);
        let cases = [
            // It resets, or vanishes; the handler watches, or does something else for long, in
            // which case it is dropped as if it were idle.
            (b"p", true, base(), 1_000),
            (b"s", true, base().idle_ms(1_500), 1_500 * 9 / 8 + 1_000),
            (b"p", false, keepalive(), 3_000 + 1_000),
            (b"s", false, keepalive().idle_ms(4_000), 3_000 + 4_500 + 1_000),
        ];
        side_by_side(cases, |n, (command, resets, config, most_ms)| {
            let site = Site::new(world, n, config.receive_queue_bytes(4_096));
            let mut peer = site.connect(world);
            ask(&mut peer, command);
            peer.set_nonblocking(true).expect("set non-blocking");
            wait_until("the receive is paused", || {
                let _ = peer.write(&[b'x'; 16_384]);
                site.total().pauses > 0
            });
            if resets {
                SockRef::from(&peer).set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
                drop(peer);
            } else {
                world.vanish(n);
            }
            let reason = if resets { CloseReason::PeerReset } else { CloseReason::PeerDead };
            let took = site.await_end(reason, Instant::now());
            let most = Duration::from_millis(most_ms) + late::allowance();
            assert!(took <= most, "case {n}: {took:?}");
            site.end();
        });
    });
}

/// The peers of every state vanish, and then the server drains: it returns in its deadline. With
/// time to spare it returns when the last peer has been found out.
#[test]
fn a_drain_does_not_wait_for_peers_that_have_vanished() {
    in_a_world("a_drain_does_not_wait_for_peers_that_have_vanished", |world| {
        let patient = base().user_timeout_ms(1_000).write_stall_ms(1_000).linger_ms(1_000);
        let cases = [(base(), 1_000, 1_100), (patient, 20_000, 2_500)];
        side_by_side(cases, |n, (config, deadline_ms, most_ms)| {
            let site = Site::new(world, n, config);
            let mut peers: Vec<_> = (0..5).map(|_| site.connect(world)).collect();
            ask(&mut peers[0], b"e"); // Idle.
            ask(&mut peers[1], b"g"); // One byte will be unacknowledged.
            peers[2].write_all(b"w").expect("send"); // Does not take what it asked for.
            ask(&mut peers[3], b"p"); // Is not listened to.
            ask(&mut peers[4], b"p"); // Has half-closed.
            peers[4].shutdown(std::net::Shutdown::Write).expect("half-close");
            await_stall(&peers[2]);
            world.vanish(n);
            site.go.store(true, SeqCst);
            wait_until("the byte is written", || site.told.lock().expect("no panic").wrote);
            let since = Instant::now();
            let handle = site.running.handle();
            let report = handle.drain(Duration::from_millis(deadline_ms)).expect("a report");
            let took = since.elapsed();
            println!("drain within {deadline_ms} ms: {took:?}, {report}");
            let most = limit(most_ms) + late::allowance();
            assert!(took <= most, "{took:?}: {report}");
            assert!(report.is_balanced() && report.total().accepted == 5, "{report}");
            assert_eq!(report.total().leaked_operations, 0, "{report}");
            site.running.join().expect("no core failed");
            // What the kernel still tries to deliver does not hold the port.
            let again = Server::new(base().bind_retry_ms(0))
                .listen(site.addr.to_string(), |_| async { Ok(()) });
            again.start().expect("the port is free").handle().close();
        });
    });
}
