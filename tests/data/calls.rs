//! What a handler calls, and how it ends, over the real ring: lines, exact reads, parsing in place,
//! halves in two tasks, children, panics and errors.
//!
//! Each test: 1. starts a server whose handler makes the calls; 2. sends what they are about, cut
//! in the worst way; 3. compares the answer; 4. `settle`s, which checks the whole account.

use std::cell::RefCell;
use std::io::{ErrorKind as Io, Read, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::common::peer::{ANY, MB, ask, bytes, tcp_addrs};
use crate::common::{config, connect, settle, start, wait_until};
use slipring::{CloseReason, Connection, Server};

#[test]
fn lines_are_read_whole_wherever_the_stream_is_cut() {
    let (running, addr) = start(Server::new(config()).listen(ANY, |mut conn| async move {
        while let Some(line) = conn.read_until(b'\n', 10).await? {
            conn.send(format!("[{}]", String::from_utf8_lossy(&line))).await?;
        }
        Ok(())
    }));
    let text = b"one\n\n10 bytes!\nlast";
    let lines = "[one\n][\n][10 bytes!\n][last]";
    let handle = running.handle();
    for cut in 0..=text.len() {
        let before = handle.stats().total().bytes_received;
        let mut stream = connect(addr);
        stream.write_all(&text[..cut]).expect("send");
        let come = || handle.stats().total().bytes_received - before;
        wait_until("the first part has come", || come() == cut as u64);
        assert_eq!(String::from_utf8_lossy(&ask(stream, &text[cut..])), lines, "cut at {cut}");
    }
    let connects = text.len() as u64 + 1;
    assert_eq!(settle(running, connects).closed.get(CloseReason::Finished), connects);
}

#[test]
fn reads_that_cannot_succeed_say_why() {
    let server = Server::new(config())
        .listen(ANY, |mut conn: Connection| async move {
            let error = conn.read_until(b'\n', 10).await.expect_err("11 bytes are too long");
            conn.send(format!("{:?}", error.kind())).await
        })
        .listen(ANY, |mut conn: Connection| async move {
            let error = conn.read_exact(&mut [0; 10]).await.expect_err("9 bytes are not 10");
            conn.send(format!("{:?}", error.kind())).await
        });
    let (running, addr) = start(server);
    assert_eq!(ask(connect(addr), b"0123456789\n"), b"TooLong");
    assert_eq!(ask(connect(addr), b"0123456789x"), b"TooLong");
    let exact = tcp_addrs(&running)[1];
    assert_eq!(ask(connect(exact), b"012345678"), b"UnexpectedEof");
    assert_eq!(ask(connect(exact), b""), b"UnexpectedEof");
    settle(running, 4);
}

#[test]
fn a_parser_on_fill_buf_and_consume_sees_every_frame() {
    let (running, addr) = start(Server::new(config()).listen(ANY, |mut conn| async move {
        // A frame is its length in one byte, and so many bytes.
        while let Some(&len) = conn.fill_buf().await?.first() {
            conn.consume(1);
            let mut frame = vec![0; usize::from(len)];
            let (mut at, half) = (0, usize::from(len) / 2);
            while at < half {
                let shown = conn.fill_buf().await?;
                let count = shown.len().min(half - at);
                frame[at..at + count].copy_from_slice(&shown[..count]);
                conn.consume(count);
                at += count;
            }
            conn.read_exact(&mut frame[half..]).await?;
            conn.send(frame).await?;
        }
        Ok(())
    }));
    let frames = (0..=255u8).cycle().take(2000).map(|n| bytes(n.into(), n.into()));
    let frames: Vec<&[u8]> = frames.collect();
    let stream = frames.iter().flat_map(|f| [&[f.len() as u8], *f].concat());
    assert!(ask(connect(addr), &stream.collect::<Vec<u8>>()) == frames.concat());
    assert_eq!(settle(running, 1).closed.get(CloseReason::Finished), 1);
}

#[test]
fn two_tasks_use_the_halves_of_a_connection() {
    let (running, addr) = start(Server::new(config()).listen(ANY, |conn| async move {
        let (mut read, mut write) = conn.into_split();
        let heard = Rc::new(RefCell::new(Vec::new()));
        let hears = Rc::clone(&heard);
        let reader = slipring::task::spawn(async move {
            while let Some(chunk) = read.recv().await? {
                hears.borrow_mut().extend_from_slice(&chunk);
            }
            slipring::Result::<()>::Ok(())
        })?;
        // The writer is busy before, while and after the other half reads.
        for piece in bytes(7, MB).chunks(10_000) {
            write.write(piece).await?;
        }
        write.flush().await?;
        reader.await??;
        write.send(heard.take()).await
    }));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let client = || ask(connect(addr), bytes(8, MB));
            scope.spawn(move || assert!(client() == [bytes(7, MB), bytes(8, MB)].concat()));
        }
    });
    assert_eq!(settle(running, 4).closed.get(CloseReason::Finished), 4);
}

