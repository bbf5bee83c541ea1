//! Drains of a server in this process: what each kind of connection, handler and task gets, and
//! that the call returns within its deadline and 100 ms whatever they do.
//!
//! The tests take turns, since most of them measure time. Allowances for time grow by how late a
//! thread that only sleeps was meanwhile, which is nothing on a machine with nothing else to do.

use std::cell::RefCell;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::common::{
    config, connect, echo_or_loop, echo_server, ignore_all, limit, not_run, start, turn, wait_until,
};
use slipring::{CloseReason, Config, Connection, DrainReport, ErrorKind, Handle, Server};

/// Scenario 19.
#[test]
fn an_empty_server_drains_at_once() {
    let _turn = turn();
    let drains = (0..5).map(|_| {
        let (running, _) = echo_server(config());
        let (report, took) = drain(&running.handle(), 300_000);
        assert_eq!(report.total().accepted, 0);
        took
    });
    let mut took: Vec<_> = drains.collect();
    took.sort_by_key(|took| took.elapsed);
    assert!(took[2].within(0, 20), "{took:?}");
}

/// Scenario 7.
#[test]
fn a_connection_without_a_byte_is_closed_after_its_grace() {
    let _turn = turn();
    let (running, addr) = echo_server(config().new_grace_ms(200));
    let (mut client, since) = (connect(addr), Instant::now());
    accepted(&running.handle(), 1);
    let (report, took) = drain(&running.handle(), 5_000);
    assert_eq!(end_of(&mut client), Ok(0));
    // The deadline counts in whole milliseconds from the one in which it was accepted.
    assert!(since.elapsed() >= Duration::from_millis(199), "{:?}", since.elapsed());
    assert!(took.within(0, 200 + 25 + 20), "{took:?} {report}");
    assert_eq!(report.total().closed.get(CloseReason::Drained), 1, "{report}");
}

#[test]
fn an_idle_connection_is_closed_at_once() {
    let _turn = turn();
    let (running, addr) = echo_server(config());
    let mut clients: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    clients.iter_mut().for_each(|client| ask(client, b"x"));
    let (report, took) = drain(&running.handle(), 5_000);
    assert!(took.within(0, 50), "{took:?} {report}");
    assert!(clients.iter_mut().all(|client| end_of(client) == Ok(0)), "a FIN each");
    assert_eq!(report.total().closed.get(CloseReason::Drained), 20, "{report}");
}

#[test]
fn a_handler_that_ignores_the_drain_costs_the_deadline_and_is_counted() {
    let _turn = turn();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", ignore_all));
    let mut client = connect(addr);
    ask(&mut client, b"x");
    let (report, took) = drain(&running.handle(), 500);
    assert!(took.within(499, 600), "{took:?} {report}");
    assert_eq!(end_of(&mut client), Ok(0));
    assert_eq!(report.total().closed.get(CloseReason::Forced), 1, "{report}");
    assert_eq!(report.total().tasks_forced, 1, "{report}");
}

/// The core is busy from before the deadline to after it, so that everything is late at once.
#[test]
fn a_handler_that_ignores_the_drain_is_counted_even_when_its_core_is_late() {
    let _turn = turn();
    let (running, addr) = start(Server::new(one_core()).listen("127.0.0.1:0", |mut conn| async {
        if conn.fill_buf().await? != b"late" {
            return ignore_all(conn).await;
        }
        conn.write(b"x").await?;
        conn.closing().await;
        nap(950).await;
        pause(100);
        Ok(())
    }));
    let mut clients = [connect(addr), connect(addr)];
    ask(&mut clients[0], b"late");
    ask(&mut clients[1], b"x");
    let (report, _) = drain(&running.handle(), 1_000);
    assert_eq!(report.total().closed.get(CloseReason::Forced), 2, "{report}");
    assert_eq!(report.total().tasks_forced, 1, "{report}");
}

/// Scenario 20.
#[test]
fn a_shorter_deadline_shortens_a_drain_and_a_longer_one_does_not_lengthen_it() {
    let _turn = turn();
    for (first_ms, second_ms) in [(60_000, 300), (300, 60_000)] {
        let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", ignore_all));
        ask(&mut connect(addr), b"x");
        let handle = running.handle();
        let first = std::thread::spawn(move || handle.drain(Duration::from_millis(first_ms)));
        pause(50);
        let (report, took) = drain(&running.handle(), second_ms);
        assert!(took.within(200, 400), "{first_ms} {second_ms} {took:?} {report}");
        let other = first.join().expect("no panic").expect("a report");
        assert_eq!(other.to_json(), report.to_json(), "both get the same account");
    }
}

