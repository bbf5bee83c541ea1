//! Servers as processes: killed and started again, examined while they serve, made and ended
//! hundreds of times, and with a core that fails.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::{self, Process, again};
use crate::common::{
    config, connect, first_cpus, free_address, late, limit, not_run, open_fds, start, wait_until,
};
use slipring::{Config, Connection, Server};
use socket2::SockRef;

/// Scenario 26, case 35. The predecessor's ring holds the port for some milliseconds more than the
/// process lives; the successor tries again, and does not fail.
#[test]
fn a_killed_server_is_up_again_at_once() {
    const TEST: &str = "a_killed_server_is_up_again_at_once";
    if let Some(addr) = child::role() {
        return serve(&addr);
    }
    late::watch();
    let addr = free_address();
    let begin = || Process::start(again(TEST, &addr.to_string(), &[]));
    let mut server = begin();
    server.line_after("up");
    let mut took = Vec::new();
    for round in 0..20 * crate::common::length() {
        // Receives, sends and accepts are in flight when it is killed.
        let mut clients: Vec<_> = (0..40).map(|_| connect(addr)).collect();
        for client in clients.iter_mut().step_by(2) {
            client.write_all(b"w").expect("send");
            client.read_exact(&mut [0; 1_000]).expect("output without end");
        }
        for client in clients.iter_mut().skip(1).step_by(2) {
            ask(client, b"e");
        }
        let since = Instant::now();
        server.child.kill().expect("kill");
        // Not even waited for.
        let mut successor = begin();
        successor.line_after("up");
        ask(&mut connect(addr), b"e");
        took.push(since.elapsed());
        let most = limit(100) + RETRY + late::allowance();
        assert!(took.last() <= Some(&most), "round {round}: {took:?}");
        server = successor;
    }
    took.sort_unstable();
    let (half, last) = (took[took.len() / 2], took[took.len() - 1]);
    println!("{} times killed and up again: median {half:?}, max {last:?}", took.len());
    assert!(half < limit(100) + late::allowance(), "{took:?}");
}

/// Scenario 34. What only looks never joins the listeners of a port, where it would take
/// connections away and reset them when it ends.
#[test]
fn looking_at_a_configuration_beside_a_live_server_disturbs_nobody() {
    const TEST: &str = "looking_at_a_configuration_beside_a_live_server_disturbs_nobody";
    if child::role().is_some() {
        let config = Config::from_env().expect("a good environment");
        config.validate().expect("a good configuration");
        assert!(config.explain().to_string().contains(&config.listen_addresses()[0]));
        let examination = slipring::doctor::examine();
        assert!(examination.is_fit(), "{examination}");
        // Told what to do, and then not started.
        let server = config.listen_addresses().into_iter();
        drop(
            server
                .fold(Server::new(config), |server, addr| server.listen(addr, crate::common::echo)),
        );
        return;
    }
    let (running, addr) = crate::common::echo_server(config());
    let cores = running.handle().stats().cores().len();
    let (stop, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let asked = thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut asked = 0;
                    while !stop.load(SeqCst) {
                        ask(&mut connect(addr), b"x");
                        asked += 1;
                    }
                    asked
                })
            })
            .collect();
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                most.fetch_max(listeners(addr) as u64, SeqCst);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let _stop = OnDrop(|| stop.store(true, SeqCst));
        for round in 0..100 * crate::common::length() {
            let mut look = again(TEST, "look", &[]);
            look.env("SLIPRING_LISTEN", addr.to_string());
            let (succeeded, words) = child::run(look);
            assert!(succeeded, "round {round}: {words}");
        }
        stop.store(true, SeqCst);
        clients.into_iter().map(|client| client.join().expect("no error, no reset")).sum()
    });
    assert_eq!(most.load(SeqCst) as usize, cores, "somebody else listened, for a moment");
    crate::common::settle(running, asked);
}

