//! What goes on while a drain runs: who hears of it, what is waited for, what is named.
//!
//! The tests take turns, since most of them measure time.

use std::io::{ErrorKind as IoKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::common::late;
use crate::common::{config, connect, echo, echo_server, ignore_all, limit, start, wait_until};
use slipring::{CloseReason, Closing, Connection, ErrorKind, Phase, Server};

/// Scenario 24.
#[test]
fn a_lame_duck_is_not_ready_from_the_order_on_and_refuses_only_after_its_time() {
    let _turn = turn();
    let (running, addr) = echo_server(config().lameduck_ms(400).syn_quiesce_ms(0));
    let handle = running.handle();
    assert!(handle.is_ready() && handle.phase() == Phase::Running);
    let since = Instant::now();
    handle.begin_drain(limit(5_000));
    assert!(!handle.is_ready() && handle.phase() == Phase::LameDuck);
    let mut served = 0;
    while handle.phase() == Phase::LameDuck && since.elapsed() < Duration::from_millis(350) {
        let mut client = connect(addr);
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an answer");
        served += 1;
    }
    assert!(served > 0);
    let report = running.join().expect("the report");
    assert!(since.elapsed() >= Duration::from_millis(400), "{report}");
    assert_eq!(report.total().accepted, served, "{report}");
    assert_eq!(handle.phase(), Phase::Down);
    let refused = TcpStream::connect(addr).expect_err("nobody listens");
    assert_eq!(refused.kind(), IoKind::ConnectionRefused);
}

/// Scenario 4.
#[test]
fn a_port_is_refused_and_free_while_the_drain_goes_on() {
    let _turn = turn();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", ignore_all));
    let handle = running.handle();
    ask(&mut connect(addr));
    handle.begin_drain(limit(2_000));
    wait_until("the listeners are closed", || handle.phase() >= Phase::DrainConnections);
    let since = Instant::now();
    let refused = TcpStream::connect(addr).expect_err("nobody listens");
    assert_eq!(refused.kind(), IoKind::ConnectionRefused);
    assert!(since.elapsed() < within(10), "{:?}", since.elapsed());
    drop(TcpListener::bind(addr).expect("the port is free, without SO_REUSEPORT too"));
    handle.close();
    assert!(running.join().expect("the report").is_balanced());
}

/// Scenario 12.
#[test]
fn what_was_forced_is_named_with_its_place_and_the_oldest_with_its_peer() {
    let _turn = turn();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", ignore_all));
    let mut clients: Vec<_> = (0..3).map(|_| connect(addr)).collect();
    clients.iter_mut().for_each(ask);
    let since = Instant::now();
    let report = running.handle().drain(Duration::from_millis(400)).expect("the report");
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(400) && took < within(500), "{took:?}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 3, "{report}");
    let named: u64 =
        report.cores().iter().flat_map(|core| &core.forced_tasks).map(|t| t.count).sum();
    assert_eq!(named, 3, "{report}");
    let peers: Vec<_> =
        clients.iter().map(|client| client.local_addr().expect("it has one")).collect();
    let oldest = report.cores().iter().filter_map(|core| core.oldest_survivor.as_ref());
    for survivor in oldest {
        assert!(survivor.peer.is_some_and(|peer| peers.contains(&peer)), "{report}");
        assert!(survivor.age >= Duration::from_millis(350), "{report}");
    }
    let text = report.to_string();
    assert!(text.contains("drain_phases.rs") && text.contains("the oldest: 127.0.0.1:"), "{text}");
    assert!(report.to_json().contains("\"forced_tasks\":[{\"name\":"), "{}", report.to_json());
}

/// Scenario 13.
#[test]
fn a_drain_waits_for_what_was_spawned_and_names_what_was_detached() {
    let _turn = turn();
    static DONE: AtomicBool = AtomicBool::new(false);
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn: Connection| async move {
            conn.recv().await?;
            slipring::task::spawn(async {
                assert_eq!(slipring::task::draining().await.expect("a core"), Closing::Draining);
                nap(300).await;
                DONE.store(true, SeqCst);
            })?;
            slipring::task::detach("metrics", async {
                loop {
                    nap(60_000).await;
                }
            })?;
            conn.write(b"x").await
        }));
    ask(&mut connect(addr));
    let since = Instant::now();
    let report = running.handle().drain(limit(5_000)).expect("the report");
    let took = since.elapsed();
    assert!(DONE.load(SeqCst) && took >= Duration::from_millis(300), "{took:?}");
    assert!(took < within(600), "the detached one is not waited for: {took:?} {report}");
    assert_eq!(report.total().tasks_forced, 0, "{report}");
    let named = report.cores().iter().flat_map(|core| &core.detached_tasks);
    let named: Vec<_> = named.map(|task| (task.name.as_str(), task.count)).collect();
    assert_eq!(named, [("metrics", 1)], "{report}");
    assert!(report.to_string().contains("1 at metrics"), "{report}");
}

