//! UDP over real sockets: what is sent comes back byte for byte, alone or in one piece with others;
//! what is lost is counted; and sockets end with their owners, whatever is in flight.

use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket as Client};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use slipring::net::UdpSocket;
use slipring::{Config, CoreStats, ErrorKind, Result, Running, Server};

use crate::common::{config, limit, not_run, wait_until};

/// 1. Eight clients, each with messages of all lengths that say whose and which they are.
/// 2. Each answer is the message, from the address that it was sent to.
/// 3. A drain ends the handlers, and the books balance.
#[test]
fn every_core_echoes_every_byte_to_its_sender() {
    let (running, addr) = udp_server(config(), echo);
    let rounds = 400 * crate::common::length() as usize;
    thread::scope(|scope| {
        for client in 0..8 {
            scope.spawn(move || {
                let socket = connected(addr);
                for round in 0..rounds {
                    // The socket's buffer has room for one of the longest beside the others.
                    let sizes = if client == 0 { ALL_SIZES } else { ONE_PACKET };
                    let len = sizes[round % 8];
                    let message = bytes(len, (client * 7919 + round) as u64);
                    assert_eq!(ask(&socket, &message), message, "client {client} round {round}");
                }
            });
        }
    });
    let total = settle(running);
    assert_eq!(total.datagrams_received, 8 * rounds as u64);
    assert_eq!((total.datagrams_sent, total.datagrams_unsent), (8 * rounds as u64, 0));
    assert_eq!((total.datagrams_truncated, total.tasks_forced), (0, 0));
}

#[test]
fn it_is_the_same_over_ipv6_and_for_both_kinds_of_addresses() {
    if Client::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        return not_run("ipv6", "this machine has no IPv6");
    }
    let server = Server::new(config()).serve_udp("[::1]:0", echo).serve_udp("127.0.0.1:0", echo);
    let running = server.start().expect("the server starts");
    let addrs = running.udp_addrs().to_vec();
    assert!(addrs[0].is_ipv6() && addrs[1].is_ipv4(), "{addrs:?}");
    for addr in addrs {
        let socket = connected(addr);
        for round in 0..50 {
            let message = bytes(round * 29, round as u64);
            assert_eq!(ask(&socket, &message), message);
        }
    }
    settle(running);
}

/// What leaves in one piece comes as datagrams of one size, and those come to us in fewer pieces
/// than there are.
#[test]
fn segments_leave_and_come_together_and_each_is_whole() {
    let pieces = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&pieces);
    let (running, addr) = udp_server(config(), move |socket: UdpSocket| {
        let count = Arc::clone(&count);
        async move {
            socket.set_gro(true)?;
            while let Some(datagram) = socket.recv_until_drain().await? {
                count.fetch_add(1, SeqCst);
                let peer = datagram.peer();
                let size = datagram.segments().next().map_or(0, <[u8]>::len);
                assert_eq!(size, datagram.segment_size().unwrap_or(datagram.len()));
                socket.send_segments(datagram, size.max(1), peer).await?;
            }
            Ok(())
        }
    });
    // The client is a task of another server, as std has no such call.
    let (sender, results) = channel();
    let (client, _) = crate::common::echo_server(config());
    client
        .handle()
        .spawn_on(0, move || async move {
            let _ = sender.send(exchange_segments(addr).await);
        })
        .expect("it is alive");
    let datagrams = results.recv_timeout(limit(20_000)).expect("an answer").expect("no error");
    client.handle().begin_drain(limit(5_000));
    client.join().expect("it ends well");
    let total = settle(running);
    assert_eq!(total.datagrams_received, datagrams);
    assert_eq!(total.datagrams_sent, datagrams);
    let pieces = pieces.load(SeqCst);
    assert!(pieces * 4 < datagrams, "{datagrams} datagrams came in {pieces} pieces");
}

