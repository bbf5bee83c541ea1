//! Which deadline ends an HTTP connection, and which does not; and what it is said to be at.
//!
//! Limits that must not end a connection are the short ones, and what must is waited for.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::http::{Client, End, serve, states};
use crate::common::{config, limit, settle, wait_until};
use slipring::{CloseReason, Config};

/// What is slow, the limits that are short, and how it ends: with a reason, after an answer or not.
struct Slow {
    name: &'static str,
    limits: fn(Config) -> Config,
    /// What is sent at first, and then again and again.
    first: &'static str,
    drip: &'static str,
    state: &'static str,
    status: Option<u16>,
    reason: CloseReason,
    end: End,
}

const MESSAGE: fn(Config) -> Config = |config| config.message_ms(SHORT_MS).min_rate_bytes_per_s(0);
const RATE: fn(Config) -> Config = |config| config.min_rate_grace_ms(SHORT_MS);
const HANDLER: fn(Config) -> Config = |config| config.handler_ms(SHORT_MS);
const IDLE: fn(Config) -> Config = |config| config.idle_ms(SHORT_MS);

const POST: &str = "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nsome";

#[test]
fn a_slow_message_is_ended_by_its_deadline_or_its_rate() {
    let base = Slow {
        name: "a head in drips",
        limits: MESSAGE,
        first: "GET /hello HTTP/1.1\r\nHost: ",
        drip: "x",
        state: "receiving",
        status: None,
        reason: CloseReason::Message,
        end: End::Fin,
    };
    run(Slow { ..base });
    run(Slow { name: "half a head", drip: "", ..base });
    run(Slow { name: "half a preface", first: "PRI * HTTP/2", drip: "", ..base });
    run(Slow { name: "a body in drips", first: POST, ..base });
    run(Slow { name: "half a body", first: POST, drip: "", ..base });
    let by_rate = Slow { limits: RATE, reason: CloseReason::MinRate, end: End::Reset, ..base };
    run(Slow { name: "a head below the rate", ..by_rate });
    run(Slow { name: "a body below the rate", first: POST, ..by_rate });
    run(Slow { name: "half a body, by the rate", first: POST, drip: "", ..by_rate });
}

#[test]
fn who_asks_for_nothing_is_idle() {
    let base = Slow {
        name: "after an answer",
        limits: IDLE,
        first: "GET /hello HTTP/1.1\r\nHost: x\r\n\r\n",
        drip: "",
        state: "idle",
        status: Some(200),
        reason: CloseReason::Idle,
        end: End::Fin,
    };
    run(Slow { ..base });
    let whole = "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody";
    run(Slow { name: "after a body", first: whole, ..base });
    let chunked = "POST /reads HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    run(Slow { name: "after chunks", first: chunked, ..base });
}

/// A handler that never looks at a body can't blame the peer for what does not come.
#[test]
fn a_handler_that_does_something_else_is_ended_by_its_own_deadline() {
    let base = Slow {
        name: "a late answer",
        limits: HANDLER,
        first: "GET /late/60000 HTTP/1.1\r\nHost: x\r\n\r\n",
        drip: "",
        state: "busy",
        status: None,
        reason: CloseReason::Handler,
        end: End::Fin,
    };
    run(Slow { ..base });
    let body = "POST /late/60000 HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\nsome";
    run(Slow { name: "a body that nobody wants", first: body, ..base });
    let read = "POST /reads/60000 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nsome";
    run(Slow { name: "a body that was read", first: read, ..base });
}

/// Each comes through though the limits of messages and of idling are short.
#[test]
fn what_is_slow_on_our_side_is_not_the_peers_fault() {
    let config = config().message_ms(SHORT_MS).min_rate_grace_ms(SHORT_MS / 2).idle_ms(SHORT_MS);
    let (running, addr) = serve(config);
    let handle = running.handle();
    let (pause, mut connects) = (3 * SHORT_MS, 0);
    for what in ["late", "thinks", "reads", "thread"] {
        // The head and the body in one piece, or each in two: then they are waited for.
        let head = format!("POST /{what}/{pause} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n");
        for pieces in [
            vec![&head[..20], &head[20..], "bo", "dy"],
            vec![&head, "body"],
            vec![&[&head, "body"].concat()],
        ] {
            let mut client = Client::connect(addr);
            connects += 1;
            let before = handle.stats().total().bytes_received;
            let mut sent = 0;
            for piece in &pieces {
                client.say(piece);
                sent += piece.len() as u64;
                wait_until("it has come", || {
                    handle.stats().total().bytes_received >= before + sent
                });
            }
            let busy = || crate::common::http::states(&handle) == ["busy"];
            wait_until(&format!("{what} in {} pieces is busy", pieces.len()), busy);
            let answer = client.answer();
            let answer = answer.unwrap_or_else(|end| panic!("{what}, {}: {end:?}", pieces.len()));
            assert_eq!(answer.status, 200, "{what}");
            drop(client);
            wait_until("it has ended", || handle.stats().total().live == 0);
        }
    }
    settle(running, connects);
}

