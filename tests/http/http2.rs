//! HTTP/2: what hyper's own client asks of it, and what no client would, frame by frame.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::common::frames::*;
use crate::common::http::{Body, Client, End, answer, pattern, serve, states};
use crate::common::peer::MB;
use crate::common::{config, limit, settle, start, wait_until};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::header::HeaderMap;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use slipring::http::Http;
use slipring::{CloseReason, Phase, Server};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

#[test]
fn many_streams_at_once_get_their_answers() {
    let (running, addr) = serve(config());
    let asking = async {
        let (sender, conn) = connect(addr).await;
        let asks = (0..500).map(|n| {
            let mut sender = sender.clone();
            tokio::spawn(async move {
                let path = if n % 3 == 0 { "late/20".to_owned() } else { format!("bytes/{n}") };
                (n, whole(sender.send_request(get(&path)).await).await)
            })
        });
        for ask in asks.collect::<Vec<_>>() {
            let (n, body) = ask.await.expect("no panic");
            let expected = if n % 3 == 0 { b"late\n".to_vec() } else { pattern(n) };
            assert!(body == expected, "stream {n}");
        }
        close(sender, conn).await;
    };
    runtime().block_on(asking);
    settle(running, 1);
}

/// More than all windows and queues hold, on several streams, there and back while it comes.
#[test]
fn long_bodies_go_both_ways_with_flow_control() {
    let (running, addr) = serve(config());
    let asking = async {
        let (sender, conn) = connect(addr).await;
        let asks = (0..4).map(|_| {
            let mut sender = sender.clone();
            tokio::spawn(async move {
                let request = Request::post("http://x/stream");
                let body = Full::new(Bytes::from(pattern(3 * MB)));
                let request = request.body(body.map_err(|never| match never {}).boxed_unsync());
                let response = sender.send_request(request.expect("a request")).await;
                assert!(whole(response).await == pattern(3 * MB));
            })
        });
        for ask in asks.collect::<Vec<_>>() {
            ask.await.expect("no panic");
        }
        close(sender, conn).await;
    };
    runtime().block_on(asking);
    settle(running, 1);
}

#[test]
fn trailers_arrive_both_ways() {
    let (running, addr) = serve(config());
    let asking = async {
        let (mut sender, conn) = connect(addr).await;
        for path in ["echo", "stream"] {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", "42".parse().expect("a value"));
            let body = Full::new(Bytes::from_static(b"body"));
            let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
            let body = body.map_err(|never: std::convert::Infallible| match never {});
            let request = Request::post(format!("http://x/{path}")).body(body.boxed_unsync());
            let response = sender.send_request(request.expect("a request")).await.expect("one");
            let told = response.headers().get("x-trailers").cloned();
            let body = response.into_body().collect().await.expect("all of it");
            let came = body.trailers().and_then(|fields| fields.get("x-sum")).cloned();
            let told = told.map_or(came, |_| Some("42".parse().expect("a value")));
            assert_eq!(told.expect("trailers, by either way"), "42", "{path}");
            assert_eq!(body.to_bytes(), &b"body"[..], "{path}");
        }
        close(sender, conn).await;
    };
    runtime().block_on(asking);
    settle(running, 1);
}

/// hyper sends whatever body there is.
#[test]
fn answers_that_have_no_body_end_with_their_head() {
    let http = Http::new().handler(service_fn(|request: Request<Incoming>| async move {
        let status = if request.uri().path() == "/204" { 204 } else { 200 };
        let status = hyper::StatusCode::from_u16(status).expect("a status");
        Ok::<_, std::convert::Infallible>(crate::common::http::text(status, "a body all the same"))
    }));
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", http));
    let mut frames = Frames::greet(addr);
    // A HEAD request, whose method is a literal, and a GET.
    frames.client.say(frame(HEADERS, END_STREAM | END_HEADERS, 1, b"\x86\x84\x02\x04HEAD"));
    let answer = frames.await_kind(HEADERS);
    assert_eq!((answer.stream, answer.flags & END_STREAM), (1, END_STREAM));
    frames.client.say(request(3, "/204"));
    let answer = frames.await_kind(HEADERS);
    assert_eq!((answer.stream, answer.flags & END_STREAM), (3, END_STREAM));
    frames.client.say(request(5, "/200"));
    let data = frames.await_kind(DATA);
    assert_eq!((data.stream, &data.payload[..]), (5, &b"a body all the same"[..]));
    drop(frames);
    settle(running, 1);
}