/// Returns how many datagrams went there and came back.
async fn exchange_segments(addr: SocketAddr) -> Result<u64> {
    let socket = UdpSocket::bind(([127, 0, 0, 1], 0))?;
    socket.set_gro(true)?;
    let mut datagrams = 0;
    for round in 0..100 {
        let (size, len) = (100 + round * 13, 30_000 + round * 97);
        let message = bytes(len, round as u64);
        socket.send_segments(message.clone(), size, addr).await?;
        socket.flush().await?;
        let mut answer: Vec<u8> = Vec::new();
        while answer.len() < len {
            let datagram = slipring::time::timeout(limit(5_000), socket.recv_from()).await??;
            assert_eq!(datagram.peer(), addr);
            for segment in datagram.segments() {
                assert!(segment.len() == size || answer.len() + segment.len() == len);
                answer.extend(segment);
                datagrams += 1;
            }
        }
        assert!(answer == message, "round {round}");
    }
    Ok(datagrams)
}

/// 1. The receive buffers hold 256 bytes of payload.
/// 2. What is longer comes without its end, says how long it was, and is counted; nothing else is.
#[test]
fn what_does_not_fit_is_cut_off_told_and_counted() {
    let small = config().buffer_bytes(256).large_buffer_bytes(256).receive_queue_bytes(4_096);
    let (running, addr) = udp_server(small, |socket: UdpSocket| async move {
        while let Some(datagram) = socket.recv_until_drain().await? {
            let told = (datagram.is_truncated(), datagram.sent_bytes(), datagram.len());
            socket.send_to(format!("{told:?}"), datagram.peer()).await?;
        }
        Ok(())
    });
    let socket = connected(addr);
    for (len, told) in
        [(256, "(false, 256, 256)"), (257, "(true, 257, 256)"), (9_000, "(true, 9000, 256)")]
    {
        assert_eq!(ask(&socket, &bytes(len, 1)), told.as_bytes());
    }
    assert_eq!(settle(running).datagrams_truncated, 2);
}

/// 1. A handler takes nothing until it is told to, so that the queue and then the kernel's buffer
///    are full, and the rest is dropped.
/// 2. Then it takes all that is left. What it got and what was counted as lost is all there was.
#[test]
fn what_the_kernel_drops_is_counted_to_the_last_datagram() {
    let gate = Arc::new(AtomicU64::new(0));
    let open = Arc::clone(&gate);
    let one_core = config().cpus(&crate::common::first_cpus(1));
    let (running, addr) = udp_server(one_core, move |socket: UdpSocket| {
        let open = Arc::clone(&open);
        async move {
            // The first is taken so that the socket receives.
            socket.recv_from().await?;
            while open.load(SeqCst) == 0 {
                slipring::time::sleep(Duration::from_millis(1)).await;
            }
            while socket.recv_until_drain().await?.is_some() {}
            Ok(())
        }
    });
    let socket = connected(addr);
    let all = 20_000;
    for n in 0..all {
        // The kernel takes it in any case; a socket of ours that is full is the other end's.
        socket.send(&bytes(200, n)).expect("send");
    }
    gate.store(1, SeqCst);
    let handle = running.handle();
    let quiet = || {
        let total = handle.stats().total();
        // The last ones are told of only when the socket closes.
        (total.datagrams_received, total.datagrams_lost > 0)
    };
    let mut before = (0, false);
    wait_until("no more come", || {
        thread::yield_now();
        let now = quiet();
        now.0 > 256 && std::mem::replace(&mut before, now) == now
    });
    let total = settle(running);
    assert!(total.datagrams_lost > 0 && total.pauses > 0, "{total:?}");
    assert_eq!(total.datagrams_received + total.datagrams_lost, all, "{total:?}");
}

