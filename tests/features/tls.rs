//! TLS on connections: every byte arrives, handshakes and records have their deadlines, each end is
//! told apart from the others, and the books have every connection.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use slipring::tls::rustls::version::{TLS12, TLS13};
use slipring::tls::{Acceptor, TlsStream, rustls};
use slipring::{CloseReason, Config, Connection, DeadlineKind, ErrorKind, Phase, Running, Server};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

use crate::common::peer::{ANY, MB, bytes};
use crate::common::{config, connect, limit, settle, start, wait_until};
use crate::tls_support::{
    ask, client, client_of, dial, end_mine, known_client, meet, mutual_server, read_to_clean_end,
    server, session,
};

#[test]
fn big_transfers_come_back_as_they_were_in_both_versions() {
    let (running, addr, _) = serve(config().send_queue_bytes(8_192), server(&[]), echo);
    std::thread::scope(|scope| {
        for (n, version) in [&TLS12, &TLS13, &TLS12, &TLS13].into_iter().enumerate() {
            scope.spawn(move || {
                let request = bytes(n, 3 * MB + n);
                let answer = ask(meet(addr, &Arc::new(client_of(version))), request);
                assert!(answer == request, "{version:?}: {} bytes", answer.len());
            });
        }
    });
    settle(running, 4);
}

#[test]
fn a_client_that_has_ended_its_side_gets_its_whole_answer() {
    let (running, addr, _) = serve(config(), server(&[]), |mut stream| async move {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await?;
        stream.write_all(&request.repeat(3)).await?;
        stream.shutdown().await?;
        Ok(())
    });
    let mut client = meet(addr, &Arc::new(client(&[])));
    client.write_all(bytes(1, MB)).expect("send");
    end_mine(&mut client);
    assert!(read_to_clean_end(&mut client) == bytes(1, MB).repeat(3));
    settle(running, 1);
}

#[test]
fn a_server_that_has_ended_its_side_gets_the_rest() {
    let (running, addr, told) = serve(config(), server(&[]), |mut stream| async move {
        stream.write_all(b"mine").await?;
        stream.shutdown().await?;
        let mut theirs = Vec::new();
        stream.read_to_end(&mut theirs).await?;
        assert_eq!(theirs.len(), 100_000);
        Ok(())
    });
    let mut client = meet(addr, &Arc::new(client(&[])));
    let mut mine = Vec::new();
    client.read_to_end(&mut mine).expect("the end by close_notify");
    assert_eq!(mine, b"mine");
    client.write_all(bytes(2, 100_000)).expect("the other direction is open");
    end_mine(&mut client);
    assert_eq!(outcome(&told), Ok(()));
    settle(running, 1);
}

#[test]
fn a_handler_that_just_returns_has_said_close_notify_behind_all_that_it_wrote() {
    let small = config().send_queue_bytes(4_096);
    let (running, addr, told) = serve(small, server(&[]), |mut stream| async move {
        let mut sent = stream.write(bytes(3, 60_000)).await?;
        sent += stream.write(&bytes(3, 60_000)[sent..]).await?;
        assert!(sent >= 16_000, "{sent} bytes were accepted");
        stream.connection().set_deadline(DeadlineKind::WriteStall, limit(10_000))?;
        Err(std::io::Error::other(sent.to_string()).into())
    });
    let mut client = meet(addr, &Arc::new(client(&[])));
    let answer = read_to_clean_end(&mut client);
    let (_, words) = outcome(&told).expect_err("it has failed on purpose");
    let sent: usize = words.rsplit(' ').next().and_then(|it| it.parse().ok()).expect("a count");
    assert!(answer == bytes(3, sent), "{} of {sent} bytes", answer.len());
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::HandlerError), 1, "{:?}", total.closed);
}

#[test]
fn what_was_written_leaves_though_nobody_flushes() {
    let small = config().send_queue_bytes(4_096);
    let (running, addr, told) = serve(small, server(&[]), |mut stream| async move {
        stream.write_all(bytes(4, 300_000)).await?;
        let (first, rest) = bytes(5, 90_000).split_at(40_000);
        let pieces = [&[], first, rest].map(std::io::IoSlice::new);
        let count = stream.write_vectored(&pieces).await?;
        assert!(count > 0, "an empty piece before them does not mean that nothing fits");
        stream.write_all(&bytes(5, 90_000)[count..]).await?;
        assert_eq!(stream.read_u8().await?, b'y');
        Ok(())
    });
    let mut client = meet(addr, &Arc::new(client(&[])));
    let mut answer = vec![0; 390_000];
    client.read_exact(&mut answer).expect("all of it, before a word of ours");
    assert!(answer[..300_000] == *bytes(4, 300_000) && answer[300_000..] == *bytes(5, 90_000));
    client.write_all(b"y").expect("send");
    assert_eq!(outcome(&told), Ok(()));
    assert!(read_to_clean_end(&mut client).is_empty());
    settle(running, 1);
}

