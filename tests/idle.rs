//! Ten thousand idle connections cost no CPU, no system call, and little memory.
//!
//! 1. A server starts here; its clients are a second process of this same executable, since a
//!    process has not enough descriptors for both ends.
//! 2. The clients connect, and each connection echoes once.
//! 3. While all of them are silent, the cores' CPU time and their system calls stand still.
//! 4. What the server's process has allocated since the first step, a connection.

use std::alloc::{GlobalAlloc, Layout, System};
use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use slipring::{Config, CoreStats};

mod common;

/// Case 43.
#[test]
fn ten_thousand_idle_connections_cost_nothing_but_a_kibibyte_each() {
    if let Ok(order) = env::var(CHILD) {
        return be_the_clients(&order);
    }
    let _turn = turn();
    let count = connections_possible();
    let config = common::config()
        .cpus(&first_cpus())
        .connections_max(count + count / 5)
        // No deadline falls due in the measured seconds.
        .first_byte_ms(3_600_000)
        .idle_ms(3_600_000)
        .check_ms(3_600_000)
        .handler_ms(3_600_000)
        .min_rate_grace_ms(3_600_000)
        .write_stall_ms(3_600_000);
    let (running, addr) = common::echo_server(config);
    let handle = running.handle();
    let (live_before, resident_before) = (LIVE_BYTES.load(Relaxed), resident_bytes());

    let mut clients = Clients::start(addr, count);
    clients.wait_until_ready();
    let total = handle.stats().total();
    assert_eq!((total.live, total.bytes_received), (count as u64, (count * MESSAGE.len()) as u64));
    wait_until_quiet(|| handle.stats().total());

    let (cpu_before, stats_before) = (cores_cpu_time(), handle.stats().total());
    thread::sleep(QUIET);
    let (cpu_after, stats_after) = (cores_cpu_time(), handle.stats().total());
    let live = LIVE_BYTES.load(Relaxed) - live_before;
    let resident = resident_bytes() - resident_before;
    assert_eq!(stats_after.live, count as u64, "the connections were there all the time");

    let cpu = cpu_after.saturating_sub(cpu_before);
    let each = live as f64 / count as f64;
    println!("{count} idle connections, silent for {QUIET:?}:");
    println!(
        "  CPU time of the cores: {cpu:?}; calls of io_uring_enter: {}",
        stats_after.enters - stats_before.enters
    );
    println!("  allocated: {each:.0} bytes a connection");
    println!(
        "  resident, the receive buffers' first use included: {:.0} bytes a connection",
        resident as f64 / count as f64
    );

    assert_eq!(stats_after.enters, stats_before.enters, "a core woke up for nothing");
    assert!(cpu < CPU_MAX, "the cores used {cpu:?}");
    assert!(each <= BYTES_EACH_MAX, "{each:.0} bytes a connection");

    clients.let_go();
    let report = handle.drain(common::limit(10_000)).expect("it drains");
    assert!(report.is_balanced(), "{report}");
    running.join().expect("no core failed");
}

/// Case 43, with all that is on by default: each core looks at its books every
/// `SLIPRING_CHECK_MS`, a few hundred connections in a turn, and does nothing else.
#[test]
fn ten_thousand_idle_connections_cost_a_self_check_now_and_then_by_default() {
    let _turn = turn();
    let count = connections_possible();
    let config = Config::default().cpus(&first_cpus()).pin(Some(false));
    let (running, addr) = common::echo_server(config.connections_max(count + count / 5));
    let handle = running.handle();
    let cores = handle.stats().cores().len() as u64;
    let mut clients = Clients::start(addr, count);
    clients.wait_until_ready();
    assert_eq!(handle.stats().total().live, count as u64);
    wait_until_quiet(|| handle.stats().total());

    let (cpu_before, stats_before) = (cores_cpu_time(), handle.stats().total());
    thread::sleep(CHECK + CHECK / 10);
    let (cpu_after, stats_after) = (cores_cpu_time(), handle.stats().total());
    let (cpu, enters) =
        (cpu_after.saturating_sub(cpu_before), stats_after.enters - stats_before.enters);
    println!(
        "{count} idle connections by default: {cpu:?} of CPU, {enters} calls of io_uring_enter"
    );
    assert_eq!(stats_after.live, count as u64, "the connections were there all the time");
    assert!(enters > 0, "no core has checked itself");
    // Some 35 of 10 000 connections on two cores; a second check may begin in the time.
    let most = 2 * (count as u64).div_ceil(CHECKED_IN_A_TURN) + 8 * cores;
    assert!(enters <= most, "{enters} calls, not {most}");
    assert!(cpu < CHECK_CPU_MAX, "the cores used {cpu:?}");

    clients.let_go();
    let report = handle.drain(common::limit(10_000)).expect("it drains");
    assert!(report.is_balanced(), "{report}");
    running.join().expect("no core failed");
}

/// As many as the hard limit on descriptors allows, with some left for everything else.
fn connections_possible() -> usize {
    let hard = common::fds_max();
    // The server asks for a fifth more than it gets, because the cores' shares are unequal.
    let possible = hard.saturating_sub(DESCRIPTORS_SPARE) / 6 * 5;
    if possible < CONNECTIONS {
        let why = format!("the limit on descriptors, {hard}, allows no more than {possible}");
        common::not_run(&format!("{CONNECTIONS} connections"), why);
    }
    assert!(possible >= 100, "the hard limit on descriptors, {hard}, leaves nothing to measure");
    possible.min(CONNECTIONS)
}

