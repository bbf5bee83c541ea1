//! Drains under HTTP load: each request that a handler has begun is answered whole, nobody is
//! reset, and the books balance.
//!
//! The tests take turns, as they load the machine.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use crate::common::http::{Client, End, pattern, serve, states};
use crate::common::{config, length, limit, start, turn, wait_until};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use slipring::http::{Http, Incoming};
use slipring::{CloseReason, Config, DrainReport, Handle, Phase, Running, Server};

#[test]
fn with_a_minimum_keep_no_request_of_a_kept_connection_is_lost_in_fifty_stops() {
    let _turn = turn();
    let all = Tally::default();
    for round in 0..STOPS * length() {
        let (tally, report) = stop_under_load(config().idle_min_keep_ms(500));
        let harmed = tally.of([&tally.raced, &tally.cut, &tally.reset, &tally.timed_out]);
        assert_eq!(harmed, [0; 4], "round {round}: {tally:?} {report}");
        assert!(tally.told.load(SeqCst) > 0, "round {round}: {tally:?}");
        assert_eq!(report.total().idle_races, 0, "round {round}: {report}");
        all.add(&tally);
    }
    println!("{} stops with a minimum keep: {all:?}", STOPS * length());
}

/// Without one, a request may meet the FIN of its idle connection; that is the one known race.
#[test]
fn without_a_keep_requests_are_answered_or_were_never_begun_in_fifty_stops() {
    let _turn = turn();
    let all = Tally::default();
    for round in 0..STOPS * length() {
        let (tally, report) = stop_under_load(config());
        let harmed = tally.of([&tally.cut, &tally.reset, &tally.timed_out]);
        assert_eq!(harmed, [0; 3], "round {round}: {tally:?} {report}");
        all.add(&tally);
    }
    println!("{} stops without a keep: {all:?}", STOPS * length());
}

#[test]
fn a_core_that_leaves_says_so_in_its_answers_and_loses_none() {
    let _turn = turn();
    for round in 0..10 * length() {
        let served = Served::start(config().cpus("0-3").idle_min_keep_ms(500));
        let handle = served.running.handle();
        let (stop, tally) = (AtomicBool::new(false), Tally::default());
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|n| {
                    let (addr, tally, stop) = (served.addr, &tally, &stop);
                    scope.spawn(
                        move || while !stop.load(SeqCst) && ask_on(addr, n, tally, stop, None) {},
                    )
                })
                .collect();
            tally.await_more(200);
            let left = handle.retire(round as usize % 4, limit(5_000)).expect("three are left");
            assert!(left.is_balanced(), "round {round}");
            assert_eq!(left.stats.closed.get(CloseReason::Forced), 0, "round {round}");
            tally.await_more(200);
            stop.store(true, SeqCst);
            clients.into_iter().for_each(|client| client.join().expect("no panic"));
        });
        let harmed =
            tally.of([&tally.raced, &tally.cut, &tally.reset, &tally.timed_out, &tally.refused]);
        assert_eq!(harmed, [0; 5], "round {round}: {tally:?}");
        let report = served.end();
        assert_eq!(served_begun(&report.1), tally.ok.load(SeqCst), "round {round}: {tally:?}");
    }
}

/// Half a head, a head without its body, and a body in the middle: each is waited for.
#[test]
fn a_request_that_has_begun_is_waited_for_and_answered() {
    let _turn = turn();
    let head = "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n";
    let body = String::from_utf8(vec![b'b'; 10_000]).expect("it is text");
    let whole = format!("{head}{body}");
    for cut in [1, 20, head.len(), head.len() + 1, whole.len() - 1] {
        for before in ["", "GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"] {
            let (running, addr) = serve(config());
            let handle = running.handle();
            let mut client = Client::connect(addr);
            if !before.is_empty() {
                client.say(before);
                assert_eq!(client.answer().expect("an answer").status, 200);
            }
            client.say(&whole[..cut]);
            let has_come = || handle.stats().total().bytes_received == (before.len() + cut) as u64;
            wait_until("the beginning has come", has_come);
            handle.begin_drain(limit(8_000));
            await_phase(&handle);
            assert_eq!(states(&handle), ["receiving"], "cut at {cut}");
            client.say(&whole[cut..]);
            let answer = client.answer().unwrap_or_else(|end| panic!("cut at {cut}: {end:?}"));
            assert!(answer.status == 200 && answer.body == body.as_bytes(), "cut at {cut}");
            assert!(answer.closes(), "cut at {cut}: {}", answer.head);
            assert_eq!(client.end(), End::Fin, "cut at {cut}");
            assert_clean(&running.join().expect("the report"));
        }
    }
}