#[test]
fn a_stream_that_is_aborted_or_whose_handler_panics_has_no_clean_end() {
    let (running, addr, _) = serve(config(), server(&[]), |mut stream| async move {
        let panics = stream.read_u8().await? == b'p';
        stream.write_all(b"half of").await?;
        assert!(!panics, "on purpose");
        stream.abort();
        Ok(())
    });
    let configuration = Arc::new(client(&[]));
    for (word, seen) in
        [(b"p", std::io::ErrorKind::UnexpectedEof), (b"a", std::io::ErrorKind::ConnectionReset)]
    {
        let mut client = meet(addr, &configuration);
        client.write_all(word).expect("send");
        let error = client.read_to_end(&mut Vec::new()).expect_err("no end that looks like one");
        assert_eq!(error.kind(), seen, "{error}");
    }
    let total = settle(running, 2);
    let of = |reason| total.closed.get(reason);
    let counts = (of(CloseReason::HandlerPanic), of(CloseReason::Aborted));
    assert_eq!(counts, (1, 1), "{:?}", total.closed);
}

#[test]
fn a_stream_that_is_cut_off_is_an_error_of_its_own_kind() {
    let (running, addr, told) = serve(config(), server(&[]), echo);
    for inside_a_record in [false, true] {
        let mut client = meet(addr, &Arc::new(client(&[])));
        client.write_all(b"whole").expect("send");
        client.read_exact(&mut [0; 5]).expect("the answer");
        if inside_a_record {
            client.sock.write_all(&[23, 3, 3, 0, 100, 1, 2, 3]).expect("send a part");
        }
        client.sock.shutdown(std::net::Shutdown::Write).expect("half-close");
        let (kind, words) = outcome(&told).expect_err("it is no end of a stream");
        assert_eq!(kind, ErrorKind::UnexpectedEof, "{words}");
        assert!(words.contains("close_notify"), "{words}");
    }
    settle(running, 2);
}

#[test]
fn idle_streams_end_with_close_notify_and_a_fin_when_the_server_drains() {
    let configuration = Arc::new(client(&[]));
    for round in 0..50 {
        let (running, addr, told) = serve(config(), server(&[]), echo);
        let mut clients: Vec<_> = (0..4).map(|_| meet(addr, &configuration)).collect();
        for client in &mut clients[1..] {
            client.write_all(b"a message").expect("send");
            client.read_exact(&mut [0; 9]).expect("the answer");
        }
        running.handle().begin_drain(limit(5_000));
        for mut client in clients {
            // It answers before it looks for the FIN.
            assert_eq!(client.read(&mut [0]).expect("close_notify"), 0, "round {round}");
            client.conn.send_close_notify();
            let _ = client.conn.write_tls(&mut client.sock);
            assert_eq!(client.sock.read(&mut [0]).expect("a FIN, no reset"), 0, "round {round}");
            assert_eq!(outcome(&told), Ok(()), "round {round}");
        }
        let report = running.join().expect("no core failed");
        let closed = report.total().closed;
        assert!(report.is_balanced(), "{report}");
        assert_eq!(closed.get(CloseReason::Drained), 4, "round {round}: {report}");
    }
}

#[test]
fn a_record_that_has_begun_when_the_server_drains_is_served() {
    let (running, addr, told) = serve(config(), server(&[]), echo);
    let mut client = meet(addr, &Arc::new(client(&[])));
    client.write_all(b"first").expect("send");
    client.read_exact(&mut [0; 5]).expect("the answer");
    let mut record = Vec::new();
    client.conn.writer().write_all(b"second").expect("it has room");
    client.conn.write_tls(&mut record).expect("a record");
    let (half, rest) = record.split_at(record.len() / 2);
    let before = running.handle().stats().total().bytes_received;
    client.sock.write_all(half).expect("send half of it");
    wait_until("half of it has come", || {
        running.handle().stats().total().bytes_received == before + half.len() as u64
    });
    running.handle().begin_drain(limit(5_000));
    wait_until("the core drains", || running.handle().phase() > Phase::StopAccept);
    client.sock.write_all(rest).expect("send the rest");
    assert_eq!(read_to_clean_end(&mut client), b"second");
    assert_eq!(outcome(&told), Ok(()));
    let report = running.join().expect("no core failed");
    assert!(report.is_balanced() && report.total().closed.get(CloseReason::Forced) == 0);
}

