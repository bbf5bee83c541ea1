//! What the integration tests share: servers on a port of their own, and waiting with a deadline.
#![allow(dead_code, reason = "each test binary uses a part of it")]

#[cfg(feature = "admin")]
pub mod browser;
pub mod child;
pub mod client;
pub mod clients;
pub mod example;
pub mod exposition;
pub mod filter;
#[cfg(feature = "hyper")]
pub mod frames;
pub mod http;
pub mod late;
pub mod load;
pub mod peer;
pub mod site;
pub mod web;
pub mod world;

use std::fmt::Display;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use slipring::{Config, Connection, CoreStats, ListenAddr, Running, Server};

/// A configuration for tests: two cores at most, unpinned, and no more descriptors than needed.
pub fn config() -> Config {
    Config::default().pin(Some(false)).connections_max(4000)
}

pub async fn echo(mut conn: Connection) -> slipring::Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}

/// An echo that spins without end on the word `loop`, until it is told to stop.
pub async fn echo_or_loop(mut conn: Connection, stop: &AtomicBool) -> slipring::Result<()> {
    while let Some(chunk) = conn.recv().await? {
        while &*chunk == b"loop" && !stop.load(SeqCst) {
            std::hint::spin_loop();
        }
        conn.send(chunk).await?;
    }
    Ok(())
}

/// Answers the first message, then looks at nothing for a minute.
pub async fn ignore_all(mut conn: Connection) -> slipring::Result<()> {
    conn.recv().await?;
    conn.write(b"x").await?;
    slipring::time::sleep(Duration::from_millis(60_000)).await;
    Ok(())
}

/// Starts an echo server on a port that the kernel chooses.
pub fn echo_server(config: Config) -> (Running, SocketAddr) {
    start(Server::new(config).listen("127.0.0.1:0", echo))
}

/// Starts a server and says where its first TCP address is.
pub fn start(server: Server) -> (Running, SocketAddr) {
    let running = server.start().expect("the server starts");
    let addr = running.local_addrs().iter().find_map(|addr| match addr {
        ListenAddr::Tcp(addr) => Some(*addr),
        _ => None,
    });
    (running, addr.expect("a TCP address"))
}

/// Connects with time limits, so that a test fails rather than hangs.
pub fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&addr, limit(10_000)).expect("connect");
    stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    stream.set_write_timeout(Some(limit(10_000))).expect("set a time limit");
    stream.set_nodelay(true).expect("set TCP_NODELAY");
    stream
}

/// Waits until `condition` holds; panics with `what` when it does not within ten seconds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + limit(10_000);
    while !condition() {
        assert!(Instant::now() < give_up, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A time limit in milliseconds, longer where everything is slow: `RING_TEST_SLOW` is the factor.
pub fn limit(ms: u64) -> Duration {
    Duration::from_millis(ms * slowness())
}

/// How much slower than usual this machine is, from `RING_TEST_SLOW`; 1 if unset.
pub fn slowness() -> u64 {
    std::env::var("RING_TEST_SLOW").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// How many times longer than in an ordinary run a test is to go on, from `RING_TEST_LONG`.
pub fn length() -> u64 {
    std::env::var("RING_TEST_LONG").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// The turn of a test that measures time, that loads the machine, or that counts what the process
/// has open: as long as it is held, no other test of the program has one.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // Another test's failure is not this one's, nor is its load.
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    late::forget();
    turn
}

/// Says that a test, or a part of it, is not run here or in a weaker form, and why: in one line on
/// the standard error itself, as nobody sees what a test that passes has printed.
pub fn not_run(what: &str, why: impl Display) {
    let why = why.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let line = format!("NOT RUN: {}/{what}: {why}\n", env!("CARGO_CRATE_NAME"));
    // Whoever has closed it does not want to know.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// An address that nobody has now, outside of the ports that the kernel gives to clients.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let step = NEXT.fetch_add(1, SeqCst) + u64::from(std::process::id()) * 37;
        let addr = SocketAddr::from(([127, 0, 0, 1], 20_000 + (step % 10_000) as u16));
        if TcpListener::bind(addr).is_ok() {
            return addr;
        }
    }
}

/// The first CPUs of those that this process may use, for `Config::cpus`.
pub fn first_cpus(count: usize) -> String {
    let status = std::fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let mut cpus = Vec::new();
    for run in list.expect("proc(5) has this line").trim().split(',') {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        let [first, last] = [first, last].map(|cpu| cpu.parse::<u16>().expect("a CPU's number"));
        cpus.extend((first..=last).map(|cpu| cpu.to_string()));
    }
    cpus.truncate(count);
    cpus.join(",")
}

/// Keeps the calling thread on one CPU (sched_setaffinity(2)).
pub fn pin(cpu: u16) {
    // SAFETY: no CPU is a valid set.
    let mut cpus = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
    // SAFETY: a set that is valid; the macro checks the number.
    unsafe { libc::CPU_SET(cpu.into(), &mut cpus) };
    // SAFETY: reads one set of that size.
    let set = unsafe { libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus) };
    assert_eq!(set, 0, "pin: {}", std::io::Error::last_os_error());
}

/// The most descriptors that this process may have.
pub fn fds_max() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").expect("the kernel tells the limits");
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    let hard = line.and_then(|line| line.split_whitespace().nth(4)).expect("proc(5) has this line");
    hard.parse().unwrap_or(usize::MAX)
}

/// The open descriptors of this process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("read /proc/self/fd").count()
}

/// Ends a server whose clients are done: waits until its last connection is gone, drains, and
/// checks that the books have every one of `connects`, nothing twice and nothing leaked.
pub fn settle(running: Running, connects: u64) -> CoreStats {
    let handle = running.handle();
    wait_until("every connection has ended", || {
        let total = handle.stats().total();
        total.accepted >= connects && total.live == 0
    });
    handle.begin_drain(limit(5_000));
    let report = running.join().expect("every core ends well");
    let total = report.total();
    assert!(report.is_balanced(), "{report}");
    assert_eq!(total.accepted, connects, "{report}");
    assert_eq!(total.closed.total(), connects, "{report}");
    assert_eq!((total.leaked_operations, total.tasks_forced, total.tasks), (0, 0, 0), "{report}");
    total
}