#[test]
fn a_child_ends_with_its_connection() {
    struct Flag(Arc<AtomicBool>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    let (running, addr) = start(Server::new(config()).listen(ANY, move |mut conn| {
        let flag = Flag(Arc::clone(&flag));
        async move {
            conn.spawn(async move {
                let _flag = flag;
                std::future::pending::<()>().await;
            })?;
            conn.recv().await.map(drop)
        }
    }));
    let stream = connect(addr);
    let handle = running.handle();
    wait_until("handler and child run", || handle.stats().total().tasks == 2);
    assert!(!ended.load(Relaxed));
    drop(stream);
    settle(running, 1);
    assert!(ended.load(Relaxed));
}

/// Case 30.
#[test]
fn a_handler_that_panics_or_fails_ends_its_own_connection_only() {
    let (running, addr) = start(Server::new(config()).listen(ANY, async |mut conn: Connection| {
        while let Some(line) = conn.read_until(b'\n', 100).await? {
            match line.as_slice() {
                b"panic\n" => panic!("as the client has asked"),
                b"fail\n" => return Err(std::io::Error::other("as asked").into()),
                _ => conn.send(line).await?,
            }
        }
        Ok(())
    }));
    let mut steady = connect(addr);
    for _ in 0..20 {
        for word in ["panic\n", "fail\n"] {
            let mut stream = connect(addr);
            stream.write_all(word.as_bytes()).expect("send");
            match stream.read(&mut [0]) {
                Ok(0) => {}
                Err(error) if error.kind() == Io::ConnectionReset => {}
                other => panic!("{word:?} was answered with {other:?}"),
            }
        }
        steady.write_all(b"hello\n").expect("send");
        let mut answer = [0; 6];
        steady.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"hello\n");
    }
    drop(steady);
    let total = settle(running, 41);
    assert_eq!(total.closed.get(CloseReason::HandlerPanic), 20);
    assert_eq!(total.closed.get(CloseReason::HandlerError), 20);
    assert_eq!(total.panics, 20);
}

#[test]
fn a_side_that_is_shut_down_ends_behind_its_output_and_goes_on_receiving() {
    let (running, addr) =
        start(Server::new(config()).listen(ANY, |mut conn: Connection| async move {
            let length = conn.recv().await?.map_or(0, |chunk| chunk.len());
            conn.send(bytes(length, 3 * MB)).await?;
            conn.shutdown().await?;
            let after = conn.send("more").await.expect_err("our side has ended");
            assert_eq!(after.kind(), slipring::ErrorKind::Misuse);
            let mut received = 0;
            while let Some(chunk) = conn.recv().await? {
                received += chunk.len();
            }
            assert_eq!(received, MB, "all that came after our end");
            Ok(())
        }));
    const ROUNDS: usize = 20;
    for round in 1..=ROUNDS {
        let mut stream = connect(addr);
        stream.write_all(&vec![0; round]).expect("send");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the output, and then the end");
        assert!(answer == bytes(round, 3 * MB), "round {round}: {} bytes", answer.len());
        stream.write_all(&vec![1; MB]).expect("the other side is open");
        stream.shutdown(std::net::Shutdown::Write).expect("shut down");
        assert_eq!(stream.read(&mut [0]).expect("no reset"), 0);
    }
    let finished = settle(running, ROUNDS as u64).closed.get(CloseReason::Finished);
    assert_eq!(finished, ROUNDS as u64, "no handler failed");
}
