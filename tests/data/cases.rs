//! Adversarial cases in which the kernel's own behaviour is the point, over real sockets: sizes at
//! the edge of the pool, resets in the middle, tiny send buffers, ends that must come soon.
//!
//! Cases are numbered as in the list of adversarial cases, as are those of the simulator in
//! `src/sim/by_hand.rs`. Every test ends with `settle`, which checks the whole account.

use std::io::{ErrorKind as Io, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use crate::common::peer::{ANY, MB, Peer, Until, ask, bytes, exchange, tcp_addrs};
use crate::common::{config, connect, echo, echo_server, length, limit, settle, start, wait_until};
use slipring::time::{sleep, timeout};
use slipring::{CloseReason, Config, Connection, ErrorKind, Server};
use socket2::SockRef;

/// Case 10: the pool holds 2048 bytes, and nothing gives any of them back for a while.
#[test]
fn as_much_as_the_pool_holds_and_a_byte_more_or_less_come_through() {
    let config = one_core().buffers(8).buffer_bytes(256).receive_queue_bytes(4096);
    let slow = |mut conn: Connection| async move {
        sleep(Duration::from_millis(1)).await;
        while let Some(chunk) = conn.recv().await? {
            conn.send(chunk).await?;
        }
        Ok(())
    };
    let (running, addr) = start(Server::new(config).listen(ANY, slow));
    let mut rounds = 0;
    for round in 0..20 * length() as usize {
        for len in [1, 255, 256, 257, 2047, 2048, 2049, 4096, 4097] {
            exchange(&mut [Peer::new(connect(addr), bytes(round, len))], Until::End);
            rounds += 1;
        }
    }
    assert_eq!(settle(running, rounds).closed.get(CloseReason::Finished), rounds);
}

/// Case 12: bytes and the end are there together, often before the accept.
#[test]
fn bytes_that_come_with_the_end_are_all_read() {
    let (running, addr) = echo_server(one_core());
    let rounds = 20 * length() as usize;
    for round in 0..rounds {
        let streams: Vec<TcpStream> = (0..50).map(|_| connect(addr)).collect();
        let len = |n: usize| 1 + (n * 769 + round * 101) % 20_000;
        for (n, mut stream) in streams.iter().enumerate() {
            stream.write_all(bytes(n, len(n))).expect("send");
            stream.shutdown(Shutdown::Write).expect("half-close");
        }
        for (n, mut stream) in streams.into_iter().enumerate() {
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("the answer");
            assert!(answer == bytes(n, len(n)), "round {round}: {} of {}", answer.len(), len(n));
        }
    }
    let connects = 50 * rounds as u64;
    assert_eq!(settle(running, connects).closed.get(CloseReason::Finished), connects);
}

/// Case 13: the bytes before a reset are the handler's, and then the error, exactly once.
#[test]
fn a_reset_in_the_middle_of_a_burst_spoils_nothing_that_came_before() {
    type Story = (usize, ErrorKind, bool);
    let (tell, stories) = mpsc::channel::<Story>();
    let tell = Mutex::new(tell);
    let (running, addr) = start(Server::new(one_core()).listen(ANY, move |mut conn| {
        let tell = tell.lock().expect("no panic").clone();
        async move {
            // Half of them look at their input only when the reset is there.
            let first = conn.fill_buf().await?.to_vec();
            let waits = first[0] == bytes(0, 1)[0];
            if waits {
                conn.closing().await;
            }
            let mut got = Vec::new();
            let error = loop {
                match conn.recv().await {
                    Ok(Some(chunk)) => got.extend_from_slice(&chunk),
                    Ok(None) => panic!("a reset is no end"),
                    Err(error) => break error.kind(),
                }
            };
            let stream = if waits { 0 } else { 1 };
            let is_prefix = bytes(stream, SENT).starts_with(&got);
            tell.send((got.len(), error, is_prefix)).expect("the test listens");
            Ok(())
        }
    }));
    let handle = running.handle();
    let rounds = 100 * length();
    let mut received = 0;
    for round in 0..rounds {
        let mut stream = connect(addr);
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set linger");
        let waits = round % 2 == 0;
        stream.write_all(bytes(usize::from(!waits), SENT)).expect("send");
        if waits {
            let total = || handle.stats().total().bytes_received;
            wait_until("the server has it all", || total() == received + SENT as u64);
        }
        drop(stream);
        let (len, error, is_prefix) = stories.recv_timeout(limit(10_000)).expect("its story");
        assert!(is_prefix, "round {round}: other bytes came");
        assert_eq!(error, ErrorKind::PeerReset, "round {round}");
        assert!(!waits || len == SENT, "round {round}: {len} of {SENT} bytes survived");
        received = handle.stats().total().bytes_received;
        wait_until("it is gone", || handle.stats().total().live == 0);
    }
    assert_eq!(settle(running, rounds).closed.get(CloseReason::PeerReset), rounds);
}

/// Less than `SLIPRING_RECEIVE_QUEUE_BYTES`, so that it is all taken before the handler looks.
const SENT: usize = 40_000;

/// Case 14.
#[test]
fn sixteen_megabytes_in_one_piece_come_back_past_a_slow_handler() {
    let slow = |mut conn: Connection| async move {
        let mut chunks = 0;
        while let Some(chunk) = conn.recv().await? {
            conn.send(chunk).await?;
            chunks += 1;
            if chunks % 64 == 0 {
                sleep(Duration::from_millis(1)).await;
            }
        }
        Ok(())
    };
    let (running, addr) = start(Server::new(one_core()).listen(ANY, slow));
    let all: Vec<u8> = (0..16).flat_map(|n| bytes(n * 3, MB)).copied().collect();
    assert!(ask(connect(addr), &all) == all);
    let total = settle(running, 1);
    assert_eq!(total.bytes_sent, 16 * MB as u64);
    assert!(total.pauses > 0, "the handler was never outrun, so the case was not met");
}

/// Case 21: what is sent while a send is in flight, by any of the calls, follows in order.
#[test]
fn sends_of_all_kinds_keep_their_order_while_sends_are_in_flight() {
    let (running, addr) = start(Server::new(one_core()).listen(ANY, |mut conn| async move {
        for n in 0..600 {
            let len = 1 + n * 7919 % 30_000;
            match n % 4 {
                0 => conn.send(bytes(n % 400, len).to_vec()).await?,
                1 => conn.write(bytes(n % 400, len)).await?,
                2 => conn.send(bytes(n % 400, len)).await?,
                _ => conn.send(Arc::<[u8]>::from(bytes(n % 400, len))).await?,
            }
            if n % 50 == 0 {
                slipring::task::yield_now().await;
            }
        }
        Ok(())
    }));
    let expected: Vec<u8> =
        (0..600).flat_map(|n| bytes(n % 400, 1 + n * 7919 % 30_000)).copied().collect();
    for round in 0..3 * length() {
        let answer = ask(connect(addr), b"");
        assert!(answer == expected, "round {round}: {} bytes", answer.len());
    }
    settle(running, 3 * length());
}

/// Case 23.
#[test]
fn ten_megabytes_leave_through_a_send_buffer_of_a_few_kilobytes() {
    let server = Server::new(one_core())
        .before_bind(|socket| SockRef::from(&socket).set_send_buffer_size(1))
        .listen(ANY, |mut conn| async move {
            for part in 0..2 {
                conn.send(bytes(part, 5 * MB)).await?;
            }
            Ok(())
        });
    let (running, addr) = start(server);
    let expected = [bytes(0, 5 * MB), bytes(1, 5 * MB)].concat();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert!(ask(connect(addr), b"") == expected));
        }
    });
    let total = settle(running, 3);
    assert_eq!((total.bytes_sent, total.bytes_abandoned), (30 * MB as u64, 0));
}