/// Scenario 14.
#[test]
fn a_raw_stream_is_told_at_once_and_forced_at_the_deadline() {
    let _turn = turn();
    static TOLD: Mutex<Vec<(Closing, Instant)>> = Mutex::new(Vec::new());
    static ENDED: Mutex<Vec<Closing>> = Mutex::new(Vec::new());
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn: Connection| async move {
            conn.recv().await?;
            conn.write(b"x").await?;
            let told = conn.closing().await;
            TOLD.lock().expect("no panic").push((told, Instant::now()));
            // It goes on with its stream, whatever it was told.
            let error = loop {
                if let Err(error) = conn.write(b"tick").await {
                    break error;
                }
                nap(5).await;
            };
            let ended = conn.closing().await;
            ENDED.lock().expect("no panic").push(ended);
            Err(error)
        }));
    let mut client = connect(addr);
    ask(&mut client);
    let since = Instant::now();
    let reader = std::thread::spawn(move || client.read_to_end(&mut Vec::new()));
    let report = running.handle().drain(Duration::from_millis(500)).expect("the report");
    let told = TOLD.lock().expect("no panic");
    assert_eq!((told.len(), told[0].0), (1, Closing::Draining));
    assert!(told[0].1 - since < within(100), "told after {:?}", told[0].1 - since);
    assert!(told[0].0.is_advisory());
    assert_eq!(*ENDED.lock().expect("no panic"), [Closing::Ended(CloseReason::Forced)]);
    assert!(reader.join().expect("no panic").expect("a FIN, no reset") >= 4, "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 1, "{report}");
}

/// Scenario 15.
#[test]
fn a_hook_is_awaited_within_the_deadline_and_named_when_it_is_not_done() {
    let _turn = turn();
    for (takes_ms, deadline_ms, done) in [(300, 5_000, true), (60_000, 300, false)] {
        static RUN: AtomicU64 = AtomicU64::new(0);
        RUN.store(0, SeqCst);
        let server =
            Server::new(config()).listen("127.0.0.1:0", echo).on_drain(move |core| async move {
                assert!(core.index < core.cores);
                nap(takes_ms).await;
                RUN.fetch_add(1, SeqCst);
            });
        let (running, _) = start(server);
        let cores = running.handle().stats().cores().len() as u64;
        let since = Instant::now();
        let report = running.handle().drain(Duration::from_millis(deadline_ms)).expect("a report");
        let took = since.elapsed();
        assert!(took >= Duration::from_millis(300) && took < within(500), "{took:?} {report}");
        assert_eq!(RUN.load(SeqCst), if done { cores } else { 0 }, "{report}");
        for core in report.cores() {
            assert_eq!((core.hooks, core.hooks_forced), (1, u64::from(!done)), "{report}");
        }
        assert_eq!(report.to_string().contains("drain_phases.rs"), !done, "{report}");
    }
}

/// Scenario 22.
#[test]
fn drains_from_many_threads_and_from_handlers_give_one_account() {
    let _turn = turn();
    static HANDLE: Mutex<Option<slipring::Handle>> = Mutex::new(None);
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn: Connection| async move {
            conn.recv().await?;
            let handle = HANDLE.lock().expect("no panic").clone().expect("it was set");
            handle.begin_drain(Duration::from_secs(20));
            conn.write(b"x").await
        }));
    let handle = running.handle();
    *HANDLE.lock().expect("no panic") = Some(running.handle());
    let mut clients: Vec<_> = (0..4).map(|_| connect(addr)).collect();
    let reports = std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..8)
            .map(|n| {
                let handle = &handle;
                scope.spawn(move || handle.drain(limit(5_000 + n)).expect("a report").to_json())
            })
            .collect();
        clients.iter_mut().for_each(|client| drop(client.write_all(b"x")));
        waiters.into_iter().map(|waiter| waiter.join().expect("no panic")).collect::<Vec<_>>()
    });
    assert!(reports.iter().all(|report| *report == reports[0]), "{reports:?}");
    let late = handle.spawn_on(0, || async {}).expect_err("the core is gone");
    assert_eq!(late.kind(), ErrorKind::Closed);
    assert!(running.join().expect("the report").is_balanced());
}

