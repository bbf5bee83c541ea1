//! Attempts to connect that are given up or lose: none leaves a socket, and each is counted once.
//! They count the descriptors of the process.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::common::client::{Client, Mute, failures};
use crate::common::{config, free_address, length, limit, open_fds, turn, wait_until};
use slipring::time::timeout;
use slipring::{Error, ErrorKind, Result, net};

/// Asks an echo server, and closes.
async fn ask(addr: impl std::fmt::Display) -> Result<()> {
    let mut conn = net::connect(addr).await?;
    conn.write(b"there and back").await?;
    let mut answer = [0; 14];
    conn.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"there and back");
    Ok(())
}

#[test]
fn who_does_not_answer_is_given_up_in_time_and_its_socket_closed() {
    let _turn = turn();
    let mute = Mute::tcp();
    let (addr, client) = (mute.addr, Client::start(config().connect_ms(150)));
    let before = open_fds();
    for (limit_ms, own) in [(150, false), (60, true)] {
        let begun = Instant::now();
        let error = client.run(move || async move {
            let connect = net::connect(addr);
            let limit = Duration::from_millis(limit_ms);
            if own { connect.timeout(limit).await } else { connect.await }.map(drop)
        });
        let (error, took) = (error.expect_err("no answer"), begun.elapsed());
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains("SLIPRING_CONNECT_MS"), "{error}");
        assert!(took >= Duration::from_millis(limit_ms), "early: {took:?}");
        assert!(took < Duration::from_millis(limit_ms) + limit(300), "late: {took:?}");
    }
    wait_until("the sockets are closed", || open_fds() == before);
    let total = client.end();
    assert_eq!((total.connects_timed_out, total.connects), (2, 2));
}

#[test]
fn the_first_address_that_answers_wins_and_the_others_are_cancelled() {
    let _turn = turn();
    let mute = Mute::tcp();
    let (upstream, alive) = crate::common::echo_server(config());
    let (nobody, client) = (free_address(), Client::plain());
    let before = open_fds();
    let race = |addrs: Vec<SocketAddr>| {
        let begun = Instant::now();
        let won = client.run(move || async move {
            let conn = net::connect_any(&addrs).timeout(Duration::from_millis(1_500)).await?;
            Ok::<_, Error>(conn.peer_addr())
        });
        (won, begun.elapsed())
    };
    // A dead address costs a quarter of a second, one that refuses nothing.
    let (won, took) = race(vec![mute.addr, alive, nobody]);
    assert_eq!(won.expect("one is alive"), Some(alive));
    assert!(took >= Duration::from_millis(250) && took < limit(1_000), "{took:?}");
    let (won, took) = race(vec![nobody, alive, mute.addr]);
    assert_eq!(won.expect("one is alive"), Some(alive));
    assert!(took < Duration::from_millis(200) + limit(100), "{took:?}");
    let (lost, took) = race(vec![nobody, mute.addr]);
    let error = lost.expect_err("none is alive");
    let text = error.to_string();
    assert!(text.contains(&nobody.to_string()) && text.contains(&mute.addr.to_string()), "{text}");
    assert!(text.contains("nobody listens") && text.contains("no answer"), "{text}");
    assert!(took >= Duration::from_millis(1_500), "{took:?}");
    wait_until("the sockets are closed", || open_fds() <= before);
    let total = client.end();
    let classes = [total.connects_cancelled, total.connects_refused, total.connects_timed_out];
    assert_eq!((total.connected, classes, total.connects), (2, [1, 2, 1], 6));
    crate::common::settle(upstream, 2);
}

#[test]
fn an_attempt_that_is_dropped_is_cancelled_and_its_socket_closed() {
    let _turn = turn();
    let mute = Mute::tcp();
    let (addr, client) = (mute.addr, Client::plain());
    let before = open_fds();
    client.run(move || async move {
        for _ in 0..20 {
            let late = timeout(Duration::from_millis(5), net::connect(addr).into_future()).await;
            assert_eq!(late.map(drop).expect_err("nobody answers").kind(), ErrorKind::TimedOut);
        }
    });
    wait_until("the sockets are closed", || open_fds() == before);
    let total = client.end();
    assert_eq!((total.connects_cancelled, total.connects), (20, 20));
}

#[test]
fn a_thousand_rounds_leave_nothing_whenever_they_are_given_up() {
    let _turn = turn();
    let (upstream, addr) = crate::common::echo_server(config());
    let client = Client::plain();
    client.run(move || async move { ask(addr).await }).expect("an answer");
    let (rounds, before) = (1_000 * length(), open_fds());
    client.run(move || async move {
        let mut seed = 0x5eed_u64;
        for round in 0..rounds {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if round % 2 == 0 {
                ask(addr).await.expect("an answer");
                continue;
            }
            // Within the few turns that a connect takes, and after it.
            let turns = (seed >> 33) % 6;
            let mut attempt = std::pin::pin!(net::connect(addr).into_future());
            let mut turn = 0;
            std::future::poll_fn(|cx| {
                turn += 1;
                cx.waker().wake_by_ref();
                let over = attempt.as_mut().poll(cx).is_ready() || turn > turns;
                if over { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
            })
            .await;
        }
    });
    wait_until("the descriptors are closed", || open_fds() <= before);
    let total = client.end();
    assert_eq!((total.connects, failures(&total)), (rounds + 1, total.connects_cancelled));
    assert!(total.connected > rounds / 2 && total.connects_cancelled > 0, "{total:?}");
    assert!(upstream.handle().drain(limit(5_000)).expect("a report").is_balanced());
}
