//! A drain of very many connections: no turn gets long by their number, and nobody is cut off.
//!
//! An ordinary run has as many as an ordinary limit on descriptors allows, a long one 50 000, for
//! which it raises its own limit where it may.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::common::{child, config, late, length, limit, not_run, start, turn, wait_until};
use slipring::{CloseReason, Config, Connection, Handle, Result, Server};
use socket2::{Domain, Socket, Type};

/// Scenario 16, without a spread.
#[test]
fn very_many_idle_connections_are_drained_without_a_long_turn_and_the_active_ones_answered() {
    if let Some(role) = child::role() {
        return be_clients(&role);
    }
    let _turn = turn();
    let wanted = if length() > 1 { 50_000 } else { 4_000 };
    let active = 500;
    let idle = wanted.min(descriptors(wanted + active + 1_000) - active - 1_000);
    if idle < wanted {
        let why = format!("descriptors allow no more than {idle}");
        not_run(&format!("{wanted} idle connections"), why);
    }
    let config = config_for(idle + active);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", serve));
    let handle = running.handle();
    let test = concat!(
        "very_many_idle_connections_are_drained_without_a_long_turn_",
        "and_the_active_ones_answered"
    );
    let children = idle.div_ceil(12_000);
    let mut clients: Vec<_> = (0..children)
        .map(|n| {
            let (idle, active) = (idle / children, active / children);
            let role = format!("{addr} {n} {idle} {active}");
            let mut command = child::again(test, &role, &[]);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("a child")
        })
        .collect();
    let connects = (children * (idle / children) + children * (active / children)) as u64;
    let give_up = Instant::now() + limit(100_000);
    while handle.stats().total().bytes_sent < connects {
        assert!(Instant::now() < give_up, "{:?}", handle.stats().total());
        std::thread::sleep(Duration::from_millis(10));
    }
    measure_turns(&handle);
    wait_until("the cores are measured", || MEASURED.load(SeqCst) >= 2 * 20);
    LONGEST_US.store(0, SeqCst);
    LONGEST_CPU_US.store(0, SeqCst);
    late::watch();

    let (deadline, since) = (Duration::from_secs(20), Instant::now());
    handle.begin_drain(deadline);
    let idlers = (children * (idle / children)) as u64;
    let drained = || handle.stats().total().closed.get(CloseReason::Drained);
    wait_until("the idle ones have their FIN", || drained() >= idlers);
    let fins = since.elapsed();
    let report = running.join().expect("the report");
    let took = since.elapsed();
    let (longest_us, cpu_us) = (LONGEST_US.load(SeqCst), LONGEST_CPU_US.load(SeqCst));
    eprintln!("{idlers} FINs in {fins:?}");
    eprintln!("{connects} clients: {took:?}, longest turn {longest_us} us, {cpu_us} us of CPU");
    eprintln!("{report}");
    for client in &mut clients {
        assert!(client.wait().expect("its end").success(), "each has its answer and its FIN");
    }
    assert!(took < deadline, "{took:?}");
    // Two cores share them. On a machine whose clients take their part it was half of that.
    let most = limit(50) + FIN_EACH * (idlers / 2) as u32 * limit(1).as_millis() as u32;
    assert!(fins < most + late::allowance(), "{fins:?} is more than {most:?}");
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().accepted, connects, "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
    assert!(cpu_us <= limit(20).as_micros() as u64, "a turn of {cpu_us} us: {report}");
    let most = limit(20) + late::allowance();
    assert!(u128::from(longest_us) <= most.as_micros(), "a turn of {longest_us} us: {report}");
}

/// Some of the clients: `address, number of the child, idle ones, active ones`.
fn be_clients(role: &str) {
    let mut words = role.split(' ');
    let addr: SocketAddr = words.next().and_then(|addr| addr.parse().ok()).expect("an address");
    let mut number = || words.next().and_then(|word| word.parse().ok()).expect("a number");
    let (child, idle, active): (usize, usize, usize) = (number(), number(), number());
    descriptors(idle + active + 100);
    let mut idlers: Vec<_> = (0..idle).map(|_| ask(addr, child, b"x")).collect();
    let mut workers: Vec<_> = (0..active).map(|_| ask(addr, child, b"w")).collect();
    for worker in &mut workers {
        let mut answer = Vec::new();
        worker.read_to_end(&mut answer).expect("an answer and a FIN");
        assert_eq!(answer, b"done");
    }
    for idler in &mut idlers {
        assert_eq!(idler.read(&mut [0]).expect("a FIN, no reset"), 0);
    }
}