#[test]
fn closing_during_a_drain_forces_it() {
    let _turn = turn();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", ignore_all));
    ask(&mut connect(addr), b"x");
    running.handle().begin_drain(Duration::from_secs(60));
    pause(50);
    let since = Instant::now();
    running.handle().close();
    let report = running.join().expect("the report");
    assert!(since.elapsed() < limit(300), "{:?}", since.elapsed());
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 1, "{report}");
}

#[test]
fn a_core_may_begin_a_drain_but_not_wait_for_one() {
    let _turn = turn();
    static HANDLE: OnceLock<Handle> = OnceLock::new();
    static REFUSED: OnceLock<ErrorKind> = OnceLock::new();
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn| async move {
            conn.recv().await?;
            let handle = HANDLE.wait();
            let refused = handle.drain(Duration::ZERO).expect_err("the core would wait for itself");
            REFUSED.set(refused.kind()).expect("one connection");
            assert!(!conn.is_draining());
            handle.begin_drain(Duration::from_secs(5));
            conn.closing().await;
            conn.write(b"bye").await
        }));
    HANDLE.set(running.handle()).expect("one server");
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    let report = running.join().expect("the report");
    assert_eq!(end_of(&mut client), Ok(3));
    assert_eq!(REFUSED.get(), Some(&ErrorKind::Misuse));
    assert!(report.is_balanced(), "{report}");
}

/// Scenarios 5 and 22.
#[test]
fn whoever_connects_before_a_drain_that_follows_the_start_is_not_reset() {
    let _turn = turn();
    for round in 0..20 {
        let (running, addr) = echo_server(config().new_grace_ms(20));
        let mut clients: Vec<_> = (0..20).map(|_| connect(addr)).collect();
        let (report, _) = drain(&running.handle(), 5_000);
        assert_eq!(report.total().accepted, 20, "{report}");
        for client in &mut clients {
            assert_eq!(end_of(client), Ok(0), "round {round}");
        }
    }
}

/// Case 36.
/// Scenario 1.
#[test]
fn connections_that_wait_in_the_kernels_queue_are_served_or_closed_but_not_reset() {
    let _turn = turn();
    let config = one_core().connections_max(1).new_grace_ms(50);
    let (running, addr) = echo_server(config);
    let mut first = connect(addr);
    ask(&mut first, b"x");
    let mut queued: Vec<_> = (0..100).map(|_| connect(addr)).collect();
    queued.iter_mut().step_by(2).for_each(|client| client.write_all(b"y").expect("send"));
    let (report, _) = drain(&running.handle(), 5_000);
    assert_eq!(end_of(&mut first), Ok(0));
    for (n, client) in queued.iter_mut().enumerate() {
        assert_eq!(end_of(client), Ok((n + 1) % 2), "number {n}: {report}");
    }
    assert_eq!(report.total().accepted, 101, "{report}");
    assert!(report.total().accept_pauses > 0);
}

#[test]
fn a_lame_duck_still_serves() {
    let _turn = turn();
    let (running, addr) = echo_server(config().lameduck_ms(300));
    let since = Instant::now();
    running.handle().begin_drain(Duration::from_secs(5));
    pause(50);
    let mut client = connect(addr);
    ask(&mut client, b"x");
    let report = running.join().expect("the report");
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(300) && took < limit(1_000), "{took:?} {report}");
    assert_eq!((end_of(&mut client), report.total().accepted), (Ok(0), 1));
}

/// Scenario 21.
#[test]
fn a_core_in_an_endless_loop_is_named_and_the_others_drain() {
    let _turn = turn();
    static STOP: AtomicBool = AtomicBool::new(false);
    let server = Server::new(config()).listen("127.0.0.1:0", |conn| echo_or_loop(conn, &STOP));
    let (running, addr) = start(server);
    let handle = running.handle();
    if handle.stats().cores().len() < 2 {
        drain(&handle, 1_000);
        return not_run("a_core_in_an_endless_loop_is_named", "it needs two CPUs");
    }
    let mut clients = Vec::new();
    while handle.stats().cores().iter().any(|core| core.accepted < 3) {
        clients.push(connect(addr));
        ask(clients.last_mut().expect("the new one"), b"x");
    }
    let before = handle.stats();
    clients[0].write_all(b"loop").expect("send");
    wait_until("a core has the message", || {
        handle.stats().total().bytes_received == before.total().bytes_received + 4
    });
    let (report, took) = drain(&handle, 500);
    let stuck: Vec<_> = report.cores().iter().filter_map(|core| core.stuck.as_deref()).collect();
    assert!(took.within(499, 600), "{took:?} {report}");
    assert!(stuck.len() == 1 && stuck[0].contains("drain.rs"), "{stuck:?}");
    assert!(report.is_balanced() && report.to_string().contains(stuck[0]), "{report}");
    let other = report.cores().iter().find(|core| core.stuck.is_none()).expect("the other core");
    assert_eq!(other.stats.closed.get(CloseReason::Drained), other.stats.accepted, "{report}");

    STOP.store(true, SeqCst);
    wait_until("the core is not stuck any more", || {
        let report = handle.drain(Duration::ZERO).expect("a report");
        report.is_balanced() && report.cores().iter().all(|core| core.stuck.is_none())
    });
    running.join().expect("the report");
}