/// A stream that is cancelled in the middle of its answer takes no other along, and leaves no task.
#[test]
fn cancelled_streams_end_their_handlers_and_nothing_else() {
    let (running, addr) = serve(config());
    let asking = async {
        let (sender, conn) = connect(addr).await;
        for round in 0..50 {
            for path in ["pieces/1000", "late/60000", "drips/1000"] {
                let mut sender = sender.clone();
                let asked = async {
                    let mut body = sender.send_request(get(path)).await?.into_body();
                    body.frame().await.expect("there is one")?;
                    hyper::Result::Ok(body)
                };
                // The answer, if there is one, is dropped in the middle.
                let patience = Duration::from_millis(if path == "late/60000" { 5 } else { 5_000 });
                drop(tokio::time::timeout(patience, asked).await);
            }
            let mut sender = sender.clone();
            let body = whole(sender.send_request(get(&format!("bytes/{round}"))).await).await;
            assert!(body == pattern(round), "round {round}");
        }
        let handle = running.handle();
        // One task is the connection's own.
        wait_until("their handlers are gone", || handle.stats().total().tasks <= 1);
        close(sender, conn).await;
    };
    runtime().block_on(asking);
    settle(running, 1);
}

#[test]
fn a_client_that_is_gone_takes_its_streams_along() {
    let (running, addr) = serve(config());
    for path in ["late/60000", "pieces/100000", "drips/100000"] {
        let asking = async {
            let (mut sender, conn) = connect(addr).await;
            let mut asked = tokio::spawn(async move { sender.send_request(get(path)).await });
            let handle = running.handle();
            let at_work = || handle.stats().total().tasks >= 2;
            while !at_work() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let _ = tokio::time::timeout(Duration::from_millis(20), &mut asked).await;
            conn.abort();
            asked.abort();
        };
        // With the runtime goes the socket.
        runtime().block_on(asking);
    }
    settle(running, 3);
}

#[test]
fn the_preface_may_come_in_any_two_pieces() {
    let (running, addr) = serve(config().cpus(&crate::common::first_cpus(1)));
    let handle = running.handle();
    let mut start = PREFACE.to_vec();
    start.extend(frame(SETTINGS, 0, 0, &[]));
    start.extend(request(1, "/hello"));
    for cut in 0..start.len() {
        let before = handle.stats().total().bytes_received;
        let mut client = Client::connect(addr);
        client.say(&start[..cut]);
        wait_until("the first piece has come", || {
            handle.stats().total().bytes_received >= before + cut as u64
        });
        client.say(&start[cut..]);
        let mut frames = Frames::new(client);
        let data = frames.await_kind(DATA);
        assert_eq!((data.stream, &data.payload[..]), (1, &b"hello\n"[..]), "cut at {cut}");
    }
    settle(running, start.len() as u64);
}

#[test]
fn no_more_streams_are_served_at_a_time_than_was_said() {
    let http = Http::new().max_streams(7).handler(service_fn(answer));
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", http));
    let mut frames = Frames::greet(addr);
    let settings = frames.await_kind(SETTINGS);
    let most = settings.payload.chunks(6).find(|one| one[..2] == [0, 3]).expect("it says so");
    assert_eq!(most[2..], [0, 0, 0, 7]);
    let ids: Vec<u32> = (0..10).map(|n| 2 * n + 1).collect();
    let requests: Vec<u8> = ids.iter().flat_map(|id| request(*id, "/late/100")).collect();
    frames.client.say(requests);
    let (mut refused, mut served) = (Vec::new(), Vec::new());
    while refused.len() + served.len() < ids.len() {
        let frame = frames.next().expect("an answer to each");
        match frame.kind {
            RST_STREAM => {
                assert_eq!(frame.payload, REFUSED_STREAM.to_be_bytes());
                refused.push(frame.stream);
            }
            DATA => served.push(frame.stream),
            _ => {}
        }
    }
    served.sort_unstable();
    assert_eq!((served, refused), (ids[..7].to_vec(), ids[7..].to_vec()));
    drop(frames);
    settle(running, 1);
}

