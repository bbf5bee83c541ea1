//! In a steady state the cores allocate nothing and enter the kernel seldom.
//!
//! 1. A server starts; its factory marks the threads of the cores, whose allocations are counted.
//! 2. More connections than are measured have their input, and then their output, queued at the
//!    same time, so that every queue has as much room as it will ever need.
//! 3. Sixty-four of them echo twenty thousand times, all in flight at once, while allocations on
//!    the cores are counted and the first few are remembered with their stacks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;

use slipring::{Connection, CoreStats, Handle, Server};

mod common;

#[test]
fn an_echo_allocates_nothing_on_any_core() {
    let steady = measure(|| {});
    let sites = SITES.lock().unwrap_or_else(PoisonError::into_inner).join("\n");
    assert_eq!((steady.allocations, steady.frees), (0, 0), "the first of them:\n{sites}");
}

/// With a CPU each, the client and the core work side by side, and a core that comes back for every
/// few messages is as quick as it can be. On one CPU they take turns, so that the core finds many
/// messages when it looks; then it must not go to the kernel for each.
#[test]
fn echoes_that_come_together_share_their_system_calls() {
    let steady = thread::scope(|scope| {
        // A thread of its own, since its affinity stays, and the cores inherit it.
        let client = scope.spawn(|| {
            stay_on_one_cpu();
            measure(interrupt_nobody)
        });
        client.join().expect("the client's thread ends well")
    });
    assert_eq!((steady.cores, steady.allocations), (1, 0));
    assert!(steady.enters_each < ENTERS_EACH_MAX, "{:.4} enters an echo", steady.enters_each);
}

/// The same for datagrams, of which no more are under way than half of what a core has buffers for.
#[test]
fn an_echo_of_datagrams_allocates_nothing_on_any_core() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let server = Server::new(common::config()).serve_udp_with("127.0.0.1:0", |_core| {
        IS_CORE.set(true);
        |socket: slipring::net::UdpSocket| async move {
            while let Some(datagram) = socket.recv_until_drain().await? {
                let peer = datagram.peer();
                socket.send_to(datagram, peer).await?;
            }
            Ok(())
        }
    });
    let running = server.start().expect("the server starts");
    let addr = running.udp_addrs()[0];
    let clients: Vec<UdpSocket> = (0..DATAGRAM_CLIENTS)
        .map(|_| {
            let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
            client.set_read_timeout(Some(common::limit(10_000))).expect("set a time limit");
            client.connect(addr).expect("connect");
            client
        })
        .collect();
    let exchange = |rounds| {
        for _ in 0..rounds {
            clients.iter().for_each(|client| assert_eq!(client.send(MESSAGE).expect("send"), 64));
            for client in &clients {
                let mut answer = [0; 65];
                assert_eq!(client.recv(&mut answer).expect("an answer"), 64);
                assert_eq!(answer[..64], *MESSAGE);
            }
        }
    };
    exchange(ROUNDS);
    // A burst that is larger than all before it finds queues too short; one in a spell is possible,
    // something for each echo would be in all of them.
    let spells = (0..SPELLS).map(|_| counted(|| exchange(ROUNDS)));
    let (allocations, frees) = spells.min().expect("there are some");
    let sites = SITES.lock().unwrap_or_else(PoisonError::into_inner).join("\n");
    assert_eq!((allocations, frees), (0, 0), "the first of them:\n{sites}");
    running.handle().begin_drain(common::limit(5_000));
    let report = running.join().expect("every core ends well");
    assert_eq!(report.total().datagrams_sent, (5 * ROUNDS * DATAGRAM_CLIENTS) as u64, "{report}");
}

/// Counts the allocations and frees of the cores meanwhile.
fn counted(work: impl FnOnce()) -> (u64, u64) {
    for counter in [&ALLOCATIONS, &FREES] {
        counter.store(0, Relaxed);
    }
    COUNTING.store(true, Relaxed);
    work();
    COUNTING.store(false, Relaxed);
    (ALLOCATIONS.load(Relaxed), FREES.load(Relaxed))
}

/// What was counted during the echoes of step 3.
struct Steady {
    cores: usize,
    allocations: u64,
    frees: u64,
    enters_each: f64,
}

/// Steps 1 to 3, after each core has called `prepare`.
fn measure(prepare: fn()) -> Steady {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let server = Server::new(common::config()).listen_with("127.0.0.1:0", move |_core| {
        prepare();
        IS_CORE.set(true);
        echo
    });
    let (running, addr) = common::start(server);
    let handle = running.handle();
    let cores = handle.stats().cores().len();
    let mut streams: Vec<TcpStream> = (0..WARM_UP).map(|_| common::connect(addr)).collect();
    fill_queues(&handle, &mut streams);
    let warm = streams.split_off(CONNECTIONS);
    exchange(&mut streams, MESSAGE, ROUNDS / 4);

    let before = settled(|| handle.stats().total());
    let (allocations, frees) = counted(|| exchange(&mut streams, MESSAGE, ROUNDS));
    let after = settled(|| handle.stats().total());

    let echoes = (ROUNDS * CONNECTIONS) as f64;
    let each = |count: fn(&CoreStats) -> u64| (count(&after) - count(&before)) as f64 / echoes;
    println!("{echoes} echoes of {} bytes over {CONNECTIONS} connections:", MESSAGE.len());
    println!("  on {cores} cores: {allocations} allocations, {frees} frees");
    println!(
        "  an echo: {:.4} enters, {:.4} submissions, {:.4} completions, {:.4} polls",
        each(|s| s.enters),
        each(|s| s.submissions),
        each(|s| s.completions),
        each(|s| s.polls)
    );
    drop((streams, warm));
    common::settle(running, WARM_UP as u64);
    Steady { cores, allocations, frees, enters_each: each(|s| s.enters) }
}

