//! A core that has much to do for one, for newcomers or for those whose time is over, and a hundred
//! others who go on as before.
//!
//! Measured in pairs: in every other round the same load goes to a plain thread of this process, on
//! the core's CPU, so that the machine is as busy and only slipring's core is not. Medians of the
//! rounds count, and of the attempts.
//!
//! Where others keep the CPUs busy, the scheduler lets a core that works wait for milliseconds, and
//! one that has slept not at all, which says nothing about slipring: such attempts don't count.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{
    config, connect, first_cpus, late, length, limit, not_run, pin, settle, start, turn, wait_until,
};
use slipring::{Config, Connection, DeadlineKind, Running, Server};

/// Case 9, with all buffers: one connection that floods as fast as loopback goes, and a hundred
/// that ping.
#[test]
fn a_flood_on_one_connection_at_most_doubles_the_p99_of_a_hundred_others() {
    let read_all = |listener: TcpListener| {
        let mut buf = vec![0; 1 << 16];
        for mut stream in listener.incoming().flatten() {
            while stream.read(&mut buf).is_ok_and(|count| count > 0) {}
        }
    };
    compare("flood", TWICE, read_all, |target, round| {
        round.begin();
        let mut flood = connect(target);
        flood.write_all(b"f").expect("send");
        let piece = vec![7; 1 << 16];
        let mut bytes = 0;
        while !round.is_over() {
            bytes += flood.write(&piece).expect("send");
        }
        assert!(bytes > 1 << 20, "the flood was a trickle of {bytes} bytes");
    });
}

/// Scenario 63: thousands of connects in one go, and a hundred connections that ping.
#[test]
fn a_burst_of_connects_at_most_doubles_the_p99_of_a_hundred_active_connections() {
    let hold_all = |listener: TcpListener| {
        let mut held = Vec::new();
        for stream in listener.incoming().flatten() {
            held.push(stream);
            if held.len() == BURST {
                held.clear();
            }
        }
    };
    compare("burst", TWICE, hold_all, |target, round| {
        round.begin();
        let burst: Vec<_> = (0..BURST).map(|_| connect(target)).collect();
        round.end();
        drop(burst);
    });
}

/// Four connections that take one response of 16 MiB after the other, from one buffer or written
/// in pieces, and a hundred that ping.
#[test]
fn big_responses_at_most_quadruple_the_p99_of_a_hundred_others() {
    let respond = |listener: TcpListener| {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                while stream.read_exact(&mut [0]).is_ok() && stream.write_all(response()).is_ok() {}
            });
        }
    };
    compare("responses", FOUR_TIMES, respond, |target, round| {
        round.begin();
        let take = |kind: &[u8]| {
            let (mut stream, mut piece) = (connect(target), vec![0; 1 << 16]);
            let mut responses = 0;
            while !round.is_over() {
                stream.write_all(kind).expect("send");
                for _ in 0..response().len() / piece.len() {
                    stream.read_exact(&mut piece).expect("a piece");
                }
                responses += 1;
            }
            assert!(responses > 0 && piece.iter().all(|byte| *byte == 7));
        };
        thread::scope(|scope| {
            for kind in [b"b", b"w", b"b", b"w"] {
                scope.spawn(|| take(kind));
            }
        });
    });
}

