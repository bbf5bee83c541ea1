//! Churn of all kinds of clients, and what is left is what should be: the table, the gauge, the
//! kernel and the descriptors agree, in between and at the end, memory has not grown, every kind of
//! client has met the end that it must, and nobody who behaved well has seen an error. Scenario 66.
//!
//! `cargo test` runs it for a few seconds; `RING_TEST_LONG` times as long it is `scripts/soak.sh`.
//! The clients are a process of their own (`soak/clients.rs`), so that this one's memory is the
//! server's. Where a link between two network namespaces can be had, some peers vanish from it.

#[path = "soak/clients.rs"]
mod clients;
mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use common::child::{self, Process};
use common::peer::tcp_addrs;
use common::world::{World, in_a_world};
use common::{config, connect, length, limit, start, wait_until};
use slipring::{CloseReason, Config, Connection, DeadlineKind, ErrorKind, Handle, Server};
use socket2::SockRef;

/// Short enough for many generations of the clients that are cut off.
fn impatient() -> Config {
    let config = config().first_byte_ms(500).message_ms(800).idle_ms(4_000).handler_ms(1_200);
    let config = config.write_stall_ms(600).half_close_ms(1_000).lifetime_ms(LIFETIME_MS);
    let config = config.heartbeat_ms(400).heartbeat_timeout_ms(1_200).min_rate_bytes_per_s(0);
    let config = config.keepalive_idle_s(1).keepalive_interval_s(1).user_timeout_ms(1_000);
    // The crowd is more than one address may have, and makes that the idle have to go.
    let config = config.connections_max(100).evict_percent(80).connections_per_ip_max(PER_IP_MAX);
    config.linger_ms(200).check_ms(100)
}

/// What each kind of client must have led to, again and again.
const REASONS: [CloseReason; 13] = [
    CloseReason::Finished,
    CloseReason::Served,
    CloseReason::PeerReset,
    CloseReason::FirstByte,
    CloseReason::Message,
    CloseReason::Idle,
    CloseReason::Handler,
    CloseReason::WriteStall,
    CloseReason::HalfClosed,
    CloseReason::Lifetime,
    CloseReason::Heartbeat,
    CloseReason::PerIp,
    CloseReason::Evicted,
];

#[test]
fn churn_of_all_kinds_of_clients_leaves_nothing_behind() {
    const TEST: &str = "churn_of_all_kinds_of_clients_leaves_nothing_behind";
    match child::role() {
        Some(role) if role.starts_with("clients ") => clients::be(&role),
        _ if in_a_world(TEST, |world| churn(TEST, Some(world))) => {}
        _ => {
            common::not_run("peers that vanish", "no namespace; all others churn");
            churn(TEST, None);
        }
    }
}

fn churn(test: &str, world: Option<&World>) {
    let fds_before = common::open_fds();
    // From the far side of a link it is reached by other addresses than loopback's.
    let any = if world.is_some() { "0.0.0.0:0" } else { "127.0.0.1:0" };
    let server = Server::new(impatient()).listen(any, obey);
    let (running, _) = start(server.listen("127.0.0.1:0", obey).heartbeat("?"));
    let handle = running.handle();
    let ports: Vec<u16> = tcp_addrs(&running).iter().map(|addr| addr.port()).collect();
    // The cores' rings and sockets, which stay as long as the server.
    let fds_idle = common::open_fds();
    let mut clients = Clients::start(test, &ports);
    let over = AtomicBool::new(false);
    let resident = thread::scope(|scope| {
        let _over = Over(&over);
        if let Some(world) = world {
            let (handle, over) = (handle.clone(), &over);
            scope.spawn(move || vanish_again_and_again(world, &handle, ports[0], over));
        }
        watch(&handle, &mut clients)
    });
    let exchanges = clients.end();
    let found = [&FOUND_IDLE, &FOUND_TALKING].map(|found| found.load(SeqCst));
    let stats = handle.stats();
    println!("soak: {exchanges} exchanges compared; {found:?} vanished peers found\n{stats}");

    // The clients are gone; their connections follow, within their deadlines.
    wait_until("every connection has ended", || handle.stats().total().live == 0);
    wait_until("the census says so", || handle.stats().total().census.total() == 0);
    assert!(handle.connections().expect("a list").is_empty());
    wait_until("the descriptors are closed", || common::open_fds() <= fds_idle);
    let total = handle.stats().total();
    assert_eq!(total.accepted, total.closed.total(), "{stats}");
    assert_eq!((total.mismatches, total.panics, total.unknown), (0, 0, 0), "{stats}");
    for reason in REASONS {
        assert!(total.closed.get(reason) >= length(), "too few: {reason:?}: {:?}", total.closed);
    }
    assert!(world.is_none() || found.iter().all(|found| *found >= length()), "{found:?}");
    let report = handle.drain(limit(5_000)).expect("a report");
    assert!(report.is_balanced(), "{report}");
    assert_eq!((report.total().leaked_operations, report.total().tasks), (0, 0), "{report}");
    drop(handle);
    running.join().expect("every core ends well");
    wait_until("the server's descriptors are closed", || common::open_fds() <= fds_before);
    is_flat(&resident);
}

