//! SIGTERM under load, to a server in a process of its own: this binary, started again with
//! `RING_TEST_CHILD`.
//!
//! 1. A thousand connections are brought into five states, each confirmed by a byte of the server.
//! 2. The process gets a SIGTERM while some more connections send requests as fast as they can.
//! 3. Half of those in the middle of a message send the rest of it.
//! 4. The process is waited for, and then every client says how its connection ended.
//!
//! `RING_TEST_LONG=20` runs the hundred rounds that the promise is measured by.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::load::{Load, Outcome, Outcomes, answer_one, may_filter};
use crate::common::{config, free_address, length, limit, turn, wait_until};
use slipring::{Connection, DrainReport, Server};
use socket2::{Domain, SockRef, Socket, Type};

const EACH: usize = 200;
const CONNECTIONS: usize = 5 * EACH;
const LOAD: usize = 8;
const ROUNDS: u64 = 5;
const BURSTS: u64 = 8;
const DRAIN_MS: u64 = 1_000;
const MESSAGE: usize = 100;
const POLL: Duration = Duration::from_micros(500);

/// What a client asks for, and then how it stands when the signal comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It has never sent a byte.
    New,
    /// It was answered and sends nothing more.
    Idle,
    /// It has sent half a message.
    MidMessage,
    /// It does not take what the handler sends.
    Blocked,
    /// Its handler sleeps and looks at nothing.
    Asleep,
}

const STATES: [State; 5] =
    [State::New, State::Idle, State::MidMessage, State::Blocked, State::Asleep];

/// How a connection ended, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// A whole answer, then the end of the stream.
    Answered,
    /// The end of the stream, no byte before it.
    Eof,
    /// The end of the stream in the middle of the output.
    Truncated,
    Reset,
    TimedOut,
}

#[test]
fn sigterm_ends_a_thousand_connections_in_every_state_within_the_deadline() {
    let _turn = turn();
    let mut took = Vec::new();
    for round in 0..ROUNDS * length() {
        took.push(one_round(round));
    }
    took.sort_unstable();
    let at = |share: usize| took[(took.len() - 1) * share / 100];
    println!(
        "{} rounds of {CONNECTIONS} connections, drain deadline {DRAIN_MS} ms: the process ended \
         after min {:?}, median {:?}, p99 {:?}, max {:?}",
        took.len(),
        at(0),
        at(50),
        at(99),
        at(100)
    );
}

fn one_round(round: u64) -> Duration {
    let mut server = ServerProcess::start("drain");
    let addr = server.addr;
    let mut clients: Vec<_> = (0..CONNECTIONS).map(|n| Client::new(addr, STATES[n % 5])).collect();
    for client in &mut clients {
        client.await_state();
    }

    let mut load: Vec<_> = (0..LOAD).map(|_| crate::common::connect(addr)).collect();
    let stop = AtomicBool::new(false);
    let (elapsed, late) = std::thread::scope(|scope| {
        let load = scope.spawn(|| ask_until_the_end(&mut load, &stop));
        std::thread::sleep(Duration::from_millis(20));
        let since = Instant::now();
        server.signal(libc::SIGTERM);
        let mid_message = clients.iter_mut().filter(|client| client.state == State::MidMessage);
        for client in mid_message.step_by(2) {
            client.complete();
        }
        let late = server.await_end();
        let elapsed = since.elapsed();
        stop.store(true, Ordering::Relaxed);
        load.join().expect("the load's connections end well");
        (elapsed, late)
    });
    TcpListener::bind(addr).expect("the port is free as soon as the process is gone");

    let (status, report) = server.outcome();
    assert_eq!(status, Some(0), "round {round}: exit status, report {report}");
    for client in clients {
        let (state, completed) = (client.state, client.completed);
        let end = client.read_to_end();
        let expected = match state {
            State::New | State::Idle | State::Asleep => End::Eof,
            State::MidMessage if completed => End::Answered,
            State::MidMessage => End::Eof,
            State::Blocked => End::Truncated,
        };
        assert_eq!(end, expected, "round {round}: {state:?}, completed: {completed}, {report}");
    }

    assert!(report.contains("\"balanced\":true"), "{report}");
    assert_eq!(number(&report, "accepted") as usize, CONNECTIONS + LOAD, "{report}");
    assert_eq!(number(&report, "drained") as usize, 2 * EACH + EACH / 2 + LOAD, "{report}");
    assert_eq!(number(&report, "forced") as usize, 2 * EACH + EACH / 2, "{report}");
    assert_eq!(number(&report, "leaked_operations"), 0.0, "{report}");
    assert!(number(&report, "tasks_forced") as usize >= EACH, "{report}");
    // On a machine that does other things too, each hand-over on the way to the end (the core's
    // last turn, its thread, the process, this one) may be as late as the waiting here was.
    let allowed = Duration::from_millis(DRAIN_MS) + limit(100) + 4 * late;
    let phases = ["lame_duck", "stop_accept", "drain_connections", "force", "down"];
    let inside_ms: f64 = phases.iter().map(|phase| number(&report, phase)).sum();
    assert!(inside_ms <= allowed.as_secs_f64() * 1e3, "round {round}: {inside_ms} ms, {report}");
    assert!(elapsed <= allowed, "round {round}: the process took {elapsed:?}: {report}");
    elapsed
}