/// An idle connection, and one with a stream at work: each hears what is the last of its streams.
#[test]
fn a_drain_is_announced_and_what_was_begun_is_answered() {
    for path in [None, Some("/late/300")] {
        let (running, addr) = serve(config());
        let handle = running.handle();
        let mut frames = Frames::greet(addr);
        frames.client.say(request(1, "/hello"));
        assert_eq!(frames.await_kind(DATA).payload, b"hello\n");
        wait_until("it is idle", || states(&handle) == ["idle"]);
        if let Some(path) = path {
            frames.client.say(request(3, path));
            wait_until("it is at work", || states(&handle) == ["busy"]);
        }
        handle.begin_drain(limit(8_000));
        wait_until("connections are drained", || handle.phase() >= Phase::DrainConnections);
        let goaway = frames.await_kind(GOAWAY);
        assert_eq!(goaway.payload[..8], [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0], "{path:?}");
        // One that was on its way then is served as well.
        frames.client.say(request(5, "/bytes/5"));
        // A ping follows, whose answer says that no more are on their way.
        let (mut served, mut last) = (Vec::new(), None);
        let end = loop {
            match frames.next() {
                Ok(Raw { kind: DATA, stream, .. }) => served.push(stream),
                Ok(Raw { kind: GOAWAY, payload, .. }) => last = Some(payload[3]),
                Ok(_) => {}
                Err(end) => break end,
            }
        };
        served.sort_unstable();
        let expected: &[u32] = if path.is_some() { &[3, 5] } else { &[5] };
        assert_eq!((end, last, &served[..]), (End::Fin, Some(5), expected), "{path:?}");
        let report = running.join().expect("the report");
        assert!(report.is_balanced(), "{report}");
        assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
    }
}

/// Streams that are opened and reset at once, as many as can be sent: CVE-2023-44487.
#[test]
fn a_rapid_reset_is_bounded_and_nobody_else_notices() {
    let (running, addr) = serve(config());
    let mut frames = Frames::greet(addr);
    let mut flood = Vec::new();
    for n in 0..5_000 {
        flood.extend(request(2 * n + 1, "/late/60000"));
        flood.extend(frame(RST_STREAM, 0, 2 * n + 1, &CANCEL.to_be_bytes()));
    }
    frames.client.say(flood);
    let goaway = frames.await_kind(GOAWAY);
    assert_eq!(goaway.payload[4..8], ENHANCE_YOUR_CALM.to_be_bytes());
    assert_eq!(Client::connect(addr).get("/hello").expect("an answer").status, 200);
    let handle = running.handle();
    wait_until("its handlers are gone", || handle.stats().total().tasks == 0);
    drop(frames);
    settle(running, 2);
}

#[test]
fn a_flood_of_continuations_or_pings_is_bounded() {
    let (running, addr) = serve(config());
    for ping in [false, true] {
        let mut frames = Frames::greet(addr);
        if !ping {
            frames.client.say(frame(HEADERS, 0, 1, &[0x82]));
        }
        let since = Instant::now();
        let one = if ping {
            frame(PING, 0, 0, &[0; 8])
        } else {
            // A header that is not indexed, of 8 KB.
            let mut field = b"\x00\x01a\x7f\x81\x3e".to_vec();
            field.resize(6 + 8_000, b'b');
            frame(CONTINUATION, 0, 1, &field)
        };
        // Who takes no pongs is not read for ever; who never ends its headers is sent away.
        frames.client.stream.set_write_timeout(Some(limit(1_000))).expect("set a time limit");
        let mut sent = 0;
        while sent < 256 * MB && frames.client.say(&one) {
            sent += one.len();
        }
        println!(
            "{sent} bytes of {} in {:?}",
            if ping { "pings" } else { "headers" },
            since.elapsed()
        );
        assert!(sent < 64 * MB, "they go on and on");
        let queued: u64 =
            running.handle().connections().expect("a list").iter().map(|it| it.bytes_queued).sum();
        assert!(queued < 2 * MB as u64, "{queued} bytes are queued");
        drop(frames);
    }
    settle(running, 2);
}

