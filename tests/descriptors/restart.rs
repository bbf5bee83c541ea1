//! The start and the end of a server, again and again: ports, descriptors and threads come back, a
//! second instance is refused, and a start that fails says why and leaves nothing behind.
//!
//! The tests take turns, since they count what the whole process has open.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::common::{
    config, connect, echo, free_address, late, limit, open_fds, start, turn, wait_until,
};
use slipring::{CloseReason, Config, Connection, ErrorKind, Server};

/// Scenario 25.
#[test]
fn a_hundred_restarts_on_one_port_always_bind_at_once() {
    let turn = Turn::take();
    let addr = free_address();
    for round in 0..100 * crate::common::length() {
        let config = config().bind_retry_ms(0).new_grace_ms(1);
        let (running, _) = start(Server::new(config).listen(addr.to_string(), echo));
        let mut clients: Vec<_> = (0..8).map(|_| connect(addr)).collect();
        clients.iter_mut().step_by(2).for_each(|client| ask(client, b"x"));
        running.handle().begin_drain(limit(2_000));
        let report = running.join().expect("the report");
        assert!(report.is_balanced() && report.total().accepted == 8, "round {round}: {report}");
        assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "round {round}: {report}");
        for client in &mut clients {
            assert_eq!(client.read(&mut [0]).expect("a FIN, no reset"), 0, "round {round}");
        }
    }
    turn.all_is_as_before();
}

#[test]
fn descriptors_and_threads_come_back_from_connections_in_every_state() {
    let turn = Turn::take();
    let obey = |mut conn: Connection| async move {
        while let Some(chunk) = conn.recv().await? {
            match chunk[0] {
                b's' => slipring::time::sleep(Duration::from_secs(60)).await,
                b'w' => loop {
                    conn.write(&[b'w'; 65_536]).await?;
                },
                _ => conn.send(chunk).await?,
            }
        }
        Ok(())
    };
    for _ in 0..crate::common::length() {
        let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", obey));
        let mut clients: Vec<_> = (0..400).map(|_| connect(addr)).collect();
        for (n, client) in clients.iter_mut().enumerate() {
            match n % 4 {
                0 => {}
                1 => ask(client, b"x"),
                2 => client.write_all(b"s").expect("send"),
                _ if n < 40 => ask(client, b"w"),
                _ => ask(client, b"x"),
            }
        }
        wait_until("all are there", || running.handle().stats().total().accepted == 400);
        let since = Instant::now();
        running.handle().begin_drain(Duration::from_millis(300));
        let report = running.join().expect("the report");
        assert!(since.elapsed() < limit(600), "{:?} {report}", since.elapsed());
        assert!(report.is_balanced(), "{report}");
        assert_eq!(report.total().leaked_operations, 0, "{report}");
    }
    turn.all_is_as_before();
}

/// As a chat server does: the handlers' registry owns the halves that it writes to, and the server
/// owns the handlers.
#[test]
fn a_registry_of_connections_that_the_handlers_own_is_let_go() {
    let turn = Turn::take();
    for _ in 0..3 {
        let server = Server::new(config()).listen_with("127.0.0.1:0", |_core| {
            let registry = Rc::new(RefCell::new(Vec::new()));
            move |conn: Connection| {
                let registry = Rc::clone(&registry);
                async move {
                    let (mut reader, writer) = conn.into_split();
                    registry.borrow_mut().push(writer);
                    while reader.recv().await?.is_some() {}
                    Ok(())
                }
            }
        });
        let (running, addr) = start(server);
        let _clients: Vec<_> = (0..8).map(|_| connect(addr)).collect();
        wait_until("all are there", || running.handle().stats().total().accepted == 8);
        let report = running.handle().drain(limit(300)).expect("the report");
        assert!(report.is_balanced(), "{report}");
        running.join().expect("the report");
    }
    turn.all_is_as_before();
}

