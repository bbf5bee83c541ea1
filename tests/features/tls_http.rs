//! HTTP over TLS: what is promised of requests and of a drain holds behind TLS as well.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use slipring::http::{Http, Incoming};
use slipring::tls::{Acceptor, rustls};
use slipring::{CloseReason, Config, Connection, Running, Server};
use tokio_rustls::TlsConnector;

use crate::common::peer::ANY;
use crate::common::{config, limit, settle, start, wait_until};
use crate::tls_support::{Client, client, meet, read_to_clean_end, server};

#[test]
fn requests_of_http_1_are_answered_one_after_the_other_and_all_at_once() {
    let (running, addr) = serve(config());
    let mut client = meet(addr, &Arc::new(client(&["http/1.1"])));
    for n in 0..20 {
        ask(&mut client, &format!("/{n}"));
        assert!(answer(&mut client).ends_with(&format!("\r\n\r\n/{n} HTTP/1.1")));
    }
    let pipelined: String = (0..20).map(|n| request(&format!("/{n}"))).collect();
    client.write_all(pipelined.as_bytes()).expect("send");
    for n in 0..20 {
        assert!(answer(&mut client).ends_with(&format!("\r\n\r\n/{n} HTTP/1.1")));
    }
    ask(&mut client, "/long");
    let long = answer(&mut client);
    assert!(long.ends_with(&"long".repeat(LONG / 4)), "{} bytes", long.len());
    client.conn.send_close_notify();
    client.conn.write_tls(&mut client.sock).expect("send close_notify");
    client.sock.shutdown(std::net::Shutdown::Write).expect("half-close");
    assert!(read_to_clean_end(&mut client).is_empty());
    settle(running, 1);
}

#[test]
fn requests_of_http_2_are_answered_and_those_under_way_are_when_the_server_drains() {
    for _ in 0..10 {
        let (running, addr) = serve(config());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let tcp = tokio::net::TcpStream::connect(addr).await.expect("connect");
            let connector = TlsConnector::from(Arc::new(client(&["h2"])));
            let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
            let tls = connector.connect(name, tcp).await.expect("the handshake");
            assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            let io = TokioIo::new(tls);
            let (mut sender, conn) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
                    .await
                    .expect("the preface");
            let conn = tokio::spawn(conn);
            let mut send = |path: &str| {
                let request = Request::builder().uri(format!("https://localhost{path}"));
                let request = request.body(Full::<Bytes>::default()).expect("a request");
                sender.send_request(request)
            };
            let text = async |response: Response<hyper::body::Incoming>| {
                assert_eq!(response.version(), Version::HTTP_2);
                let body = response.into_body().collect().await.expect("the whole body");
                String::from_utf8(body.to_bytes().to_vec()).expect("it is UTF-8")
            };
            let first = send("/first").await.expect("an answer");
            assert_eq!(text(first).await, "/first HTTP/2.0");
            let slow: Vec<_> = (0..5).map(|_| tokio::spawn(send("/slow"))).collect();
            // An answer behind them: they have come too.
            send("/after").await.expect("an answer");
            running.handle().begin_drain(limit(5_000));
            for slow in slow {
                let response = slow.await.expect("no panic").expect("an answer");
                assert_eq!(text(response).await, "long".repeat(LONG / 4));
            }
            conn.await.expect("no panic").expect("a GOAWAY and close_notify, no reset");
        });
        let report = running.join().expect("no core failed");
        assert!(report.is_balanced(), "{report}");
        assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
    }
}

#[test]
fn a_drain_ends_keep_alive_connections_with_close_notify_and_answers_what_is_under_way() {
    let configuration = Arc::new(client(&["http/1.1"]));
    for round in 0..10 {
        let (running, addr) = serve(config());
        let [mut idle, mut busy] = [(); 2].map(|()| meet(addr, &configuration));
        for client in [&mut idle, &mut busy] {
            ask(client, "/");
            answer(client);
        }
        let received = || running.handle().stats().total().bytes_received;
        let before = received();
        ask(&mut busy, "/slow");
        wait_until("it has come", || received() > before);
        running.handle().begin_drain(limit(5_000));
        assert!(read_to_clean_end(&mut idle).is_empty(), "round {round}");
        let rest = String::from_utf8(read_to_clean_end(&mut busy)).expect("it is UTF-8");
        assert!(rest.contains("\r\nconnection: close\r\n"), "round {round}: {rest:.200}");
        assert!(rest.ends_with(&"long".repeat(LONG / 4)), "round {round}: {} bytes", rest.len());
        let report = running.join().expect("no core failed");
        assert!(report.is_balanced(), "{report}");
        assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
    }
}

