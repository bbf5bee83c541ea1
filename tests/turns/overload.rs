//! More connections than there are places, addresses or descriptors for, over real sockets.
//!
//! Every client ends in one class: answered, the end before any byte, reset, or still waiting.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::{self, Process, again};
use crate::common::{
    config, connect, echo, first_cpus, late, limit, not_run, settle, start, turn, wait_until,
};
use slipring::{CloseReason, Connection, Overload, Server};
use socket2::{Domain, SockRef, Socket, Type};

/// How a client that has sent a byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Answered,
    Eof,
    Reset,
    Waiting,
}

/// Scenario 61, `queue`, and scenario 60 for the descriptors that slipring has: those for whom
/// there is no place wait in the kernel's queue, none is destroyed, all are served in the end.
///
/// Direct descriptors, whose full table destroys a connection for each accept that is armed again,
/// do not exist here: accepted connections are ordinary descriptors.
#[test]
fn a_full_server_lets_the_rest_wait_and_serves_them_round_after_round() {
    let _turn = turn();
    let config = config().connections_max(100).evict_percent(0);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", echo));
    let handle = running.handle();
    let rounds = 5 * crate::common::length();
    for round in 0..rounds {
        let mut waiting: Vec<_> = (0..150).map(|_| ask(addr)).collect();
        let mut served = Vec::new();
        // A core whose queue is empty keeps one place for the next connection there.
        wait_until("a hundred are served", || handle.stats().total().live >= 99);
        wait_until("a hundred are answered", || {
            take_answered(&mut waiting, &mut served);
            served.len() >= 99
        });
        take_answered(&mut waiting, &mut served);
        assert!((99..=100).contains(&served.len()), "round {round}: {}", served.len());
        assert!(handle.stats().total().live <= 100, "round {round}");
        served.clear();
        wait_until("the others are answered too", || {
            take_answered(&mut waiting, &mut served);
            waiting.is_empty()
        });
        assert_eq!(handle.stats().total().closed.get(CloseReason::PeerReset), 0);
        drop(served);
        wait_until("all are gone", || handle.stats().total().live == 0);
    }
    settle(running, 150 * rounds);
}

/// Scenario 61, `reject`: those for whom there is no place see the end at once, and no reset though
/// they have sent something.
#[test]
fn a_full_server_that_rejects_ends_the_rest_at_once_without_a_reset() {
    let _turn = turn();
    let config = config().connections_max(100).evict_percent(0).overload(Overload::Reject);
    let (running, addr) =
        start(Server::new(config.cpus(&first_cpus(1))).listen("127.0.0.1:0", echo));
    let rounds = 5 * crate::common::length();
    for round in 0..rounds {
        let clients: Vec<_> = (0..150).map(|_| ask(addr)).collect();
        let fates: Vec<_> = clients.iter().map(end).collect();
        let count = |fate| fates.iter().filter(|it| **it == fate).count();
        assert_eq!(
            (count(Fate::Answered), count(Fate::Eof)),
            (100, 50),
            "round {round}: {fates:?}"
        );
        drop(clients);
        wait_until("all are gone", || running.handle().stats().total().live == 0);
    }
    let total = settle(running, 150 * rounds);
    assert_eq!(total.closed.get(CloseReason::Rejected), 50 * rounds);
}

/// Scenario 61: more are rejected at once than the server listens to; each sees the end or, as it
/// has sent something by then, a reset, and nobody waits.
#[test]
fn any_number_of_clients_can_be_rejected() {
    let _turn = turn();
    let config = config().connections_max(10).overload(Overload::Reject).evict_percent(0);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", echo));
    let clients: Vec<_> = (0..1_000).map(|_| connect(addr)).collect();
    wait_until("all but those with a place have seen the end", || {
        clients.iter().filter(|it| look(it) == Fate::Eof).count() == 990
    });
    drop(clients);
    let total = settle(running, 1_000);
    assert!(total.closed.get(CloseReason::Rejected) >= 990 - 64, "{total:?}");
}

