//! Under a service manager: what it is told (sd_notify(3)), when its watchdog hears nothing, and
//! the sockets that it passes (sd_listen_fds(3)), from process to process.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::common::child::{self, Process, again, example};
use crate::common::load::{Load, Outcome, answer_one};
use crate::common::{config, connect, length, limit, not_run, wait_until};
use slipring::{Connection, ListenAddr, Server, systemd};
use socket2::SockRef;

#[test]
fn a_manager_is_told_of_readiness_and_of_a_drain_until_its_end() {
    const TEST: &str = "a_manager_is_told_of_readiness_and_of_a_drain_until_its_end";
    if child::role().is_some() {
        return serve_as_child();
    }
    for abstract_name in [false, true] {
        let manager = Manager::new(abstract_name);
        let mut server = Process::start(manager.child(TEST, &[("SLIPRING_DRAIN_MS", "20000")]));
        let ready = manager.hears("READY=1");
        assert!(ready.contains("STATUS=serving on 2 cores"), "{ready}");
        // It accepts, whatever the process has said meanwhile.
        let addr = server.line_after("at ").parse().expect("an address");
        let mut client = connect(addr);
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an answer");

        client.write_all(b"wait").expect("send");
        client.read_exact(&mut [0]).expect("the handler is at it");
        server.signal(libc::SIGTERM);
        let stopping = manager.hears("STOPPING=1");
        let usec = number_after(&stopping, "EXTEND_TIMEOUT_USEC=");
        let bounds = 20_000_000..=25_000_000;
        assert!(bounds.contains(&usec), "all of the drain's time and what comes after: {stopping}");
        assert!(stopping.contains("1 connections left"), "{stopping}");
        // Each second anew, with less time and the same connection.
        for _ in 0..2 {
            let next = manager.hears("EXTEND_TIMEOUT_USEC=");
            assert!(number_after(&next, "EXTEND_TIMEOUT_USEC=") < usec, "{next}");
            assert!(next.contains("connections finish: 1 connections left"), "{next}");
            assert!(!next.contains("STOPPING"), "once: {next}");
        }
        // A second signal forces it, and the manager hears of that as well.
        server.signal(libc::SIGTERM);
        let end = manager.hears("STATUS=drained: 1 connections closed, 1 of them forced");
        assert!(!end.contains("EXTEND"), "{end}");
        server.line_after("books balance");
        assert!(server.child.wait().expect("its end").success());
    }
}

/// It restarts the service then.
#[test]
fn the_watchdog_hears_nothing_while_one_core_is_stuck() {
    const TEST: &str = "the_watchdog_hears_nothing_while_one_core_is_stuck";
    if child::role().is_some() {
        return serve_as_child();
    }
    let manager = Manager::new(false);
    let every = limit(300);
    let usec = (2 * every).as_micros().to_string();
    let mut server = Process::start(manager.child(TEST, &[("WATCHDOG_USEC", &usec)]));
    let addr = server.line_after("at ").parse().expect("an address");
    manager.hears("READY=1");
    // Nobody is connected, and all cores sleep but for this.
    let idle: Vec<Instant> = (0..5).map(|_| manager.hears_at("WATCHDOG=1")).collect();
    let longest = idle.windows(2).map(|pair| pair[1] - pair[0]).max().expect("four gaps");
    assert!(longest < 2 * every, "the manager would have lost its patience: {longest:?}");

    for round in 0..2 {
        let mut client = connect(addr);
        client.write_all(b"loop").expect("send");
        client.read_exact(&mut [0; 4]).expect("the handler is at it");
        let stuck = Instant::now();
        // What was on its way then, and no more.
        while manager.heard_within("WATCHDOG=1", every) {
            assert!(stuck.elapsed() < 3 * every, "round {round}: it is told all the same");
        }
        let silent = manager.heard_within("WATCHDOG=1", 3 * every);
        assert!(!silent, "round {round}: one core is stuck");
        // And at once when it is not any more.
        client.shutdown(std::net::Shutdown::Write).expect("the end");
        assert_eq!(client.read(&mut [0]).expect("a FIN"), 0, "the handler has gone on");
        let since = Instant::now();
        manager.hears("WATCHDOG=1");
        assert!(since.elapsed() < 2 * every, "round {round}: {:?}", since.elapsed());
    }
    server.signal(libc::SIGTERM);
    server.line_after("books balance");
}