#[test]
fn a_request_that_drips_in_by_records_has_one_deadline_for_all_of_them() {
    let bounded = config().message_ms(400).min_rate_bytes_per_s(0);
    let (running, addr) = serve(bounded);
    let mut client = meet(addr, &Arc::new(client(&["http/1.1"])));
    client.sock.set_read_timeout(Some(Duration::from_millis(20))).expect("set a time limit");
    let since = Instant::now();
    // What is sent ends amid a record each time, so that each of the server's waits is in one.
    let mut unsent = Vec::new();
    let long = format!("GET / HTTP/1.1\r\nhost: {}", "x".repeat(5_000));
    let ended = long.bytes().find(|byte| {
        client.conn.writer().write_all(&[*byte]).expect("it has room");
        client.conn.write_tls(&mut unsent).expect("a record");
        let half = unsent.len() - 10;
        let sent = client.sock.write_all(&unsent[..half]).is_ok();
        unsent.drain(..half);
        !sent || client.sock.read(&mut [0; 4096]).is_ok_and(|count| count == 0)
    });
    assert!(ended.is_some(), "the whole head came through");
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(400) && took < limit(5_000), "{took:?}");
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::Message), 1, "{:?}", total.closed);
}

#[test]
fn a_client_that_leaves_without_a_word_is_a_failure_amid_a_request_only() {
    let (running, addr) = serve(config());
    for (words, reason) in [
        // As browsers do that have connected in advance.
        (None, CloseReason::Finished),
        (Some(""), CloseReason::Finished),
        (Some("GET / HTTP/1.1\r\nho"), CloseReason::HandlerError),
        (
            Some("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nfour"),
            CloseReason::HandlerError,
        ),
    ] {
        let before = running.handle().stats().total().closed.get(reason);
        let mut client = meet(addr, &Arc::new(client(&["http/1.1"])));
        if let Some(words) = words {
            ask(&mut client, "/");
            answer(&mut client);
            client.write_all(words.as_bytes()).expect("send");
        }
        client.sock.shutdown(std::net::Shutdown::Write).expect("half-close");
        wait_until("it is in the books", || {
            running.handle().stats().total().closed.get(reason) == before + 1
        });
    }
    settle(running, 4);
}

fn serve(config: Config) -> (Running, SocketAddr) {
    let acceptor = Acceptor::new(Arc::new(server(&["h2", "http/1.1"])));
    start(Server::new(config).listen(ANY, move |conn: Connection| {
        let acceptor = acceptor.clone();
        async move {
            let stream = acceptor.accept(conn).await?;
            Http::new().serve(stream, service_fn(tell)).await
        }
    }))
}

async fn tell(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let path = request.uri().path().to_owned();
    let version = request.version();
    request.into_body().collect().await?;
    if path == "/slow" {
        slipring::time::sleep(Duration::from_millis(100)).await;
    }
    let text = match &path[..] {
        "/slow" | "/long" => "long".repeat(LONG / 4),
        path => format!("{path} {version:?}"),
    };
    Ok(Response::new(Full::new(Bytes::from(text))))
}

fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

fn ask(client: &mut Client, path: &str) {
    client.write_all(request(path).as_bytes()).expect("send");
}

/// One response, head and body.
fn answer(client: &mut Client) -> String {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).expect("a head");
        text.push(byte[0]);
    }
    let head = String::from_utf8(text).expect("it is UTF-8");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.and_then(|length| length.parse().ok()).expect("a length")];
    client.read_exact(&mut body).expect("a body");
    head + &String::from_utf8(body).expect("it is UTF-8")
}

/// The length of a long answer: more than an output queue holds.
const LONG: usize = 1_000_000;