/// Case 27, scenario 55: whatever is in flight, the end comes at once.
#[test]
fn the_peer_sees_the_end_soon_after_the_handler_has_let_go() {
    let let_go = Arc::new(Mutex::new(Instant::now()));
    let ends = |how: fn(Connection) -> Ends| {
        let let_go = Arc::clone(&let_go);
        move |conn| {
            let let_go = Arc::clone(&let_go);
            async move {
                let conn = how(conn).await?;
                *let_go.lock().expect("no panic") = Instant::now();
                drop(conn);
                // The connection ends when it is dropped, and not with its handler.
                sleep(Duration::from_millis(200)).await;
                Ok(())
            }
        }
    };
    let server = Server::new(one_core().linger_ms(5_000))
        .listen(ANY, ends(|mut conn| Box::pin(async { conn.recv().await.map(|_| conn) })))
        .listen(
            ANY,
            ends(|mut conn| Box::pin(async { conn.read_exact(&mut [0]).await.map(|()| conn) })),
        )
        .listen(
            ANY,
            ends(|mut conn| {
                Box::pin(async {
                    let _ = timeout(Duration::from_millis(1), conn.recv()).await;
                    let _ = timeout(Duration::from_millis(1), conn.recv()).await;
                    Ok(conn)
                })
            }),
        )
        .listen(
            ANY,
            ends(|mut conn| {
                Box::pin(async {
                    conn.send(bytes(0, MB)).await?;
                    Ok(conn)
                })
            }),
        );
    let (running, _) = start(server);
    let rounds = 30 * length();
    for (way, addr) in tcp_addrs(&running).into_iter().enumerate() {
        let mut late: Vec<Duration> = (0..rounds)
            .map(|round| {
                let mut stream = connect(addr);
                // The second handler leaves all but a byte of it unread.
                stream.write_all(&[1; 100]).expect("send");
                let mut answer = Vec::new();
                let end = stream.read_to_end(&mut answer);
                let end = end.unwrap_or_else(|error| panic!("way {way}, round {round}: {error}"));
                assert_eq!(end, if way == 3 { MB } else { 0 });
                let_go.lock().expect("no panic").elapsed()
            })
            .collect();
        late.sort();
        let (median, most) = (late[late.len() / 2], late[late.len() * 9 / 10]);
        assert!(median < limit(20) && most < limit(100), "way {way}: {late:?}");
    }
    settle(running, 4 * rounds);
}

