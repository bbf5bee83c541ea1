//! Connections that no core has accepted: what becomes of them while their core does not come back,
//! after that, and in a drain.
//!
//! 1. A core, or each of two, is held by a task that does not return before the test wants it to.
//! 2. Clients connect, which the kernel does by itself, and wait in the queues of the listeners.
//! 3. The task returns, or a drain begins first; each client says how it went.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::MutexGuard;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use crate::common::{config, connect, echo, first_cpus, late, limit, settle, start, wait_until};
use slipring::{Handle, Server};

/// Case 1: a backlog of four times the completion queue, all of it there when the core comes back.
#[test]
fn a_backlog_of_four_times_the_completion_queue_is_all_accepted() {
    let _turn = turn();
    let config = config().cpus(&first_cpus(1)).sq_entries(8).cq_entries(64).completion_budget(16);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", echo));
    let handle = running.handle();
    for _ in 0..ROUNDS {
        let before = handle.stats().total().accepted;
        let held = Held::all(&handle);
        let mut clients: Vec<_> = (0..256).map(|_| ask(addr)).collect();
        assert_eq!(queued(addr), [256], "in the kernel's queue");
        assert_eq!(handle.stats().total().accepted, before);
        held.let_go();
        assert!(clients.iter_mut().all(|client| end_of(client) == Fate::Answered));
    }
    settle(running, 256 * ROUNDS);
}

/// Scenario 1, case 36: a hundred clients wait at the listeners of two cores when the drain begins.
#[test]
fn what_waits_at_each_of_two_listeners_is_served_or_closed_by_a_drain_but_not_reset() {
    let _turn = turn();
    let config = config().cpus(TWO).new_grace_ms(50);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", echo));
    let handle = running.handle();
    let held = Held::all(&handle);
    let (mut silent, mut asking): (Vec<_>, Vec<_>) =
        (0..50).map(|_| (connect(addr), ask(addr))).unzip();
    let waiting = queued(addr);
    assert!(waiting.len() == 2 && waiting.iter().all(|count| *count >= 20), "{waiting:?}");
    assert_eq!((waiting.iter().sum::<u64>(), handle.stats().total().accepted), (100, 0));
    handle.begin_drain(limit(10_000));
    held.let_go();
    let report = running.join().expect("the report");
    for client in &mut silent {
        assert_eq!(end_of(client), Fate::Eof, "{report}");
    }
    for client in &mut asking {
        assert_eq!(end_of(client), Fate::Answered, "{report}");
        assert_eq!(end_of(client), Fate::Eof, "{report}");
    }
    let mut accepted: Vec<_> = report.cores().iter().map(|core| core.stats.accepted).collect();
    accepted.sort_unstable();
    assert_eq!(accepted, waiting, "each listener's own: {report}");
    assert!(report.is_balanced(), "{report}");
}

/// Scenario 21: nobody takes what waits at a core that is stuck, and nobody counts it.
#[test]
fn what_waits_at_a_stuck_core_stays_in_the_kernels_queue() {
    let _turn = turn();
    let config = config().cpus(TWO).new_grace_ms(50);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", echo));
    let handle = running.handle();
    let held = Held::core(&handle, 0);
    let mut clients: Vec<_> = (0..60).map(|_| ask(addr)).collect();
    let mut waiting = Vec::new();
    wait_until("the other core has answered its own", || {
        let (still, _): (Vec<_>, Vec<_>) =
            clients.drain(..).partition(|client| look(client) == Fate::Waiting);
        clients = still;
        waiting = queued(addr);
        clients.len() as u64 == waiting[1] && waiting[0] == 0
    });
    assert!((10..=50).contains(&clients.len()), "{waiting:?}");
    let since = Instant::now();
    let report = handle.drain(Duration::from_millis(500)).expect("a report");
    let took = since.elapsed();
    assert!(took < limit(600) + late::allowance(), "{took:?} {report}");
    let stuck = |n: usize| report.cores()[n].stuck.is_some();
    assert!(stuck(0) && !stuck(1), "{report}");
    let answered = 60 - clients.len() as u64;
    let accepted = [0, 1].map(|n: usize| report.cores()[n].stats.accepted);
    assert_eq!(accepted, [0, answered], "{report}");
    assert!(clients.iter().all(|client| look(client) == Fate::Waiting), "{report}");

    held.let_go();
    let last = running.join().expect("no core failed");
    let fates: Vec<_> = clients.iter_mut().map(|client| end_of(client)).collect();
    // It comes back after the deadline, so nobody is served any more.
    assert!(fates.iter().all(|fate| *fate == Fate::Eof), "{fates:?}: {last}");
    assert!(last.is_balanced(), "{last}");
}

/// How a client stands that has sent a byte, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Answered,
    Eof,
    Reset,
    Waiting,
}

/// Cores that do nothing but wait, until they are let go.
struct Held(Vec<Sender<()>>);

impl Held {
    fn all(handle: &Handle) -> Held {
        Held((0..handle.stats().cores().len()).map(|core| hold(handle, core)).collect())
    }

    fn core(handle: &Handle, core: usize) -> Held {
        Held(vec![hold(handle, core)])
    }

    fn let_go(self) {
        drop(self.0);
    }
}

/// Holds the core until what it returns is dropped. It takes no CPU from those who connect.
fn hold(handle: &Handle, core: usize) -> Sender<()> {
    let ((arrive, arrived), (release, released)) = (channel(), channel());
    let hold = move || async move {
        arrive.send(()).expect("the test waits for it");
        let _ = released.recv();
    };
    handle.spawn_on(core, hold).expect("it is up");
    arrived.recv_timeout(limit(10_000)).expect("it is held");
    release
}

/// How many wait at each listener of that port, the fewest first (proc(5)): what a listener has to
/// be read is who waits to be accepted.
fn queued(addr: SocketAddr) -> Vec<u64> {
    let sockets = std::fs::read_to_string("/proc/net/tcp").expect("read /proc/net/tcp");
    let port = format!(":{:04X}", addr.port());
    let waiting = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let listens = words[1].ends_with(&port) && words[3] == "0A";
        let count = words[4].split_once(':').expect("two queues").1;
        listens.then(|| u64::from_str_radix(count, 16).expect("a number"))
    };
    let mut counts: Vec<_> = sockets.lines().skip(1).filter_map(waiting).collect();
    counts.sort_unstable();
    counts
}

/// Connects and sends a byte.
fn ask(addr: SocketAddr) -> TcpStream {
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    client
}

/// How it stands now.
fn look(client: &TcpStream) -> Fate {
    client.set_nonblocking(true).expect("set non-blocking");
    let fate = end_of(client);
    client.set_nonblocking(false).expect("set blocking");
    fate
}

/// What it gets, waiting for it.
fn end_of(mut client: &TcpStream) -> Fate {
    match client.read(&mut [0]) {
        Ok(0) => Fate::Eof,
        Ok(_) => Fate::Answered,
        Err(error) if error.kind() == ErrorKind::WouldBlock => Fate::Waiting,
        Err(_) => Fate::Reset,
    }
}

/// One at a time: one measures time.
fn turn() -> MutexGuard<'static, ()> {
    late::watch();
    crate::common::turn()
}

/// Two cores, on whatever CPUs there are.
const TWO: &str = "0-1";
const ROUNDS: u64 = 5;