/// Thousands of connections whose time is over in the same moment, and a hundred that ping. Those
/// are measured from the first that is ended to the last, of which a p99 of all would tell nothing;
/// and ending connections takes so much longer than a ping that it is held against a time.
#[test]
fn deadlines_of_one_moment_keep_the_p99_of_a_hundred_others_below_five_milliseconds() {
    let end_all = |listener: TcpListener| {
        let mut held = Vec::new();
        for stream in listener.incoming().flatten() {
            held.push(stream);
            if held.len() == BURST {
                let ends = held.iter_mut().map(|stream| {
                    let mut message = [0; 9];
                    stream.read_exact(&mut message).expect("when it ends");
                    end_ms(&message[1..])
                });
                let end = Duration::from_millis(ends.max().expect("some"));
                wait_until("it is time", || EPOCH.elapsed() >= end);
                held.clear();
            }
        }
    };
    compare("deadlines", Most::P99(P99_MAX), end_all, |target, round| {
        let mut held: Vec<_> = (0..BURST).map(|_| connect(target)).collect();
        let end_ms = (EPOCH.elapsed() + TIME_TO_SAY).as_millis() as u64;
        let mut message = [b'd'; 9];
        message[1..].copy_from_slice(&end_ms.to_be_bytes());
        for stream in &mut held {
            stream.write_all(&message).expect("send");
        }
        let said_ms = EPOCH.elapsed().as_millis() as u64;
        assert!(said_ms < end_ms, "they end {} ms too early to be told", said_ms - end_ms);
        for mut stream in held {
            // Its end, or a reset.
            let _ = stream.read(&mut [0]);
            round.begin();
        }
        round.end();
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
/// `beside` is what does the same to the load as the server does.
fn compare(
    what: &str,
    most: Most,
    beside: impl FnOnce(TcpListener) + Send + 'static,
    load: impl Fn(SocketAddr, &Round) + Sync,
) {
    let _turn = turn();
    let (running, addr) = serve(one_core().connections_max(6_000).evict_percent(0));
    // The core and what stands in for it have a CPU of their own, and who loads and pings another.
    let cpus: Vec<u16> = first_cpus(2).split(',').map(|cpu| cpu.parse().expect("a CPU")).collect();
    let [own, others_cpu] = cpus[..] else {
        return not_run(what, "it takes two CPUs");
    };
    let sink = sink(own, beside);
    pin(others_cpu);
    go_first();
    let mut clients: Vec<_> = (0..100).map(|_| connect(addr)).collect();
    ping(&mut clients);
    let (mut seen, mut figures) = (Vec::new(), Vec::new());
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
            figures.push(most.figure(on, beside));
        }
        if figures.len() == ENOUGH {
            break;
        }
    }
    println!("{what}: median p99 with the load on the core, beside it, others' CPU time: {seen:?}");
    figures.sort_by(f64::total_cmp);
    if figures.len() < ENOUGH {
        not_run(what, format!("others keep the CPUs busy: {seen:?}"));
        assert!(seen.iter().all(|(on, ..)| *on < limit(200)), "{what}: {seen:?}");
    } else {
        println!("{what}: {figures:.2?} of at most 1");
        assert!(figures[ENOUGH / 2] <= 1.0, "{what}: {figures:.2?} of {most:?}: {seen:?}");
    }
    drop(clients);
    let connects = running.handle().stats().total().accepted;
    settle(running, connects);
}

/// What is promised of a p99; of a build without optimization a part of it is asked.
#[derive(Clone, Copy, Debug)]
enum Most {
    /// So many times the p99 with the same load beside the core.
    Ratio(f64),
    P99(Duration),
}

impl Most {
    /// What part of that a p99 is.
    fn figure(self, on: Duration, beside: Duration) -> f64 {
        let part = match self {
            Most::Ratio(ratio) => on.as_secs_f64() / beside.as_secs_f64() / ratio,
            Most::P99(time) => on.as_secs_f64() / time.as_secs_f64(),
        };
        if cfg!(debug_assertions) { part / 2.0 } else { part }
    }
}

/// One load: when the pings begin to count, and when they are over, which either side may say.
#[derive(Default)]
struct Round {
    begun: AtomicBool,
    over: AtomicBool,
}

impl Round {
    fn begin(&self) {
        self.begun.store(true, SeqCst);
    }

    fn end(&self) {
        self.over.store(true, SeqCst);
    }

    fn is_over(&self) -> bool {
        self.over.load(SeqCst)
    }
}

/// The p99 of the pings while the load goes to `target`.
fn one_round(
    clients: &mut [TcpStream],
    target: SocketAddr,
    load: &(impl Fn(SocketAddr, &Round) + Sync),
) -> Duration {
    let round = Round::default();
    let mut took = Vec::new();
    thread::scope(|scope| {
        let load = scope.spawn(|| load(target, &round));
        let _over = Over(&round.over);
        wait_until("it has begun", || round.begun.load(SeqCst) || load.is_finished());
        // As long as it lasts, and half a second of what lasts for ever.
        let since = Instant::now();
        while !round.is_over() && since.elapsed() < Duration::from_millis(500) || took.is_empty() {
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

/// Echoes, unless a connection's first byte asks for something else.
fn serve(config: Config) -> (Running, SocketAddr) {
    start(Server::new(config).listen("127.0.0.1:0", |mut conn: Connection| async move {
        let mut asked = None;
        while let Some(chunk) = conn.recv().await? {
            match *asked.get_or_insert(chunk[0]) {
                b'f' => {}
                b'b' => conn.send(response()).await?,
                b'w' => conn.write(response()).await?,
                b'd' => {
                    let left = Duration::from_millis(end_ms(&chunk[1..])) - EPOCH.elapsed();
                    conn.set_deadline(DeadlineKind::Idle, left)?;
                }
                _ => conn.send(chunk).await?,
            }
        }
        Ok(())
    }))
}

fn response() -> &'static [u8] {
    static RESPONSE: LazyLock<Vec<u8>> = LazyLock::new(|| vec![7; 16 << 20]);
    &RESPONSE
}

/// When a connection is to end, in milliseconds since the epoch.
fn end_ms(message: &[u8]) -> u64 {
    u64::from_be_bytes(message.try_into().expect("eight bytes"))
}

/// Has this thread, but none that it starts, run before all ordinary ones, where it may (sched(7)):
/// who pings shares a CPU with who loads, and that wait is not the core's.
fn go_first() {
    let first = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: reads one value that lives during the call.
    unsafe { libc::sched_setscheduler(0, policy, &raw const first) };
}

/// A plain thread that does to connections what it is told.
fn sink(cpu: u16, serve: impl FnOnce(TcpListener) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("an address");
    thread::spawn(move || {
        pin(cpu);
        serve(listener);
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

const TWICE: Most = Most::Ratio(2.0);
const FOUR_TIMES: Most = Most::Ratio(4.0);
const P99_MAX: Duration = Duration::from_millis(5);
const ROUNDS: usize = 5;
/// So many undisturbed attempts are enough, of so many at most; their median counts.
const ENOUGH: usize = 3;
const ATTEMPTS: usize = 6;
const BURST: usize = 5_000;
/// From when the last of a burst is there, for telling all of them when they end.
const TIME_TO_SAY: Duration = Duration::from_millis(800);
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
