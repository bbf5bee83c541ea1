//! What comes in storms: signals that interrupt the cores, wakes and spawns that race with a drain,
//! and completions by the hundred in a queue that holds sixteen.
//!
//! Apart from the other cases since signals belong to the whole process: every thread of this one
//! is sent them, and SIGPIPE is counted instead of ignored.

mod common;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use common::peer::{ANY, Peer, Until, bytes, exchange};
use common::{config, connect, echo, echo_server, length, limit, settle, start, wait_until};
use slipring::time::sleep;
use slipring::{CloseReason, Connection, ErrorKind, Phase, Server};

/// Case 32: every core is interrupted thousands of times, in the kernel and out of it.
#[test]
fn a_storm_of_signals_to_the_cores_disturbs_no_byte_and_no_drain() {
    let _turn = turn();
    count(libc::SIGUSR1, &INTERRUPTIONS);
    let (running, addr) = echo_server(config().buffers(16).buffer_bytes(1024));
    let cores = core_threads();
    assert_eq!(cores.len(), running.handle().stats().cores().len());
    let over = AtomicBool::new(false);
    let mut finished = 0;
    let total = std::thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| {
            while !over.load(SeqCst) {
                cores.iter().for_each(|core| signal_thread(*core, libc::SIGUSR1));
                std::thread::yield_now();
            }
        });
        while INTERRUPTIONS.load(SeqCst) < 2_000 * length() {
            let peer = |n| Peer::new(connect(addr), bytes(n, 50_000));
            exchange(&mut (0..100).map(peer).collect::<Vec<_>>(), Until::End);
            finished += 100;
        }
        let peer = |n| Peer::new(connect(addr), bytes(n, 10));
        let mut idle: Vec<Peer> = (0..100).map(peer).collect();
        exchange(&mut idle, Until::Echoed);
        let report = running.handle().drain(limit(5_000)).expect("a report");
        assert!(report.is_balanced(), "{report}");
        report.total()
    });
    let closed = (total.closed.get(CloseReason::Finished), total.closed.get(CloseReason::Drained));
    assert_eq!((closed, total.leaked_operations), ((finished, 100), 0), "{total:?}");
}

/// Case 22: to a peer that has closed, the first send goes out, and the next one fails.
#[test]
fn sending_to_a_peer_that_has_closed_is_an_error_and_no_signal() {
    let _turn = turn();
    count(libc::SIGPIPE, &PIPES);
    let stories = Arc::new(Mutex::new(Vec::new()));
    let story = Arc::clone(&stories);
    let (running, addr) = start(Server::new(config()).listen(ANY, move |mut conn: Connection| {
        let story = Arc::clone(&story);
        async move {
            while conn.recv().await?.is_some() {}
            // The peer is gone for good, which nobody has told us yet.
            conn.write(b"first").await?;
            conn.flush().await?;
            let error = loop {
                sleep(Duration::from_millis(1)).await;
                match conn.write(b"more").await {
                    Ok(()) => {}
                    Err(error) => break error,
                }
            };
            let after = conn.flush().await.expect_err("it stays broken").kind();
            story.lock().expect("no panic").push((error.kind(), after));
            Err(error)
        }
    }));
    for _ in 0..50 {
        connect(addr).write_all(b"bye").expect("send");
    }
    assert_eq!(settle(running, 50).closed.get(CloseReason::PeerReset), 50);
    let stories = stories.lock().expect("no panic");
    assert_eq!(stories.len(), 50);
    let broken = (ErrorKind::PeerReset, ErrorKind::PeerReset);
    assert!(stories.iter().all(|story| *story == broken), "{stories:?}");
    assert_eq!(PIPES.load(SeqCst), 0, "SIGPIPE");
}