/// Scenario 35.
#[test]
fn a_second_instance_is_refused_and_the_first_does_not_notice() {
    let turn = Turn::take();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", echo));
    let stop = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut answers = 0;
            while !stop.load(SeqCst) {
                ask(&mut connect(addr), b"x");
                answers += 1;
            }
            answers
        });
        for _ in 0..20 {
            let second = Server::new(config().bind_retry_ms(10)).listen(addr.to_string(), echo);
            let error = second.start().expect_err("somebody listens there");
            assert_eq!(error.kind(), ErrorKind::AddressInUse, "{error}");
            assert!(error.to_string().contains(&addr.to_string()), "{error}");
        }
        stop.store(true, SeqCst);
        client.join().expect("no error")
    });
    running.handle().begin_drain(limit(2_000));
    let report = running.join().expect("the report");
    assert_eq!(report.total().accepted, answers, "{report}");
    turn.all_is_as_before();
}

#[test]
fn two_instances_that_start_at_once_do_not_both_serve() {
    let turn = Turn::take();
    for round in 0..20 {
        let (addr, barrier) = (free_address(), Arc::new(Barrier::new(2)));
        let start = || {
            let barrier = Arc::clone(&barrier);
            std::thread::spawn(move || {
                let server = Server::new(config().bind_retry_ms(0)).listen(addr.to_string(), echo);
                barrier.wait();
                server.start()
            })
        };
        let both = [start(), start()].map(|thread| thread.join().expect("no panic"));
        let kinds = both.each_ref().map(|it| it.as_ref().map(drop).map_err(slipring::Error::kind));
        for running in both.into_iter().flatten() {
            running.handle().close();
            running.join().expect("the report");
        }
        let refused = kinds.iter().filter(|kind| **kind == Err(ErrorKind::AddressInUse)).count();
        let served = kinds.iter().filter(|kind| kind.is_ok()).count();
        // When both listen in the same instant, the kernel refuses both.
        assert!(served <= 1 && served + refused == 2, "round {round}: {kinds:?}");
    }
    turn.all_is_as_before();
}

/// Case 39. A ring whose descriptor stays registered would keep the sockets open.
#[test]
fn the_peers_see_the_end_as_soon_as_the_server_has_ended() {
    let turn = Turn::take();
    late::watch();
    let before = open_fds();
    for round in 0..20 * crate::common::length() {
        let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", echo));
        let mut clients: Vec<_> = (0..20).map(|_| connect(addr)).collect();
        clients.iter_mut().step_by(2).for_each(|client| ask(client, b"x"));
        running.handle().close();
        running.join().expect("no core failed");
        let since = Instant::now();
        for client in &mut clients {
            assert_eq!(client.read(&mut [0]).ok(), Some(0), "round {round}: a FIN");
        }
        assert!(since.elapsed() < limit(100) + late::allowance(), "{:?}", since.elapsed());
        TcpListener::bind(addr).expect("nobody listens any more");
        drop(clients);
        assert_eq!(open_fds(), before, "round {round}");
    }
    turn.all_is_as_before();
}

#[test]
fn a_port_that_a_predecessor_still_holds_is_waited_for() {
    let turn = Turn::take();
    let predecessor = TcpListener::bind(free_address()).expect("a port");
    let addr = predecessor.local_addr().expect("its address");
    let since = Instant::now();
    let dying = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(predecessor);
    });
    let server = Server::new(config().bind_retry_ms(10_000)).listen(addr.to_string(), echo);
    let running = server.start().expect("the predecessor dies in time");
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(300) && took < limit(600), "{took:?}");
    ask(&mut connect(addr), b"x");
    running.handle().close();
    running.join().expect("the report");
    dying.join().expect("no panic");

    let holder = TcpListener::bind(free_address()).expect("a port");
    let addr = holder.local_addr().expect("its address").to_string();
    let since = Instant::now();
    let error = Server::new(config().bind_retry_ms(200)).listen(&addr, echo).start();
    let (error, took) = (error.expect_err("it is held"), since.elapsed());
    assert!(took >= Duration::from_millis(200) && took < limit(400), "{took:?}");
    assert_eq!(error.kind(), ErrorKind::AddressInUse);
    let text = error.to_string();
    assert!(text.contains(&addr) && text.contains("somebody listens there"), "{text}");
    drop(holder);
    turn.all_is_as_before();
}