type Ends = std::pin::Pin<Box<dyn Future<Output = slipring::Result<Connection>>>>;

/// Case 28: short answers over requests of which most is still on its way.
#[test]
fn a_short_answer_survives_the_rest_of_its_request_round_after_round() {
    let (running, addr) = start(Server::new(one_core()).listen(ANY, |mut conn| async move {
        conn.read_exact(&mut [0]).await?;
        conn.write(b"that is enough").await
    }));
    let rounds = 500 * length();
    for round in 0..rounds {
        let mut stream = connect(addr);
        // Once the answer has arrived there is nothing to lose, and the rest may meet a reset.
        let pieces = bytes(round as usize % 100, 30_000).chunks(3_000);
        let _ = pieces.map(|piece| stream.write_all(piece)).find(|written| written.is_err());
        let (mut answer, mut byte) = (Vec::new(), [0]);
        while let Ok(1) = stream.read(&mut byte) {
            answer.push(byte[0]);
        }
        assert_eq!(answer, b"that is enough", "round {round}");
    }
    assert_eq!(settle(running, rounds).closed.get(CloseReason::Served), rounds);
}

/// Case 29, scenario 48: the answer may take its time after the peer has ended its side.
#[test]
fn a_peer_that_has_ended_its_side_still_gets_a_late_answer() {
    let (running, addr) = start(Server::new(one_core()).listen(ANY, |mut conn| async move {
        let mut all = Vec::new();
        while let Some(chunk) = conn.recv().await? {
            all.extend_from_slice(&chunk);
        }
        // The end stays the end, however often it is asked for.
        assert!(conn.recv().await?.is_none() && conn.fill_buf().await?.is_empty());
        for piece in all.chunks(5_000) {
            sleep(Duration::from_millis(5)).await;
            conn.write(piece).await?;
            conn.flush().await?;
        }
        Ok(())
    }));
    for n in 0..20 {
        assert!(ask(connect(addr), bytes(n, 20_000)) == bytes(n, 20_000));
    }
    let total = settle(running, 20);
    assert_eq!((total.closed.get(CloseReason::Finished), total.panics), (20, 0));
}

/// Scenario 48: an end that has been read is no news any more, however long the answer takes.
#[test]
fn a_peer_that_has_ended_its_side_costs_nothing_while_its_answer_is_late() {
    const LATE: Duration = Duration::from_millis(200);
    let before = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&before);
    let handler = move |mut conn: Connection| {
        let told = Arc::clone(&told);
        async move {
            while conn.recv().await?.is_some() {}
            told.lock().expect("no panic").push(Instant::now());
            sleep(LATE).await;
            conn.write(b"late").await
        }
    };
    let (running, addr) = start(Server::new(one_core()).listen(ANY, handler));
    let handle = running.handle();
    for round in 0..5 {
        let mut stream = connect(addr);
        stream.write_all(b"x").expect("send");
        stream.shutdown(Shutdown::Write).expect("half-close");
        wait_until("the end is read", || before.lock().expect("no panic").len() > round);
        let (stats, since) = (handle.stats().total(), before.lock().expect("no panic")[round]);
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the late answer");
        assert!(answer == b"late" && since.elapsed() >= LATE);
        let after = handle.stats().total();
        let seen = (after.completions - stats.completions, after.enters - stats.enters);
        println!("completions and calls while the answer was late: {seen:?}");
        assert!(seen.0 <= 8 && seen.1 <= 16, "{seen:?}");
    }
    settle(running, 5);
}

