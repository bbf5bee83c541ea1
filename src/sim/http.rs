//! HTTP over a simulated kernel: what comes in one read with something else, and what comes at the
//! very moment at which a deadline passes or a drain begins.

use std::cell::Cell;
use std::convert::Infallible;
use std::rc::Rc;

use hyper::service::service_fn;
use hyper::{Request, Response};

use super::hands::{connect, entry, finish, pass_until, pass_until_reminded, say, settle};
use super::peer::{Fate, Peer};
use super::rig::Rig;
use crate::config::Config;
use crate::http::{Http, Incoming};
use crate::report::CloseReason;
use crate::table::Id;
use crate::token::Kind;

/// The next request has begun, though nothing of it has come since it was found out that the last
/// one was answered.
#[test]
fn a_request_whose_beginning_came_with_the_last_one_is_waited_for_in_a_drain() {
    for cut in [1, 4, NEXT.len() - 1] {
        let (rig, _) = http(config());
        let id = connect(&rig);
        say(&rig, [LAST, &NEXT[..cut]].concat().as_bytes());
        send(&rig);
        assert_eq!(answers(&rig), ["/last"], "cut at {cut}");
        rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
        settle(&rig);
        entry(&rig, id, |entry| {
            let is_left = entry.ended.is_none() && !entry.is_closing();
            assert!(is_left && entry.deadlines.is_in_message(), "cut at {cut}: it was cut off");
        });
        say(&rig, &NEXT.as_bytes()[cut..]);
        send(&rig);
        assert_eq!(answers(&rig), ["/last", "/next, the end"], "cut at {cut}");
        finish(&rig);
        assert_eq!(rig.world.borrow().past()[0].fate, Fate::Fin);
    }
}

/// hyper can be told to keep an answer until it has no more input in hand. It goes down with the
/// connection then, and the answer to the next request never takes its place.
#[test]
fn an_answer_that_hyper_keeps_back_is_never_replaced_by_the_next_one() {
    for comes in [true, false] {
        let (rig, _) = serve(config(), Http::new().http1(|it| _ = it.pipeline_flush(true)));
        connect(&rig);
        say(&rig, [LAST, &NEXT[..4]].concat().as_bytes());
        send(&rig);
        rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
        settle(&rig);
        if comes {
            say(&rig, &NEXT.as_bytes()[4..]);
        }
        send(&rig);
        let answers = answers(&rig);
        assert!(answers.is_empty() || answers[0] == "/last", "{answers:?}");
        end_all(&rig);
        assert_eq!(rig.stats().closed.total(), 1, "its connection is held up");
        finish(&rig);
    }
}

/// Neither an empty line, which begins no request, nor what cannot be looked at holds a drain up.
#[test]
fn who_has_asked_for_nothing_more_is_drained_at_once() {
    let body = "POST /last HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody";
    for asked in [LAST.to_owned(), format!("{LAST}\r\n"), LAST.repeat(2), body.to_owned()] {
        let (rig, _) = http(config());
        connect(&rig);
        say(&rig, asked.as_bytes());
        send(&rig);
        assert!(answers(&rig).iter().all(|answer| answer == "/last"), "{asked:?}");
        rig.control.begin_drain_at(rig.world.borrow().now_ns() + 60_000_000_000);
        settle(&rig);
        end_all(&rig);
        assert_eq!(rig.stats().closed.get(CloseReason::Drained), 1, "{asked:?}");
        finish(&rig);
    }
}