/// Scenario 20, case 35.
#[test]
fn a_second_signal_forces() {
    let _turn = turn();
    let mut server = ServerProcess::start("patient");
    let mut clients: Vec<_> = STATES.iter().map(|state| Client::new(server.addr, *state)).collect();
    for client in &mut clients {
        client.await_state();
    }
    server.signal(libc::SIGINT);
    std::thread::sleep(Duration::from_millis(50));
    assert!(server.child.try_wait().expect("wait").is_none(), "the drain waits for the sleeper");
    let since = Instant::now();
    server.signal(libc::SIGTERM);
    server.await_end();
    assert!(since.elapsed() < limit(200), "took {:?}", since.elapsed());
    let (status, report) = server.outcome();
    assert_eq!(status, Some(0), "{report}");
    assert!(report.contains("\"balanced\":true"), "{report}");
    for client in clients {
        let end = client.read_to_end();
        assert!(matches!(end, End::Eof | End::Truncated), "{end:?} {report}");
    }
}

/// Case 35. Clients connect as fast as they can, and nobody of them knows of the signal.
#[test]
fn a_sigterm_in_a_burst_of_connects_leaves_nobody_without_an_answer() {
    let _turn = turn();
    const TEST: &str = "a_sigterm_in_a_burst_of_connects_leaves_nobody_without_an_answer";
    let behind_the_filter = may_filter(TEST);
    let total = Outcomes::default();
    for round in 0..BURSTS * length() {
        let addr = free_address();
        let mut server = ServerProcess::start(&format!("burst {addr}"));
        let load = Load::start(addr, LOAD);
        wait_until("the load is under way", || load.outcomes().get(Outcome::Ok) >= 200);
        server.signal(libc::SIGTERM);
        server.await_end();
        let outcomes = load.stop();
        drop(TcpListener::bind(addr).expect("the port is free as soon as the process is gone"));
        let (status, report) = server.outcome();
        let seen = format!("round {round}: {outcomes}: {report}");
        assert_eq!(status, Some(0), "{seen}");
        assert!(report.contains("\"balanced\":true"), "{seen}");
        assert_eq!(number(&report, "leaked_operations"), 0.0, "{seen}");
        let served = outcomes.get(Outcome::Ok) + outcomes.get(Outcome::Eof);
        assert_eq!(outcomes.get(Outcome::Truncated) + outcomes.get(Outcome::TimedOut), 0, "{seen}");
        if behind_the_filter {
            assert_eq!(outcomes.get(Outcome::Reset), 0, "{seen}");
            assert_eq!(number(&report, "accepted") as u64, served, "{seen}");
            assert!(report.contains("\"stop\":\"syn_filter\""), "{seen}");
        }
        total.add(&outcomes);
    }
    println!("across the signals: {total}");
    let met = total.get(Outcome::Refused) + total.get(Outcome::HeldOff);
    assert!(met > 0, "nobody came after a signal: {total}");
    assert!(total.get(Outcome::Reset) <= 4 * BURSTS * length(), "{total}");
}

/// One connection of the test.
struct Client {
    stream: TcpStream,
    state: State,
    completed: bool,
}

impl Client {
    fn new(addr: SocketAddr, state: State) -> Client {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        if state == State::Blocked {
            socket.set_recv_buffer_size(4096).expect("a small buffer");
        }
        socket.connect_timeout(&addr.into(), limit(10_000)).expect("connect");
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
        stream.set_write_timeout(Some(limit(10_000))).expect("set a time limit");
        let mut request = match state {
            State::New => Vec::new(),
            State::Idle => b"e".to_vec(),
            State::MidMessage => b"m".to_vec(),
            State::Blocked => b"w".to_vec(),
            State::Asleep => b"s".to_vec(),
        };
        if state == State::MidMessage {
            request.extend_from_slice(&[b'x'; MESSAGE / 2]);
        }
        stream.write_all(&request).expect("send a request");
        Client { stream, state, completed: false }
    }

    /// The server confirms each command with a byte; one that is blocked is not read from.
    fn await_state(&mut self) {
        let mut byte = [0];
        match self.state {
            State::New => {}
            State::Blocked => {
                self.stream.peek(&mut byte).expect("output");
            }
            _ => self.stream.read_exact(&mut byte).expect("an answer"),
        }
    }

    fn complete(&mut self) {
        self.stream.write_all(&[b'x'; MESSAGE - MESSAGE / 2]).expect("send the rest");
        self.completed = true;
    }

    fn read_to_end(mut self) -> End {
        let mut received = Vec::new();
        match self.stream.read_to_end(&mut received) {
            Ok(0) => End::Eof,
            Ok(MESSAGE) if received.iter().all(|byte| *byte == b'X') => End::Answered,
            Ok(_) => End::Truncated,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => End::TimedOut,
            Err(_) => End::Reset,
        }
    }
}