/// Scenario 62.
#[test]
fn one_address_gets_its_connections_and_no_more_and_others_theirs() {
    let _turn = turn();
    let server = Server::new(config().connections_per_ip_max(10)).listen("127.0.0.1:0", echo);
    let has_v6 = Socket::new(Domain::IPV6, Type::STREAM, None)
        .and_then(|socket| socket.bind(&"[::1]:0".parse::<SocketAddr>().expect("it is one").into()))
        .is_ok();
    let server = if has_v6 { server.listen("[::1]:0", echo) } else { server };
    let (running, addr) = start(server);
    let addrs = crate::common::peer::tcp_addrs(&running);
    let mut connects = 0;
    for round in 0..3 {
        let mut clients = Vec::new();
        for last in 1..4 {
            let from = Ipv4Addr::new(127, 0, 0, last);
            let group: Vec<_> = (0..15).map(|_| ask_from(from, addr)).collect();
            let fates: Vec<_> = group.iter().map(end).collect();
            let count = |fate| fates.iter().filter(|it| **it == fate).count();
            assert_eq!((count(Fate::Answered), count(Fate::Eof)), (10, 5), "{round}: {fates:?}");
            connects += 15;
            clients.extend(group);
        }
        if has_v6 {
            // All of loopback's network of 64 bits is one address.
            let group: Vec<_> = (0..12).map(|_| ask(addrs[1])).collect();
            let answered = group.iter().map(end).filter(|fate| *fate == Fate::Answered);
            assert_eq!(answered.count(), 10);
            connects += 12;
            clients.extend(group);
        } else {
            not_run("networks of IPv6", "this machine has no IPv6");
        }
        drop(clients);
        wait_until("all are gone", || running.handle().stats().total().live == 0);
    }
    let total = settle(running, connects);
    assert_eq!(total.closed.get(CloseReason::PerIp), 3 * if has_v6 { 17 } else { 15 });
}

/// Scenario 50: under pressure those that linger go first, though their linger would last longer;
/// scenario 65: then the idle ones, and never one that is active.
#[test]
fn under_pressure_who_lingers_goes_first_and_the_active_stay() {
    let _turn = turn();
    let config = config().cpus(&first_cpus(1)).connections_max(100).linger_ms(60_000);
    let server = Server::new(config).listen("127.0.0.1:0", |mut conn: Connection| async move {
        while let Some(chunk) = conn.recv().await? {
            if chunk[0] == b'q' {
                return Ok(());
            }
            conn.send(chunk).await?;
        }
        Ok(())
    });
    let (running, addr) = start(server);
    let handle = running.handle();
    let idle: Vec<_> = (0..40).map(|_| ask(addr)).collect();
    assert!(idle.iter().all(|it| end(it) == Fate::Answered));
    let mut active: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    // Twenty that linger: they go on sending and do not end their side.
    let lingering: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    for mut client in &lingering {
        client.write_all(&[b'q'; 100_000]).expect("send");
    }
    let closed = |reason| handle.stats().total().closed.get(reason);
    assert_eq!(closed(CloseReason::Evicted), 0);
    // The idle ones have been idle for a second then.
    let ripe = Instant::now() + Duration::from_millis(1_200);
    wait_until("a second has passed", || {
        ping_all(&mut active);
        Instant::now() > ripe
    });
    assert_eq!(handle.stats().total().live, 80);
    let newcomers: Vec<_> = (0..16).map(|_| ask(addr)).collect();
    assert!(newcomers.iter().all(|it| end(it) == Fate::Answered));
    wait_until("there is room", || {
        ping_all(&mut active);
        // At 95 five have to go, and the last newcomer may come after that.
        handle.stats().total().live <= 91
    });
    // Some of those that linger sufficed.
    assert!((5..=20).contains(&closed(CloseReason::Evicted)), "{}", closed(CloseReason::Evicted));
    assert!(idle.iter().all(|it| look(it) == Fate::Waiting), "an idle one went first");
    // Then come many more than those that linger.
    let crowd: Vec<_> = (0..40).map(|_| ask(addr)).collect();
    assert!(crowd.iter().all(|it| end(it) == Fate::Answered), "idle ones make room");
    ping_all(&mut active);
    let gone = idle.iter().map(look).filter(|fate| *fate == Fate::Eof).count();
    assert!(gone > 0, "no idle one went");
    drop((idle, active, lingering, newcomers, crowd));
    settle(running, 40 + 20 + 20 + 16 + 40);
}