/// Does what the first byte says, which it sends back first.
async fn obey(mut conn: Connection) -> slipring::Result<()> {
    let peer = conn.peer_addr().map(|peer| peer.ip().to_string());
    let mut command = [0];
    let result = follow(&mut conn, &mut command).await;
    let lost = result.as_ref().is_err_and(|error| error.kind() == ErrorKind::PeerDead);
    if lost && peer.is_some_and(|peer| peer.starts_with("10.77.")) {
        let found = if command == *b"t" { &FOUND_TALKING } else { &FOUND_IDLE };
        found.fetch_add(1, SeqCst);
    }
    result
}

async fn follow(conn: &mut Connection, command: &mut [u8; 1]) -> slipring::Result<()> {
    conn.read_exact(command).await?;
    conn.write(command).await?;
    match command[0] {
        b'o' => return Ok(()),
        // Lines.
        b'l' => {
            while let Some(line) = conn.read_until(b'\n', 10_000).await? {
                conn.write(&line).await?;
            }
            return Ok(());
        }
        // Looks at nothing.
        b's' => {
            slipring::time::sleep(Duration::from_secs(60)).await;
            return Ok(());
        }
        // Talks, so that what it says is not acknowledged any more; only the kernel sees to that.
        b't' => {
            conn.set_deadline(DeadlineKind::WriteStall, Duration::from_secs(10))?;
            loop {
                conn.write(b".").await?;
                slipring::time::sleep(Duration::from_millis(100)).await;
            }
        }
        b'i' => conn.set_deadline(DeadlineKind::Idle, Duration::from_millis(700))?,
        // Amid a message nobody is evicted before the kernel finds out that it has vanished.
        b'v' => {
            conn.set_deadline(DeadlineKind::Message, Duration::from_secs(60))?;
            conn.begin_message();
        }
        _ => {}
    }
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}

/// Peers on the far side of the link, some that are silent and some that are talked to, and then
/// their address is gone. The kernel has to find them out.
fn vanish_again_and_again(world: &World, handle: &Handle, port: u16, over: &AtomicBool) {
    let addrs = [1, 2].map(|n| (n, world.subnet(n)));
    for (n, mut addr) in addrs.into_iter().cycle() {
        if over.load(SeqCst) {
            return;
        }
        addr.set_port(port);
        let peers = world.far(move || {
            let peer = |n| {
                let mut stream = connect(addr);
                stream.write_all(if n % 2 == 0 { b"v" } else { b"t" }).expect("send");
                stream.read_exact(&mut [0]).expect("an answer");
                let none = Some(Duration::ZERO);
                SockRef::from(&stream).set_linger(none).expect("set SO_LINGER");
                stream
            };
            (0..6).map(peer).collect::<Vec<_>>()
        });
        world.vanish(n);
        let theirs = format!("10.77.{n}.2");
        wait_until("those who have vanished are found", || {
            let list = handle.connections().expect("a list");
            let peers = list.iter().filter_map(|info| info.peer);
            !peers.into_iter().any(|peer| peer.ip().to_string() == theirs)
        });
        drop(peers);
        world.reappear(n);
    }
}

/// Looks on, and returns the resident memory at each look. Now and then those clients pause that
/// come and go all the time, and then all who count have to agree.
fn watch(handle: &Handle, clients: &mut Clients) -> Vec<usize> {
    let length = Duration::from_secs(SECONDS) * length() as u32;
    let (since, mut resident, mut quiet) = (Instant::now(), Vec::new(), Vec::new());
    let (mut next_look, mut next_quiet) = (since, since + QUIET_EACH);
    while since.elapsed() < length {
        next_look += LOOK_EACH;
        thread::sleep(next_look.saturating_duration_since(Instant::now()));
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
        if Instant::now() >= next_quiet {
            clients.tell("pause");
            clients.process.line_after("paused");
            quiet.push(agreement(handle, &clients.ports));
            clients.tell("go");
            (next_look, next_quiet) = (Instant::now(), Instant::now() + QUIET_EACH);
        }
    }
    println!("soak: connections when all agreed: {quiet:?}");
    assert!(quiet.iter().any(|count| *count > 0), "there was nothing to agree on");
    resident
}