#[test]
fn spawn_on_runs_on_its_core_and_is_refused_after_the_end() {
    let turn = Turn::take();
    let (running, _) = start(Server::new(config()).listen("127.0.0.1:0", echo));
    let handle = running.handle();
    let names: Arc<Mutex<Vec<String>>> = Arc::default();
    let cores = handle.stats().cores().len();
    for core in 0..cores {
        let names = Arc::clone(&names);
        let note = move || {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            // Not `Send`, which it need not be.
            let name = Rc::new(RefCell::new(name));
            async move { names.lock().expect("no panic").push(name.take()) }
        };
        handle.spawn_on(core, note).expect("it is up");
    }
    wait_until("all have run", || names.lock().expect("no panic").len() == cores);
    let mut names = names.lock().expect("no panic").clone();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), cores, "one thread each: {names:?}");
    let unknown = handle.spawn_on(cores, || async {}).expect_err("no such core");
    assert_eq!(unknown.kind(), ErrorKind::Misuse);
    running.handle().close();
    running.join().expect("the report");
    let late = handle.spawn_on(0, || async {}).expect_err("the core is gone");
    assert_eq!(late.kind(), ErrorKind::Closed);
    // A handle keeps the cores' bells.
    drop(handle);
    turn.all_is_as_before();
}

/// Scenario 36. A predecessor's connections keep a port from its successor unless both have set
/// `SO_REUSEADDR`, and of two that listen both must have set `SO_REUSEPORT`; so both always are.
#[test]
fn every_listener_has_both_options_for_reuse_and_its_connections_hold_nobody_up() {
    let turn = Turn::take();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let held = || {
        let seen = Arc::clone(&seen);
        Server::new(config().bind_retry_ms(0)).before_bind(move |socket| {
            let socket = socket2::SockRef::from(&socket);
            let both = (socket.reuse_address()?, socket.reuse_port()?);
            seen.lock().expect("no panic").push(both);
            Ok(())
        })
    };
    let addr = free_address();
    for round in 0..10 {
        // By turns a server of ours and one that has set SO_REUSEADDR only.
        let (running, _) = start(held().listen(addr.to_string(), echo).listen("[::1]:0", echo));
        let mut client = connect(addr);
        ask(&mut client, b"x");
        running.handle().close();
        running.join().expect("the report");
        let listener = TcpListener::bind(addr);
        let listener = listener.unwrap_or_else(|error| panic!("round {round}: {error}"));
        let client = connect(addr);
        // Its side of the connection waits out its time (TIME_WAIT).
        drop(listener.accept().expect("a connection"));
        drop(client);
    }
    let seen = seen.lock().expect("no panic");
    assert!(!seen.is_empty() && seen.iter().all(|both| *both == (true, true)), "{seen:?}");
    drop(seen);
    turn.all_is_as_before();
}

