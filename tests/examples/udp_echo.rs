//! The UDP echo example does what it promises at its top, as a process of its own, for clients that
//! know nothing of it. `RING_TEST_EXAMPLES` names the folder of the built examples, as in
//! `tests/examples.rs`.

use std::env;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::common::{limit, wait_until};

/// 1. It says where it listens; plain clients get each message back, those of several at a time.
/// 2. SIGTERM: it ends with status 0 and a line of JSON that says what became of each datagram.
#[test]
fn udp_echo_answers_plain_clients_and_drains_on_sigterm_with_a_report() {
    let mut echo = Ended(
        example("udp_echo")
            .env("SLIPRING_LISTEN", "127.0.0.1:0")
            .env("SLIPRING_REPORT", "json")
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the example"),
    );
    let mut lines = BufReader::new(echo.0.stdout.take().expect("it is a pipe")).lines();
    let mut line = || lines.next().expect("a line").expect("it is UTF-8");
    let first = line();
    let addr = first.strip_prefix("listening on ").unwrap_or_else(|| panic!("no address: {first}"));

    let clients: Vec<UdpSocket> = (0..6)
        .map(|_| {
            let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
            client.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
            client.connect(addr).expect("connect");
            client
        })
        .collect();
    let (rounds, mut datagrams) = (100, 0);
    for round in 0..rounds {
        for (n, client) in clients.iter().enumerate() {
            for message in 0..3 {
                let text = format!("{n} {round} {message} {}", "x".repeat(round * 9));
                client.send(text.as_bytes()).expect("send");
                datagrams += 1;
            }
        }
        for (n, client) in clients.iter().enumerate() {
            let mut texts: Vec<String> = (0..3).map(|_| receive(client)).collect();
            texts.sort();
            for (message, text) in texts.iter().enumerate() {
                assert!(text.starts_with(&format!("{n} {round} {message} ")), "{text}");
            }
        }
    }

    // SAFETY: a plain system call; the process is our child and not waited for yet.
    let sent = unsafe { libc::kill(echo.0.id() as libc::pid_t, libc::SIGTERM) };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    let report = line();
    assert!(report.contains(r#""balanced":true"#), "{report}");
    let all = [("received", datagrams), ("truncated", 0), ("lost", 0), ("sent", datagrams)];
    let all = all.map(|(name, count)| format!("{name:?}:{count},")).concat();
    let all = format!(r#""datagrams":{{{all}"unsent":0}}"#);
    assert!(report.contains(&all), "{all} in {report}");
    let mut status = None;
    wait_until("it has ended", || {
        status = echo.0.try_wait().expect("ask for the child");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{report}");
}

fn receive(client: &UdpSocket) -> String {
    let mut answer = vec![0; 2_000];
    let len = client.recv(&mut answer).expect("an answer");
    answer.truncate(len);
    String::from_utf8(answer).expect("it is UTF-8")
}

/// Ended by force when a test fails.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An example, with nothing of slipring's in its environment.
fn example(name: &str) -> Command {
    let folder = env::var_os("RING_TEST_EXAMPLES").map(PathBuf::from).unwrap_or_else(|| {
        let this = env::current_exe().expect("this executable has a path");
        // target/PROFILE/deps/this
        this.ancestors().nth(2).expect("it is in a profile's folder").join("examples")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is not there: `cargo build --examples` makes it", path.display());
    let mut command = Command::new(path);
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"SLIPRING_") {
            command.env_remove(name);
        }
    }
    command
}