/// It has the time that a message has, from when it would have been idle for too long.
#[test]
fn a_request_whose_beginning_came_with_the_last_one_keeps_its_connection_from_being_idle() {
    for comes in [true, false] {
        let (rig, _) = http(config().idle_ms(5_000).message_ms(3_000));
        let id = connect(&rig);
        say(&rig, [LAST, &NEXT[..4]].concat().as_bytes());
        send(&rig);
        pass_until(&rig, &|| is_in_message(&rig, id));
        if comes {
            say(&rig, &NEXT.as_bytes()[4..]);
            send(&rig);
            assert_eq!(answers(&rig), ["/last", "/next"]);
        }
        let reason = if comes { CloseReason::Idle } else { CloseReason::Message };
        pass_until(&rig, &|| rig.core.borrow_mut().table.iter().any(|(_, it)| it.ended.is_some()));
        end_all(&rig);
        settle(&rig);
        assert_eq!(rig.stats().closed.get(reason), 1, "{:?}", rig.stats().closed);
        finish(&rig);
    }
}

/// A GOAWAY, the answer to what is on its way, another GOAWAY, and the end.
#[test]
fn an_http2_connection_that_is_idle_for_too_long_is_told_before_it_ends() {
    for answers_pings in [true, false] {
        let (rig, _) = http(config().idle_ms(5_000));
        connect(&rig);
        say(&rig, &[PREFACE, &request(1)].concat());
        send(&rig);
        assert_eq!(frames(&rig, HEADERS).len(), 1);
        let before = frames(&rig, GOAWAY).len();
        pass_until(&rig, &|| {
            send(&rig);
            !frames(&rig, GOAWAY).is_empty()
        });
        assert_eq!((before, rig.stats().live), (0, 1));
        if answers_pings {
            let ping = frames(&rig, PING).pop().expect("a ping follows");
            say(&rig, &[&frame(PING, 1, 0, &ping)[..], &request(3)].concat());
        }
        pass_until(&rig, &|| {
            send(&rig);
            end_all(&rig);
            rig.stats().live == 0
        });
        assert_eq!(rig.stats().closed.get(CloseReason::Idle), 1, "{:?}", rig.stats().closed);
        finish(&rig);
        let world = rig.world.borrow();
        let peer = &world.past()[0];
        let told = frames_of(&peer.received, GOAWAY).len();
        assert_eq!((peer.fate, told), (Fate::Fin, 1 + usize::from(answers_pings)));
    }
}

/// Pings keep a stream on which nothing happens, but not for ever.
#[test]
fn an_http2_request_that_is_never_answered_ends_with_its_connection() {
    let never = service_fn(|_: Request<Incoming>| std::future::pending::<Answer>());
    let config = config().lifetime_ms(50_000).drain_ms(4_000).handler_ms(600_000);
    let rig = Rig::by_hand(config, Http::new().handler(never));
    connect(&rig);
    say(&rig, &[PREFACE, &request(1)].concat());
    let mut answered = 0;
    let begun_ms = rig.world.borrow().now_ns() / 1_000_000;
    while rig.stats().live > 0 {
        rig.world.borrow_mut().pass_ms(100);
        send(&rig);
        let pings = frames(&rig, PING);
        for ping in pings.iter().skip(std::mem::replace(&mut answered, pings.len())) {
            say(&rig, &frame(PING, 1, 0, ping));
        }
        if rig.core.borrow_mut().table.iter().any(|(_, entry)| entry.ended.is_some()) {
            end_all(&rig);
        }
    }
    let took_ms = rig.world.borrow().now_ns() / 1_000_000 - begun_ms;
    assert!((45_000..60_000).contains(&took_ms), "after {took_ms} ms");
    assert!(answered >= 2, "{answered} pings");
    assert_eq!(rig.stats().closed.get(CloseReason::Lifetime), 1, "{:?}", rig.stats().closed);
    finish(&rig);
}