#[test]
fn the_hook_sees_each_socket_and_its_error_is_reported() {
    let turn = Turn::take();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let server = Server::new(config()).before_bind({
        let seen = Arc::clone(&seen);
        move |socket| {
            seen.lock().expect("no panic").push(socket.as_raw_fd());
            socket2::SockRef::from(&socket).set_recv_buffer_size(8_192)
        }
    });
    let server = server.listen("127.0.0.1:0", echo).listen("127.0.0.1:0", echo);
    let (running, addr) = start(server);
    let sockets = 2 * running.handle().stats().cores().len();
    assert_eq!(seen.lock().expect("no panic").len(), sockets);
    ask(&mut connect(addr), b"x");
    running.handle().close();
    running.join().expect("the report");

    let refuse = |_: std::os::fd::BorrowedFd<'_>| Err(std::io::Error::other("not this one"));
    let error = Server::new(config()).before_bind(refuse).listen("127.0.0.1:0", echo).start();
    let text = error.expect_err("the hook refuses").to_string();
    assert!(text.contains("not this one") && text.contains("127.0.0.1:0"), "{text}");
    turn.all_is_as_before();
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing_behind() {
    let turn = Turn::take();
    let on = |config: Config, addr: &str| Server::new(config).listen(addr, echo);
    let held = TcpListener::bind(free_address()).expect("a port");
    let held_addr = held.local_addr().expect("its address").to_string();
    let free = free_address().to_string();
    let brief = || config().bind_retry_ms(0);
    let cases = [
        (on(config().idle_ms(0), &free), ErrorKind::Config, "SLIPRING_IDLE_MS"),
        (on(config().pin(Some(true)).cpus("1023"), &free), ErrorKind::Config, "CPU 1023"),
        (on(config().cpus("0-"), &free), ErrorKind::Config, "SLIPRING_CPUS"),
        (on(config(), "nowhere"), ErrorKind::Config, "nowhere"),
        (on(config(), &free).listen(&free, echo), ErrorKind::AddressInUse, "twice"),
        (on(brief(), &free).listen(&held_addr, echo), ErrorKind::AddressInUse, &held_addr),
        (on(config(), "192.0.2.1:7000"), ErrorKind::Io, "no interface"),
    ];
    for (server, kind, part) in cases {
        let error = server.start().expect_err(part);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(part), "{part} is not in: {error}");
        TcpListener::bind(&free).expect("the other address is free");
    }
    let panics = on(config(), &free).listen_with("127.0.0.1:0", |core| {
        assert!(core.index > core.cores, "on purpose, where a handler is made");
        echo
    });
    assert_eq!(panics.start().expect_err("it panics").kind(), ErrorKind::Panicked);
    drop(held);
    turn.all_is_as_before();
}

/// Case 47.
#[test]
fn too_few_descriptors_is_an_error_that_says_how_to_get_more() {
    if std::env::var_os("RING_TEST_CHILD").is_some() {
        let server = Server::new(config()).listen("127.0.0.1:0", echo);
        println!("\n{:?}", server.start().map(drop));
        return;
    }
    let _turn = Turn::take();
    let this = std::env::current_exe().expect("the path of this test");
    let child = Command::new("sh")
        .args(["-c", "ulimit -n 64; exec \"$0\" \"$@\""])
        .arg(this)
        .args(["--exact", "restart::too_few_descriptors_is_an_error_that_says_how_to_get_more"])
        .args(["--nocapture", "--test-threads=1"])
        .env("RING_TEST_CHILD", "1")
        .output()
        .expect("start this test again");
    let text = String::from_utf8_lossy(&child.stdout);
    for part in ["Resource", "RLIMIT_NOFILE", "hard limit 64", "ulimit -n", "CONNECTIONS_MAX"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
}

/// The only test that runs now, and what the process had open when it began.
struct Turn {
    _guard: MutexGuard<'static, ()>,
    fds: usize,
    threads: usize,
}

impl Turn {
    fn take() -> Turn {
        let guard = turn();
        // Other threads of the harness come and go, but only before and after their turn.
        Turn { _guard: guard, fds: open_fds(), threads: server_threads() }
    }

    fn all_is_as_before(&self) {
        assert_eq!((open_fds(), server_threads()), (self.fds, self.threads), "fds and threads");
    }
}

/// The threads of this process that a server has started, by their names.
fn server_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("read /proc/self/task");
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    let names = tasks.flatten().filter_map(|task| name(task).ok());
    names.filter(|name| name.starts_with("slipring") || name.starts_with("iou-")).count()
}

/// Sends a message and reads one byte.
fn ask(client: &mut TcpStream, message: &[u8]) {
    client.write_all(message).expect("send");
    client.read_exact(&mut [0]).expect("an answer");
}