/// Case 42: a handler that never waits for anything costs the others a turn's share, no more.
#[test]
fn a_handler_that_yields_for_ever_starves_nobody() {
    let spin = |mut conn: Connection| async move {
        conn.write(b"x").await?;
        loop {
            slipring::task::yield_now().await;
        }
    };
    let server = Server::new(one_core()).listen(ANY, spin).listen(ANY, echo);
    let (running, addr) = start(server);
    let other = tcp_addrs(&running)[1];
    let mut spinners: Vec<TcpStream> = (0..10).map(|_| connect(addr)).collect();
    for spinner in &mut spinners {
        spinner.read_exact(&mut [0]).expect("it spins");
    }
    let mut late = Vec::new();
    for round in 0..200u8 {
        let since = Instant::now();
        assert_eq!(ask(connect(other), &[round]), [round], "a new connection each time");
        late.push(since.elapsed());
    }
    late.sort();
    assert!(late[180] < limit(50), "{late:?}");
    let report = running.handle().drain(limit(300)).expect("a report");
    assert!(report.is_balanced(), "{report}");
    let closed = report.total().closed;
    assert_eq!((closed.get(CloseReason::Forced), closed.total()), (10, 210), "{report}");
    assert_eq!(report.total().tasks_forced, 10, "{report}");
}

/// Scenario 45: a peer whose input nobody takes any more is paused; its reset is seen all the same,
/// by the send that is stuck or, where there is none, by nothing but a look-out for it.
#[test]
fn a_reset_is_seen_though_nothing_is_read_any_more() {
    let config = one_core().write_stall_ms(60_000).idle_ms(600_000);
    let waits = |conn: Connection| async move {
        conn.closing().await;
        Ok(())
    };
    let (running, _) = start(Server::new(config).listen(ANY, echo).listen(ANY, waits));
    let handle = running.handle();
    let stats = || handle.stats().total();
    let mut rounds = 0;
    for addr in tcp_addrs(&running).repeat(3 * length() as usize) {
        rounds += 1;
        let stream = connect(addr);
        stream.set_write_timeout(Some(limit(300))).expect("set a time limit");
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set linger");
        // A core that is late looks like one that takes nothing, so both must be seen.
        wait_until("it is paused, and takes nothing any more", || {
            let written = (&stream).write_all(bytes(rounds as usize, MB));
            let blocked = written.is_err_and(|error| error.kind() == Io::WouldBlock);
            blocked && stats().pauses >= rounds
        });
        assert_eq!(stats().live, 1);
        let since = Instant::now();
        drop(stream);
        wait_until("it is gone", || stats().live == 0);
        assert!(since.elapsed() < limit(1_000), "{:?}", since.elapsed());
    }
    assert_eq!(settle(running, rounds).closed.get(CloseReason::PeerReset), rounds);
}

/// Case 30: a handler that panics with a receive and a send in flight leaves both to the kernel.
#[test]
fn a_panic_with_everything_in_flight_ends_its_connection_alone() {
    let began = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&began);
    let panics = move |mut conn: Connection| {
        let count = Arc::clone(&count);
        async move {
            conn.send(bytes(0, 4 * MB)).await?;
            let mut half = Box::pin(conn.recv());
            let brief = timeout(Duration::from_millis(1), half.as_mut()).await;
            assert!(brief.is_err(), "nothing was sent");
            count.fetch_add(1, SeqCst);
            std::mem::forget(half);
            panic!("as this test wants it");
        }
    };
    let server = Server::new(one_core()).listen(ANY, panics).listen(ANY, echo);
    let (running, addr) = start(server);
    let other = tcp_addrs(&running)[1];
    for n in 0..20 {
        let mut stream = connect(addr);
        wait_until("it has panicked", || began.load(SeqCst) == n + 1);
        exchange(&mut [Peer::new(connect(other), bytes(n as usize, 100_000))], Until::End);
        // What `send` had accepted is delivered whole; then comes the end.
        let mut answer = Vec::new();
        let end = stream.read_to_end(&mut answer);
        assert!(end.is_ok() && answer == bytes(0, 4 * MB), "{end:?} after {}", answer.len());
    }
    let total = settle(running, 40);
    assert_eq!(total.closed.get(CloseReason::HandlerPanic), 20);
    assert_eq!((total.panics, total.closed.get(CloseReason::Finished)), (20, 20));
}

fn one_core() -> Config {
    let status = std::fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let cpus = list.expect("a list of CPUs").trim();
    config().cpus(cpus.split([',', '-']).next().unwrap_or(cpus))
}
