//! tokio's I/O traits on connections: what is built on them works, no byte is lost or changed,
//! errors have their kinds, and a drain ends idle readers and lets busy ones finish.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::channel;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use slipring::{CloseReason, Connection, Server};
use socket2::SockRef;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional, split};
use tokio_util::codec::{
    AnyDelimiterCodec, Framed, LengthDelimitedCodec, LinesCodec, LinesCodecError,
};

use crate::common::peer::{ANY, MB, Peer, Until, ask, bytes, exchange};
use crate::common::{config, connect, limit, settle, start, wait_until};

#[test]
fn lines_through_a_codec_are_whole_however_they_are_split() {
    let server = Server::new(config()).listen(ANY, |conn: Connection| async move {
        let mut lines = Framed::new(conn, LinesCodec::new_with_max_length(10_000));
        while let Some(line) = lines.next().await {
            lines.send(line.map_err(io_error)?.to_uppercase()).await.map_err(io_error)?;
        }
        Ok(())
    });
    let (running, addr) = start(server);
    let text: String =
        (0..500).map(|n| format!("line {n} {}\n", "x".repeat(n * 7 % 3000))).collect();
    for piece in [1 << 20, 1000, 61] {
        let mut stream = connect(addr);
        let answer = std::thread::scope(|scope| {
            scope.spawn(|| {
                for piece in text.as_bytes().chunks(piece) {
                    (&stream).write_all(piece).expect("send");
                }
                stream.shutdown(Shutdown::Write).expect("half-close");
            });
            let mut answer = String::new();
            (&stream).read_to_string(&mut answer).expect("receive");
            answer
        });
        assert!(answer == text.to_uppercase(), "in pieces of {piece}");
        assert_eq!(stream.read(&mut [0]).expect("a FIN"), 0);
    }
    settle(running, 3);
}

#[test]
fn frames_of_any_length_come_back_as_they_were() {
    let server = Server::new(config()).listen(ANY, |conn: Connection| async move {
        let mut frames = Framed::new(conn, LengthDelimitedCodec::new());
        while let Some(frame) = frames.next().await {
            frames.send(frame?.freeze()).await?;
        }
        Ok(())
    });
    let (running, addr) = start(server);
    let (mut request, mut left) = (Vec::new(), bytes(3, 2 * MB));
    for length in [0, 1, 2, 4095, 4096, 65_536, 300_000, 17, 1_000_000] {
        let (frame, rest) = left.split_at(length);
        request.extend((length as u32).to_be_bytes());
        request.extend(frame);
        left = rest;
    }
    assert!(ask(connect(addr), &request) == request);
    settle(running, 1);
}

#[test]
fn a_frame_above_the_codecs_bound_is_an_error_and_not_the_end_of_the_stream() {
    let (sender, told) = channel();
    let server = Server::new(config()).listen(ANY, move |conn: Connection| {
        let sender = sender.clone();
        async move {
            let codec = AnyDelimiterCodec::new_with_max_length(b"\n".to_vec(), vec![], 16);
            let mut frames = Framed::new(conn, codec);
            let first = frames.next().await.map(|frame| frame.is_ok());
            let _ = sender.send(first);
            Ok(())
        }
    });
    let (running, addr) = start(server);
    assert!(ask(connect(addr), &[b'x'; 100]).is_empty());
    assert_eq!(told.recv_timeout(limit(10_000)).expect("the handler ran"), Some(false));
    settle(running, 1);
}

#[test]
fn copies_between_halves_carry_every_byte_in_order() {
    let by_halves = |conn: Connection| async move {
        let (mut read, mut write) = conn.into_split();
        copy(&mut read, &mut write).await?;
        Ok(())
    };
    let by_tokio = |conn: Connection| async move {
        let (mut read, mut write) = split(conn);
        copy(&mut read, &mut write).await?;
        Ok(())
    };
    let buffered = |conn: Connection| async move {
        let (mut read, mut write) = conn.into_split();
        tokio::io::copy_buf(&mut read, &mut write).await?;
        Ok(())
    };
    let small = config().send_queue_bytes(4_096).receive_queue_bytes(16_384);
    let server = Server::new(small).listen(ANY, by_halves).listen(ANY, by_tokio);
    let (running, _) = start(server.listen(ANY, buffered));
    for addr in crate::common::peer::tcp_addrs(&running) {
        let peer = |n| Peer::new(connect(addr), bytes(n, MB + 77 * n));
        exchange(&mut (0..5).map(peer).collect::<Vec<_>>(), Until::End);
    }
    settle(running, 15);
}