#[test]
fn an_idle_connection_ends_though_its_pings_are_answered() {
    let (running, addr) = serve(config().idle_ms(1_000));
    let mut frames = Frames::greet(addr);
    frames.client.say(request(1, "/hello"));
    assert_eq!(frames.await_kind(DATA).payload, b"hello\n");
    let since = Instant::now();
    // Bytes that are no streams are no activity.
    while frames.client.say(frame(PING, 0, 0, &[0; 8])) && since.elapsed() < limit(8_000) {
        if frames.next().is_err() {
            break;
        }
    }
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(900) && took < limit(4_000), "{took:?}");
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::Idle), 1, "{:?}", total.closed);
}

/// hyper has handed all of the answer over long before the peer has it.
#[test]
fn an_answer_that_the_peer_takes_slowly_is_at_work_until_it_has_all_of_it() {
    let (running, addr) = serve(config().idle_ms(500));
    let mut frames = Frames::greet(addr);
    frames.client.say(request(1, "/bytes/400000"));
    let (mut got, mut steps, mut since) = (Vec::new(), 0, Instant::now());
    let end = loop {
        // Pings keep the client going, and are no activity.
        frames.client.say(frame(PING, 0, 0, &[0; 8]));
        match frames.next() {
            Ok(Raw { kind: DATA, payload, flags, .. }) => {
                got.extend(payload);
                if flags & END_STREAM != 0 {
                    break None;
                }
            }
            Ok(_) => {}
            Err(end) => break Some(end),
        }
        if since.elapsed() > Duration::from_millis(400) {
            (since, steps) = (Instant::now(), steps + 1);
            // Little by little, and at last all of it.
            let room: u32 = if steps < 10 { 1_000 } else { 1 << 20 };
            for stream in [0, 1] {
                frames.client.say(frame(WINDOW_UPDATE, 0, stream, &room.to_be_bytes()));
            }
        }
    };
    assert_eq!((end, got.len()), (None, 400_000), "after {steps} steps");
    assert!(got == pattern(400_000));
    drop(frames);
    settle(running, 1);
}

#[test]
fn an_idle_peer_that_does_not_answer_the_farewell_holds_up_no_drain() {
    let (running, addr) = serve(config());
    let handle = running.handle();
    let mut frames = Frames::greet(addr);
    frames.client.say(request(1, "/hello"));
    assert_eq!(frames.await_kind(DATA).payload, b"hello\n");
    wait_until("it is idle", || states(&handle) == ["idle"]);
    frames.confirms_pings = false;
    let since = Instant::now();
    handle.begin_drain(limit(20_000));
    frames.await_kind(GOAWAY);
    while frames.next().is_ok() {}
    let report = running.join().expect("the report");
    assert!(since.elapsed() < limit(5_000), "{:?}", since.elapsed());
    assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("one")
}

type Conn = JoinHandle<hyper::Result<()>>;

async fn connect(addr: SocketAddr) -> (SendRequest<Body>, Conn) {
    let stream = tokio::net::TcpStream::connect(addr).await.expect("connect");
    let io = TokioIo::new(stream);
    let shaken = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await;
    let (sender, conn) = shaken.expect("a handshake");
    (sender, tokio::spawn(conn))
}

/// The connection ends when nobody can send on it any more, and without an error.
async fn close(sender: SendRequest<Body>, conn: Conn) {
    drop(sender);
    conn.await.expect("no panic").expect("it ends well");
}

fn get(path: &str) -> Request<Body> {
    let body = Full::default().map_err(|never| match never {}).boxed_unsync();
    Request::get(format!("http://x/{path}")).body(body).expect("a request")
}

async fn whole(response: hyper::Result<Response<Incoming>>) -> Vec<u8> {
    let response = response.expect("an answer");
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.expect("all of it").to_bytes().into()
}