/// A connected socket hears that nobody is there, with whoever waits for an answer, and goes on.
#[test]
fn a_connected_socket_hears_that_nobody_is_there_and_goes_on() {
    let (running, addr) = udp_server(config(), echo);
    let outcome = on_a_core(&running, move || async move {
        let nobody = Client::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
        let socket = UdpSocket::bind(([127, 0, 0, 1], 0))?;
        let unconnected = socket.send("x").await.expect_err("to nobody");
        assert_eq!(unconnected.kind(), ErrorKind::Misuse, "{unconnected}");
        socket.connect(nobody)?;
        assert_eq!(socket.peer_addr(), Some(nobody));
        for _ in 0..20 {
            socket.send("is anybody there?").await?;
            let refused = slipring::time::timeout(limit(5_000), socket.recv_from()).await?;
            let refused = refused.expect_err("nobody is");
            assert_eq!(refused.raw_os_error(), Some(libc::ECONNREFUSED), "{refused}");
            // The same may be told to a send as well.
            let _ = socket.flush().await;
        }
        socket.connect(addr)?;
        socket.send("and here?").await?;
        let answer = slipring::time::timeout(limit(5_000), socket.recv_from()).await??;
        assert_eq!((&*answer, answer.peer()), (&b"and here?"[..], addr));
        Ok(())
    });
    outcome.expect("no other error");
    settle(running);
}

#[test]
fn what_can_not_be_sent_is_an_error_that_says_why() {
    let (running, _) = udp_server(config(), echo);
    let outcome = on_a_core(&running, || async {
        let socket = UdpSocket::bind(([127, 0, 0, 1], 0))?;
        let own = socket.local_addr()?;
        let error = socket.send_to(vec![0; 65_508], own).await.expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::TooLong);
        assert!(error.to_string().contains("65507") && error.to_string().contains("65508"));
        let error = socket.send_segments("x", 0, own).await.expect_err("no size");
        assert_eq!(error.kind(), ErrorKind::Misuse);
        let error = socket.send_to("x", (Ipv6Addr::LOCALHOST, 9)).await.expect_err("IPv6");
        assert!(error.to_string().contains("IPv4"), "{error}");
        // What the kernel alone knows is told by flush, once.
        socket.send_to("x", ([255, 255, 255, 255], 9)).await?;
        let error = socket.flush().await.expect_err("no broadcast without SO_BROADCAST");
        assert!(error.to_string().contains("255.255.255.255:9"), "{error}");
        socket.flush().await?;
        let taken = UdpSocket::bind(own).expect_err("it is ours");
        assert_eq!(taken.kind(), ErrorKind::AddressInUse, "{taken}");
        let beside = UdpSocket::bind_shared(([127, 0, 0, 1], 0))?;
        UdpSocket::bind_shared(beside.local_addr()?)?;
        Ok(())
    });
    outcome.expect("no other error");
    let error = UdpSocket::bind(([127, 0, 0, 1], 0)).expect_err("this thread is no core");
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert_eq!(settle(running).datagrams_unsent, 1);
}

/// All cores' sockets are bound or none, beside nobody else, and free again afterwards.
#[test]
fn an_address_that_somebody_has_is_refused_and_nothing_is_left_behind() {
    let taken = Client::bind("127.0.0.1:0").expect("bind");
    let addr = taken.local_addr().expect("it is bound").to_string();
    let server = || Server::new(config().bind_retry_ms(20)).serve_udp(addr.clone(), echo);
    let error =
        server().listen("127.0.0.1:0", crate::common::echo).start().expect_err("it is taken");
    assert_eq!(error.kind(), ErrorKind::AddressInUse);
    assert!(error.to_string().contains(&format!("bind udp {addr}")), "{error}");
    drop(taken);
    Client::bind(&addr).expect("nothing of the server is left there");
    let running = server().start().expect("it is free now");
    let second = server().start().expect_err("one server has it");
    assert_eq!(second.kind(), ErrorKind::AddressInUse, "{second}");
    assert_eq!(ask(&connected(addr.parse().expect("an address")), b"x"), b"x");
    settle(running);
    settle(server().start().expect("it is free again"));
    let error = Server::new(config()).serve_udp("unix:/x", echo).start().expect_err("no UDP");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}