/// One that had not sent a byte when the drain began, and sends its request in two pieces.
#[test]
fn a_request_that_begins_in_a_drain_is_waited_for_too() {
    let _turn = turn();
    let head = "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n";
    let whole = format!("{head}body");
    for cut in [1, 4, 20, head.len(), head.len() + 1] {
        let (running, addr) = serve(config().new_grace_ms(8_000));
        let handle = running.handle();
        let mut client = Client::connect(addr);
        wait_until("it is accepted", || handle.stats().total().live == 1);
        handle.begin_drain(limit(9_000));
        await_phase(&handle);
        client.say(&whole[..cut]);
        let has_come = || handle.stats().total().bytes_received == cut as u64;
        wait_until("the beginning has come", has_come);
        wait_until("the rest is waited for", || states(&handle) == ["receiving"]);
        client.say(&whole[cut..]);
        let answer = client.answer().unwrap_or_else(|end| panic!("cut at {cut}: {end:?}"));
        assert_eq!((&answer.body[..], answer.closes()), (&b"body"[..], true), "cut at {cut}");
        assert_eq!(client.end(), End::Fin, "cut at {cut}");
        assert_clean(&running.join().expect("the report"));
    }
}

/// As the client is told to go on only then, its body can't have come before.
#[test]
fn a_body_that_is_asked_for_in_a_drain_is_waited_for() {
    let _turn = turn();
    let (running, addr) = serve(config());
    let handle = running.handle();
    let mut client = Client::connect(addr);
    client.say("POST /thinks/200 HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n");
    wait_until("it is at work", || states(&handle) == ["busy"]);
    handle.begin_drain(limit(8_000));
    await_phase(&handle);
    assert_eq!(client.answer().expect("the go-ahead").status, 100);
    client.say("body");
    let answer = client.answer().expect("an answer");
    assert_eq!((&answer.body[..], answer.closes()), (&b"4"[..], true), "{}", answer.head);
    assert_eq!(client.end(), End::Fin);
    assert_clean(&running.join().expect("the report"));
}

#[test]
fn of_pipelined_requests_the_one_at_work_is_the_last_in_a_drain() {
    let _turn = turn();
    let (running, addr) = serve(config());
    let handle = running.handle();
    let mut client = Client::connect(addr);
    client.say("GET /late/300 HTTP/1.1\r\nHost: x\r\n\r\n".repeat(3));
    wait_until("it is at work", || states(&handle) == ["busy"]);
    handle.begin_drain(limit(8_000));
    assert!(client.answer().expect("an answer").closes());
    assert_eq!(client.end(), End::Fin);
    assert_clean(&running.join().expect("the report"));
}

#[test]
fn a_long_answer_is_finished_in_a_drain_and_its_connection_then_ends() {
    let _turn = turn();
    let (running, addr) = serve(config());
    let mut client = Client::connect(addr);
    client.say("GET /pieces/500 HTTP/1.1\r\nHost: x\r\n\r\n");
    client.more().expect("its beginning");
    let draining = std::thread::spawn({
        let handle = running.handle();
        move || handle.drain(limit(8_000)).expect("the report")
    });
    await_phase(&running.handle());
    assert_eq!(client.answer().expect("all of it").body.len(), 500 * 16 * 1024);
    assert_eq!(client.end(), End::Fin);
    assert_clean(&draining.join().expect("no panic"));
}

