//! HTTP/1 requests whose body, answer or end comes at an unusual time: expectations, early answers,
//! half-closed connections, upgrades.

use std::net::{Shutdown, SocketAddr};

use crate::common::http::{Answer, Client, End, answer, pattern, serve, text};
use crate::common::peer::MB;
use crate::common::{config, settle, start, wait_until};
use bytes::Bytes;
use hyper::header::{CONNECTION, UPGRADE};
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use slipring::http::{Http, Incoming};
use slipring::{CloseReason, Connection, ErrorKind, HalfClose, Running, Server};

#[test]
fn who_expects_100_continue_is_told_when_the_body_is_wanted() {
    let (running, addr) = serve(config());
    let mut client = Client::connect(addr);
    let head =
        "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n";
    for _ in 0..3 {
        client.say(head);
        assert_eq!(client.answer().expect("the go-ahead").status, 100);
        client.say("body");
        assert_eq!(body(client.answer()), b"body");
    }
    drop(client);
    settle(running, 1);
}

#[test]
fn who_expects_100_continue_is_refused_without_it_where_nobody_wants_the_body() {
    let (running, addr) = serve(config());
    let mut client = Client::connect(addr);
    client.say(
        "POST /ignore HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n",
    );
    assert_eq!(client.answer().expect("an answer").status, 413);
    assert_eq!(client.end(), End::Fin, "whether a body follows is anybody's guess");
    settle(running, 1);
}

/// The client has the body on its way when the refusal comes, and sends on all the same.
#[test]
fn an_early_refusal_arrives_though_the_body_is_still_being_sent() {
    let (running, addr) = serve(config());
    for _ in 0..20 {
        let mut client = Client::connect(addr);
        client
            .say(format!("POST /ignore HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 8 * MB));
        // More than fits into any buffer in between, less than the server throws away.
        for piece in pattern(MB / 2).chunks(50_000) {
            client.say(piece);
        }
        assert_eq!(client.answer().expect("the refusal").status, 413);
        assert_eq!(client.end(), End::Fin);
    }
    settle(running, 20);
}

#[test]
fn head_requests_and_statuses_without_a_body_leave_the_connection_in_step() {
    let (running, addr) = serve(config());
    let mut client = Client::connect(addr);
    for (method, path, status) in [
        ("HEAD", "/bytes/1000", 200),
        ("HEAD", "/pieces/3", 200),
        ("GET", "/none", 204),
        ("GET", "/unmodified", 304),
        ("HEAD", "/nowhere", 404),
    ] {
        client.say(format!("{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let answer = client.answer_to(method == "HEAD").expect("an answer");
        assert_eq!(answer.status, status, "{method} {path}");
        if path == "/bytes/1000" {
            assert_eq!(answer.header("content-length"), Some("1000"));
        }
        assert_eq!(body(client.get("/hello")), b"hello\n", "after {method} {path}");
    }
    drop(client);
    settle(running, 1);
}

#[test]
fn long_bodies_go_both_ways_at_once() {
    let (running, addr) = serve(config());
    let mut client = Client::connect(addr);
    let sent = pattern(3 * MB);
    let mut writer = Client { stream: client.stream.try_clone().expect("another"), rest: vec![] };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            writer.say("POST /stream HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
            for chunk in sent.chunks(70_000) {
                writer.say(format!("{:x}\r\n", chunk.len()));
                writer.say(chunk);
                writer.say("\r\n");
            }
            writer.say("0\r\n\r\n");
        });
        assert!(body(client.answer()) == sent);
    });
    assert_eq!(body(client.get("/hello")), b"hello\n");
    drop((client, writer));
    settle(running, 1);
}

#[test]
fn who_has_ended_its_side_still_gets_its_answers() {
    let (running, addr) = serve(config());
    for path in ["/hello", "/late/50", "/pieces/100", "/drips/5"] {
        let mut client = Client::connect(addr);
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        client.say(request.repeat(2));
        client.stream.shutdown(Shutdown::Write).expect("half-close");
        for _ in 0..2 {
            assert_eq!(client.answer().expect("an answer").status, 200, "{path}");
        }
        assert_eq!(client.end(), End::Fin, "{path}");
    }
    settle(running, 4);
}

#[test]
fn who_has_ended_its_side_gets_no_answer_where_that_is_an_abort() {
    let (running, addr) = serve(config().half_close(HalfClose::Abort));
    let mut client = Client::connect(addr);
    client.say("GET /late/60000 HTTP/1.1\r\nHost: x\r\n\r\n");
    let handle = running.handle();
    wait_until("the handler is at work", || crate::common::http::states(&handle) == ["busy"]);
    client.stream.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(client.end(), End::Fin);
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::HalfClosed), 1, "{:?}", total.closed);
}