#[test]
fn variables_for_another_process_are_none_and_without_a_manager_nothing_happens() {
    const TEST: &str =
        "variables_for_another_process_are_none_and_without_a_manager_nothing_happens";
    if child::role().is_some() {
        return serve_as_child();
    }
    let manager = Manager::new(false);
    let other = [("WATCHDOG_USEC", "20000"), ("WATCHDOG_PID", "1"), ("LISTEN_PID", "1")];
    let others = [&other[..], &[("LISTEN_FDS", "9")]].concat();
    let mut server = Process::start(manager.child(TEST, &others));
    manager.hears("READY=1");
    assert!(!manager.heard_within("WATCHDOG=1", Duration::from_millis(200)));
    server.signal(libc::SIGTERM);
    server.line_after("books balance");

    let mut alone = Process::start(again(TEST, "serve", &[]));
    alone.line_after("at ");
    alone.signal(libc::SIGTERM);
    alone.line_after("books balance");
}

#[test]
fn a_start_fails_where_the_manager_can_not_be_told() {
    const TEST: &str = "a_start_fails_where_the_manager_can_not_be_told";
    if child::role().is_some() {
        return serve_as_child();
    }
    let deaf = Manager::new(false);
    let full = UnixDatagram::unbound().expect("a socket");
    full.set_nonblocking(true).expect("do not wait");
    while full.send_to(b"x", &deaf.path).is_ok() {}
    let deaf_path = deaf.path.display().to_string();
    let nobody = "/nonexistent/notify";
    let well = Manager::new(false);
    let well_path = well.path.display().to_string();
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: [Case<'_>; 7] = [
        (&[("NOTIFY_SOCKET", nobody)], &["Io", nobody, "unset it"]),
        (&[("NOTIFY_SOCKET", "run/notify")], &["Unsupported", "run/notify", "abstract name"]),
        (&[("NOTIFY_SOCKET", "vsock:2:1234")], &["Unsupported", "vsock:2:1234"]),
        (&[("NOTIFY_SOCKET", &deaf_path)], &["READY=1"]),
        (
            &[("NOTIFY_SOCKET", &well_path), ("WATCHDOG_USEC", "30s")],
            &["Config", "WATCHDOG_USEC", "30s"],
        ),
        (&[("NOTIFY_SOCKET", &well_path), ("WATCHDOG_USEC", "0")], &["Config", "WATCHDOG_USEC"]),
        (&[("LISTEN_PID", "self"), ("LISTEN_FDS", "1")], &["Config", "LISTEN_PID"]),
    ];
    for (variables, parts) in cases {
        let since = Instant::now();
        let mut command = again(TEST, "serve", &[]);
        command.envs(variables.iter().copied());
        let (_, words) = child::run(command);
        let said = words.lines().find(|line| line.starts_with("failed: ")).unwrap_or_default();
        for part in parts {
            assert!(said.contains(part), "{variables:?}: {part:?} is not in {words}");
        }
        assert!(since.elapsed() < limit(10_000), "{variables:?}: {:?}", since.elapsed());
    }
}

#[test]
fn a_manager_that_goes_away_is_told_of_once_and_keeps_nobody_from_being_served() {
    const TEST: &str =
        "a_manager_that_goes_away_is_told_of_once_and_keeps_nobody_from_being_served";
    if child::role().is_some() {
        return serve_as_child();
    }
    let manager = Manager::new(false);
    let mut server = Process::start(manager.child(TEST, &[("WATCHDOG_USEC", "40000")]));
    let addr = server.line_after("at ").parse().expect("an address");
    manager.hears("WATCHDOG=1");
    drop(manager);
    assert!(server.line_after("not told: ").contains("notify the service manager"));
    for _ in 0..20 {
        let mut client = connect(addr);
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an answer");
    }
    server.signal(libc::SIGTERM);
    // What is said next is the report, and not the same again.
    let lines = server.rest();
    assert!(!lines.iter().any(|line| line.starts_with("not told")), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("books balance")), "{lines:?}");
}