#[test]
fn a_request_that_comes_with_the_end_of_a_handshake_is_served_though_the_server_drains() {
    let (running, addr, told) = serve(config(), server(&[]), echo);
    let mut client = dial(addr, &Arc::new(client(&[])));
    client.conn.write_tls(&mut client.sock).expect("a ClientHello");
    while client.conn.is_handshaking() {
        client.conn.read_tls(&mut client.sock).expect("the server's part");
        client.conn.process_new_packets().expect("the server's part");
    }
    client.conn.writer().write_all(b"request").expect("it has room");
    running.handle().begin_drain(limit(5_000));
    wait_until("the core drains", || running.handle().phase() > Phase::StopAccept);
    while client.conn.wants_write() {
        client.conn.write_tls(&mut client.sock).expect("send the rest and the request");
    }
    assert_eq!(read_to_clean_end(&mut client), b"request");
    assert_eq!(outcome(&told), Ok(()));
    let report = running.join().expect("no core failed");
    assert!(report.is_balanced() && report.total().closed.get(CloseReason::Forced) == 0);
}

#[test]
fn what_is_no_tls_is_refused_with_a_word_and_without_a_reset() {
    let (running, addr, told) = serve(config(), server(&[]), echo);
    let http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let wrong = [22, 3, 1, 0, 5, 9, 9, 9, 9, 9];
    for (garbage, hint) in [(&http[..], true), (bytes(5, 20_000), true), (&wrong[..], false)] {
        let mut stream = connect(addr);
        stream.write_all(garbage).expect("send");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("a FIN, no reset");
        // At most an alert, and nothing that looks like another protocol.
        assert!(answer.len() <= 7 && answer.first().is_none_or(|kind| *kind == 21), "{answer:?}");
        let (kind, words) = outcome(&told).expect_err("no handshake");
        assert_eq!(kind, ErrorKind::Protocol, "{words}");
        assert_eq!(words.contains("no TLS"), hint, "{words}");
    }
    settle(running, 3);
}

#[test]
fn who_only_asks_whether_somebody_listens_is_no_failure() {
    let (running, addr, told) = serve(config(), server(&[]), echo);
    drop(connect(addr));
    assert_eq!(outcome(&told).expect_err("no handshake").0, ErrorKind::Closed);

    let mut early = dial(addr, &Arc::new(client(&[])));
    early.conn.write_tls(&mut early.sock).expect("a ClientHello");
    early.sock.shutdown(std::net::Shutdown::Write).expect("half-close");
    assert_eq!(outcome(&told).expect_err("no handshake").0, ErrorKind::UnexpectedEof);
    let total = settle(running, 2);
    let of = |reason| total.closed.get(reason);
    let counts = (of(CloseReason::Finished), of(CloseReason::HandlerError));
    assert_eq!(counts, (1, 1), "{:?}", total.closed);
}

#[test]
fn who_has_said_nothing_when_the_server_drains_is_drained() {
    let graceful = config().new_grace_ms(50);
    let (running, addr, told) = serve(graceful, server(&[]), echo);
    let mut silent = connect(addr);
    wait_until("it is there", || running.handle().stats().total().live == 1);
    running.handle().begin_drain(limit(5_000));
    assert_eq!(silent.read(&mut [0]).expect("a FIN, no reset"), 0);
    assert_eq!(outcome(&told).expect_err("no handshake").0, ErrorKind::Closed);
    let report = running.join().expect("no core failed");
    let closed = report.total().closed;
    assert!(report.is_balanced() && closed.get(CloseReason::Drained) == 1, "{report}");
}

