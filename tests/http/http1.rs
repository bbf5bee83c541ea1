//! HTTP/1 by the letter, over raw sockets: each case is sent whole, and split at every byte.

use std::collections::BTreeMap;
use std::net::{Shutdown, SocketAddr};

use crate::common::http::{Client, End, pattern, serve};
use crate::common::{config, first_cpus, length, settle, wait_until};
use slipring::{CloseReason, Handle};

/// What is sent, the statuses and bodies that come, and whether the connection goes on.
struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    answers: Vec<(u16, &'static str)>,
    then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    GoesOn,
    /// The answer, or the last one, says so, and a FIN follows.
    Closes,
    /// A FIN follows; hyper does not say so when a body is broken.
    Ends,
}

use Then::{Closes, Ends, GoesOn};

fn case(name: &'static str, bytes: &str, answers: &[(u16, &'static str)], then: Then) -> Case {
    Case { name, bytes: bytes.into(), answers: answers.to_vec(), then }
}

fn well_formed() -> Vec<Case> {
    let get = "GET /hello HTTP/1.1\r\nHost: x\r\n\r\n";
    let hello = (200, "hello\n");
    let chunked = "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let with = |head: &str, rest: &str| format!("{head}{rest}");
    vec![
        case("a request", get, &[hello], GoesOn),
        case(
            "pipelined requests of all kinds",
            &[
                get,
                "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\none",
                "HEAD /unmodified HTTP/1.1\r\nHost: x\r\n\r\n",
                chunked,
                "4\r\ntwo \r\n3\r\nand\r\n0\r\n\r\n",
                "GET /none HTTP/1.1\r\nHost: x\r\n\r\n",
                get,
            ]
            .concat(),
            &[hello, (200, "one"), (304, ""), (200, "two and"), (204, ""), hello],
            GoesOn,
        ),
        case("empty lines before a request", &with("\r\n\r\n\n", get), &[hello], GoesOn),
        case("lines that end in LF alone", "GET /hello HTTP/1.1\nHost: x\n\n", &[hello], GoesOn),
        case("no Host is left to the service", "GET /hello HTTP/1.1\r\n\r\n", &[hello], GoesOn),
        case("absolute form", "GET http://x/hello HTTP/1.1\r\nHost: x\r\n\r\n", &[hello], GoesOn),
        case("an unknown method", "BREW /hello HTTP/1.1\r\nHost: x\r\n\r\n", &[hello], GoesOn),
        case(
            "the same length twice",
            "POST /echo HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
            &[(200, "ok")],
            GoesOn,
        ),
        case(
            "chunks with extensions and trailers",
            &with(chunked, "2;a=b\r\nab\r\n1 ; c=\"d\"\r\nc\r\n00;e\r\nX-Sum: 1\r\n\r\n"),
            &[(200, "abc")],
            GoesOn,
        ),
        case("a body of no chunk", &with(chunked, "0\r\n\r\n"), &[(200, "")], GoesOn),
        case(
            "chunked wins over a length, and nothing may hide behind it",
            "POST /echo HTTP/1.1\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n\
             2\r\nok\r\n0\r\n\r\nGET /hello HTTP/1.1\r\nHost: x\r\n\r\n",
            &[(200, "ok")],
            Closes,
        ),
        case("HTTP/1.0", "GET /hello HTTP/1.0\r\n\r\n", &[hello], Closes),
        case(
            "HTTP/1.0 with keep-alive",
            "GET /hello HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
            &[hello],
            GoesOn,
        ),
        case(
            "a client that says close",
            &with("GET /hello HTTP/1.1\r\nConnection: close\r\n\r\n", get),
            &[hello],
            Closes,
        ),
    ]
}