/// Answered before its body was looked at, the body comes and is thrown away, and the connection is
/// idle then: not one that owes the rest of a message.
#[test]
fn a_connection_is_idle_after_a_body_that_nobody_wanted() {
    let config = config().message_ms(SHORT_MS).min_rate_grace_ms(SHORT_MS / 2);
    let (running, addr) = serve(config.idle_ms(8 * SHORT_MS));
    let mut client = Client::connect(addr);
    // The head and the first of the body, which hyper reads by itself, fill a receive buffer each.
    let head = " HTTP/1.1\r\nHost: x\r\nContent-Length: 7000\r\n\r\n";
    let path = format!("POST /ignore/{:x<1$}", "", 4096 - 13 - head.len());
    client.say(format!("{path}{head}{:x<7000}", ""));
    let answer = client.answer().expect("an answer");
    assert!(answer.status == 413 && !answer.closes(), "{}", answer.head);
    let since = Instant::now();
    assert_eq!(client.end(), End::Fin);
    assert!(since.elapsed() >= Duration::from_millis(8 * SHORT_MS - 1), "{:?}", since.elapsed());
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::Idle), 1, "{:?}", total.closed);
}

#[test]
fn a_reader_that_takes_nothing_of_an_answer_stalls() {
    let (running, addr) = serve(config().write_stall_ms(SHORT_MS).min_rate_bytes_per_s(0));
    let mut client = Client::connect(addr);
    client.say("GET /pieces/100000 HTTP/1.1\r\nHost: x\r\n\r\n");
    let handle = running.handle();
    wait_until("it stalls", || states(&handle) == ["sending"]);
    wait_until("it has ended", || handle.stats().total().live == 0);
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::WriteStall), 1, "{:?}", total.closed);
}

#[test]
fn an_answer_in_drips_goes_on_for_longer_than_any_limit() {
    let config = config().message_ms(SHORT_MS).idle_ms(SHORT_MS).handler_ms(SHORT_MS);
    let (running, addr) = serve(config);
    let mut client = Client::connect(addr);
    let answer = client.get(&format!("/drips/{}", 3 * SHORT_MS / 20)).expect("an answer");
    assert_eq!(answer.body.len() as u64, 3 * SHORT_MS / 20);
    drop(client);
    settle(running, 1);
}

/// Runs a case beside nobody else. The limits that must not end it are the ordinary, long ones.
fn run(slow: Slow) {
    let Slow { name, limits, first, drip, state, status, reason, end } = slow;
    let (running, addr) = serve(limits(config()));
    let handle = running.handle();
    let since = Instant::now();
    let mut client = Client::connect(addr);
    client.say(first);
    if let Some(status) = status {
        assert_eq!(client.answer().expect("an answer").status, status, "{name}");
    }
    wait_until(&format!("{name} is {state}"), || states(&handle) == [state]);
    let mut writer = client.stream.try_clone().expect("another");
    let dripping = thread::spawn(move || {
        while !drip.is_empty() && writer.write_all(drip.as_bytes()).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    wait_until("it has ended", || handle.stats().total().live == 0);
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(SHORT_MS - 1), "{name}: after {took:?}");
    assert!(took < limit(8_000), "{name}: after {took:?}");
    let ended = client.end();
    // What is sent to a closed connection is answered with a reset.
    assert!(ended == end || !drip.is_empty(), "{name}: {ended:?}");
    client.stream.shutdown(std::net::Shutdown::Both).ok();
    dripping.join().expect("no panic");
    let total = settle(running, 1);
    assert_eq!(total.closed.get(reason), 1, "{name}: {:?}", total.closed);
}

const SHORT_MS: u64 = 300;