/// Sends a request on each of a few connections in turn, until they end. Each request is answered
/// whole or not at all, and no connection is reset.
fn ask_until_the_end(streams: &mut Vec<TcpStream>, stop: &AtomicBool) {
    let mut answers = 0;
    while !streams.is_empty() {
        assert!(!stop.load(Ordering::Relaxed) || answers > 0, "the load got no answer at all");
        streams.retain_mut(|stream| {
            let mut byte = [0];
            // A request that crosses the server's FIN may find the connection gone.
            if stream.write_all(b"e").is_err() {
                return false;
            }
            let count = stream.read(&mut byte).expect("an answer or the end, no reset");
            answers += count;
            count == 1
        });
    }
}

/// A server in a process of its own.
struct ServerProcess {
    child: Child,
    output: BufReader<ChildStdout>,
    addr: SocketAddr,
}

impl ServerProcess {
    fn start(role: &str) -> ServerProcess {
        let this = std::env::current_exe().expect("the path of this test");
        let mut child = Command::new(this)
            .args(["--exact", "sigterm::the_server_process", "--nocapture", "--test-threads=1"])
            .env("RING_TEST_CHILD", role)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the server's process");
        let mut output = BufReader::new(child.stdout.take().expect("its output"));
        let addr = line_after(&mut output, "address ").parse().expect("an address");
        ServerProcess { child, output, addr }
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill(2) touches no memory; the child has not been waited for, so the number is
        // still its own.
        let result = unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        assert_eq!(result, 0, "kill");
    }

    /// Returns how late this thread was at worst after a sleep, which says how busy the machine is.
    fn await_end(&mut self) -> Duration {
        let give_up = Instant::now() + limit(10_000);
        let mut late = Duration::ZERO;
        while self.child.try_wait().expect("wait").is_none() {
            let asleep = Instant::now();
            assert!(asleep < give_up, "the server's process did not end");
            std::thread::sleep(POLL);
            late = late.max(asleep.elapsed() - POLL);
        }
        late
    }

    /// The exit status and the report, once it has ended.
    fn outcome(mut self) -> (Option<i32>, String) {
        let report = line_after(&mut self.output, "report ");
        (self.child.wait().expect("wait").code(), report)
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line_after(output: &mut impl BufRead, word: &str) -> String {
    for line in output.lines() {
        let line = line.expect("a line of text");
        if let Some(rest) = line.strip_prefix(word) {
            return rest.to_owned();
        }
    }
    panic!("the server's process ended without {word:?}");
}

/// A number of the report.
fn number(report: &str, key: &str) -> f64 {
    let key = format!("\"{key}\":");
    let at = report.find(&key).unwrap_or_else(|| panic!("{key} is not in {report}"));
    let text: String = report[at + key.len()..]
        .chars()
        .take_while(|char| char.is_ascii_digit() || ['.', 'e', '-'].contains(char))
        .collect();
    text.parse().unwrap_or_else(|_| panic!("{key} is no number in {report}"))
}

/// Not a test by itself: the process that the tests above start.
#[test]
fn the_server_process() {
    let Ok(role) = std::env::var("RING_TEST_CHILD") else { return };
    let served = match role.split_once(' ') {
        Some(("burst", addr)) => {
            run(Server::new(config().drain_ms(10_000)).listen(addr, answer_one))
        }
        _ => serve(if role == "patient" { 60_000 } else { DRAIN_MS }),
    };
    let status = match &served {
        Ok(report) if report.is_balanced() => 0,
        Ok(_) => 1,
        Err(_) => 2,
    };
    println!("\nreport {}", served.map_or_else(|error| error.to_string(), |it| it.to_json()));
    std::process::exit(status);
}

fn serve(drain_ms: u64) -> slipring::Result<DrainReport> {
    let config = config().drain_ms(drain_ms).new_grace_ms(300).write_stall_ms(600_000);
    let server = Server::new(config)
        .before_bind(|socket| SockRef::from(&socket).set_send_buffer_size(16 * 1024));
    run(server.listen("127.0.0.1:0", obey))
}

fn run(server: Server) -> slipring::Result<DrainReport> {
    let running = server.drain_on_signals().start()?;
    println!("\naddress {}", running.local_addrs()[0]);
    running.join()
}

/// Does what the first byte of each request says.
async fn obey(mut conn: Connection) -> slipring::Result<()> {
    static ENDLESS: [u8; 64 * 1024] = [b'w'; 64 * 1024];
    loop {
        let Some(command) = conn.fill_buf().await?.first().copied() else { return Ok(()) };
        conn.consume(1);
        conn.write(&[command]).await?;
        match command {
            b'm' => {
                let mut message = [0; MESSAGE];
                conn.read_exact(&mut message).await?;
                conn.write(&message.to_ascii_uppercase()).await?;
            }
            b's' => slipring::time::sleep(Duration::from_secs(60)).await,
            b'w' => loop {
                conn.send(&ENDLESS).await?;
            },
            _ => {}
        }
    }
}