#[test]
fn a_two_way_copy_to_a_pipe_carries_both_directions_and_both_ends() {
    let server = Server::new(config()).listen(ANY, |mut conn: Connection| async move {
        let (mut near, mut far) = tokio::io::duplex(1_000);
        // At the other end of the pipe somebody answers only when all has come.
        let answering = conn.spawn(async move {
            let mut all = Vec::new();
            far.read_to_end(&mut all).await?;
            all.reverse();
            far.write_all(&all).await?;
            far.shutdown().await
        })?;
        let (there, back) = copy_bidirectional(&mut conn, &mut near).await?;
        assert_eq!(there, back);
        answering.await?.map_err(Into::into)
    });
    let (running, addr) = start(server);
    for n in 0..5 {
        let request = bytes(n, 100_000 * n);
        let answer = ask(connect(addr), request);
        assert!(answer.iter().rev().eq(request), "stream {n}: {} bytes", answer.len());
    }
    settle(running, 5);
}

#[test]
fn buffered_lines_end_with_the_last_one_whole_or_not() {
    let server = Server::new(config()).listen(ANY, |conn: Connection| async move {
        let (read, mut write) = conn.into_split();
        let mut lines = read.lines();
        while let Some(line) = lines.next_line().await? {
            write.write_all(format!("{}\n", line.len()).as_bytes()).await?;
        }
        Ok(())
    });
    let (running, addr) = start(server);
    let request = format!("\r\n\na\n{}\n{}", "b".repeat(70_000), "c".repeat(5));
    assert_eq!(ask(connect(addr), request.as_bytes()), b"0\n0\n1\n70000\n5\n");
    settle(running, 1);
}

#[test]
fn vectored_writes_keep_the_order_though_there_is_little_room() {
    let server = Server::new(config().send_queue_bytes(1_024)).listen(ANY, |mut conn| async move {
        let all = bytes(9, MB);
        let mut pieces = Vec::new();
        let (mut left, mut length) = (all, 1);
        while !left.is_empty() {
            let (piece, rest) = left.split_at(length.min(left.len()));
            // An empty piece in between changes nothing.
            pieces.extend([IoSlice::new(piece), IoSlice::new(&[])]);
            (left, length) = (rest, length * 31 % 977);
        }
        let mut pieces = &mut pieces[..];
        while pieces.iter().any(|piece| !piece.is_empty()) {
            let few = pieces.len().min(50);
            let count = conn.write_vectored(&pieces[..few]).await?;
            assert!(count > 0 || pieces[..few].iter().all(|piece| piece.is_empty()));
            IoSlice::advance_slices(&mut pieces, count);
        }
        Ok::<_, slipring::Error>(())
    });
    let (running, addr) = start(server);
    assert!(ask(connect(addr), b"") == bytes(9, MB));
    settle(running, 1);
}

#[test]
fn after_a_shutdown_the_other_direction_goes_on() {
    let (sender, told) = channel();
    let server = Server::new(config()).listen(ANY, move |mut conn: Connection| {
        let sender = sender.clone();
        async move {
            AsyncWriteExt::write_all(&mut conn, b"mine").await?;
            AsyncWriteExt::flush(&mut conn).await?;
            AsyncWriteExt::shutdown(&mut conn).await?;
            let late = AsyncWriteExt::write(&mut conn, b"late").await;
            let mut theirs = Vec::new();
            conn.read_to_end(&mut theirs).await?;
            let _ = sender.send((late.map_err(|error| error.kind()), theirs));
            Ok(())
        }
    });
    let (running, addr) = start(server);
    let mut stream = connect(addr);
    let mut mine = Vec::new();
    stream.read_to_end(&mut mine).expect("all that the server sends, and its end");
    assert_eq!(mine, b"mine");
    stream.write_all(b"yours").expect("the other direction is open");
    drop(stream);
    let (late, theirs) = told.recv_timeout(limit(10_000)).expect("the handler has ended");
    assert_eq!((late, &theirs[..]), (Err(ErrorKind::InvalidInput), &b"yours"[..]));
    settle(running, 1);
}