#[test]
fn a_body_that_ends_too_early_is_an_error_for_the_service_and_no_end() {
    let (running, addr) = serve(config());
    for head in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        let mut client = Client::connect(addr);
        client.say(format!("POST /echo HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n4\r\nbo"));
        client.stream.shutdown(Shutdown::Write).expect("half-close");
        assert_eq!(client.answer().expect("an answer").status, 422);
        assert_eq!(client.end(), End::Fin);
    }
    settle(running, 2);
}

/// A connection goes on in another protocol, with the bytes that came with the request.
#[test]
fn an_upgraded_connection_goes_on_with_what_came_behind_the_request() {
    let (running, addr) = upgrading();
    let upgrade = "GET /hello HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
    let connect = "CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n";
    for (request, status) in [(upgrade, 101), (connect, 200)] {
        for behind in ["", "x", "first words"] {
            // Another request before it, on the same connection, with it in one piece.
            let mut client = Client::connect(addr);
            client.say(format!("GET /hello HTTP/1.1\r\nHost: x\r\n\r\n{request}{behind}"));
            assert_eq!(body(client.answer()), b"hello\n");
            let answer = client.answer_to(true).expect("it goes on");
            assert_eq!(answer.status, status, "{}", answer.head);
            assert_eq!(client.take(behind.len()).expect("the first words"), behind.as_bytes());
            for words in [&b"and"[..], &pattern(100_000)] {
                let mut writer = client.stream.try_clone().expect("another");
                std::thread::scope(|scope| {
                    scope.spawn(move || std::io::Write::write_all(&mut writer, words));
                    assert!(client.take(words.len()).expect("an echo") == words);
                });
            }
            client.stream.shutdown(Shutdown::Write).expect("half-close");
            assert_eq!(client.end(), End::Fin);
        }
    }
    settle(running, 6);
}

/// Upgrades whoever asks for it to an echo.
fn upgrading() -> (Running, SocketAddr) {
    start(Server::new(config()).listen("127.0.0.1:0", |conn: Connection| async move {
        let service = service_fn(|request: Request<Incoming>| async {
            if request.method() == Method::CONNECT {
                return Ok(text(StatusCode::OK, ""));
            }
            if !request.headers().contains_key(UPGRADE) {
                return answer(request).await;
            }
            let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
            response.headers_mut().insert(CONNECTION, "upgrade".parse().expect("a value"));
            response.headers_mut().insert(UPGRADE, "echo".parse().expect("a value"));
            Ok(response)
        });
        let echo = |mut conn: Connection, behind: Bytes| async move {
            conn.write(&behind).await?;
            crate::common::echo(conn).await
        };
        Http::new().serve_with_upgrade(conn, service, echo).await
    }))
}

fn body(answer: Result<Answer, End>) -> Vec<u8> {
    let answer = answer.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.head);
    answer.body
}

/// Whoever is to blame is named: the service, or the peer.
#[test]
fn an_error_says_whether_the_service_or_the_peer_has_failed() {
    let (tell, told) = std::sync::mpsc::channel();
    let server = Server::new(config()).listen("127.0.0.1:0", move |conn: Connection| {
        let tell = tell.clone();
        async move {
            let fails = service_fn(|_: Request<Incoming>| async {
                Err::<hyper::Response<String>, _>(std::io::Error::other("the disk is full"))
            });
            let error = Http::new().serve(conn, fails).await.expect_err("either way");
            tell.send((error.kind(), error.to_string())).expect("the test waits");
            Err(error)
        }
    });
    let (running, addr) = start(server);
    let hear = || told.recv_timeout(std::time::Duration::from_secs(10)).expect("an error");
    Client::connect(addr).say("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let (kind, text) = hear();
    assert_eq!(kind, ErrorKind::Service, "{text}");
    assert!(text.contains("the disk is full"), "{text}");
    Client::connect(addr).say("GET / HTTP/1.1\r\nHost");
    let (kind, text) = hear();
    assert_eq!(kind, ErrorKind::Protocol, "{text}");
    let closed = settle(running, 2).closed;
    assert_eq!(closed.get(CloseReason::HandlerError), 2);
}