#[test]
fn a_handler_hears_of_the_drain_and_how_long_it_has() {
    let _turn = turn();
    static SEEN: Mutex<Vec<(bool, Option<Duration>)>> = Mutex::new(Vec::new());
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn| async move {
            let look = |conn: &Connection| {
                SEEN.lock().expect("no panic").push((conn.is_draining(), conn.remaining()));
            };
            conn.recv().await?;
            look(&conn);
            conn.write(b"x").await?;
            conn.closing().await;
            look(&conn);
            Ok(())
        }));
    let mut client = connect(addr);
    ask(&mut client, b"x");
    let (report, took) = drain(&running.handle(), 5_000);
    assert!(took.within(0, 50), "{took:?} {report}");
    let seen = SEEN.lock().expect("no panic");
    assert_eq!(seen[0], (false, None));
    assert!(seen[1].0 && seen[1].1.is_some_and(|left| left.as_millis() > 4_800), "{seen:?}");
}

#[test]
fn a_panic_in_a_destructor_at_the_deadline_spoils_nothing() {
    let _turn = turn();
    struct Spoiler;
    impl Drop for Spoiler {
        fn drop(&mut self) {
            // Without the hook, which may take longer than the drain has to print where it was.
            std::panic::resume_unwind(Box::new("on purpose, in a destructor"));
        }
    }
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", |conn| async {
        let _spoiler = Spoiler;
        ignore_all(conn).await
    }));
    let mut clients: Vec<_> = (0..4).map(|_| connect(addr)).collect();
    clients.iter_mut().for_each(|client| ask(client, b"x"));
    let (report, took) = drain(&running.handle(), 200);
    assert!(took.within(199, 300), "{took:?} {report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 4, "{report}");
    assert!(running.join().is_ok());
}

#[test]
fn each_deadline_ends_its_connection_on_time_for_its_reason() {
    let _turn = turn();
    let unlimited = || config().first_byte_ms(60_000).idle_ms(60_000).lifetime_ms(60_000);
    let cases = [
        (unlimited().first_byte_ms(200), 200, CloseReason::FirstByte, "SLIPRING_FIRST_BYTE_MS"),
        (unlimited().idle_ms(250), 250, CloseReason::Idle, "SLIPRING_IDLE_MS"),
    ];
    for (config, limit_ms, reason, variable) in cases {
        static ERROR: Mutex<Option<slipring::Error>> = Mutex::new(None);
        let (running, addr) =
            start(Server::new(config).listen("127.0.0.1:0", |mut conn| async move {
                let error = loop {
                    match conn.recv().await {
                        Ok(Some(chunk)) => conn.send(chunk).await?,
                        Ok(None) => panic!("the peer never ends it"),
                        Err(error) => break error,
                    }
                };
                *ERROR.lock().expect("no panic") = Some(error);
                Ok(())
            }));
        let mut client = connect(addr);
        let mut since = Instant::now();
        let (end, mut took) = Took::of(|| match reason {
            CloseReason::FirstByte => end_of(&mut client),
            _ => {
                pause(100);
                since = Instant::now();
                ask(&mut client, b"x");
                end_of(&mut client)
            }
        });
        took.elapsed = since.elapsed();
        // Counted in whole milliseconds, from the one that it began in.
        assert!(took.within(limit_ms - 1, limit_ms * 9 / 8 + 1 + 25), "{reason:?} {took:?}");
        assert_eq!(end, Ok(0), "{reason:?}");
        let (report, _) = drain(&running.handle(), 1_000);
        assert_eq!(report.total().closed.get(reason), 1, "{report}");
        let error = ERROR.lock().expect("no panic").take().expect("the handler gets an error");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains(variable), "{error}");
    }
}

