//! Churn of all kinds of clients, and at the end nothing is left but what should be: the table,
//! the gauge, the kernel and the descriptors agree, memory has not grown, and nobody who behaved
//! well has seen an error. Scenario 66.
//!
//! `cargo test` runs it for a few seconds; `RING_TEST_LONG` times as long it is `scripts/soak.sh`.
//! The clients are threads of this process, a few for each kind, each with one connection at a
//! time or some at once.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::{config, limit, wait_until};
use slipring::{Config, Handle};

/// What a client is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Asks, gets its answer, closes; every byte is compared.
    Good,
    /// Half-closes, and reads to the end.
    HalfCloses,
    /// Sends a byte now and then.
    Slow,
    /// Sends, then neither reads, writes nor closes until the server has given it up.
    Vanishes,
    /// Resets at any moment.
    Resets,
    /// Sends as fast as it can, and reads nothing.
    Firehose,
}

const CLIENTS: [(Manner, usize); 6] = [
    (Manner::Good, 3),
    (Manner::HalfCloses, 2),
    (Manner::Slow, 4),
    (Manner::Vanishes, 8),
    (Manner::Resets, 2),
    (Manner::Firehose, 2),
];

/// Short enough for many generations of the clients that are cut off.
fn impatient() -> Config {
    config()
        .first_byte_ms(500)
        .idle_ms(700)
        .message_ms(1_000)
        .write_stall_ms(600)
        .half_close_ms(1_000)
        .lifetime_ms(LIFETIME_MS)
        .linger_ms(200)
        .check_ms(100)
}

#[test]
fn churn_of_all_kinds_of_clients_leaves_nothing_behind() {
    let fds_before = common::open_fds();
    let (running, addr) = common::echo_server(impatient());
    let handle = running.handle();
    // The cores' rings and sockets, which stay as long as the server.
    let fds_idle = common::open_fds();
    let length = Duration::from_millis(SECONDS * 1_000) * common::length() as u32;
    let (stop, good) = (AtomicBool::new(false), AtomicU64::new(0));
    let resident = std::thread::scope(|scope| {
        for (manner, count) in CLIENTS {
            for n in 0..count {
                let (stop, good) = (&stop, &good);
                scope.spawn(move || {
                    let mut turn = n as u64 * 7919;
                    while !stop.load(SeqCst) {
                        turn += 1;
                        good.fetch_add(be(manner, addr, turn, stop), SeqCst);
                    }
                });
            }
        }
        let watched = watch(&handle, length);
        stop.store(true, SeqCst);
        watched
    });
    let stats = handle.stats();
    eprintln!("soak: {} exchanges that were compared in {length:?}\n{stats}", good.load(SeqCst));
    assert!(good.load(SeqCst) > 20 * SECONDS, "hardly anything happened");

    // The clients are gone; their connections follow, within their deadlines.
    wait_until("every connection has ended", || handle.stats().total().live == 0);
    wait_until("the census says so", || handle.stats().total().census.total() == 0);
    assert!(handle.connections().expect("a list").is_empty());
    wait_until("the kernel has none", || established(addr) == 0);
    wait_until("the descriptors are closed", || common::open_fds() <= fds_idle);
    let total = handle.stats().total();
    assert_eq!(total.accepted, total.closed.total(), "{}", handle.stats());
    assert_eq!((total.mismatches, total.panics, total.unknown), (0, 0, 0), "{}", handle.stats());
    let report = handle.drain(limit(5_000)).expect("a report");
    assert!(report.is_balanced(), "{report}");
    assert_eq!((report.total().leaked_operations, report.total().tasks), (0, 0), "{report}");
    drop(handle);
    running.join().expect("every core ends well");
    wait_until("the server's descriptors are closed", || common::open_fds() <= fds_before);
    is_flat(&resident);
}

/// Looks on, and returns the resident memory at each look.
fn watch(handle: &Handle, length: Duration) -> Vec<usize> {
    let (since, mut resident) = (Instant::now(), Vec::new());
    let mut next = since;
    while since.elapsed() < length {
        next += LOOK_EACH;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        resident.push(resident_bytes());
        let list = handle.connections().expect("a list");
        let (total, listed) = (handle.stats().total(), list.len());
        assert_eq!(total.mismatches, 0, "{}", handle.stats());
        // Nobody stays for longer than its deadlines allow, wherever it is stuck.
        if let Some(oldest) = list.oldest() {
            let most = limit(LIFETIME_MS * 9 / 8 + 2_000);
            assert!(oldest.age < most, "{:?} is too old:\n{list}", oldest.age);
        }
        assert!(list.silent_cores().is_empty(), "{listed} of {}: {list}", total.live);
    }
    resident
}