fn malformed() -> Vec<Case> {
    let head = |line: &str| format!("GET /hello HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n");
    let post = |length: &str| format!("POST /echo HTTP/1.1\r\n{length}\r\n\r\n");
    let chunks = |rest: &str| post("Transfer-Encoding: chunked") + rest;
    let bad = |name, bytes: &str| case(name, bytes, &[(400, "")], Closes);
    let broken = |name, bytes: &str| case(name, bytes, &[(422, "*")], Ends);
    vec![
        bad("garbage", "\x01\x02\x03\r\n\r\n"),
        bad("HTTP/0.9", "GET /hello\r\n\r\n"),
        bad("a version that is not spoken", "GET /hello HTTP/3.1\r\n\r\n"),
        bad("a space before a colon", &head("A : b")),
        bad("a folded header", &head("A: b\r\n c")),
        bad("a NUL in a header", &head("A: b\0c")),
        bad("a CR in a header", &head("A: b\rc")),
        bad("a header without a name", &head(": b")),
        bad("lengths that differ", &post("Content-Length: 1\r\nContent-Length: 2")),
        bad("a list of lengths", &post("Content-Length: 1, 2")),
        bad("a negative length", &post("Content-Length: -1")),
        bad("a length with a sign", &post("Content-Length: +1")),
        bad("a length that is no number", &post("Content-Length: 0x1")),
        bad("a length of more than 64 bits", &post("Content-Length: 18446744073709551616")),
        bad("an encoding that is unknown", &post("Transfer-Encoding: gzip")),
        bad("chunked that is not the last", &post("Transfer-Encoding: chunked, gzip")),
        bad(
            "chunked in HTTP/1.0",
            "POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        broken("a chunk's length that is no number", &chunks("g\r\nab\r\n0\r\n\r\n")),
        broken("a negative chunk", &chunks("-1\r\nab\r\n0\r\n\r\n")),
        broken("a chunk's length of more than 64 bits", &chunks("10000000000000000\r\n")),
        broken("a chunk longer than it says", &chunks("1\r\nab\r\n0\r\n\r\n")),
        broken("a chunk's end in LF alone", &chunks("1\r\na\n0\r\n\r\n")),
    ]
}

#[test]
fn requests_are_answered_in_order_wherever_they_are_split() {
    let (running, addr) = serve(config().cpus(&first_cpus(1)));
    let mut connects = 0;
    for case in well_formed() {
        connects += case.run_in_all_pieces(&running.handle(), addr);
    }
    let total = settle(running, connects);
    assert_eq!(total.closed.get(CloseReason::HandlerError), 0, "{:?}", total.closed);
}

#[test]
fn what_is_malformed_is_refused_and_the_refusal_arrives() {
    let (running, addr) = serve(config().cpus(&first_cpus(1)));
    let mut connects = 0;
    for case in malformed() {
        connects += case.run_in_all_pieces(&running.handle(), addr);
    }
    let total = settle(running, connects);
    assert_eq!(total.closed.get(CloseReason::HandlerPanic), 0, "{:?}", total.closed);
}

#[test]
fn what_is_too_large_is_refused_and_the_refusal_arrives() {
    let (running, addr) = serve(config());
    let many = "A: b\r\n".repeat(101);
    let mut hello = vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    hello.extend_from_slice(&pattern(500));
    let cases = [
        ("a hundred headers", format!("GET /hello HTTP/1.1\r\n{}\r\n", &many[6..]).into(), 200),
        ("too many headers", format!("GET /hello HTTP/1.1\r\n{many}\r\n").into(), 431),
        (
            "a long head",
            format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "b".repeat(1 << 20)).into(),
            431,
        ),
        ("a head without an end", "A".repeat(1 << 20).into(), 431),
        ("a long path", format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(65_534)).into(), 414),
        (
            "a length of 64 bits",
            b"POST /echo HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n".to_vec(),
            431,
        ),
        ("a TLS client", hello, 400),
    ];
    let connects = cases.len() as u64;
    for (name, bytes, status) in cases {
        let mut client = Client::connect(addr);
        client.say(&bytes);
        let answer = client.answer().unwrap_or_else(|end| panic!("{name}: {end:?}"));
        assert_eq!(answer.status, status, "{name}: {}", answer.head);
        if status == 200 {
            continue;
        }
        assert_eq!(client.end(), End::Fin, "{name}");
    }
    settle(running, connects);
}

#[test]
fn a_thousand_pipelined_requests_are_answered_in_order() {
    let (running, addr) = serve(config());
    let mut client = Client::connect(addr);
    let mut stream = client.stream.try_clone().expect("another handle");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let all: String =
                (0..1_000).map(|n| format!("GET /bytes/{n} HTTP/1.1\r\nHost: x\r\n\r\n")).collect();
            std::io::Write::write_all(&mut stream, all.as_bytes()).expect("send");
        });
        for n in 0..1_000 {
            let answer = client.answer().expect("an answer");
            assert_eq!((answer.status, answer.body), (200, pattern(n)));
        }
    });
    drop(client);
    settle(running, 1);
}