#[test]
fn errors_have_the_kinds_that_io_has_for_them() {
    let (sender, told) = channel();
    let server = Server::new(config().idle_ms(200)).listen(ANY, move |mut conn: Connection| {
        let sender = sender.clone();
        async move {
            let error = loop {
                match AsyncReadExt::read(&mut conn, &mut [0; 64]).await {
                    Ok(0) => break None,
                    Ok(_) => {}
                    Err(error) => break Some(error),
                }
            };
            let written = AsyncWriteExt::write(&mut conn, b"x").await.map_err(|it| it.kind());
            let kind = error.as_ref().map(|error| error.kind());
            let _ = sender.send((kind, written));
            error.map_or(Ok(()), |error| Err(error.into()))
        }
    });
    let (running, addr) = start(server);
    let outcome = || told.recv_timeout(limit(10_000)).expect("the handler has ended");

    let mut idle = connect(addr);
    idle.write_all(b"one byte and no more").expect("send");
    assert_eq!(outcome(), (Some(ErrorKind::TimedOut), Err(ErrorKind::TimedOut)));
    assert_eq!(idle.read(&mut [0]).expect("a FIN"), 0);

    let gone = connect(addr);
    (&gone).write_all(b"x").expect("send");
    wait_until("it is accepted", || running.handle().stats().total().accepted == 2);
    SockRef::from(&gone).set_linger(Some(Duration::ZERO)).expect("close with a reset");
    drop(gone);
    let reset = ErrorKind::ConnectionReset;
    assert_eq!(outcome(), (Some(reset), Err(reset)));

    let total = settle(running, 2);
    let of = |reason| total.closed.get(reason);
    assert_eq!((of(CloseReason::Idle), of(CloseReason::PeerReset)), (1, 1), "{:?}", total.closed);
}

#[test]
fn what_a_forced_drain_ends_is_aborted() {
    let (sender, told) = channel();
    let server = Server::new(config()).listen(ANY, move |mut conn: Connection| {
        let sender = sender.clone();
        async move {
            let mut message = [0; 8];
            conn.begin_message();
            let result = AsyncReadExt::read_exact(&mut conn, &mut message).await;
            let _ = sender.send(result.map_err(|error| error.kind()));
            Ok(())
        }
    });
    let (running, addr) = start(server);
    let mut half = connect(addr);
    half.write_all(b"half").expect("send");
    wait_until("it is received", || running.handle().stats().total().bytes_received == 4);
    let report = running.handle().drain(limit(100)).expect("a report");
    assert!(
        report.is_balanced() && report.total().closed.get(CloseReason::Forced) == 1,
        "{report}"
    );
    let result = told.recv_timeout(limit(10_000)).expect("the handler has ended");
    assert_eq!(result, Err(ErrorKind::ConnectionAborted));
    running.join().expect("no core failed");
}

#[test]
fn a_drain_ends_idle_readers_and_lets_busy_ones_finish() {
    for round in 0..20 {
        let server = Server::new(config()).listen(ANY, |conn: Connection| async move {
            let mut lines = Framed::new(conn, LinesCodec::new());
            while let Some(line) = lines.next().await {
                let line = line.map_err(io_error)?;
                if line == "slow" {
                    // Goes on once the drain has come.
                    lines.get_ref().closing().await;
                    slipring::time::sleep(Duration::from_millis(20)).await;
                }
                lines.send(line.repeat(50_000)).await.map_err(io_error)?;
            }
            Ok(())
        });
        let (running, addr) = start(server);
        let ask_for = |word: &str| {
            let mut stream = connect(addr);
            stream.write_all(format!("{word}\n").as_bytes()).expect("send");
            stream
        };
        let mut idle: Vec<TcpStream> = (0..5).map(|_| ask_for("fast")).collect();
        for stream in &mut idle {
            stream.read_exact(&mut vec![0; 200_001]).expect("the answer");
        }
        let busy: Vec<TcpStream> = (0..5).map(|_| ask_for("slow")).collect();
        wait_until("all are at work", || {
            running.handle().stats().total().bytes_received == 2 * 5 * 5
        });
        running.handle().begin_drain(limit(5_000));
        for mut stream in idle {
            assert_eq!(stream.read(&mut [0]).expect("a FIN, no reset"), 0, "round {round}");
        }
        for mut stream in busy {
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("a FIN, no reset");
            assert_eq!(answer.len(), 200_001, "round {round}");
        }
        let report = running.join().expect("no core failed");
        let closed = report.total().closed;
        assert!(report.is_balanced() && closed.get(CloseReason::Forced) == 0, "{report}");
        assert_eq!(closed.get(CloseReason::Drained), 10, "{report}");
    }
}

/// A codec's error is its own type.
fn io_error(error: LinesCodecError) -> std::io::Error {
    std::io::Error::other(error)
}