/// The last third against the first, whose beginning fills pools and queues.
fn is_flat(resident: &[usize]) {
    let third = resident.len() / 3;
    let median = |part: &[usize]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part[part.len() / 2]
    };
    let (first, last) = (median(&resident[third / 2..third]), median(&resident[2 * third..]));
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    eprintln!("soak: resident {:.1} MiB, then {:.1} MiB", mib(first), mib(last));
    assert!(last <= first + first / 4 + (2 << 20), "memory grows: {first} to {last} bytes");
}

/// One connection's life, or a try. Returns how many exchanges were compared.
fn be(manner: Manner, addr: SocketAddr, turn: u64, stop: &AtomicBool) -> u64 {
    let Ok(mut stream) = TcpStream::connect_timeout(&addr, limit(10_000)) else {
        assert!(!matches!(manner, Manner::Good | Manner::HalfCloses), "{manner:?}: no connection");
        return 0;
    };
    stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    stream.set_write_timeout(Some(limit(10_000))).expect("set a time limit");
    let bytes = random(turn);
    match manner {
        Manner::Good => {
            for piece in bytes.chunks(997) {
                stream.write_all(piece).expect("a good client can send");
                let mut answer = vec![0; piece.len()];
                stream.read_exact(&mut answer).expect("a good client gets its answer");
                assert!(answer == piece, "another connection's bytes");
            }
            bytes.chunks(997).len() as u64
        }
        Manner::HalfCloses => {
            stream.write_all(&bytes).expect("a good client can send");
            stream.shutdown(Shutdown::Write).expect("half-close");
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("a good client gets its answer and a FIN");
            assert!(answer == bytes, "another connection's bytes");
            1
        }
        Manner::Slow => {
            for byte in bytes.iter().take(20) {
                if stream.write_all(&[*byte]).is_err() || stop.load(SeqCst) {
                    break;
                }
                pause(turn % 300);
            }
            0
        }
        Manner::Vanishes => {
            // Some say nothing at all, some a little, some leave more unread than the kernel holds.
            stream.set_write_timeout(Some(Duration::from_millis(100))).expect("set a time limit");
            for _ in 0..[0, 1, 1, 1_000][turn as usize % 4] {
                if stream.write_all(&bytes).is_err() {
                    break;
                }
            }
            wait_for_the_end(&stream, stop);
            0
        }
        Manner::Resets => {
            let _ = stream.write_all(&bytes[..turn as usize % bytes.len()]);
            let socket = socket2::SockRef::from(&stream);
            socket.set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
            pause(turn % 3);
            0
        }
        Manner::Firehose => {
            let until = Instant::now() + Duration::from_millis(turn % 1_500);
            stream.set_write_timeout(Some(Duration::from_millis(50))).expect("set a time limit");
            while Instant::now() < until && !stop.load(SeqCst) {
                match stream.write(&bytes) {
                    Err(error) if error.kind() != ErrorKind::WouldBlock => break,
                    _ => {}
                }
            }
            0
        }
    }
}

/// Holds a connection, without a word, until the server has ended it.
fn wait_for_the_end(stream: &TcpStream, stop: &AtomicBool) {
    let socket = socket2::SockRef::from(stream);
    let since = Instant::now();
    // The FIN may be behind what it never reads.
    while !stop.load(SeqCst) && since.elapsed() < Duration::from_millis(LIFETIME_MS) {
        stream.set_nonblocking(true).expect("set non-blocking");
        let mut byte = [std::mem::MaybeUninit::uninit(); 1];
        let ended = matches!(socket.peek(&mut byte), Ok(0));
        if ended || !matches!(socket.take_error(), Ok(None)) {
            return;
        }
        pause(20);
    }
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// Bytes that differ from turn to turn, 1 to 60 KiB of them.
fn random(turn: u64) -> Vec<u8> {
    let mut state = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words = 128 + next() % 7_500;
    (0..words).flat_map(|_| next().to_le_bytes()).collect()
}

/// The server's connections in the kernel's eyes that are neither closed nor in TIME_WAIT.
fn established(addr: SocketAddr) -> usize {
    const CONNECTED: [&str; 6] = ["01", "04", "05", "08", "09", "0B"];
    let table = std::fs::read_to_string("/proc/self/net/tcp").expect("the kernel lists them");
    let local = format!(":{:04X}", addr.port());
    let ours = table.lines().skip(1).filter(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_ours = fields.next().is_some_and(|name| name.ends_with(&local));
        is_ours && fields.nth(1).is_some_and(|state| CONNECTED.contains(&state))
    });
    ours.count()
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").expect("the kernel tells our memory");
    let pages: usize = text.split_whitespace().nth(1).expect("proc(5)").parse().expect("a number");
    pages * 4_096
}

const SECONDS: u64 = 9;
const LIFETIME_MS: u64 = 3_000;
const LOOK_EACH: Duration = Duration::from_millis(100);