/// The socket goes from process to process, as a manager keeps it open.
#[test]
fn process_after_process_serves_one_socket_and_nobody_is_refused_or_reset() {
    const TEST: &str = "process_after_process_serves_one_socket_and_nobody_is_refused_or_reset";
    if child::role().is_some() {
        return serve_as_child();
    }
    let kept = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = kept.local_addr().expect("its address");
    let load = Load::start(addr, 4);
    for round in 0..5 * length() {
        let mut server = Process::start(passed_to(TEST, "serve", &[&kept], "web"));
        assert_eq!(server.line_after("at "), addr.to_string());
        let ok = load.outcomes().get(Outcome::Ok);
        wait_until("it serves", || load.outcomes().get(Outcome::Ok) > ok + 20);
        server.signal(libc::SIGTERM);
        server.line_after("books balance");
        assert!(server.child.wait().expect("its end").success(), "round {round}");
    }
    let mut last = Process::start(passed_to(TEST, "serve", &[&kept], "web"));
    last.line_after("at ");
    let outcomes = load.stop();
    eprintln!("{outcomes}");
    let others = [Outcome::Refused, Outcome::HeldOff].map(|it| outcomes.get(it));
    assert_eq!((others, outcomes.harmed()), ([0, 0], 0), "{outcomes}");
    last.signal(libc::SIGTERM);
    last.line_after("books balance");
}