/// Cases 4 and 7: clients that reset, before the accept or after it, by the thousand.
#[test]
fn thousands_of_connects_that_reset_at_once_leave_nothing() {
    let _turn = turn();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", echo));
    let connects = 5_000 * crate::common::length();
    let good = ask(addr);
    for _ in 0..connects {
        let client = connect(addr);
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
    }
    assert_eq!(end(&good), Fate::Answered);
    drop(good);
    settle(running, connects + 1);
}

/// Scenario 59, case 2. The child runs out of descriptors while a thousand more connect: it does
/// not spin, its connections go on, and it serves those that waited as soon as there are some.
#[test]
fn a_process_without_descriptors_waits_idly_and_goes_on_when_there_are_some() {
    const TEST: &str = "a_process_without_descriptors_waits_idly_and_goes_on_when_there_are_some";
    if child::role().is_some() {
        return serve_without_descriptors();
    }
    let _turn = turn();
    let (mut server, addr) = start_without_descriptors(TEST);
    let mut old: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    ping_all(&mut old);
    let median = |clients: &mut [TcpStream]| {
        let mut took: Vec<_> = (0..20).map(|_| ping_all(clients)).collect();
        took.sort_unstable();
        took[took.len() / 2]
    };
    let before = median(&mut old);
    // By a command on one of the connections it takes all descriptors that are left.
    old[0].write_all(b"hog").expect("send");
    server.line_after("none left");
    let waiting: Vec<_> = (0..1_000).map(|_| ask(addr)).collect();
    let (cpu, since) = (cpu_time(&server), Instant::now());
    while since.elapsed() < Duration::from_secs(3) {
        thread::sleep(Duration::from_millis(50));
    }
    let used = cpu_time(&server) - cpu;
    assert!(used < since.elapsed() / 20, "{used:?} of CPU in {:?}", since.elapsed());
    let during = median(&mut old);
    assert!(during < 2 * before + limit(5) + late::allowance(), "{before:?}, then {during:?}");
    assert!(waiting.iter().all(|it| look(it) == Fate::Waiting), "accepted without descriptor");

    old[0].write_all(b"let go").expect("send");
    server.line_after("let go");
    let since = Instant::now();
    assert_eq!(end(&waiting[0]), Fate::Answered);
    let resumed = since.elapsed();
    let most = Duration::from_millis(1_150) + limit(50) + late::allowance();
    assert!(resumed < most, "resumed after {resumed:?}");
    assert!(waiting.iter().skip(1).all(|it| end(it) == Fate::Answered));
    println!("{used:?} of CPU in 3 s; resumed after {resumed:?}; pings {before:?}, {during:?}");
}

/// Starts a test again as a server that can be told to take all descriptors.
fn start_without_descriptors(test: &str) -> (Process, SocketAddr) {
    late::watch();
    let mut server = Process::start(again(test, "server", &[]));
    let addr = server.line_after("up ").parse().expect("an address");
    (server, addr)
}

/// That server.
fn serve_without_descriptors() {
    let config = config().connections_max(2_000).cpus(&first_cpus(1)).evict_percent(0);
    let server = Server::new(config).listen("127.0.0.1:0", |mut conn: Connection| async move {
        let mut hoard = Vec::new();
        while let Some(chunk) = conn.recv().await? {
            match &*chunk {
                b"hog" => {
                    while let Ok(file) = std::fs::File::open("/dev/null") {
                        hoard.push(file);
                    }
                    println!("\nnone left");
                }
                b"let go" => {
                    hoard.clear();
                    println!("\nlet go");
                }
                _ => conn.send(chunk).await?,
            }
        }
        Ok(())
    });
    let (running, addr) = start(server);
    println!("\nup {addr}");
    running.join().expect("it is killed before");
}