/// The streams of each client that were begun are answered, the others it hears were not.
#[test]
fn no_stream_that_was_begun_is_lost_in_fifty_stops() {
    let _turn = turn();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (mut all, mut refused) = (0, 0);
    for round in 0..STOPS * length() {
        let served = Served::start(config());
        let (ok, other) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let clients: Vec<_> = (0..4)
            .map(|_| runtime.spawn(ask_by_http2(served.addr, Arc::clone(&ok), Arc::clone(&other))))
            .collect();
        wait_until("the load is under way", || ok.load(SeqCst) >= 200);
        let handle = served.running.handle();
        handle.begin_drain(limit(8_000));
        for client in clients {
            runtime.block_on(client).expect("no panic");
        }
        let (ok, other) = (ok.load(SeqCst), other.load(SeqCst));
        let (report, served) = served.end();
        assert_clean(&report);
        assert_eq!(ok, served_begun(&served), "round {round}: {other} were not begun; {report}");
        (all, refused) = (all + ok, refused + other);
    }
    println!("{} stops: {all} streams answered, {refused} not begun", STOPS * length());
}

/// 16 streams at a time until the connection takes no more.
async fn ask_by_http2(addr: SocketAddr, ok: Arc<AtomicU64>, other: Arc<AtomicU64>) {
    let stream = tokio::net::TcpStream::connect(addr).await.expect("connect");
    let io = TokioIo::new(stream);
    let shaken = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await;
    let (sender, conn) = shaken.expect("a handshake");
    let conn = tokio::spawn(conn);
    let ask = |n: usize| {
        let (mut sender, ok, other) = (sender.clone(), Arc::clone(&ok), Arc::clone(&other));
        tokio::spawn(async move {
            for at in 0.. {
                let size = (n * 131 + at * 17) % 3_000;
                let request = Request::get(format!("http://x/{size}"));
                let request = request.body(Full::<Bytes>::default()).expect("a request");
                let sent = async {
                    sender.ready().await?;
                    sender.send_request(request).await
                };
                let got = match sent.await {
                    Ok(response) => response.into_body().collect().await,
                    Err(error) => Err(error),
                };
                match got {
                    Ok(body) => {
                        assert!(body.to_bytes() == pattern(size));
                        ok.fetch_add(1, SeqCst);
                    }
                    Err(_) => {
                        other.fetch_add(1, SeqCst);
                        return;
                    }
                }
            }
        })
    };
    let asking: Vec<_> = (0..16).map(ask).collect();
    for one in asking {
        one.await.expect("no panic");
    }
    drop(sender);
    // Whether it hears of a FIN or of a last frame first, it is over without a reset.
    conn.await.expect("no panic").expect("the connection ends well");
}

/// What became of the requests, by the clients.
#[derive(Debug, Default)]
struct Tally {
    ok: AtomicU64,
    /// Those whose answer said that it was the last one.
    told: AtomicU64,
    /// A FIN came instead of an answer.
    raced: AtomicU64,
    cut: AtomicU64,
    reset: AtomicU64,
    timed_out: AtomicU64,
    refused: AtomicU64,
    /// Asked in a drain, and not told that the answer was the last one.
    misled: AtomicU64,
}

impl Tally {
    fn of<const N: usize>(&self, counts: [&AtomicU64; N]) -> [u64; N] {
        counts.map(|count| count.load(SeqCst))
    }

    fn await_more(&self, count: u64) {
        let before = self.ok.load(SeqCst);
        wait_until("the load goes on", || self.ok.load(SeqCst) >= before + count);
    }

    fn add(&self, other: &Tally) {
        for (all, count) in
            [(&self.ok, &other.ok), (&self.told, &other.told), (&self.raced, &other.raced)]
        {
            all.fetch_add(count.load(SeqCst), SeqCst);
        }
    }
}