/// Scenario 16, with a spread.
#[test]
fn closes_are_spread_evenly_over_the_time_given() {
    let _turn = turn();
    let count = 2_000;
    descriptors(2 * count + 1_000);
    let config = config_for(count);
    let (running, addr) =
        start(Server::new(config.close_spread_ms(1_000)).listen("127.0.0.1:0", serve));
    let clients: Vec<_> = (0..count).map(|n| ask(addr, n, b"x")).collect();
    clients.iter().for_each(|client| client.set_nonblocking(true).expect("set non-blocking"));
    late::watch();
    measure_turns(&running.handle());
    LONGEST_CPU_US.store(0, SeqCst);
    let since = Instant::now();
    running.handle().begin_drain(Duration::from_secs(20));
    let mut open: Vec<_> = clients.iter().collect();
    let mut quarters = [0; 4];
    while !open.is_empty() {
        let before = open.len();
        open.retain(|client| !matches!((&mut &**client).read(&mut [0]), Ok(0)));
        let quarter = (since.elapsed().as_millis() / 250).min(3) as usize;
        quarters[quarter] += before - open.len();
        // The cores, which are measured, need a CPU more than this does.
        std::thread::sleep(Duration::from_millis(2));
        assert!(since.elapsed() < limit(10_000), "{} are still open", open.len());
    }
    let (took, cpu_us) = (since.elapsed(), LONGEST_CPU_US.load(SeqCst));
    eprintln!(
        "{count} closes in {took:?}, by quarter {quarters:?}, longest turn {cpu_us} us of CPU"
    );
    assert!(cpu_us <= limit(20).as_micros() as u64, "a turn of {cpu_us} us");
    assert!(took >= Duration::from_millis(900), "{took:?}");
    assert!(took < limit(1_200) + late::allowance(), "{took:?}");
    if late::allowance() < Duration::from_millis(40) {
        // Each is up to an eighth late, by which the last quarter gets some of the third.
        let even = count / 4 * 7 / 10..=count / 4 * 13 / 10;
        let fair = quarters.iter().all(|closed| even.contains(closed));
        assert!(fair, "{quarters:?}");
    } else {
        not_run("the evenness of the closes", format!("the machine is too busy: {quarters:?}"));
    }
    assert!(running.join().expect("the report").is_balanced());
}

/// Echoes; a worker is answered when it has worked on, half a second into the drain.
async fn serve(mut conn: Connection) -> Result<()> {
    while let Some(chunk) = conn.recv().await? {
        let works = &*chunk == b"w";
        conn.send(chunk).await?;
        if works {
            conn.closing().await;
            slipring::time::sleep(Duration::from_millis(500)).await;
            conn.write(b"done").await?;
        }
    }
    Ok(())
}

/// A task on each core that comes back each turn, and sees how long it was away.
fn measure_turns(handle: &Handle) {
    for core in 0..handle.stats().cores().len() {
        let measure = || async {
            let _ = slipring::task::detach("turns", async {
                loop {
                    let since = (Instant::now(), thread_cpu());
                    slipring::task::yield_now().await;
                    let cpu = thread_cpu() - since.1;
                    LONGEST_US.fetch_max(since.0.elapsed().as_micros() as u64, SeqCst);
                    LONGEST_CPU_US.fetch_max(cpu.as_micros() as u64, SeqCst);
                    MEASURED.fetch_add(1, SeqCst);
                }
            });
        };
        handle.spawn_on(core, measure).expect("it is up");
    }
}

/// The time that this thread was on a CPU, which nobody else on the machine makes longer.
fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is written before the call returns.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The most that a core may take for each FIN when all are due at once.
const FIN_EACH: Duration = Duration::from_micros(150);

static LONGEST_US: AtomicU64 = AtomicU64::new(0);
static LONGEST_CPU_US: AtomicU64 = AtomicU64::new(0);
static MEASURED: AtomicU64 = AtomicU64::new(0);

/// Connects from one of several addresses, as one has too few ports, and has a byte answered.
fn ask(addr: SocketAddr, n: usize, message: &[u8]) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let from = SocketAddr::from(([127, 0, 1, (n % 8) as u8 + 1], 0));
    socket.bind(&from.into()).expect("bind");
    socket.connect(&addr.into()).expect("connect");
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(limit(100_000))).expect("set a time limit");
    stream.write_all(message).expect("send");
    stream.read_exact(&mut [0]).expect("an answer");
    stream
}

/// A server of two cores for so many connections.
fn config_for(connections: usize) -> Config {
    let config = config().cpus("0-1").connections_max(connections + 100).idle_ms(600_000);
    // Nearly all places are taken, and nobody is to go for that.
    config.backlog(4_096).lifetime_ms(3_600_000).evict_percent(0)
}

/// Raises the limit on descriptors as far as needed, if it may, and says what it is then.
fn descriptors(needed: usize) -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is written before the call returns.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    let needed = (needed as libc::rlim_t).max(limit.rlim_cur);
    for soft in [needed, limit.rlim_max.min(needed)] {
        let wanted = libc::rlimit { rlim_cur: soft, rlim_max: limit.rlim_max.max(soft) };
        // SAFETY: the limit is only read.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const wanted) } == 0 {
            return soft as usize;
        }
    }
    limit.rlim_cur as usize
}