/// A retry as soon as a connection ends: its descriptor is taken before the back-off is over.
#[test]
fn the_end_of_a_connection_ends_the_wait_for_descriptors() {
    const TEST: &str = "the_end_of_a_connection_ends_the_wait_for_descriptors";
    if child::role().is_some() {
        return serve_without_descriptors();
    }
    let _turn = turn();
    let (mut server, addr) = start_without_descriptors(TEST);
    let old: Vec<_> = (0..30).map(|_| ask(addr)).collect();
    assert!(old.iter().all(|it| end(it) == Fate::Answered));
    let mut hog = ask(addr);
    assert_eq!(end(&hog), Fate::Answered);
    hog.write_all(b"hog").expect("send");
    server.line_after("none left");
    let waiting: Vec<_> = (0..30).map(|_| ask(addr)).collect();
    // By then it waits a second between tries.
    thread::sleep(Duration::from_millis(2_000));
    let mut took = Vec::new();
    for (gone, next) in old.into_iter().zip(&waiting) {
        drop(gone);
        let since = Instant::now();
        assert_eq!(end(next), Fate::Answered);
        took.push(since.elapsed());
    }
    took.sort_unstable();
    let median = took[took.len() / 2];
    assert!(median < limit(100) + late::allowance(), "{took:?}");
}

/// Connects and sends a byte.
fn ask(addr: SocketAddr) -> TcpStream {
    let mut client = connect(addr);
    // A server that rejects may have ended it by now.
    let _ = client.write_all(b"x");
    client
}

fn ask_from(from: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from((from, 0)).into()).expect("an address of loopback");
    socket.connect_timeout(&to.into(), limit(10_000)).expect("connect");
    let mut client = TcpStream::from(socket);
    client.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    let _ = client.write_all(b"x");
    client
}

/// Moves those that have had their answer. It is read by that, so nobody may be looked at again.
fn take_answered(waiting: &mut Vec<TcpStream>, served: &mut Vec<TcpStream>) {
    for client in std::mem::take(waiting) {
        match look(&client) {
            Fate::Waiting => waiting.push(client),
            fate => {
                assert_eq!(fate, Fate::Answered);
                served.push(client);
            }
        }
    }
}

/// How it stands now.
fn look(client: &TcpStream) -> Fate {
    client.set_nonblocking(true).expect("set non-blocking");
    let fate = end(client);
    client.set_nonblocking(false).expect("set blocking");
    fate
}

/// What it gets, waiting for it.
fn end(mut client: &TcpStream) -> Fate {
    match client.read(&mut [0; 1]) {
        Ok(0) => Fate::Eof,
        Ok(_) => Fate::Answered,
        Err(error) if error.kind() == ErrorKind::WouldBlock => Fate::Waiting,
        Err(_) => Fate::Reset,
    }
}

/// Sends a byte on each and waits for it to come back. Returns the longest time of one.
fn ping_all(clients: &mut [TcpStream]) -> Duration {
    let mut longest = Duration::ZERO;
    for client in clients {
        let since = Instant::now();
        client.write_all(b"p").expect("send");
        client.read_exact(&mut [0; 1]).expect("an answer");
        longest = longest.max(since.elapsed());
    }
    longest
}

/// User and system time of a process so far (proc(5)).
fn cpu_time(server: &Process) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.child.id())).expect("stat");
    let fields = stat.rsplit_once(')').expect("a name").1.split_whitespace();
    let ticks: u64 =
        fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("ticks")).sum();
    // SAFETY: takes an integer.
    let hz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_millis(ticks * 1_000 / u64::try_from(hz).expect("it is positive"))
}