#[test]
fn a_handshake_has_its_deadlines_however_its_bytes_are_spread() {
    let bounded = config().first_byte_ms(150).message_ms(400).min_rate_bytes_per_s(0);
    let (running, addr, told) = serve(bounded, server(&[]), echo);
    let configuration = Arc::new(client(&[]));
    let mut hello = Vec::new();
    session(&configuration).write_tls(&mut hello).expect("a ClientHello");

    // One that says nothing, one that stops half-way, one that drips, one that never finishes.
    let drip = |addr: SocketAddr| {
        let mut stream = connect(addr);
        stream.set_read_timeout(Some(Duration::from_millis(10))).expect("set a time limit");
        for byte in &hello {
            if stream.write_all(&[*byte]).is_err() || stream.read(&mut [0]).is_ok() {
                return;
            }
        }
        panic!("{} bytes came through", hello.len());
    };
    for (sent, reason, at_least_ms) in [
        (Some(0), CloseReason::FirstByte, 150),
        (Some(hello.len() / 2), CloseReason::Message, 400),
        (Some(hello.len()), CloseReason::Message, 400),
        (None, CloseReason::Message, 400),
    ] {
        let before = running.handle().stats().total().closed.get(reason);
        let since = Instant::now();
        if let Some(count) = sent {
            let mut stream = connect(addr);
            stream.write_all(&hello[..count]).expect("send");
            stream.read_to_end(&mut Vec::new()).expect("a FIN, no reset");
        } else {
            drip(addr);
        }
        let (kind, words) = outcome(&told).expect_err("no handshake");
        assert_eq!(kind, ErrorKind::TimedOut, "{words}");
        assert!(since.elapsed() >= Duration::from_millis(at_least_ms), "{:?}", since.elapsed());
        wait_until("it is in the books", || {
            running.handle().stats().total().closed.get(reason) == before + 1
        });
    }
    settle(running, 4);
}

#[test]
fn a_record_that_drips_in_has_a_deadline_and_an_idle_stream_another() {
    let bounded = config().message_ms(300).idle_ms(20_000).min_rate_bytes_per_s(0);
    let (running, addr, told) = serve(bounded, server(&[]), |stream| async move {
        stream.connection().set_deadline(DeadlineKind::Idle, Duration::from_millis(250))?;
        echo(stream).await
    });
    let configuration = Arc::new(client(&[]));
    let mut dripping = meet(addr, &configuration);
    dripping.sock.write_all(&[23, 3, 3, 0, 200]).expect("send the header of a record");
    dripping.sock.set_read_timeout(Some(Duration::from_millis(10))).expect("set a time limit");
    let dripped = (0..200).take_while(|_| {
        let sent = dripping.sock.write_all(&[0]).is_ok();
        // Gives it time.
        let _ = dripping.sock.read(&mut [0; 4096]);
        sent && running.handle().stats().total().live > 0
    });
    assert!(dripped.count() < 200, "the whole record came through");
    assert_eq!(outcome(&told).expect_err("a deadline").0, ErrorKind::TimedOut);

    let idle = meet(addr, &configuration);
    assert_eq!(outcome(&told).expect_err("a deadline").0, ErrorKind::TimedOut);
    drop(idle);
    let total = settle(running, 2);
    let of = |reason| total.closed.get(reason);
    assert_eq!((of(CloseReason::Message), of(CloseReason::Idle)), (1, 1), "{:?}", total.closed);
}

#[test]
fn records_that_come_without_a_pause_have_a_deadline_each() {
    let bounded = config().message_ms(400).min_rate_bytes_per_s(0);
    let (running, addr, told) = serve(bounded, server(&[]), echo);
    let mut client = meet(addr, &Arc::new(client(&[])));
    client.sock.set_read_timeout(Some(Duration::from_millis(20))).expect("set a time limit");
    let (since, mut unsent, mut sent) = (Instant::now(), Vec::new(), 0);
    // What is sent ends amid a record each time, for much longer than one may take.
    while since.elapsed() < Duration::from_millis(1_200) {
        client.conn.writer().write_all(b"0123456789").expect("it has room");
        client.conn.write_tls(&mut unsent).expect("a record");
        let half = unsent.len() - 10;
        client.sock.write_all(&unsent[..half]).expect("send a part");
        unsent.drain(..half);
        sent += 10;
        // The echo of what is complete, in time for the next.
        let _ = client.sock.peek(&mut [0; 1]);
        while client.conn.read_tls(&mut client.sock).is_ok_and(|count| count > 0) {
            client.conn.process_new_packets().expect("whole records");
        }
    }
    client.sock.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    client.sock.write_all(&unsent).expect("send the rest");
    end_mine(&mut client);
    assert_eq!(read_to_clean_end(&mut client).len(), sent);
    assert_eq!(outcome(&told), Ok(()));
    settle(running, 1);
}