/// Case 38. A thousand servers that are not started leave nothing behind, nor do hundreds that
/// were, one after the other, under a limit on locked memory that would hold ten of them.
#[test]
fn hundreds_of_servers_in_one_process_leak_nothing() {
    const TEST: &str = "hundreds_of_servers_in_one_process_leak_nothing";
    if child::role().is_none() {
        let command = again(TEST, "nobody", &["sh", "-c", "ulimit -l 1024; exec \"$0\" \"$@\""]);
        child::run_as_nobody(TEST, command);
        return;
    }
    let one_core = || config().cpus(&first_cpus(1));
    let (fds, maps) = (open_fds(), mappings());
    for _ in 0..1_000 {
        drop(Server::new(one_core()).listen("127.0.0.1:0", crate::common::echo));
    }
    let since = Instant::now();
    let rounds = 300 * crate::common::length();
    for round in 0..rounds {
        let (running, addr) =
            start(Server::new(one_core()).listen("127.0.0.1:0", crate::common::echo));
        if round % 100 == 0 {
            ask(&mut connect(addr), b"x");
        }
        running.handle().begin_drain(limit(10_000));
        let report = running.join().expect("no core failed");
        assert!(report.is_balanced(), "round {round}: {report}");
        assert_eq!(report.total().leaked_operations, 0, "round {round}: {report}");
        assert_eq!(open_fds(), fds, "round {round}");
    }
    println!("{rounds} servers, one after the other: {:?}", since.elapsed());
    // Threads' stacks and the allocator's arenas are kept for later, but not one for each server.
    let grown = mappings().saturating_sub(maps);
    assert!(grown < 100, "{grown} mappings more");
}

/// Case 40. A core that fails takes nobody with it: the other one drains, the failure is named,
/// and the exit status says that something was wrong.
#[test]
fn when_a_core_fails_the_others_drain_and_the_exit_status_says_so() {
    const TEST: &str = "when_a_core_fails_the_others_drain_and_the_exit_status_says_so";
    if let Some(addr) = child::role() {
        return serve(&addr);
    }
    if thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2) {
        return not_run(TEST, "a core that fails beside others needs two CPUs");
    }
    for round in 0..5 * crate::common::length() {
        let addr = free_address();
        let mut server = Process::start(again(TEST, &addr.to_string(), &[]));
        server.line_after("up");
        let mut clients: Vec<_> = (0..40).map(|_| connect(addr)).collect();
        for client in &mut clients {
            ask(client, b"e");
        }
        let cores: Vec<u8> = clients.iter_mut().map(|client| ask(client, b"c")).collect();
        let of = |core: u8| cores.iter().enumerate().filter(move |(_, of)| **of == core);
        let (failing, healthy) = (0, 1);
        let slow: Vec<_> = of(healthy).map(|(n, _)| n).take(3).collect();
        let fails = of(failing).map(|(n, _)| n).next().expect("some connection is on the core");
        slow.iter().for_each(|n| clients[*n].write_all(b"t").expect("send"));
        clients[fails].write_all(b"k").expect("send");
        let words = server.line_after("served ");
        assert!(words.contains("io_uring_enter"), "round {round}: {words}");
        let status = await_status(&mut server);
        assert_eq!(status.code(), Some(1), "round {round}: {status} {words}");
        for (n, _) in of(healthy) {
            let mut received = Vec::new();
            clients[n].read_to_end(&mut received).expect("a FIN, no reset");
            let expected: &[u8] = if slow.contains(&n) { b"tT" } else { b"" };
            assert_eq!(received, expected, "round {round}: {words}");
        }
        for (n, _) in of(failing) {
            // It ends, well or not.
            let _ = clients[n].read_to_end(&mut Vec::new());
        }
    }
}

/// Scenario 44. Whoever was paused has heard of nobody, which is not the peers' fault.
#[test]
fn a_server_that_was_paused_ends_no_peer_that_answers() {
    const TEST: &str = "a_server_that_was_paused_ends_no_peer_that_answers";
    const PEERS: usize = 1_000;
    if let Some(addr) = child::role() {
        return serve(&addr);
    }
    let addr = free_address();
    let mut server = Process::start(again(TEST, &addr.to_string(), &[]));
    server.line_after("up");
    let mut peers: Vec<_> = (0..PEERS).map(|_| connect(addr)).collect();
    for peer in &mut peers {
        ask(peer, b"e");
        peer.set_nonblocking(true).expect("set non-blocking");
    }
    let mut asked = 0;
    for round in 0..crate::common::length() {
        asked += answer(&mut peers, 2 * BEAT);
        server.signal(libc::SIGSTOP);
        asked += answer(&mut peers, 3 * (BEAT + BEAT_TIMEOUT));
        server.signal(libc::SIGCONT);
        asked += answer(&mut peers, 2 * (BEAT + BEAT_TIMEOUT));
        assert!(asked >= PEERS, "round {round}: {asked}");
    }
    server.signal(libc::SIGTERM);
    let words = server.line_after("served ");
    assert!(words.contains(&format!("{:<15}{PEERS}", "drained")), "{words}");
    assert!(!words.contains("heartbeat"), "{words}");
    println!("asked {asked} times: {words}");
}

