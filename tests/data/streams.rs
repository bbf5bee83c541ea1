//! The data path over the real ring, on loopback: whatever clients and handlers do, what was sent
//! arrives whole and in order, nobody else waits for it, and the books balance afterwards.
//!
//! Each test: 1. starts a server; 2. sends known bytes and compares what comes back; 3. looks at
//! the counters that the case is about; 4. `settle`s, which checks the whole account.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::common::peer::{ANY, MB, PIECE, Peer, Until, ask, bytes, exchange, tcp_addrs};
use crate::common::{
    config, connect, echo, echo_server, limit, not_run, settle, start, wait_until,
};
use slipring::{CloseReason, Connection, Result, Server};
use socket2::{Domain, Socket, Type};

/// Case 14, in pieces of 64 KiB.
#[test]
fn five_megabytes_each_way_through_200_connections() {
    let (running, addr) = echo_server(config());
    std::thread::scope(|scope| {
        for quarter in 0..4usize {
            scope.spawn(move || {
                let peer = |n| Peer::new(connect(addr), bytes(quarter * 50 + n, 5 * MB));
                let mut peers: Vec<Peer> = (0..50).map(peer).collect();
                exchange(&mut peers, Until::End);
            });
        }
    });
    let per_core: Vec<u64> = running.handle().stats().cores().iter().map(|c| c.accepted).collect();
    assert!(per_core.len() < 2 || per_core.iter().filter(|n| **n > 0).count() >= 2, "{per_core:?}");
    let total = settle(running, 200);
    assert_eq!(total.closed.get(CloseReason::Finished), 200);
    assert_eq!((total.bytes_received, total.bytes_sent), (1000 * MB as u64, 1000 * MB as u64));
}

/// Cases 12 and 29.
#[test]
fn a_half_close_is_answered_with_all_the_bytes_and_then_the_end() {
    let (running, addr) = echo_server(config());
    let fixed = [MB, 0, 1, 4095, 4096, 4097, 65_536, 65_537, 0];
    for round in 0..200 {
        let random = bytes(round, 4).iter().fold(0, |n, b| n << 8 | usize::from(*b));
        let len = fixed.get(round).copied().unwrap_or(random % (1 << (round % 21)));
        exchange(&mut [Peer::new(connect(addr), bytes(round, len))], Until::End);
    }
    let total = settle(running, 200);
    assert_eq!(total.closed.get(CloseReason::Finished), 200);
    assert_eq!(total.bytes_abandoned, 0);
}

/// Case 14.
#[test]
fn one_byte_writes_come_back_in_order() {
    let (running, addr) = echo_server(config());
    let peer = |n| Peer::new(connect(addr), bytes(n, 25_000)).in_pieces_of(1);
    exchange(&mut (0..4).map(peer).collect::<Vec<_>>(), Until::End);
    assert_eq!(settle(running, 4).closed.get(CloseReason::Finished), 4);
}

#[test]
fn small_writes_of_a_turn_leave_as_one_send() {
    let (running, addr) = start(Server::new(config()).listen(ANY, |mut conn| async move {
        for byte in bytes(1, 100_000) {
            conn.write(std::slice::from_ref(byte)).await?;
        }
        conn.flush().await
    }));
    assert!(ask(connect(addr), b"") == bytes(1, 100_000));
    let total = settle(running, 1);
    assert!(total.submissions < 1000, "{} submissions for 100000 writes", total.submissions);
}

#[test]
fn a_peer_that_does_not_read_makes_send_wait_and_loses_nothing() {
    let accepted = Arc::new(AtomicU64::new(0));
    let (running, addr) = start(Server::new(config()).listen(ANY, sends_64_mb(&accepted)));
    let mut stream = connect(addr);
    let handle = running.handle();
    let taken = || handle.stats().total().bytes_sent;
    wait_until("the kernel takes something", || taken() > 0);
    wait_until("the output stands still", || {
        let before = accepted.load(Relaxed);
        std::thread::sleep(limit(100));
        accepted.load(Relaxed) == before
    });
    let waits = accepted.load(Relaxed) - taken();
    assert!(waits <= 262_144 + PIECE as u64, "{waits} bytes in memory, SEND_QUEUE_BYTES exceeded");
    assert!(accepted.load(Relaxed) < 64 * MB as u64);
    let mut piece = vec![0; PIECE];
    for n in 0..64 * MB / PIECE {
        stream.read_exact(&mut piece).expect("the rest");
        assert!(piece == bytes(n % 256, PIECE), "piece {n} differs");
    }
    assert_eq!(stream.read(&mut piece).expect("the end"), 0);
    drop(stream);
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::Served), 1);
    assert_eq!((total.bytes_sent, total.bytes_abandoned), (64 * MB as u64, 0));
}