/// Keeps this thread, and those that it starts from now on, on the CPU that it runs on.
fn stay_on_one_cpu() {
    // SAFETY: it takes nothing and gives a number.
    let cpu = unsafe { libc::sched_getcpu() };
    // SAFETY: a set of CPUs is plain bits, of which none is set.
    let mut cpus: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel named the CPU, and glibc's macro checks the bounds of the set.
    unsafe { libc::CPU_SET(cpu as usize, &mut cpus) };
    // SAFETY: the set lives during the call and has the size that is passed.
    let set = unsafe { libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// Keeps this thread from taking the CPU away from another one when it wakes up (sched(7)).
fn interrupt_nobody() {
    let normal = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter lives during the call, which concerns the calling thread only.
    let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const normal) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// Echoes; after a message that says so, takes nothing more until it may.
async fn echo(mut conn: Connection) -> slipring::Result<()> {
    while let Some(chunk) = conn.recv().await? {
        let hold = chunk.starts_with(HOLD);
        conn.send(chunk).await?;
        while hold && HELD.load(Relaxed) {
            slipring::task::yield_now().await;
        }
    }
    Ok(())
}

/// Lets every handler find its input, and queue its output, in the same turn.
fn fill_queues(handle: &Handle, streams: &mut [TcpStream]) {
    HELD.store(true, Relaxed);
    exchange(streams, HOLD, 1);
    for stream in streams.iter_mut() {
        stream.write_all(MESSAGE).expect("send");
    }
    let sent = (streams.len() * (HOLD.len() + MESSAGE.len())) as u64;
    common::wait_until("all input is queued", || handle.stats().total().bytes_received == sent);
    HELD.store(false, Relaxed);
    for stream in streams.iter_mut() {
        stream.read_exact(&mut [0; MESSAGE.len()]).expect("receive");
    }
}

/// A closed loop: every connection has one message under way, then every answer is read.
fn exchange(streams: &mut [TcpStream], message: &[u8; 64], rounds: usize) {
    let mut answer = [0; 64];
    for _ in 0..rounds {
        for stream in streams.iter_mut() {
            stream.write_all(message).expect("send");
        }
        for stream in streams.iter_mut() {
            stream.read_exact(&mut answer).expect("receive");
            assert_eq!(answer, *message);
        }
    }
}

/// The counters when the cores have published the last turn's.
fn settled(stats: impl Fn() -> CoreStats) -> CoreStats {
    let mut last = stats();
    let mut same = 0;
    common::wait_until("the cores had nothing to do", || {
        let now = stats();
        same = if now == last { same + 1 } else { 0 };
        last = now;
        same == 20
    });
    last
}

/// Counts what the threads of the cores allocate and free while `COUNTING`.
struct CountCalls;

thread_local! {
    /// Whether this thread is a core. Constant and without a destructor: reading it allocates
    /// nothing and works at any time.
    static IS_CORE: Cell<bool> = const { Cell::new(false) };
    /// Remembering a stack allocates too.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

/// Whether handlers that were told to hold still do.
static HELD: AtomicBool = AtomicBool::new(false);

/// What is counted is of the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static FREES: AtomicU64 = AtomicU64::new(0);
/// Where the first few allocations came from.
static SITES: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn counts() -> bool {
    COUNTING.load(Relaxed) && IS_CORE.get() && !LOOKING.get()
}

fn count_allocation(size: usize) {
    if counts() && ALLOCATIONS.fetch_add(1, Relaxed) < SITES_MAX {
        LOOKING.set(true);
        remember_site(size);
        LOOKING.set(false);
    }
}

fn remember_site(size: usize) {
    let stack = Backtrace::force_capture().to_string();
    let ours = stack.lines().filter(|line| line.contains("slipring::"));
    let ours: Vec<&str> = ours.take(STACK_LINES_MAX).collect();
    let site = format!("{size} bytes at\n{}", ours.join("\n"));
    SITES.lock().unwrap_or_else(PoisonError::into_inner).push(site);
}

#[global_allocator]
static ALLOCATOR: CountCalls = CountCalls;

// SAFETY: every call goes to the system's allocator as it is; where counting allocates, it does so
// through this allocator again, which `LOOKING` keeps from recursing.
unsafe impl GlobalAlloc for CountCalls {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocation(layout.size());
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if counts() {
            FREES.fetch_add(1, Relaxed);
        }
        // SAFETY: the caller keeps the promises of `dealloc`, and the block is the system's.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count_allocation(layout.size());
        // SAFETY: the caller keeps the promises of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_allocation(size);
        // SAFETY: the caller keeps the promises of `realloc`, and the block is the system's.
        unsafe { System.realloc(block, layout, size) }
    }
}

const CONNECTIONS: usize = 64;
/// Of which one has to be without.
const SPELLS: usize = 4;
const DATAGRAM_CLIENTS: usize = 16;
/// So many that each core gets more of them than half of what all can have under way.
const WARM_UP: usize = 200;
/// Rounds of one echo on each connection: 20 032 echoes.
const ROUNDS: usize = 313;
const MESSAGE: &[u8; 64] = &[b'x'; 64];
const HOLD: &[u8; 64] = &[b'h'; 64];
const ENTERS_EACH_MAX: f64 = 0.1;
const SITES_MAX: u64 = 5;
const STACK_LINES_MAX: usize = 4;
