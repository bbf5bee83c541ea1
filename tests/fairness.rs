//! A core that has much to do for one, or for newcomers, and a hundred others who go on as before.
//!
//! Measured in pairs: in every other round the same load goes to a plain thread of this process, on
//! the core's CPU, so that the machine is as busy and only slipring's core is not. Medians of the
//! rounds count, and of the attempts.
//!
//! Where others keep the CPUs busy, the scheduler lets a core that works wait for milliseconds, and
//! one that has slept not at all, which says nothing about slipring: such attempts don't count.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    config, connect, first_cpus, late, length, limit, not_run, pin, settle, start, wait_until,
};
use slipring::{Config, Connection, Running, Server};

/// Case 9, with all buffers: one connection that floods as fast as loopback goes, and a hundred
/// that ping.
#[test]
fn a_flood_on_one_connection_at_most_doubles_the_p99_of_a_hundred_others() {
    compare("flood", |target, over| {
        let mut flood = connect(target);
        flood.write_all(b"f").expect("send");
        let piece = vec![7; 1 << 16];
        let mut bytes = 0;
        while !over.load(SeqCst) {
            bytes += flood.write(&piece).expect("send");
        }
        assert!(bytes > 1 << 20, "the flood was a trickle of {bytes} bytes");
    });
}

/// Scenario 63: thousands of connects in one go, and a hundred connections that ping.
#[test]
fn a_burst_of_connects_at_most_doubles_the_p99_of_a_hundred_active_connections() {
    compare("burst", |target, over| {
        let burst: Vec<_> = (0..BURST).map(|_| connect(target)).collect();
        over.store(true, SeqCst);
        drop(burst);
    });
}

/// Case 9: with eight small buffers in all, a flood leaves enough of them to a hundred others.
#[test]
fn a_flood_leaves_buffers_to_a_hundred_small_connections() {
    let _turn = turn();
    let config = one_core().buffers(8).buffer_bytes(1_024).receive_queue_bytes(4_096);
    let (running, addr) = serve(config);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut flood = connect(addr);
            flood.write_all(b"f").expect("send");
            while !over.load(SeqCst) {
                flood.write_all(&[7; 1 << 16]).expect("send");
            }
        });
        let _over = Over(&over);
        let mut clients: Vec<_> = (0..100).map(|_| connect(addr)).collect();
        let mut took: Vec<_> = (0..20 * length()).flat_map(|_| ping(&mut clients)).collect();
        let p99 = p99(&mut took);
        println!("p99 {p99:?}, max {:?}", took[took.len() - 1]);
        assert!(p99 < limit(200), "{p99:?}");
    });
    settle(running, 101);
}