/// Case 20.
#[test]
fn a_peer_that_does_not_read_is_ended_by_the_write_stall_deadline() {
    let accepted = Arc::new(AtomicU64::new(0));
    let config = config().write_stall_ms(300);
    let (running, addr) = start(Server::new(config).listen(ANY, sends_64_mb(&accepted)));
    let (began, stream) = (Instant::now(), connect(addr));
    let handle = running.handle();
    wait_until("it is ended", || handle.stats().total().closed.total() == 1);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(300) && took < limit(3_000), "{took:?}");
    let total = settle(running, 1);
    assert_eq!(total.closed.get(CloseReason::WriteStall), 1);
    assert!(total.bytes_abandoned > 0);
    drop(stream);
}

#[test]
fn a_peer_that_reads_slowly_does_not_stall() {
    let config = config().write_stall_ms(300);
    let (running, addr) = start(Server::new(config).listen(ANY, |mut conn| async move {
        conn.send(bytes(0, 5 * MB)).await?;
        conn.flush().await
    }));
    let stream = connect_with_a_small_window(addr);
    for (n, piece) in bytes(0, 5 * MB).chunks(PIECE).enumerate() {
        std::thread::sleep(Duration::from_millis(20));
        let mut got = vec![0; piece.len()];
        (&stream).read_exact(&mut got).unwrap_or_else(|error| panic!("piece {n}: {error}"));
        assert!(got == piece, "piece {n} differs");
    }
    assert_eq!((&stream).read(&mut [0]).expect("the end"), 0);
    drop(stream);
    assert_eq!(settle(running, 1).closed.get(CloseReason::Served), 1);
}