/// Case 37: what other threads post while a core drains is run, dropped or refused, never lost.
#[test]
fn wakes_and_spawns_that_race_with_a_drain_are_all_accounted_for() {
    let _turn = turn();
    for round in 0..20 * length() {
        let (running, addr) = echo_server(config());
        let mut client = connect(addr);
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an answer");
        let handle = running.handle();
        let cores = handle.stats().cores().len();
        // Each message of these threads holds one of it.
        let held = Arc::new(());
        let wakers = Arc::new(Mutex::new(Vec::<Waker>::new()));
        let (spawned, refused) = (AtomicU64::new(0), AtomicU64::new(0));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _over = Over(&over);
            for thread in 0..3 {
                let (handle, over) = (&handle, &over);
                let (spawned, refused) = (&spawned, &refused);
                let (held, wakers) = (&held, &wakers);
                scope.spawn(move || {
                    while !over.load(SeqCst) {
                        // Thousands on their way are a storm, and still a bound.
                        if Arc::strong_count(held) > 5_000 {
                            std::thread::yield_now();
                            continue;
                        }
                        let (held, wakers) = (Arc::clone(held), Arc::clone(wakers));
                        let waits = move || async move {
                            let mut turns = 0;
                            std::future::poll_fn(|cx| {
                                let _held = &held;
                                wakers.lock().expect("no panic").push(cx.waker().clone());
                                turns += 1;
                                if turns > 3 { std::task::Poll::Ready(()) } else { PENDING }
                            })
                            .await;
                        };
                        match handle.spawn_on(thread % cores, waits) {
                            Ok(()) => spawned.fetch_add(1, SeqCst),
                            Err(_) => refused.fetch_add(1, SeqCst),
                        };
                    }
                });
            }
            let (over, wakers) = (&over, &wakers);
            scope.spawn(move || {
                while !over.load(SeqCst) {
                    let some = std::mem::take(&mut *wakers.lock().expect("no panic"));
                    some.into_iter().for_each(Waker::wake);
                }
            });
            wait_until("they race", || spawned.load(SeqCst) > 10 * round);
            let report = handle.drain(limit(300)).expect("a report");
            // Spawns keep it up to its deadline, and no further; this thread may be late itself.
            let phases = [Phase::StopAccept, Phase::DrainConnections, Phase::Force, Phase::Down];
            let took: Duration = phases.iter().map(|phase| report.phases().get(*phase)).sum();
            assert!(took < limit(300) + limit(300), "round {round}: {report}");
            assert!(report.is_balanced(), "round {round}: {report}");
            assert_eq!(report.total().closed.get(CloseReason::Drained), 1, "{report}");
        });
        running.join().expect("every core ends well");
        // A core without a processor may still be at it when its report is due.
        wait_until("no message outlives its core", || {
            wakers.lock().expect("no panic").clear();
            Arc::strong_count(&held) == 1
        });
    }
}

const PENDING: std::task::Poll<()> = std::task::Poll::Pending;

/// Case 15, scenario 58: each close is a cancellation and a receive's end, all at once.
#[test]
fn five_hundred_closes_at_once_go_through_a_queue_of_sixteen() {
    let _turn = turn();
    let config = config().sq_entries(8).cq_entries(16).connections_max(2_000);
    let (running, addr) = start(Server::new(config).listen(ANY, echo));
    let mut peers: Vec<Peer> = (0..500).map(|n| Peer::new(connect(addr), bytes(n, 100))).collect();
    exchange(&mut peers, Until::Echoed);
    let before = running.handle().stats().total();
    assert_eq!(before.live, 500);
    let report = running.handle().drain(limit(10_000)).expect("a report");
    let total = report.total();
    assert!(report.is_balanced(), "{report}");
    assert_eq!(total.closed.get(CloseReason::Drained), 500, "{report}");
    assert_eq!((total.leaked_operations, total.tasks_forced), (0, 0), "{report}");
    assert!(total.overflows > before.overflows, "the queue was never full in the drain");
    exchange(&mut peers, Until::End);
    running.join().expect("every core ends well");
}

/// Ends a storm when it is dropped, also by a test that fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// The tests take turns: the signals of one would disturb the others.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

static INTERRUPTIONS: AtomicU64 = AtomicU64::new(0);
static PIPES: AtomicU64 = AtomicU64::new(0);

/// Counts a signal from now on, and interrupts system calls with it.
fn count(signal: libc::c_int, counter: &'static AtomicU64) {
    extern "C" fn interrupted(_: libc::c_int) {
        INTERRUPTIONS.fetch_add(1, SeqCst);
    }
    extern "C" fn piped(_: libc::c_int) {
        PIPES.fetch_add(1, SeqCst);
    }
    counter.store(0, SeqCst);
    let handler = if signal == libc::SIGPIPE { piped } else { interrupted };
    // SAFETY: all zeros is a valid sigaction: no flags, and so no SA_RESTART, and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    // SAFETY: the action is initialised, and its handler only adds to an atomic.
    let result = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "sigaction");
}

/// The thread ids of all cores of this process.
fn core_threads() -> Vec<libc::pid_t> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("read /proc/self/task");
    let is_core = |task: &std::path::Path| {
        let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
        name.starts_with("slipring-")
    };
    let paths = tasks.map(|task| task.expect("it is readable").path()).filter(|path| is_core(path));
    let name = |path: std::path::PathBuf| path.file_name()?.to_str()?.parse().ok();
    paths.filter_map(name).collect()
}

fn signal_thread(thread: libc::pid_t, signal: libc::c_int) {
    // SAFETY: tgkill takes three numbers; a thread that is gone is an error of no interest.
    unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, signal) };
}