#[test]
fn a_handler_that_ignores_its_deadline_is_dropped_a_grace_later() {
    let _turn = turn();
    static DROPPED: AtomicU64 = AtomicU64::new(0);
    let config = config().first_byte_ms(100).force_grace_ms(200);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", |conn| async move {
        let _kept = (conn, OnDrop(&DROPPED));
        nap(60_000).await;
        Ok(())
    }));
    let mut client = connect(addr);
    let ((), took) = Took::of(|| {
        assert_eq!(end_of(&mut client), Ok(0));
        assert_eq!(DROPPED.load(SeqCst), 0, "it has a moment to notice");
        wait_until("it is dropped", || DROPPED.load(SeqCst) == 1);
    });
    assert!(took.within(299, 300 * 9 / 8 + 2 + 25), "{took:?}");
    let (report, took) = drain(&running.handle(), 5_000);
    assert!(took.within(0, 50), "{took:?} {report}");
    assert_eq!(report.total().closed.get(CloseReason::FirstByte), 1, "{report}");
    assert_eq!(report.total().tasks_forced, 0, "{report}");
}

/// A connection that outlives its handler, its core and the books, in a place of the thread.
#[test]
fn a_connection_that_is_never_let_go_does_not_hold_up_the_drain() {
    let _turn = turn();
    thread_local! {
        static KEPT: RefCell<Vec<Connection>> = const { RefCell::new(Vec::new()) };
    }
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn| async move {
            conn.write(b"x").await?;
            KEPT.with(|kept| kept.borrow_mut().push(conn));
            Ok(())
        }));
    let mut client = connect(addr);
    ask(&mut client, b"");
    let (report, took) = drain(&running.handle(), 200);
    assert!(took.within(199, 300), "{took:?} {report}");
    assert_eq!(end_of(&mut client), Ok(0));
    assert_eq!(report.total().closed.get(CloseReason::Forced), 1, "{report}");
    running.join().expect("the threads end well");
}

/// How long something took, and how late a thread that only sleeps was meanwhile.
#[derive(Clone, Copy, Debug)]
struct Took {
    elapsed: Duration,
    late: Duration,
}

impl Took {
    fn of<T>(work: impl FnOnce() -> T) -> (T, Took) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut late = Duration::ZERO;
                while !done.load(SeqCst) {
                    let since = Instant::now();
                    pause(1);
                    late = late.max(since.elapsed() - Duration::from_millis(1));
                }
                late
            });
            let since = Instant::now();
            let result = catch_unwind(AssertUnwindSafe(work));
            let elapsed = since.elapsed();
            done.store(true, SeqCst);
            let late = watcher.join().expect("no panic");
            (result.unwrap_or_else(|panic| resume_unwind(panic)), Took { elapsed, late })
        })
    }

    fn within(&self, least_ms: u64, most_ms: u64) -> bool {
        self.elapsed >= Duration::from_millis(least_ms)
            && self.elapsed <= limit(most_ms) + 4 * self.late
    }
}

/// Drains, and checks what holds for every drain.
fn drain(handle: &Handle, deadline_ms: u64) -> (DrainReport, Took) {
    let deadline = Duration::from_millis(deadline_ms);
    let (report, took) = Took::of(|| handle.drain(deadline).expect("a report"));
    assert!(took.within(0, deadline_ms + 100), "{took:?} for {deadline:?}: {report}");
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().leaked_operations, 0, "{report}");
    (report, took)
}

async fn nap(ms: u64) {
    slipring::time::sleep(Duration::from_millis(ms)).await;
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// Sends a message and reads one byte.
fn ask(client: &mut TcpStream, message: &[u8]) {
    client.write_all(message).expect("send");
    client.read_exact(&mut [0]).expect("an answer");
}

/// How many bytes come before the end of the stream.
fn end_of(client: &mut TcpStream) -> std::result::Result<usize, IoKind> {
    client.read_to_end(&mut Vec::new()).map_err(|error| error.kind())
}

fn accepted(handle: &Handle, count: u64) {
    wait_until("they are accepted", || handle.stats().total().accepted == count);
}

/// One core, on the first CPU that this process may use.
fn one_core() -> Config {
    let status = std::fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let cpus = list.expect("a list of CPUs").trim();
    config().cpus(cpus.split([',', '-']).next().unwrap_or(cpus))
}

/// Counts its own end.
struct OnDrop(&'static AtomicU64);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}