/// Sockets are dropped while receives and sends are in flight, round after round; then their ports
/// are free, and no buffer or operation is left.
#[test]
fn sockets_dropped_mid_flight_leave_nothing() {
    let (running, addr) = udp_server(config(), echo);
    let handle = running.handle();
    let cores = handle.stats().cores().len() as u64;
    let ports = Arc::new(Mutex::new(Vec::new()));
    for round in 0..50 * crate::common::length() {
        let ports = Arc::clone(&ports);
        let outcome = on_a_core(&running, move || async move {
            let socket = Rc::new(UdpSocket::bind(([127, 0, 0, 1], 0))?);
            ports.lock().expect("nobody has panicked").push(socket.local_addr()?);
            for n in 0..1 + round % 40 {
                socket.send_to(bytes(1_000, n), addr).await?;
            }
            let other = Rc::clone(&socket);
            let reading = slipring::task::spawn(async move { other.recv_from().await })?;
            if round % 2 == 0 {
                drop(slipring::time::timeout(Duration::ZERO, socket.recv_from()).await);
            }
            if round % 3 == 0 {
                slipring::task::yield_now().await;
            }
            reading.abort();
            Ok(())
        });
        outcome.expect("no error");
    }
    wait_until("all are closed", || handle.stats().total().udp_sockets == cores);
    let ports = ports.lock().expect("nobody has panicked");
    assert!(ports.iter().all(|port| Client::bind(port).is_ok()), "a port is not free");
    let total = settle(running);
    assert_eq!(total.datagrams_unsent, 0);
}

/// 1. Clients flood the server, whose handlers keep what they get for a while.
/// 2. A drain: handlers that go by it end at once, those that do not at the deadline, named.
/// 3. Nothing is in flight any more, and the port is free.
#[test]
fn a_drain_under_load_closes_all_sockets_in_time_and_names_who_was_forced() {
    for deaf in [false, true] {
        let (running, addr) = udp_server(config(), move |socket: UdpSocket| async move {
            let mut kept = Vec::new();
            loop {
                let datagram = match deaf {
                    true => socket.recv_from().await?,
                    false => match socket.recv_until_drain().await? {
                        Some(datagram) => datagram,
                        None => return Ok(()),
                    },
                };
                socket.send_to(datagram.to_vec(), datagram.peer()).await?;
                kept.push(datagram);
                kept.truncate(20);
            }
        });
        let cores = running.handle().stats().cores().len() as u64;
        let stop = AtomicU64::new(0);
        thread::scope(|scope| {
            for client in 0..4 {
                let stop = &stop;
                scope.spawn(move || {
                    let socket = Client::bind("127.0.0.1:0").expect("bind");
                    while stop.load(SeqCst) == 0 {
                        let _ = socket.send_to(&bytes(500, client), addr);
                    }
                });
            }
            let handle = running.handle();
            wait_until("it is under load", || handle.stats().total().datagrams_sent > 2_000);
            let begun = Instant::now();
            handle.begin_drain(Duration::from_millis(500));
            let report = running.join().expect("every core ends well");
            let took = begun.elapsed();
            stop.store(1, SeqCst);
            let total = report.total();
            let forced: u64 = report.cores().iter().map(|core| core.stats.tasks_forced).sum();
            assert_eq!(forced, if deaf { cores } else { 0 }, "{report}");
            assert!(took < limit(600) && (deaf || took < limit(300)), "{took:?}");
            assert!(report.is_balanced(), "{report}");
            assert_eq!((total.udp_sockets, total.leaked_operations, total.mismatches), (0, 0, 0));
            let named = report.cores().iter().flat_map(|core| &core.forced_tasks);
            let here = named.filter(|task| task.name.contains("udp.rs")).count() as u64;
            assert_eq!(here, forced, "{report}");
        });
        Client::bind(addr).expect("the port is free");
    }
}

/// A handler that fails or panics is called again, with the same socket; one that is done is not.
#[test]
fn a_handler_that_fails_is_counted_and_called_again_with_the_same_socket() {
    let one_core = config().cpus(&crate::common::first_cpus(1));
    let (running, addr) = udp_server(one_core, |socket: UdpSocket| async move {
        while let Some(datagram) = socket.recv_until_drain().await? {
            match &*datagram {
                b"fail" => return Err(std::io::Error::other("as it was told").into()),
                b"panic" => panic!("as it was told"),
                b"leave" => return Ok(()),
                _ => socket.send_to("here", datagram.peer()).await?,
            }
        }
        Ok(())
    });
    let handle = running.handle();
    let socket = connected(addr);
    for (n, word) in ["fail", "panic", "fail"].into_iter().enumerate() {
        socket.send(word.as_bytes()).expect("send");
        assert_eq!(ask(&socket, b"hello"), b"here", "after {word}");
        assert_eq!(handle.stats().total().udp_handler_failures, n as u64 + 1);
    }
    assert_eq!(handle.stats().total().udp_sockets, 1);
    socket.send(b"leave").expect("send");
    wait_until("it has left", || handle.stats().total().udp_sockets == 0);
    let total = settle(running);
    assert_eq!((total.panics, total.udp_handler_failures), (1, 3));
}