/// How many connections there are: by the table, by the gauge, in the kernel's list, and among this
/// process's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Count {
    table: usize,
    gauge: usize,
    kernel: usize,
    descriptors: usize,
}

impl Count {
    fn new(handle: &Handle, ports: &[u16]) -> Count {
        let sockets = sockets(ports);
        let descriptors = std::fs::read_dir("/proc/self/fd").expect("proc(5) has it");
        let names = descriptors.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let names = names.filter_map(|name| name.into_os_string().into_string().ok());
        let names = names.filter(|name| sockets.contains(name));
        Count {
            table: handle.connections().expect("a list").len(),
            gauge: handle.stats().total().live as usize,
            kernel: sockets.len(),
            descriptors: names.count(),
        }
    }

    fn agrees(self) -> bool {
        [self.gauge, self.kernel, self.descriptors] == [self.table; 3]
    }
}

/// Waits until all agree, twice in a row, as some connections still end. A count that is off by one
/// for good never agrees.
fn agreement(handle: &Handle, ports: &[u16]) -> usize {
    let give_up = Instant::now() + limit(10_000);
    loop {
        let counts = [Count::new(handle, ports), Count::new(handle, ports)];
        if counts[0] == counts[1] && counts[0].agrees() {
            return counts[0].table;
        }
        assert!(Instant::now() < give_up, "{counts:?}\n{}", handle.stats());
        thread::sleep(Duration::from_millis(5));
    }
}

/// The sockets of the server's ports in the kernel's list that are connections and that somebody
/// has open: the others have no inode. By the names that they have among the descriptors.
fn sockets(ports: &[u16]) -> BTreeSet<String> {
    const LISTENS: &str = "0A";
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").expect("the kernel's list");
    let locals: Vec<String> = ports.iter().map(|port| format!(":{port:04X}")).collect();
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields[1], fields[3], fields[9]);
        let ours = locals.iter().any(|port| local.ends_with(port));
        (ours && state != LISTENS && inode != "0").then(|| format!("socket:[{inode}]"))
    };
    table.lines().skip(1).filter_map(socket).collect()
}

/// The process of the clients.
struct Clients {
    process: Process,
    ports: Vec<u16>,
}

impl Clients {
    fn start(test: &str, ports: &[u16]) -> Clients {
        let role = format!("clients {} {}", ports[0], ports[1]);
        let mut command = child::again(test, &role, &[]);
        command.stdin(Stdio::piped());
        Clients { process: Process::start(command), ports: ports.to_vec() }
    }

    fn tell(&mut self, word: &str) {
        let input = self.process.child.stdin.as_mut().expect("a pipe");
        writeln!(input, "{word}").expect("the clients go on");
    }

    /// Lets each come to its end, and says how many exchanges were compared.
    fn end(mut self) -> u64 {
        self.tell("end");
        let exchanges = self.process.line_after("compared ").parse().expect("a number");
        let status = self.process.child.wait().expect("its end");
        assert!(status.success(), "a client has complained");
        exchanges
    }
}

/// Memory after the first third, which fills pools and queues, against the end.
fn is_flat(resident: &[usize]) {
    let sixth = resident.len() / 6;
    let median = |part: &[usize]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part[part.len() / 2]
    };
    let warm = median(&resident[2 * sixth..3 * sixth]);
    let last = median(&resident[resident.len() - sixth..]);
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    println!("soak: resident {:.2} MiB, then {:.2} MiB", mib(warm), mib(last));
    // A few seconds are not enough to fill everything.
    let slack = if length() > 1 { 1 << 20 } else { 4 << 20 };
    assert!(last <= warm + warm / 20 + slack, "memory grows: {warm} to {last} bytes");
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").expect("the kernel tells our memory");
    let pages: usize = text.split_whitespace().nth(1).expect("proc(5)").parse().expect("a number");
    pages * 4_096
}

/// Ends what runs beside also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Peers that had vanished and were found: silent ones, and those that were talked to.
static FOUND_IDLE: AtomicU64 = AtomicU64::new(0);
static FOUND_TALKING: AtomicU64 = AtomicU64::new(0);

/// How long it goes on, `RING_TEST_LONG` times; `scripts/soak.sh` knows it too.
const SECONDS: u64 = 8;
const LIFETIME_MS: u64 = 5_000;
const PER_IP_MAX: u32 = 40;
const LOOK_EACH: Duration = Duration::from_millis(100);
const QUIET_EACH: Duration = Duration::from_millis(1_500);
