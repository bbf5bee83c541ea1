//! Sockets that were passed in (`Server::listen_on`): whoever keeps them open keeps the queue, so
//! that one process may follow another and nobody who connects is refused or reset.
//!
//! The tests take turns, as they load the machine.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::time::Duration;

use crate::common::load::{Load, Outcome, answer_one};
use crate::common::{config, connect, length, limit, turn, wait_until};
use slipring::{Balance, Config, DrainReport, ErrorKind, ListenAddr, Running, Server, StopMethod};
use socket2::{Domain, SockRef, Socket, Type};

#[test]
fn one_server_after_another_serves_everybody_who_connects_before_between_and_after() {
    let _turn = turn();
    // One for all cores, one for each, and what is neither.
    for sockets in [1, 2, 3] {
        let kept = group(sockets);
        let addr = kept[0].local_addr().expect("an address");
        let load = Load::start(addr, 8);
        let mut served = 0;
        for round in 0..6 * length() {
            let running = serve(&kept, two_cores());
            let ok = load.outcomes().get(Outcome::Ok);
            wait_until("it serves", || load.outcomes().get(Outcome::Ok) > ok + 50);
            let report = running.handle().drain(limit(5_000)).expect("the report");
            running.join().expect("no core failed");
            assert!(report.is_balanced(), "{sockets} sockets, round {round}: {report}");
            assert_left_open(&report);
            served += report.total().accepted;
        }
        // Whoever waits now is not to wait in vain.
        let last = serve(&kept, two_cores());
        let outcomes = load.stop();
        last.handle().begin_drain(limit(5_000));
        let report = last.join().expect("no core failed");
        served += report.total().accepted;
        eprintln!("{sockets} sockets: {outcomes}");
        let ok = outcomes.get(Outcome::Ok);
        let others = [Outcome::Refused, Outcome::HeldOff].map(|it| outcomes.get(it));
        assert_eq!((others, outcomes.harmed()), ([0, 0], 0), "{sockets} sockets: {outcomes}");
        assert_eq!(served, ok, "{sockets} sockets: {outcomes}");
    }
}

#[test]
fn what_a_full_server_leaves_in_the_queue_is_counted_and_served_by_the_next() {
    let _turn = turn();
    let kept = group(1);
    let addr = kept[0].local_addr().expect("an address");
    for round in 0..10 {
        let full = serve(&kept, config().cpus("0").connections_max(2));
        let mut clients: Vec<_> = (0..10).map(|_| connect(addr)).collect();
        clients.iter_mut().for_each(|client| client.write_all(ASKED).expect("send"));
        // Those that are answered make room; so it is full of those that are not.
        let handle = full.handle();
        wait_until("all are served", || handle.stats().total().closed.total() == 10);
        let mut silent: Vec<_> = (0..10).map(|_| connect(addr)).collect();
        wait_until("it is full", || handle.stats().total().live >= 1);
        let report = handle.drain(Duration::from_millis(300)).expect("the report");
        full.join().expect("no core failed");
        let total = report.total();
        assert!(report.is_balanced(), "round {round}: {report}");
        assert_eq!(total.accepted + total.queue_left, 20, "round {round}: {report}");
        assert!(total.queue_left >= 7 && total.queue_abandoned == 0, "round {round}: {report}");
        assert!(report.to_json().contains(&format!("\"queue_left\":{}", total.queue_left)));

        let next = serve(&kept, config().cpus("0"));
        let mut answered = 0;
        for client in &mut silent {
            // The first server has ended those that it had.
            if client.write_all(ASKED).is_ok() {
                answered += u64::from(client.read_exact(&mut [0; ASKED.len()]).is_ok());
            }
        }
        assert_eq!(answered, total.queue_left, "round {round}: {report}");
        next.handle().begin_drain(limit(1_000));
        next.join().expect("no core failed");
    }
}

#[test]
fn unix_sockets_are_kept_with_their_queue_and_their_name() {
    let _turn = turn();
    let path = std::env::temp_dir().join(format!("slipring-passed-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let name = format!("slipring-passed-{}", std::process::id());
    let abstract_addr = UnixAddr::from_abstract_name(&name).expect("a name");
    let named = [
        (UnixListener::bind(&path).expect("bind"), ListenAddr::Unix(path.clone())),
        (UnixListener::bind_addr(&abstract_addr).expect("bind"), ListenAddr::Abstract(name)),
    ];
    for round in 0..5 {
        let sockets = named.each_ref().map(|(socket, _)| socket.try_clone().expect("a copy"));
        let server = Server::new(two_cores()).listen_on(sockets, answer_one);
        let mut early = named.each_ref().map(|(socket, _)| {
            let addr = socket.local_addr().expect("an address");
            UnixStream::connect_addr(&addr).expect("somebody listens, though nobody accepts")
        });
        let running = server.start().expect("it starts");
        assert_eq!(running.local_addrs(), named.each_ref().map(|(_, addr)| addr.clone()));
        for client in &mut early {
            client.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
            client.write_all(ASKED).expect("send");
            client.read_exact(&mut [0; ASKED.len()]).expect("an answer");
        }
        let report = running.handle().drain(limit(5_000)).expect("the report");
        assert!(report.is_balanced(), "round {round}: {report}");
        assert_eq!(report.total().accepted, 2, "round {round}: {report}");
        assert_left_open(&report);
        running.join().expect("no core failed");
        assert!(path.exists(), "the file is not ours");
    }
    std::fs::remove_file(&path).expect("our own file");
}

#[test]
fn what_can_not_be_accepted_from_is_refused_with_the_reason() {
    let _turn = turn();
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a port");
    let connected = connect(tcp.local_addr().expect("its address"));
    let bound = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    bound.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("bind");
    let nameless = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
    let datagram = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let file = std::fs::File::open("Cargo.toml").expect("a file");
    let cases: [(Vec<OwnedFd>, &str); 6] = [
        (Vec::new(), "there is none"),
        (vec![file.into()], "expected a socket that listens"),
        (vec![datagram.into()], "ListenStream="),
        (vec![connected.into()], "Accept=no"),
        (vec![bound.into()], "does not listen"),
        (vec![nameless.into()], "does not listen"),
    ];
    for (sockets, part) in cases {
        let error = Server::new(config()).listen_on(sockets, answer_one).start();
        let error = error.expect_err(part);
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(part), "{part} is not in: {error}");
    }
    let by_cpu = config().cpus(&crate::common::first_cpus(1)).pin(Some(true)).balance(Balance::Cpu);
    let error = Server::new(by_cpu).listen_on([tcp.try_clone().expect("a copy")], answer_one);
    let error = error.start().expect_err("the order is not known");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("SLIPRING_BALANCE"), "{error}");
    let addr = tcp.local_addr().expect("its address").to_string();
    let twice = Server::new(config().bind_retry_ms(0)).listen_on([tcp], answer_one);
    let error = twice.listen(addr, answer_one).start().expect_err("it is in use");
    assert_eq!(error.kind(), ErrorKind::AddressInUse, "{error}");
}

