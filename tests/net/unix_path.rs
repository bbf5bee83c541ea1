//! Servers on one path of a Unix socket, one after the other and at once, and one whose owner has
//! let go of it: the file is there as long as somebody listens, and is nobody's afterwards.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::{self, Process, again};
use crate::common::{config, echo, first_cpus, limit, wait_until};
use slipring::{Connection, ErrorKind, Phase, Result, Running, Server};

#[test]
fn a_server_that_drains_leaves_its_successor_the_file() {
    let path = path("successor");
    for round in 0..5 {
        let old = start(&path, echo_late);
        let mut client = connect(&path);
        client.write_all(b"x").expect("send");
        wait_until("it is served", || old.handle().stats().total().bytes_received == 1);
        old.handle().begin_drain(limit(5_000));
        wait_until("nobody listens", || UnixStream::connect(&path).is_err());
        let new = start(&path, echo);
        ask(&mut connect(&path));
        assert_ne!(old.handle().phase(), Phase::Down, "round {round}: it still drains");
        client.read_exact(&mut [0]).expect("the late echo");
        let report = old.join().expect("the old one's report");
        assert!(report.is_balanced(), "round {round}: {report}");
        ask(&mut connect(&path));
        new.handle().begin_drain(limit(1_000));
        new.join().expect("the new one's report");
        assert!(!path.exists(), "round {round}");
    }
}

/// So late that a successor starts meanwhile.
async fn echo_late(mut conn: Connection) -> Result<()> {
    while let Some(chunk) = conn.recv().await? {
        slipring::time::sleep(Duration::from_millis(500)).await;
        conn.send(chunk).await?;
    }
    Ok(())
}

#[test]
fn a_server_whose_owner_has_let_go_of_it_goes_on() {
    let path = path("let-go");
    let handle = start(&path, echo).handle();
    assert!(path.exists());
    for _ in 0..20 {
        ask(&mut connect(&path));
    }
    let report = handle.drain(limit(1_000)).expect("a report");
    assert!(report.is_balanced() && report.total().accepted == 20, "{report}");
    assert!(!path.exists(), "the last core to end has removed it");
}

#[test]
fn signals_still_drain_a_server_whose_owner_has_let_go_of_it() {
    const TEST: &str = "signals_still_drain_a_server_whose_owner_has_let_go_of_it";
    if let Some(role) = child::role() {
        let server = Server::new(config()).listen(format!("unix:{role}"), echo);
        let handle = server.drain_on_signals().start().expect("start").handle();
        println!("\nup");
        wait_until("it is drained", || handle.phase() == Phase::Down);
        assert!(handle.drain(Duration::ZERO).expect("the report").is_balanced());
        println!("\ndown");
        return;
    }
    let path = path("signals");
    let mut server = Process::start(again(TEST, &path.to_string_lossy(), &[]));
    server.line_after("up");
    let mut client = connect(&path);
    ask(&mut client);
    server.signal(libc::SIGTERM);
    assert_eq!(client.read(&mut [0]).expect("a FIN"), 0);
    server.line_after("down");
    assert!(server.child.wait().expect("its end").success());
    assert!(!path.exists());
}

#[test]
fn of_two_that_start_at_once_on_a_path_one_serves_and_one_is_refused() {
    let path = path("at-once");
    for round in 0..20 {
        let barrier = Barrier::new(2);
        let begin = || {
            barrier.wait();
            let server = Server::new(config().bind_retry_ms(0));
            server.listen(format!("unix:{}", path.display()), echo).start()
        };
        let (one, other) = thread::scope(|scope| {
            let one = scope.spawn(begin);
            (begin(), one.join().expect("no panic"))
        });
        let (winner, loser) = if one.is_ok() { (one, other) } else { (other, one) };
        let error = loser.expect_err("both listen");
        assert_eq!(error.kind(), ErrorKind::AddressInUse, "round {round}: {error}");
        ask(&mut connect(&path));
        let winner = winner.expect("one of them listens");
        winner.handle().begin_drain(limit(1_000));
        winner.join().expect("the report");
        assert!(!path.exists(), "round {round}");
    }
}

#[test]
fn a_start_that_fails_leaves_no_file() {
    let path = path("failed");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = taken.local_addr().expect("its address").to_string();
    let server = Server::new(config().bind_retry_ms(0));
    let server = server.listen(format!("unix:{}", path.display()), echo).listen(addr, echo);
    let error = server.start().expect_err("somebody listens there");
    assert_eq!(error.kind(), ErrorKind::AddressInUse, "{error}");
    assert!(!path.exists());
}

/// The kernel does not say how many wait at a Unix socket, and one in each turn would be too few
/// for a core whose turns are long.
#[test]
fn a_burst_at_a_unix_socket_is_accepted_in_few_turns() {
    let path = path("burst");
    let config = config().cpus(&first_cpus(1)).task_budget(TASK_BUDGET as u32);
    let server = Server::new(config).listen(format!("unix:{}", path.display()), echo);
    let running = server.start().expect("the server starts");
    // A task that is always ready is polled as often as a turn allows, so that each is long.
    let polls = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&polls);
    let make_turns_long = async move || {
        loop {
            counter.fetch_add(1, SeqCst);
            let since = Instant::now();
            while since.elapsed() < Duration::from_micros(20) {
                std::hint::spin_loop();
            }
            slipring::task::yield_now().await;
        }
    };
    running.handle().spawn_on(0, make_turns_long).expect("it runs");
    wait_until("turns are long", || polls.load(SeqCst) > 1_000);
    let before = polls.load(SeqCst);
    let clients: Vec<UnixStream> = (0..64).map(|_| connect(&path)).collect();
    wait_until("all are accepted", || running.handle().stats().total().accepted == 64);
    let turns = (polls.load(SeqCst) - before) / TASK_BUDGET;
    assert!(turns <= 32, "{turns} turns");
    drop(clients);
    running.handle().begin_drain(limit(100));
    running.join().expect("the report");
}

fn start<F>(path: &Path, handler: fn(Connection) -> F) -> Running
where
    F: Future<Output = Result<()>> + 'static,
{
    let server = Server::new(config()).listen(format!("unix:{}", path.display()), handler);
    server.start().expect("the server starts")
}

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("slipring-path-{name}-{}.sock", std::process::id()))
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("connect");
    stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    stream
}

fn ask(stream: &mut UnixStream) {
    stream.write_all(b"x").expect("send");
    stream.read_exact(&mut [0]).expect("the echo");
}

/// `SLIPRING_TASK_BUDGET`.
const TASK_BUDGET: u64 = 256;