#[test]
fn a_receiver_that_outruns_its_handler_is_paused_and_disturbs_nobody() {
    let config = config().buffer_bytes(16_384);
    let slow = async |mut conn: Connection| {
        while let Some(chunk) = conn.recv().await? {
            slipring::time::sleep(Duration::from_millis(1)).await;
            conn.send(chunk).await?;
        }
        Ok(())
    };
    let server = Server::new(config).listen(ANY, slow).listen(ANY, echo);
    let (running, addr) = start(server);
    let other = tcp_addrs(&running)[1];
    let mut pings = 0;
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| {
        let flood = scope.spawn(move || {
            let parts = |n: usize| Peer::new(connect(addr), bytes(n, 4 * MB));
            exchange(&mut [parts(1), parts(2)], Until::End);
        });
        let mut stream = connect(other);
        while !flood.is_finished() {
            let began = Instant::now();
            stream.write_all(b"ping").expect("send");
            stream.read_exact(&mut [0; 4]).expect("an answer");
            slowest = slowest.max(began.elapsed());
            pings += 1;
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    assert!(pings > 50 && slowest < limit(500), "{pings} pings, the slowest took {slowest:?}");
    let total = settle(running, 3);
    assert!(total.pauses > 0);
    assert_eq!(total.closed.get(CloseReason::Finished), 3);
}

/// Case 8.
#[test]
fn a_tiny_pool_serves_everyone_in_turn_and_then_rests() {
    let config = config().buffers(8).buffer_bytes(256).receive_queue_bytes(256);
    let (running, addr) = echo_server(config);
    let peer = |n| Peer::new(connect(addr), bytes(n, if n == 0 { 2 * MB } else { 5000 }));
    let mut peers: Vec<Peer> = (0..51).map(peer).collect();
    exchange(&mut peers, Until::Echoed);
    let handle = running.handle();
    let enters = || handle.stats().total().enters;
    let before = enters();
    std::thread::sleep(limit(200));
    let idle = enters() - before;
    assert!(idle < 20, "{idle} calls of io_uring_enter with nothing to do");
    exchange(&mut peers, Until::End);
    let total = settle(running, 51);
    assert!(total.buffers_missing > 0);
    assert_eq!(total.closed.get(CloseReason::Finished), 51);
}

#[test]
fn a_handler_that_keeps_its_chunks_keeps_nobody_from_receiving() {
    let kept = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&kept);
    let keep = move |mut conn: Connection| {
        let count = Arc::clone(&count);
        async move {
            let mut chunks = Vec::new();
            while let Some(chunk) = conn.recv().await? {
                count.fetch_add(chunk.len() as u64, Relaxed);
                chunks.push(chunk);
            }
            for chunk in chunks {
                conn.send(chunk).await?;
            }
            Ok(())
        }
    };
    let config = config().buffers(16).buffer_bytes(1024);
    let (running, addr) = start(Server::new(config).listen(ANY, keep).listen(ANY, echo));
    let other = tcp_addrs(&running)[1];
    let mut keepers: Vec<TcpStream> = (0..8).map(|_| connect(addr)).collect();
    for (n, keeper) in keepers.iter_mut().enumerate() {
        keeper.write_all(bytes(n, 100_000)).expect("send");
    }
    wait_until("all is kept", || kept.load(Relaxed) == 800_000);
    let peer = |n| Peer::new(connect(other), bytes(n, 100_000));
    exchange(&mut (0..20).map(peer).collect::<Vec<_>>(), Until::End);
    for (n, keeper) in keepers.into_iter().enumerate() {
        assert!(ask(keeper, b"") == bytes(n, 100_000), "what keeper {n} kept has changed");
    }
    assert_eq!(settle(running, 28).closed.get(CloseReason::Finished), 28);
}

/// Case 28, scenario 49.
#[test]
fn a_response_arrives_whole_though_most_of_the_request_is_unread() {
    let response: Arc<[u8]> = bytes(0, 4 * MB).into();
    let (running, addr) = start(Server::new(config()).listen(ANY, move |mut conn| {
        let response = Arc::clone(&response);
        async move {
            conn.read_exact(&mut [0]).await?;
            conn.send(response).await
        }
    }));
    for round in 0..100 {
        let mut stream = connect(addr);
        stream.write_all(bytes(round, 100_000)).expect("send the request");
        let mut answer = Vec::with_capacity(4 * MB);
        stream.read_to_end(&mut answer).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert!(answer == bytes(0, 4 * MB), "round {round}: {} bytes came", answer.len());
    }
    let total = settle(running, 100);
    assert_eq!(total.closed.get(CloseReason::Served), 100, "{:?}", total.closed);
}

/// Cases 15 and 34.
#[test]
fn tiny_rings_lose_nothing() {
    let (running, addr) = echo_server(config().sq_entries(8).cq_entries(16));
    let peer = |n| Peer::new(connect(addr), bytes(n, 20_000));
    let mut peers: Vec<Peer> = (0..500).map(peer).collect();
    exchange(&mut peers, Until::End);
    let total = settle(running, 500);
    assert_eq!(total.closed.get(CloseReason::Finished), 500);
    assert_eq!(total.bytes_sent, 500 * 20_000);
    assert!(total.overflows > 0, "16 entries for 500 connections, and no overflow was counted");
}

#[test]
fn unix_sockets_and_ipv6_echo_too() {
    let name = format!("slipring-data-{}", std::process::id());
    let path = std::env::temp_dir().join(format!("{name}.sock"));
    let mut server = Server::new(config())
        .listen(format!("unix:{}", path.display()), echo)
        .listen(format!("unix:@{name}"), echo);
    let ipv6 = TcpListener::bind("[::1]:0").is_ok();
    if ipv6 {
        server = server.listen("[::1]:0", echo);
    } else {
        not_run("unix_sockets_and_ipv6_echo_too", "this machine has no IPv6");
    }
    let running = server.start().expect("start");
    let mut peers = Vec::new();
    for n in 0..20 {
        let by_path = UnixStream::connect(&path).expect("connect to the path");
        peers.push(Peer::new(by_path, bytes(n, MB)));
        peers.push(Peer::new(connect_by_name(&name), bytes(n + 100, MB)));
        if let Some(addr) = tcp_addrs(&running).first() {
            peers.push(Peer::new(connect(*addr), bytes(n + 200, MB)));
        }
    }
    exchange(&mut peers, Until::End);
    let connects = peers.len() as u64;
    drop(peers);
    assert_eq!(settle(running, connects).closed.get(CloseReason::Finished), connects);
    assert!(!path.exists(), "the socket's file stays");
}

#[test]
fn the_end_of_a_unix_stream_is_seen_however_short_the_buffers_are() {
    let name = format!("slipring-end-{}", std::process::id());
    let config = config().buffers(8).buffer_bytes(256);
    let server = Server::new(config).listen(format!("unix:@{name}"), echo);
    let running = server.start().expect("start");
    for round in 0..20usize {
        let peer = |n| Peer::new(connect_by_name(&name), bytes(round + n, 3000));
        exchange(&mut (0..20).map(peer).collect::<Vec<_>>(), Until::End);
    }
    assert_eq!(settle(running, 400).closed.get(CloseReason::Finished), 400);
}

#[test]
fn what_a_unix_peer_sent_before_it_closed_is_read() {
    let name = format!("slipring-late-{}", std::process::id());
    let read = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&read);
    let late = move |mut conn: Connection| {
        let count = Arc::clone(&count);
        async move {
            slipring::time::sleep(Duration::from_millis(100)).await;
            while let Some(chunk) = conn.recv().await? {
                count.fetch_add(chunk.len() as u64, Relaxed);
            }
            Ok(())
        }
    };
    let server = Server::new(config().receive_queue_bytes(4096).buffer_bytes(512));
    let running = server.listen(format!("unix:@{name}"), late).start().expect("start");
    let mut stream = connect_by_name(&name);
    stream.write_all(bytes(1, 100_000)).expect("send");
    drop(stream);
    let total = settle(running, 1);
    assert_eq!((read.load(Relaxed), total.closed.get(CloseReason::Finished)), (100_000, 1));
}

