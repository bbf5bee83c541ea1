//! Peers that take no output and fill a core's memory, over real sockets: everyone waits, the stuck
//! go, and whoever is active loses no byte. Scenario 65.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::peer::{MB, Peer, Until, bytes, exchange};
use crate::common::{config, connect, echo, first_cpus, limit, settle, start, turn, wait_until};
use slipring::{CloseReason, Connection, Handle, Running, Server};
use socket2::{Domain, SockRef, Socket, Type};

/// While nobody has been stuck for long enough to be evicted, receives pause, and the active get on
/// all the same; a second later the stuck make room.
#[test]
fn over_the_budget_receives_pause_and_the_active_get_everything() {
    let _turn = turn();
    let (running, addr) = serve();
    let handle = running.handle();
    let mut streams = streams(addr);
    let stuck: Vec<_> = (0..10).map(|_| stick(addr)).collect();
    wait_until("it is too much", || stats(&handle).memory_pauses > 0);
    exchange(&mut streams, Until::Echoed);
    let total = stats(&handle);
    println!("{} times short, {} receives paused", total.memory_pauses, total.pauses);
    assert!(total.pauses > 0, "no receive was paused");
    let room = || stats(&handle).memory_bytes < MAX as u64 / 100 * 90;
    wait_until("some have gone", || evicted(&handle) > 0 && room());
    exchange(&mut streams, Until::End);
    wait_until("the active have ended", || closed(&handle, CloseReason::Finished) == 4);
    assert_eq!(stats(&handle).closed.total(), 4 + evicted(&handle), "{}", handle.stats());
    drop((streams, stuck));
    settle(running, 4 + 10);
}

/// Of two generations of the stuck the older one goes, and nobody who is active.
#[test]
fn over_the_budget_the_longest_stuck_go_and_nobody_else() {
    let _turn = turn();
    let (running, addr) = serve();
    let handle = running.handle();
    let mut active: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    let old: Vec<_> = (0..6).map(|_| stick(addr)).collect();
    let ripe = Instant::now() + Duration::from_millis(3_500);
    wait_until("they have been stuck for a while", || {
        ping_all(&mut active);
        Instant::now() > ripe
    });
    assert_eq!((stats(&handle).memory_pauses, evicted(&handle)), (0, 0), "{}", handle.stats());
    let mut streams = streams(addr);
    let new: Vec<_> = (0..4).map(|_| stick(addr)).collect();
    wait_until("some have to go", || {
        ping_all(&mut active);
        evicted(&handle) > 0
    });
    exchange(&mut streams, Until::Echoed);
    ping_all(&mut active);
    let (gone, total) = (evicted(&handle), stats(&handle));
    println!("{gone} of 6 evicted, {} bytes left", total.memory_bytes);
    assert!((1..=6).contains(&gone) && total.closed.total() == gone, "{:?}", total.closed);
    let listed = handle.connections().expect("a list");
    let stays = |client: &TcpStream| {
        let own = client.local_addr().expect("an address");
        listed.iter().any(|info| info.peer == Some(own))
    };
    assert!(active.iter().chain(&new).all(stays), "not the longest stuck went: {listed}");
    assert_eq!(old.iter().filter(|it| !stays(it)).count() as u64, gone);
    for mut client in old.iter().filter(|it| !stays(it)) {
        // A FIN would say that this was all.
        let error = client.read_to_end(&mut Vec::new()).expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    drop((active, old, new, streams));
    settle(running, 20 + 6 + 4 + 4);
}

/// One core of a mebibyte. A connection that begins with `s` alone is sent more and more, any other
/// is echoed.
fn serve() -> (Running, SocketAddr) {
    let config = config().cpus(&first_cpus(1)).memory_bytes_max(MAX).evict_percent(90);
    // Output is looked at four times in that, so that it is known who is stuck for how long.
    let config = config.send_queue_bytes(MAX / 8).write_stall_ms(8_000);
    let server = Server::new(config)
        .before_bind(|socket| SockRef::from(&socket).set_send_buffer_size(16 * 1024));
    start(server.listen("127.0.0.1:0", |mut conn: Connection| async move {
        let Some(first) = conn.recv().await? else { return Ok(()) };
        if *first == *b"s" {
            loop {
                conn.send(vec![7; 1 << 14]).await?;
            }
        }
        conn.send(first).await?;
        echo(conn).await
    }))
}

fn streams(addr: SocketAddr) -> Vec<Peer> {
    (0..4).map(|n| Peer::new(connect(addr), bytes(n, 4 * MB))).collect()
}

/// A client for whom the server has more and more, and that reads nothing.
fn stick(addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(4_096).expect("a small buffer");
    socket.connect_timeout(&addr.into(), limit(10_000)).expect("connect");
    let mut client = TcpStream::from(socket);
    client.write_all(b"s").expect("send");
    client
}

fn ping_all(clients: &mut [TcpStream]) {
    for client in clients {
        client.write_all(b"p").expect("send");
        client.read_exact(&mut [0; 1]).expect("an answer");
    }
}

fn stats(handle: &Handle) -> slipring::CoreStats {
    handle.stats().total()
}

fn closed(handle: &Handle, reason: CloseReason) -> u64 {
    stats(handle).closed.get(reason)
}

fn evicted(handle: &Handle) -> u64 {
    closed(handle, CloseReason::Evicted)
}

/// What all connections together may have queued.
const MAX: usize = 1 << 20;