/// Scenario 8, the drain's deadline: no message deadline is as short as this drain's.
#[test]
fn half_a_request_is_waited_for_until_the_deadline_and_ends_with_a_fin() {
    let _turn = turn();
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn: Connection| async move {
            while let Some(line) = conn.read_until(b'\n', 1024).await? {
                conn.write(&line).await?;
            }
            Ok(())
        }));
    let (mut half, mut whole) = (connect(addr), connect(addr));
    half.write_all(b"GET /").expect("send");
    whole.write_all(b"GET /").expect("send");
    wait_until("both are there", || running.handle().stats().total().bytes_received == 10);
    let since = Instant::now();
    running.handle().begin_drain(Duration::from_millis(500));
    wait_until("the drain has begun", || running.handle().phase() == Phase::DrainConnections);
    whole.write_all(b" and the rest\n").expect("send");
    let mut answer = String::new();
    whole.read_to_string(&mut answer).expect("an answer and a FIN");
    assert_eq!(answer, "GET / and the rest\n");
    assert_eq!(half.read(&mut [0]).expect("a FIN, no reset"), 0);
    let report = running.join().expect("the report");
    assert!(since.elapsed() < within(600), "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 1, "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Drained), 1, "{report}");
}

/// Scenario 8: the message's own deadline, where that is over before the drain's.
#[test]
fn half_a_request_is_waited_for_until_its_own_deadline_where_that_is_shorter() {
    let _turn = turn();
    let config = config().message_ms(400);
    let (running, addr) =
        start(Server::new(config).listen("127.0.0.1:0", |mut conn: Connection| async move {
            conn.read_until(b'\n', 1024).await.map(drop)
        }));
    let (mut half, since) = (connect(addr), Instant::now());
    half.write_all(b"GET /").expect("send");
    wait_until("it is there", || running.handle().stats().total().bytes_received == 5);
    let report = running.handle().drain(limit(10_000)).expect("the report");
    let took = since.elapsed();
    assert_eq!(half.read(&mut [0]).expect("a FIN, no reset"), 0);
    assert!(took >= Duration::from_millis(399) && took < within(400 * 9 / 8 + 50), "{took:?}");
    assert_eq!(report.total().closed.get(CloseReason::Message), 1, "{report}");
    assert!(report.is_balanced(), "{report}");
}

/// Scenario 11, as far as raw streams go: the handler ends after the message at hand.
#[test]
fn of_three_pipelined_requests_the_one_at_hand_is_answered_and_the_others_never_start() {
    let _turn = turn();
    static STARTED: AtomicU64 = AtomicU64::new(0);
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn: Connection| async move {
            while !conn.is_draining()
                && let Some(line) = conn.read_until(b'\n', 1024).await?
            {
                STARTED.fetch_add(1, SeqCst);
                conn.closing().await;
                conn.write(&line).await?;
            }
            Ok(())
        }));
    let mut client = connect(addr);
    client.write_all(b"one\ntwo\nthree\n").expect("send");
    wait_until("the first has started", || STARTED.load(SeqCst) == 1);
    let report = running.handle().drain(limit(5_000)).expect("the report");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer and a FIN, no reset");
    assert_eq!((answer.as_str(), STARTED.load(SeqCst)), ("one\n", 1), "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
}

async fn nap(ms: u64) {
    slipring::time::sleep(Duration::from_millis(ms)).await;
}

/// Sends a byte and reads one.
fn ask(client: &mut TcpStream) {
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("an answer");
}

/// A time limit, longer where the machine is busy.
fn within(ms: u64) -> Duration {
    limit(ms) + late::allowance()
}

/// One at a time.
fn turn() -> MutexGuard<'static, ()> {
    late::watch();
    crate::common::turn()
}