/// Case 28.
#[test]
fn a_response_survives_input_that_comes_after_the_handler_has_finished() {
    let (running, addr) = start(Server::new(config()).listen(ANY, |mut conn| async move {
        conn.read_exact(&mut [0]).await?;
        conn.send(bytes(0, MB)).await
    }));
    let handle = running.handle();
    for round in 0..20 {
        let mut stream = connect_with_a_small_window(addr);
        stream.write_all(b"x").expect("send the first byte");
        let sent = (round + 1) * MB as u64;
        wait_until("the kernel has it all", || handle.stats().total().bytes_sent == sent);
        wait_until("the handler has finished", || handle.stats().total().tasks == 0);
        stream.write_all(&[0; 1000]).expect("send the rest of the request");
        let mut answer = Vec::with_capacity(MB);
        stream.read_to_end(&mut answer).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert!(answer == bytes(0, MB));
    }
    settle(running, 20);
}

/// A handler that sends without end, nearly, and counts what `send` has accepted.
fn sends_64_mb(
    accepted: &Arc<AtomicU64>,
) -> impl Fn(Connection) -> Pin<Box<dyn Future<Output = Result<()>>>> + Send + Sync + 'static {
    let accepted = Arc::clone(accepted);
    move |mut conn: Connection| {
        let accepted = Arc::clone(&accepted);
        Box::pin(async move {
            for n in 0..64 * MB / PIECE {
                conn.send(bytes(n % 256, PIECE).to_vec()).await?;
                accepted.fetch_add(PIECE as u64, Relaxed);
            }
            Ok(())
        })
    }
}

/// So that the kernels' buffers hold a part only of what is sent here.
fn connect_with_a_small_window(addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(PIECE).expect("set the receive buffer");
    socket.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    socket.connect(&addr.into()).expect("connect");
    socket.into()
}

/// Connects to a Unix socket in the abstract name space.
fn connect_by_name(name: &str) -> UnixStream {
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).expect("a name");
    UnixStream::connect_addr(&address).expect("connect to the name")
}