/// What is passed in is often as plain as the kernel makes it.
#[test]
fn a_socket_is_readied_for_what_its_connections_inherit() {
    let _turn = turn();
    let kept = TcpListener::bind("[::1]:0").expect("a port");
    SockRef::from(&kept).set_cloexec(false).expect("let it be inherited");
    let copy = OwnedFd::from(kept.try_clone().expect("a copy"));
    let config = two_cores().keepalive_idle_s(77).user_timeout_ms(5_000);
    let server = Server::new(config).listen_on([copy], answer_one);
    let running = server.start().expect("it starts");
    let socket = SockRef::from(&kept);
    assert!(socket.tcp_nodelay().expect("read it") && socket.keepalive().expect("read it"));
    let idle = socket.tcp_keepalive_time().expect("read it");
    let timeout = socket.tcp_user_timeout().expect("read it");
    assert_eq!((idle.as_secs(), timeout), (77, Some(Duration::from_secs(5))));
    assert!(socket.nonblocking().expect("read it"));
    running.handle().close();
    running.join().expect("no core failed");
    assert!(SockRef::from(&kept).is_listener().expect("read it"), "nobody has shut it down");
}

#[test]
fn a_core_leaves_a_socket_that_others_accept_from_and_stays_at_its_own() {
    let _turn = turn();
    let shared = group(1);
    let addr = shared[0].local_addr().expect("an address");
    let running = serve(&shared, two_cores());
    let load = Load::start(addr, 8);
    wait_until("it serves", || load.outcomes().get(Outcome::Ok) > 50);
    let left = running.handle().retire(0, limit(5_000)).expect("the other one is left");
    assert_eq!(left.stop, Some(StopMethod::LeftOpen), "{left:?}");
    let ok = load.outcomes().get(Outcome::Ok);
    wait_until("the other one serves", || load.outcomes().get(Outcome::Ok) > ok + 50);
    let outcomes = load.stop();
    assert_eq!((outcomes.harmed(), outcomes.get(Outcome::Refused)), (0, 0), "{outcomes}");
    end(running);

    let own = group(2);
    let running = serve(&own, two_cores());
    let error = running.handle().retire(1, limit(1_000)).expect_err("it alone has that queue");
    assert_eq!(error.kind(), ErrorKind::Misuse, "{error}");
    let addr = own[0].local_addr().expect("an address").to_string();
    assert!(error.to_string().contains(&addr), "{error}");
    end(running);
}

fn two_cores() -> Config {
    config().cpus("0,1").connections_max(1_000)
}

/// Listening sockets of one port, as a service manager opens them with `ReusePort=yes`.
fn group(sockets: usize) -> Vec<TcpListener> {
    let mut addr = SocketAddr::from(([127, 0, 0, 1], 0));
    let one = |_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_port(true).expect("SO_REUSEPORT");
        socket.bind(&addr.into()).expect("bind");
        socket.listen(1_024).expect("listen");
        let listener = TcpListener::from(socket);
        addr = listener.local_addr().expect("an address");
        listener
    };
    (0..sockets).map(one).collect()
}

fn serve(kept: &[TcpListener], config: Config) -> Running {
    let copies: Vec<OwnedFd> =
        kept.iter().map(|socket| socket.as_fd().try_clone_to_owned().expect("a copy")).collect();
    Server::new(config).listen_on(copies, answer_one).start().expect("the server starts")
}

fn assert_left_open(report: &DrainReport) {
    for core in report.cores() {
        assert_eq!(core.stop, Some(StopMethod::LeftOpen), "{report}");
    }
    assert_eq!(report.total().queue_abandoned, 0, "{report}");
}

fn end(running: Running) {
    running.handle().begin_drain(limit(2_000));
    let report = running.join().expect("no core failed");
    assert!(report.is_balanced(), "{report}");
}

/// As much as `answer_one` answers.
const ASKED: &[u8; 16] = b"0123456789abcdef";