#[test]
fn random_pieces_of_random_requests_are_answered_in_order() {
    let (mut random, rounds) = (Random::new(), 40 * length());
    let (running, addr) = serve(config());
    for round in 0..rounds {
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        for _ in 0..random.below(8) + 1 {
            let body = pattern(random.below(20_000));
            bytes.extend_from_slice(b"POST /echo HTTP/1.1\r\nHost: x\r\n");
            if random.below(2) == 0 {
                bytes.extend_from_slice(
                    format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes(),
                );
                bytes.extend_from_slice(&body);
            } else {
                bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
                for chunk in body.chunks(random.below(5_000) + 1) {
                    bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    bytes.extend_from_slice(chunk);
                    bytes.extend_from_slice(b"\r\n");
                }
                bytes.extend_from_slice(b"0\r\n\r\n");
            }
            expected.push(body);
        }
        let mut client = Client::connect(addr);
        let mut writer =
            Client { stream: client.stream.try_clone().expect("another"), rest: vec![] };
        std::thread::scope(|scope| {
            let random = &mut random;
            scope.spawn(move || {
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (now, later) = rest.split_at(rest.len().min(random.below(6_000) + 1));
                    assert!(writer.say(now));
                    rest = later;
                }
            });
            for body in expected {
                let answer = client.answer().unwrap_or_else(|end| panic!("round {round}: {end:?}"));
                assert!(answer.status == 200 && answer.body == body, "round {round}");
            }
        });
    }
    settle(running, rounds);
}

#[test]
fn no_mutation_of_a_request_makes_it_hang_or_panic() {
    let (mut random, rounds) = (Random::new(), 400 * length());
    let (running, addr) = serve(config());
    let cases: Vec<Vec<u8>> =
        well_formed().into_iter().chain(malformed()).map(|case| case.bytes).collect();
    let mut ends = BTreeMap::new();
    for round in 0..rounds {
        let mut bytes = cases[random.below(cases.len())].clone();
        for _ in 0..random.below(4) + 1 {
            random.mutate(&mut bytes);
        }
        let mut client = Client::connect(addr);
        client.say(&bytes);
        let _ = client.stream.shutdown(Shutdown::Write);
        let end = loop {
            client.rest.clear();
            if let Err(end) = client.more() {
                break end;
            }
        };
        assert!(end != End::TimedOut, "round {round}: {:?}", String::from_utf8_lossy(&bytes));
        *ends.entry(format!("{end:?}")).or_insert(0) += 1;
    }
    println!("{rounds} mutations: {ends:?}");
    assert_eq!(ends.get("Fin"), Some(&rounds), "every end is a FIN: {ends:?}");
    let total = settle(running, rounds);
    assert_eq!(total.closed.get(CloseReason::HandlerPanic), 0, "{:?}", total.closed);
}

impl Case {
    /// Runs the case whole and with a cut at each of its bytes, which the server notices. Returns
    /// how often.
    fn run_in_all_pieces(&self, handle: &Handle, addr: SocketAddr) -> u64 {
        for cut in 0..self.bytes.len() {
            let before = handle.stats().total().bytes_received;
            let mut client = Client::connect(addr);
            let (first, second) = self.bytes.split_at(cut);
            client.say(first);
            wait_until("the first piece has come", || {
                handle.stats().total().bytes_received >= before + cut as u64
            });
            client.say(second);
            self.check(&mut client, cut);
        }
        self.bytes.len() as u64
    }

    fn check(&self, client: &mut Client, cut: usize) {
        let name = format!("{}, cut at {cut}", self.name);
        let mut closes = false;
        for (status, body) in &self.answers {
            let head_only = *status == 304;
            let answer = client.answer_to(head_only);
            let answer = answer.unwrap_or_else(|end| panic!("{name}: {end:?}"));
            assert_eq!(answer.status, *status, "{name}: {}", answer.head);
            let text = String::from_utf8_lossy(&answer.body);
            assert!(*body == "*" || text == *body, "{name}: {text:?}");
            // HTTP/1.0 need not say what it does anyway.
            closes = answer.closes() || answer.head.starts_with("http/1.0");
        }
        if self.then == GoesOn {
            let answer = client.get("/hello").unwrap_or_else(|end| panic!("{name}: {end:?}"));
            assert_eq!((answer.status, &answer.body[..]), (200, &b"hello\n"[..]), "{name}");
        } else {
            assert!(closes || self.then == Ends, "{name}: it says so");
            assert_eq!(client.end(), End::Fin, "{name}");
        }
    }
}

/// Numbers that are the same for a seed, which is printed.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let given = std::env::var("RING_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| u64::from(std::process::id()) * 7919);
        println!("RING_TEST_SEED={seed}");
        Random(seed)
    }

    fn below(&mut self, limit: usize) -> usize {
        // splitmix64, <https://prng.di.unimi.it/splitmix64.c>.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len());
        match self.below(5) {
            0 => bytes[at] = self.below(256) as u8,
            1 => bytes[at] ^= 1 << self.below(8),
            2 => bytes.insert(at, b"\r\n :\0,;0f-"[self.below(10)]),
            3 => drop(bytes.drain(at..bytes.len().min(at + 1 + self.below(20)))),
            _ => bytes.extend_from_within(at..),
        }
        if bytes.is_empty() {
            bytes.push(b'\n');
        }
    }
}