/// Each core has a socket of its own, and a sender always meets the same one.
#[test]
fn a_sender_always_meets_the_same_core() {
    let server = Server::new(config()).serve_udp_with("127.0.0.1:0", |core| {
        let index = core.index;
        move |socket: UdpSocket| async move {
            while let Some(datagram) = socket.recv_until_drain().await? {
                socket.send_to(vec![index as u8], datagram.peer()).await?;
            }
            Ok(())
        }
    });
    let (running, addr) = started(server);
    let cores = running.handle().stats().cores().len();
    let mut met = HashMap::new();
    for _ in 0..64 {
        let socket = connected(addr);
        let core = ask(&socket, b"who?");
        for _ in 0..10 {
            assert_eq!(ask(&socket, b"who?"), core);
        }
        *met.entry(core[0]).or_insert(0) += 1;
    }
    assert_eq!(met.len(), cores, "{met:?}");
    settle(running);
}

const ALL_SIZES: [usize; 8] = [0, 1, 7, 100, 1_472, 4_000, 9_000, 65_507];
const ONE_PACKET: [usize; 8] = [0, 1, 2, 33, 512, 1_000, 1_200, 1_472];

async fn echo(socket: UdpSocket) -> Result<()> {
    while let Some(datagram) = socket.recv_until_drain().await? {
        let peer = datagram.peer();
        socket.send_to(datagram, peer).await?;
    }
    Ok(())
}

fn udp_server<H, F>(config: Config, handler: H) -> (Running, SocketAddr)
where
    H: Fn(UdpSocket) -> F + Send + Sync + 'static,
    F: Future<Output = Result<()>> + 'static,
{
    started(Server::new(config).serve_udp("127.0.0.1:0", handler))
}

fn started(server: Server) -> (Running, SocketAddr) {
    let running = server.start().expect("the server starts");
    let addr = running.udp_addrs()[0];
    (running, addr)
}

/// Runs a task on the first core, and waits for its outcome.
fn on_a_core<M, F>(running: &Running, make: M) -> Result<()>
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = Result<()>> + 'static,
{
    let (sender, outcome) = channel();
    let task = move || async move {
        let outcome = make().await;
        let _ = sender.send(outcome);
    };
    running.handle().spawn_on(0, task).expect("it is alive");
    outcome.recv_timeout(limit(20_000)).expect("the task has come to its end")
}

/// A client of one peer, with time limits, so that a test fails rather than hangs.
fn connected(addr: SocketAddr) -> Client {
    let any = if addr.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" };
    let socket = Client::bind(any).expect("bind");
    socket.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    socket.connect(addr).expect("connect");
    socket
}

fn ask(socket: &Client, message: &[u8]) -> Vec<u8> {
    let mut answer = vec![0; 66_000];
    socket.send(message).expect("send");
    let len = socket.recv(&mut answer).expect("an answer");
    answer.truncate(len);
    answer
}

/// Bytes that say which they are.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let start = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..len as u64).map(|n| (start.wrapping_add(n * n) >> 7) as u8).collect()
}

/// Drains, and checks that nothing is left.
fn settle(running: Running) -> CoreStats {
    running.handle().begin_drain(limit(5_000));
    let report = running.join().expect("every core ends well");
    let total = report.total();
    assert!(report.is_balanced(), "{report}");
    assert_eq!((total.udp_sockets, total.tasks, total.leaked_operations), (0, 0, 0), "{report}");
    assert_eq!((total.unknown, total.mismatches), (0, 0), "{report}");
    total
}