/// Two CPUs of those that this process may use: more cores would make the shares more unequal.
fn first_cpus() -> String {
    let status = fs::read_to_string("/proc/self/status").expect("the kernel tells the status");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let mut cpus = Vec::new();
    for run in list.expect("proc(5) has this line").trim().split(',') {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        let [first, last] = [first, last].map(|cpu| cpu.parse::<u16>().expect("a CPU's number"));
        cpus.extend((first..=last).map(|cpu| cpu.to_string()));
    }
    cpus.truncate(2);
    cpus.join(",")
}

fn wait_until_quiet(stats: impl Fn() -> CoreStats) {
    let (mut last, mut since) = (stats(), Instant::now());
    common::wait_until("the cores had nothing to do", || {
        let now = stats();
        if now.enters != last.enters {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() >= Duration::from_millis(200)
    });
}

/// What the cores' threads, and the kernel's worker threads for them, have run.
fn cores_cpu_time() -> Duration {
    let mut cores = 0;
    let mut total = Duration::ZERO;
    for task in fs::read_dir("/proc/self/task").expect("the kernel lists the threads") {
        let path = task.expect("it is readable").path();
        // A thread that ends meanwhile is none of the cores.
        let Ok(name) = fs::read_to_string(path.join("comm")) else { continue };
        if name.starts_with("slipring-") || name.starts_with("iou-") {
            cores += usize::from(name.starts_with("slipring-"));
            let times = fs::read_to_string(path.join("schedstat")).expect("CONFIG_SCHED_INFO");
            let ran_ns = times.split(' ').next().and_then(|word| word.parse().ok());
            total += Duration::from_nanos(ran_ns.expect("the first number is the time it ran"));
        }
    }
    assert!(cores > 0, "there is no thread of a core");
    total
}

fn resident_bytes() -> i64 {
    let statm = fs::read_to_string("/proc/self/statm").expect("the kernel tells the sizes");
    let pages = statm.split(' ').nth(1).and_then(|word| word.parse::<i64>().ok());
    pages.expect("the second number is the resident pages") * 4096
}

/// The process of the clients.
struct Clients {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Clients {
    /// Starts it; it inherits the limit on descriptors that the server has raised.
    fn start(addr: SocketAddr, count: usize) -> Clients {
        let mut command = Command::new(env::current_exe().expect("this executable has a path"));
        command.args([TEST, "--exact", "--nocapture"]).env(CHILD, format!("{addr} {count}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("start the clients");
        let output = BufReader::new(process.stdout.take().expect("it is a pipe"));
        Clients { process, output }
    }

    fn wait_until_ready(&mut self) {
        let mut line = String::new();
        while line.trim_end() != READY {
            line.clear();
            let count = self.output.read_line(&mut line).expect("the clients' output");
            assert!(count > 0, "the clients have failed; see their message above");
        }
    }

    /// Makes it close the connections and end.
    fn let_go(&mut self) {
        drop(self.process.stdin.take());
        // It must not find the pipe shut.
        self.output.read_to_end(&mut Vec::new()).expect("the clients' output");
        assert!(self.process.wait().expect("wait for the clients").success());
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Connects, lets each connection echo once, and holds all until the standard input ends.
fn be_the_clients(order: &str) {
    let (addr, count) = order.split_once(' ').expect("an address and a number");
    let (addr, count) = (addr.parse().expect("an address"), count.parse().expect("a number"));
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = common::connect(addr);
        stream.write_all(MESSAGE).expect("send");
        let mut answer = [0; MESSAGE.len()];
        stream.read_exact(&mut answer).expect("receive");
        assert_eq!(answer, *MESSAGE);
        streams.push(stream);
    }
    println!("{READY}");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("wait for the end");
}

/// One at a time: they count what the process allocates and uses.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts the bytes that are allocated and not freed yet, of all threads together.
struct CountBytes;

static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);

#[global_allocator]
static ALLOCATOR: CountBytes = CountBytes;

// SAFETY: every call goes to the system's allocator as it is; counting allocates nothing.
unsafe impl GlobalAlloc for CountBytes {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size() as i64, Relaxed);
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size() as i64, Relaxed);
        // SAFETY: the caller keeps the promises of `dealloc`, and the block is the system's.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size() as i64, Relaxed);
        // SAFETY: the caller keeps the promises of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE_BYTES.fetch_add(size as i64 - layout.size() as i64, Relaxed);
        // SAFETY: the caller keeps the promises of `realloc`, and the block is the system's.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// Tells the clients' process what it is, with the address and the number of connections.
const CHILD: &str = "RING_TEST_CHILD";
const TEST: &str = "ten_thousand_idle_connections_cost_nothing_but_a_kibibyte_each";
const READY: &str = "all clients are connected";
const MESSAGE: &[u8; 64] = &[b'x'; 64];

const CONNECTIONS: usize = 10_000;
const DESCRIPTORS_SPARE: usize = 500;
const QUIET: Duration = Duration::from_secs(3);
const CPU_MAX: Duration = Duration::from_millis(10);
const BYTES_EACH_MAX: f64 = 1024.0;
/// The default of `SLIPRING_CHECK_MS`.
const CHECK: Duration = Duration::from_secs(10);
const CHECKED_IN_A_TURN: u64 = 256;
/// A hundredth of the time; 30 ms without optimization here.
const CHECK_CPU_MAX: Duration = Duration::from_millis(110);