/// Runs rounds in pairs, with the load on slipring and beside it, and compares.
fn compare(what: &str, load: impl Fn(SocketAddr, &AtomicBool) + Sync) {
    let _turn = turn();
    let (running, addr) = serve(one_core().connections_max(6_000).evict_percent(0));
    // The core and what stands in for it have a CPU of their own, and who loads and pings another.
    let cpus: Vec<u16> = first_cpus(2).split(',').map(|cpu| cpu.parse().expect("a CPU")).collect();
    let [own, others_cpu] = cpus[..] else {
        return not_run(what, "it takes two CPUs");
    };
    let sink = sink(what == "flood", own);
    pin(others_cpu);
    go_first();
    let mut clients: Vec<_> = (0..100).map(|_| connect(addr)).collect();
    ping(&mut clients);
    let (mut seen, mut ratios) = (Vec::new(), Vec::new());
    for _ in 0..ATTEMPTS {
        let others = late::Others::watch();
        let (mut on, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS * length() as usize {
            beside.push(one_round(&mut clients, sink, &load));
            on.push(one_round(&mut clients, addr, &load));
            let gone = || running.handle().stats().total().live == 100;
            wait_until("the load is gone", gone);
        }
        let others = others.share();
        let (on, beside) = (median(&mut on), median(&mut beside));
        seen.push((on, beside, others));
        if others < late::Others::MAX {
            ratios.push(on.as_secs_f64() / beside.as_secs_f64());
        }
        if ratios.len() == ENOUGH {
            break;
        }
    }
    println!("{what}: median p99 with the load on the core, beside it, others' CPU time: {seen:?}");
    ratios.sort_by(f64::total_cmp);
    if ratios.len() < ENOUGH {
        not_run(what, format!("others keep the CPUs busy: {seen:?}"));
        assert!(seen.iter().all(|(on, ..)| *on < limit(200)), "{what}: {seen:?}");
    } else {
        let median = ratios[ENOUGH / 2];
        println!("{what}: ratios {ratios:.2?}");
        assert!(median <= RATIO_MAX, "{what}: {median:.2} times the p99 beside it: {seen:?}");
    }
    drop(clients);
    let connects = running.handle().stats().total().accepted;
    settle(running, connects);
}

/// The p99 of the pings while the load goes to `target`.
fn one_round(
    clients: &mut [TcpStream],
    target: SocketAddr,
    load: &(impl Fn(SocketAddr, &AtomicBool) + Sync),
) -> Duration {
    let over = AtomicBool::new(false);
    let mut took = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| load(target, &over));
        let _over = Over(&over);
        // As long as a burst lasts, and a second of a flood.
        let since = Instant::now();
        while !over.load(SeqCst) && since.elapsed() < Duration::from_secs(1) || took.is_empty() {
            took.extend(ping(clients));
        }
    });
    p99(&mut took)
}

/// A byte to each and back, one after the other: how long each took.
fn ping(clients: &mut [TcpStream]) -> Vec<Duration> {
    let mut took = Vec::with_capacity(clients.len());
    for client in clients {
        let since = Instant::now();
        client.write_all(b"p").expect("send");
        client.read_exact(&mut [0; 1]).expect("an answer");
        took.push(since.elapsed());
    }
    took
}

fn p99(took: &mut [Duration]) -> Duration {
    took.sort_unstable();
    took[(took.len() - 1) * 99 / 100]
}

fn median(took: &mut [Duration]) -> Duration {
    took.sort_unstable();
    took[took.len() / 2]
}

fn one_core() -> Config {
    config().cpus(&first_cpus(1))
}

/// Echoes, but for a connection that begins with an `f`: it is read and that is all.
fn serve(config: Config) -> (Running, SocketAddr) {
    start(Server::new(config).listen("127.0.0.1:0", |mut conn: Connection| async move {
        let mut floods = None;
        while let Some(chunk) = conn.recv().await? {
            if !*floods.get_or_insert(chunk[0] == b'f') {
                conn.send(chunk).await?;
            }
        }
        Ok(())
    }))
}

/// Has this thread, but none that it starts, run before all ordinary ones, where it may (sched(7)):
/// who pings shares a CPU with who loads, and that wait is not the core's.
fn go_first() {
    let first = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: reads one value that lives during the call.
    unsafe { libc::sched_setscheduler(0, policy, &raw const first) };
}

/// A plain thread that accepts, and reads what comes if anything is to come.
fn sink(reads: bool, cpu: u16) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("an address");
    thread::spawn(move || {
        pin(cpu);
        let (mut held, mut buf) = (Vec::new(), vec![0; 1 << 16]);
        for mut stream in listener.incoming().flatten() {
            while reads && stream.read(&mut buf).is_ok_and(|count| count > 0) {}
            held.push(stream);
            if reads || held.len() == BURST {
                held.clear();
            }
        }
    });
    addr
}

/// Ends the load also when a test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// One at a time, since they measure time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is promised; of a build without optimization less is asked.
const RATIO_MAX: f64 = if cfg!(debug_assertions) { 4.0 } else { 2.0 };
const ROUNDS: usize = 5;
/// So many undisturbed attempts are enough, of so many at most; their median counts.
const ENOUGH: usize = 3;
const ATTEMPTS: usize = 6;
const BURST: usize = 5_000;