#[test]
fn sockets_are_told_apart_by_name_and_taken_once() {
    const TEST: &str = "sockets_are_told_apart_by_name_and_taken_once";
    if child::role().is_some() {
        let mut passed = systemd::listen_fds().expect("three were passed");
        let names: Vec<_> = passed.names().map(str::to_owned).collect();
        let again = systemd::listen_fds().expect_err("they were taken");
        let (web, admin) = (passed.take("web"), passed.take("admin"));
        let running = Server::new(config().cpus("0"))
            .listen_on(web, answer_one)
            .listen_on(admin, answer_one)
            .start()
            .expect("it starts");
        println!("\n{names:?} {:?} {} left", again.kind(), passed.len());
        println!("{}", addresses(running.local_addrs()));
        running.handle().close();
        running.join().expect("no core failed");
        return;
    }
    let sockets = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    let addrs = sockets.each_ref().map(|socket| socket.local_addr().expect("its address"));
    let [first, second, third] = &sockets;
    let names = "web:admin:web";
    let (succeeded, words) = child::run(passed_to(TEST, "names", &[first, second, third], names));
    assert!(succeeded, "{words}");
    assert!(words.contains(r#"["web", "admin", "web"] Misuse 0 left"#), "{words}");
    let in_order = format!("{}, {}, {}", addrs[0], addrs[2], addrs[1]);
    assert!(words.contains(&in_order), "{in_order} is not in {words}");
    let (_, words) = child::run(passed_to(TEST, "names", &[first, second], "web"));
    assert!(words.contains("LISTEN_FDNAMES"), "as many names as sockets: {words}");
}

/// The example, started by systemd's own tool when the first client connects.
#[test]
fn the_example_is_activated_by_the_first_connection() {
    const TEST: &str = "the_example_is_activated_by_the_first_connection";
    let there = |name: &str| {
        child::path().split(':').any(|folder| PathBuf::from(folder).join(name).exists())
    };
    if !there("systemd-socket-activate") {
        return not_run(TEST, "there is no systemd-socket-activate");
    }
    let addr = crate::common::free_address();
    let manager = Manager::new(false);
    let example = example("systemd");
    let mut command = Command::new("systemd-socket-activate");
    command.args(["-l", &addr.to_string(), "--fdname=web", "-E", "SLIPRING_CONNECTIONS_MAX=200"]);
    command.arg("-E").arg(format!("NOTIFY_SOCKET={}", manager.path.display())).arg(example);
    command.env("PATH", child::path()).stderr(Stdio::null());
    let mut server = Process::start(command);
    wait_until("the tool listens", || TcpStream::connect(addr).is_ok());
    let mut client = connect(addr);
    client.write_all(b"there and back").expect("send");
    manager.hears("READY=1");
    client.read_exact(&mut [0; 14]).expect("an answer");
    assert_eq!(server.line_after("listening on "), addr.to_string());
    server.signal(libc::SIGTERM);
    manager.hears("STOPPING=1");
    drop(client);
    let text = server.rest().join("\n");
    assert!(server.child.wait().expect("its end").success(), "{text}");
    assert!(text.contains("books balance") && text.contains("left_open"), "{text}");
}

/// A service manager's end of `NOTIFY_SOCKET`.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    variable: String,
}

impl Manager {
    fn new(abstract_name: bool) -> Manager {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("slipring-manager-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let path = std::env::temp_dir().join(&name);
        let (socket, variable) = if abstract_name {
            let addr = UnixAddr::from_abstract_name(&name).expect("a name");
            (UnixDatagram::bind_addr(&addr).expect("bind"), format!("@{name}"))
        } else {
            (UnixDatagram::bind(&path).expect("bind"), path.display().to_string())
        };
        Manager { socket, path, variable }
    }

    /// A server that this one manages.
    fn child(&self, test: &str, variables: &[(&str, &str)]) -> Command {
        let mut command = again(test, "serve", &[]);
        command.env("NOTIFY_SOCKET", &self.variable).envs(variables.iter().copied());
        command
    }

    /// Waits for a message with these words, and returns all of it.
    fn hears(&self, words: &str) -> String {
        self.receive(words, limit(10_000)).unwrap_or_else(|| panic!("waited in vain for {words}"))
    }

    fn hears_at(&self, words: &str) -> Instant {
        self.hears(words);
        Instant::now()
    }

    fn heard_within(&self, words: &str, time: Duration) -> bool {
        self.receive(words, time).is_some()
    }

    fn receive(&self, words: &str, time: Duration) -> Option<String> {
        let (begun, mut message) = (Instant::now(), [0; 4_096]);
        loop {
            let left = time.checked_sub(begun.elapsed()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).expect("set a time limit");
            let Ok(bytes) = self.socket.recv(&mut message) else { continue };
            let text = String::from_utf8_lossy(&message[..bytes]);
            if text.contains(words) {
                return Some(text.into_owned());
            }
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// This test binary again, with these sockets from descriptor 3 on.
fn passed_to(test: &str, role: &str, sockets: &[&TcpListener], names: &str) -> Command {
    let (mut aside, mut into) = (String::new(), String::new());
    for (n, socket) in sockets.iter().enumerate() {
        // Also for the other children that are started meanwhile.
        SockRef::from(*socket).set_cloexec(false).expect("let it be inherited");
        aside.push_str(&format!(" {}<&{}", n + 900, socket.as_raw_fd()));
        into.push_str(&format!(" {}<&{} {1}<&-", n + 3, n + 900));
    }
    let script = format!("exec {aside}; export LISTEN_PID=$$; exec \"$0\" \"$@\" {into}");
    let mut command = again(test, role, &["bash", "-c", &script]);
    command.env("LISTEN_FDS", sockets.len().to_string()).env("LISTEN_FDNAMES", names);
    command
}

/// What a child does: it serves until it is told to stop.
fn serve_as_child() {
    let serve = || -> slipring::Result<()> {
        let config = slipring::Config::from_env()?.cpus("0,1").pin(Some(false));
        let config = config.connections_max(200).stall_ms(0);
        let server = Server::new(config)
            .drain_on_signals()
            .notify_systemd(|error| println!("\nnot told: {error}"));
        let mut passed = systemd::listen_fds()?;
        let server = if passed.is_empty() {
            server.listen("127.0.0.1:0", obey)
        } else {
            server.listen_on(passed.take("web"), answer_one)
        };
        let running = server.start()?;
        println!("\nat {}", addresses(running.local_addrs()));
        let report = running.join()?;
        println!("{}", if report.is_balanced() { "books balance" } else { "no balance" });
        Ok(())
    };
    if let Err(error) = serve() {
        println!("\nfailed: {:?}: {error}", error.kind());
    }
}

/// Echoes; keeps its core on `loop`, and itself on `wait`, until the peer has ended its side.
async fn obey(mut conn: Connection) -> slipring::Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.write(&chunk).await?;
        match &*chunk {
            b"wait" => slipring::time::sleep(Duration::from_secs(60)).await,
            b"loop" => {
                // What was sent leaves meanwhile.
                slipring::time::sleep(Duration::from_millis(1)).await;
                let until = Instant::now() + limit(2_500);
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn addresses(addrs: &[ListenAddr]) -> String {
    addrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn number_after(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{name} in {text}"))
}