/// Stops a server whose clients ask and ask on connections that they keep.
fn stop_under_load(config: Config) -> (Tally, DrainReport) {
    let served = Served::start(config);
    let handle = served.running.handle();
    let (never, tally) = (AtomicBool::new(false), Tally::default());
    std::thread::scope(|scope| {
        for n in 0..CLIENTS {
            let (addr, tally, stop, handle) = (served.addr, &tally, &never, &handle);
            scope.spawn(move || ask_on(addr, n, tally, stop, Some(handle)));
        }
        tally.await_more(200);
        handle.begin_drain(limit(8_000));
    });
    let (report, served) = served.end();
    assert_clean(&report);
    assert_eq!(tally.misled.load(SeqCst), 0, "{tally:?}");
    assert_eq!(served_begun(&served), tally.ok.load(SeqCst), "{tally:?}: {report}");
    (tally, report)
}

/// Asks on one connection until that ends. False when it ended otherwise than was announced.
fn ask_on(
    addr: SocketAddr,
    n: usize,
    tally: &Tally,
    stop: &AtomicBool,
    in_drain: Option<&Handle>,
) -> bool {
    let stream = match TcpStream::connect(addr) {
        Ok(stream) => stream,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            tally.refused.fetch_add(1, SeqCst);
            return false;
        }
    };
    stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    stream.set_nodelay(true).expect("set TCP_NODELAY");
    let mut client = Client { stream, rest: Vec::new() };
    for at in 0.. {
        let drains = in_drain.is_some_and(|handle| handle.phase() > Phase::StopAccept);
        let size = (n * 131 + at * 17) % 3_000;
        let end = match client.get(&format!("/{size}")) {
            Ok(answer) => {
                assert!(answer.status == 200 && answer.body == pattern(size));
                tally.ok.fetch_add(1, SeqCst);
                if answer.closes() {
                    tally.told.fetch_add(1, SeqCst);
                    assert_eq!(client.end(), End::Fin);
                    return true;
                }
                tally.misled.fetch_add(u64::from(drains), SeqCst);
                if stop.load(SeqCst) {
                    return false;
                }
                continue;
            }
            Err(end) => end,
        };
        let count = match end {
            End::Fin => &tally.raced,
            End::Cut => &tally.cut,
            End::Reset => &tally.reset,
            End::TimedOut => &tally.timed_out,
        };
        count.fetch_add(1, SeqCst);
        return false;
    }
    false
}

/// A server that counts the requests that its handlers begin.
struct Served {
    running: Running,
    addr: SocketAddr,
    begun: Arc<AtomicU64>,
}

impl Served {
    /// Answers with as many bytes as the path says, in a later poll.
    fn start(config: Config) -> Served {
        let begun = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&begun);
        let service = service_fn(move |request: Request<Incoming>| {
            count.fetch_add(1, SeqCst);
            let size = request.uri().path()[1..].parse().expect("a size");
            async move {
                slipring::task::yield_now().await;
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(pattern(size)))))
            }
        });
        let (running, addr) =
            start(Server::new(config).listen("127.0.0.1:0", Http::new().handler(service)));
        Served { running, addr, begun }
    }

    fn end(self) -> (DrainReport, Arc<AtomicU64>) {
        self.running.handle().begin_drain(limit(8_000));
        (self.running.join().expect("the report"), self.begun)
    }
}

fn served_begun(begun: &AtomicU64) -> u64 {
    begun.load(SeqCst)
}

fn await_phase(handle: &Handle) {
    wait_until("connections are drained", || handle.phase() >= Phase::DrainConnections);
}

fn assert_clean(report: &DrainReport) {
    let total = report.total();
    assert!(report.is_balanced(), "{report}");
    assert_eq!(
        (total.closed.get(CloseReason::Forced), total.leaked_operations),
        (0, 0),
        "{report}"
    );
    assert_eq!((total.tasks_forced, total.tasks), (0, 0), "{report}");
}

const CLIENTS: usize = 8;
const STOPS: u64 = 50;