#[test]
fn the_protocol_is_agreed_on_by_alpn_and_the_name_is_known() {
    let (sender, seen) = channel();
    let offer = server(&["h2", "http/1.1"]);
    let (running, addr, told) = serve(config(), offer, move |mut stream| {
        let alpn = stream.alpn().map(<[u8]>::to_vec);
        let name = stream.server_name().map(str::to_owned);
        let _ = sender.send((alpn, name));
        async move { stream.shutdown().await.map_err(Into::into) }
    });
    for (asked, agreed) in [
        (&["h2", "http/1.1"][..], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&["spdy/3", "http/1.1", "h2"], Some("h2")),
        (&[], None),
    ] {
        let mut client = meet(addr, &Arc::new(client(asked)));
        assert_eq!(client.conn.alpn_protocol(), agreed.map(str::as_bytes), "{asked:?}");
        assert!(read_to_clean_end(&mut client).is_empty());
        let (alpn, name) = seen.recv_timeout(limit(10_000)).expect("the handler ran");
        assert_eq!(alpn.as_deref(), agreed.map(str::as_bytes), "{asked:?}");
        assert_eq!(name.as_deref(), Some("localhost"));
        assert_eq!(outcome(&told), Ok(()));
    }
    let mut stranger = dial(addr, &Arc::new(client(&["spdy/3"])));
    assert!(stranger.read(&mut [0]).is_err(), "nothing is agreed on");
    assert_eq!(outcome(&told).expect_err("nothing is agreed on").0, ErrorKind::Protocol);
    settle(running, 5);
}

#[test]
fn sessions_are_resumed_and_clients_are_known_by_their_certificates() {
    let (sender, seen) = channel();
    let (running, addr, told) = serve(config(), mutual_server(), move |mut stream| {
        let certificates = stream.session().peer_certificates().map_or(0, <[_]>::len);
        let _ = sender.send((certificates, stream.session().handshake_kind()));
        async move {
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            stream.write_all(line.as_bytes()).await.map_err(Into::into)
        }
    });
    for version in [&TLS13, &TLS12] {
        let configuration = Arc::new(known_client(version));
        for resumed in [false, true] {
            let mut client = meet(addr, &configuration);
            client.write_all(b"who am I\n").expect("send");
            assert_eq!(read_to_clean_end(&mut client), b"who am I\n");
            let (certificates, kind) = seen.recv_timeout(limit(10_000)).expect("the handler ran");
            assert_eq!(certificates, 1);
            let is_resumed = kind == Some(rustls::HandshakeKind::Resumed);
            assert_eq!(is_resumed, resumed, "{version:?}: {kind:?}");
            assert_eq!(outcome(&told), Ok(()));
        }
    }
    let mut stranger = dial(addr, &Arc::new(client(&[])));
    let refused = stranger.write_all(b"me\n").and_then(|()| stranger.read(&mut [0]));
    assert!(refused.is_err(), "a client without a certificate is refused");
    assert_eq!(outcome(&told).expect_err("no certificate").0, ErrorKind::Protocol);
    settle(running, 5);
}

async fn echo(mut stream: TlsStream) -> slipring::Result<()> {
    let mut buf = vec![0; 10_000];
    loop {
        let count = stream.read(&mut buf).await?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&buf[..count]).await?;
        stream.flush().await?;
    }
}

/// How a handler has ended, its handshake included.
type Outcome = Result<(), (ErrorKind, String)>;

fn outcome(told: &Receiver<Outcome>) -> Outcome {
    told.recv_timeout(limit(10_000)).expect("the handler has ended")
}

/// Serves TLS streams, and tells how each handler has ended.
fn serve<H, F>(
    config: Config,
    tls: rustls::ServerConfig,
    handle: H,
) -> (Running, SocketAddr, Receiver<Outcome>)
where
    H: Fn(TlsStream) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = slipring::Result<()>> + 'static,
{
    let (sender, told) = channel();
    let acceptor = Acceptor::new(Arc::new(tls));
    let server = Server::new(config).listen(ANY, move |conn: Connection| {
        let (acceptor, handle, sender) = (acceptor.clone(), handle.clone(), sender.clone());
        async move {
            let result = async move { handle(acceptor.accept(conn).await?).await }.await;
            let words = |error: &slipring::Error| (error.kind(), error.to_string());
            let _ = sender.send(result.as_ref().map_err(words).copied());
            result
        }
    });
    let (running, addr) = start(server);
    (running, addr, told)
}