/// Whatever the deadline, a request that comes when it passes is answered, also one of which the
/// half has come.
#[test]
fn a_request_that_comes_with_the_end_of_idleness_is_answered() {
    for (http2, in_two) in [(false, false), (false, true), (true, false), (true, true)] {
        let (rig, served) = http(config().idle_ms(5_000));
        connect(&rig);
        let (first, next) = match http2 {
            true => ([PREFACE, &request(1)].concat(), request(3)),
            false => (LAST.into(), NEXT.into()),
        };
        say(&rig, &first);
        send(&rig);
        assert_eq!(served.get(), 1);
        // It passes in the turn in which the request, or its half, is heard.
        pass_until_reminded(&rig, 6_000);
        let cut = if in_two { next.len() / 2 } else { next.len() };
        say(&rig, &next[..cut]);
        if in_two {
            // Half a frame is no request: the peer is told, and what is on its way is answered.
            let told = || {
                send(&rig);
                !http2 || !frames(&rig, GOAWAY).is_empty()
            };
            pass_until(&rig, &told);
            say(&rig, &next[cut..]);
        }
        send(&rig);
        let closed = rig.stats().closed;
        assert_eq!(served.get(), 2, "http2: {http2}, in two: {in_two}, {closed:?}");
        assert_eq!(rig.stats().live, 1);
        finish(&rig);
    }
}

type Answer = Result<Response<String>, Infallible>;

/// A service that answers with the path, and counts.
fn http(config: Config) -> (Rig, Rc<Cell<u32>>) {
    serve(config, Http::new())
}

fn serve(config: Config, http: Http) -> (Rig, Rc<Cell<u32>>) {
    let served = Rc::new(Cell::new(0));
    let count = Rc::clone(&served);
    let service = service_fn(move |request: Request<Incoming>| {
        count.set(count.get() + 1);
        let path = request.uri().path().to_owned();
        async move { Answer::Ok(Response::new(path)) }
    });
    (Rig::by_hand(config, http.handler(service)), served)
}

fn config() -> Config {
    Config::default().user_timeout_ms(0).linger_ms(0)
}

/// What is queued goes out, and what follows from that happens.
fn send(rig: &Rig) {
    for _ in 0..4 {
        rig.world.borrow_mut().work_on_all(Kind::Send);
        rig.world.borrow_mut().peers().for_each(Peer::take_output);
        settle(rig);
    }
}

/// Everything that is in flight on connections comes to its end.
fn end_all(rig: &Rig) {
    for _ in 0..4 {
        for kind in [Kind::Send, Kind::Cancel, Kind::Receive, Kind::Hangup] {
            rig.world.borrow_mut().work_on_all(kind);
            settle(rig);
        }
    }
}

fn is_in_message(rig: &Rig, id: Id) -> bool {
    let core = rig.core.borrow_mut();
    core.table.get(id).expect("it is still there").deadlines.is_in_message()
}

fn received(rig: &Rig) -> Vec<u8> {
    let mut world = rig.world.borrow_mut();
    world.peers().next().map(|peer| peer.received.clone()).unwrap_or_default()
}

/// The bodies of HTTP/1 answers, and which one is the last.
fn answers(rig: &Rig) -> Vec<String> {
    let text = String::from_utf8(received(rig)).expect("it is text");
    let answers = text.split("HTTP/1.1 200 OK\r\n").skip(1);
    let body = |answer: &str| {
        let (head, body) = answer.split_once("\r\n\r\n").expect("a whole head");
        format!("{body}{}", if head.contains("connection: close") { ", the end" } else { "" })
    };
    answers.map(body).collect()
}

/// The payloads of the frames of one kind that have come.
fn frames(rig: &Rig, kind: u8) -> Vec<Vec<u8>> {
    frames_of(&received(rig), kind)
}

fn frames_of(mut bytes: &[u8], kind: u8) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        let (payload, rest) = rest.split_at(length);
        if head[3] == kind {
            found.push(payload.to_vec());
        }
        bytes = rest;
    }
    found
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    [&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream], payload].concat()
}

/// GET / of http://x, its headers and nothing else.
fn request(stream: u8) -> Vec<u8> {
    frame(HEADERS, 5, stream, b"\x82\x86\x84\x41\x01x")
}

const LAST: &str = "GET /last HTTP/1.1\r\nHost: x\r\n\r\n";
const NEXT: &str = "GET /next HTTP/1.1\r\nHost: x\r\n\r\n";
/// With settings that set nothing.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const HEADERS: u8 = 1;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