/// Answers each heartbeat for so long. Returns how many there were; nobody may be ended.
fn answer(peers: &mut [TcpStream], time: Duration) -> usize {
    let (until, mut asked) = (Instant::now() + time, 0);
    while Instant::now() < until {
        for peer in &mut *peers {
            match peer.read(&mut [0]) {
                Ok(count) => {
                    assert_eq!(count, 1, "a healthy peer was ended");
                    asked += 1;
                    peer.write_all(b"!").expect("send");
                }
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}"),
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    asked
}

/// Serves on the address until it is drained, as a service would.
fn serve(addr: &str) {
    let config = config().cpus(&first_cpus(2)).bind_retry_ms(RETRY.as_millis() as u64);
    let config = config.heartbeat_ms(BEAT.as_millis() as u64);
    let config = config.heartbeat_timeout_ms(BEAT_TIMEOUT.as_millis() as u64);
    let server = Server::new(config);
    let server = server.before_bind(|it| SockRef::from(&it).set_send_buffer_size(16 * 1024));
    let server = server.listen_with(addr, |core| {
        let core = core.index as u8;
        move |conn| obey(conn, core)
    });
    let server = server.heartbeat(b"?").drain_on_signals();
    let running = server.start().expect("the server starts");
    println!("\nup");
    let served = running.join();
    let words = served.as_ref().map_or_else(ToString::to_string, ToString::to_string);
    println!("\nserved {}", words.replace('\n', "; "));
    std::process::exit(i32::from(served.is_err()));
}

/// Does what each byte says, which is sent back first.
async fn obey(mut conn: Connection, core: u8) -> slipring::Result<()> {
    static OUTPUT: [u8; 65_536] = [b'w'; 65_536];
    loop {
        let Some(command) = conn.fill_buf().await?.first().copied() else { return Ok(()) };
        conn.consume(1);
        if command == b'!' {
            continue;
        }
        conn.write(&[if command == b'c' { core } else { command }]).await?;
        match command {
            b'w' => loop {
                conn.send(&OUTPUT).await?;
            },
            b's' => slipring::time::sleep(Duration::from_secs(60)).await,
            b't' => {
                slipring::time::sleep(Duration::from_millis(300)).await;
                conn.write(b"T").await?;
            }
            b'k' => crate::common::filter::refuse_here(libc::SYS_io_uring_enter, libc::EPERM),
            _ => {}
        }
    }
}

/// Sends a command and reads one byte.
fn ask(client: &mut TcpStream, command: &[u8]) -> u8 {
    let mut answer = [0];
    client.write_all(command).expect("send");
    client.read_exact(&mut answer).expect("an answer");
    answer[0]
}

fn await_status(server: &mut Process) -> ExitStatus {
    let mut status = None;
    wait_until("the process has ended", || {
        status = server.child.try_wait().expect("wait");
        status.is_some()
    });
    status.expect("it has ended")
}

/// How many sockets listen on the port of that address.
fn listeners(addr: SocketAddr) -> usize {
    let sockets = std::fs::read_to_string("/proc/net/tcp").expect("read /proc/net/tcp");
    let port = format!(":{:04X}", addr.port());
    let listens = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some("0A")
    };
    sockets.lines().filter(listens).count()
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").expect("read /proc/self/maps").lines().count()
}

/// Does something on the way out, a panic included.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

/// How long a server tries to bind.
const RETRY: Duration = Duration::from_millis(1_000);
const BEAT: Duration = Duration::from_millis(400);
const BEAT_TIMEOUT: Duration = Duration::from_millis(400);
