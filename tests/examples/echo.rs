//! The examples do what they promise at their top: they run here as processes of their own, the
//! way that a service manager or a person in a shell would run them.
//!
//! `RING_TEST_EXAMPLES` names the folder of the built examples; by default it is the one that
//! `cargo test` builds them into. `cargo test --test examples` alone builds no examples.

use std::env;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;

use crate::common::{connect, limit, wait_until};

#[test]
fn echo_serves_and_drains_on_sigterm_with_a_report_for_machines() {
    let mut echo = Echo::start(&[("SLIPRING_REPORT", "json")]);
    let mut peer = connect(echo.addr);
    peer.write_all(b"there and back").expect("send");
    let mut answer = [0; 14];
    peer.read_exact(&mut answer).expect("receive");
    assert_eq!(&answer, b"there and back");

    echo.signal(libc::SIGTERM);
    assert_eq!(peer.read(&mut answer).expect("a FIN and no reset"), 0);
    let (status, lines) = echo.end();
    assert_eq!(status.code(), Some(0), "{lines:?}");
    let [line] = &lines[..] else { panic!("one line of JSON, not {lines:?}") };
    let report = Json::parse(line);
    for key in
        ["accepted", "closed", "handed_over", "forced", "abandoned_bytes", "phases_ms", "cores"]
    {
        assert!(report.get(key).is_some(), "{key} in {line}");
    }
    assert_eq!(report.get("balanced"), Some(&Json::Bool(true)), "{line}");
    assert_eq!(report.number("accepted"), 1.0, "{line}");
    assert_eq!(report.number("forced"), 0.0, "{line}");
    assert!(matches!(report.get("cores"), Some(Json::Array(cores)) if !cores.is_empty()), "{line}");
    let closed = report.get("closed").expect("it has the key");
    assert_eq!(closed.sum(), 1.0, "every connection has one reason: {line}");
}

#[test]
fn echo_reports_in_words_unless_told_otherwise() {
    let mut echo = Echo::start(&[]);
    drop(connect(echo.addr));
    echo.signal(libc::SIGINT);
    let (status, lines) = echo.end();
    assert_eq!(status.code(), Some(0), "{lines:?}");
    assert!(lines[0].contains("books balance"), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("phases:")), "{lines:?}");
}

#[test]
fn a_second_signal_forces_a_peer_that_reads_nothing() {
    let patient = [("SLIPRING_REPORT", "json"), ("SLIPRING_DRAIN_MS", "600000")];
    let mut echo = Echo::start(&patient);
    let mut peer = connect(echo.addr);
    flood_until_stuck(&mut peer);

    echo.signal(libc::SIGTERM);
    wait_until("the listener is closed", || {
        let refused = TcpStream::connect(echo.addr).err().map(|error| error.kind());
        refused == Some(ErrorKind::ConnectionRefused)
    });
    assert!(echo.process.try_wait().expect("ask for the child").is_none(), "it waits for the peer");

    let forced = Instant::now();
    echo.signal(libc::SIGTERM);
    let (status, lines) = echo.end();
    assert!(forced.elapsed() < limit(2_000), "it took {:?}", forced.elapsed());
    assert_eq!(status.code(), Some(0), "{lines:?}");
    let report = Json::parse(&lines[0]);
    assert_eq!(report.number("forced"), 1.0, "{lines:?}");
    assert!(report.number("abandoned_bytes") > 0.0, "{lines:?}");
    assert_eq!(report.get("balanced"), Some(&Json::Bool(true)), "{lines:?}");
}

#[test]
fn a_mistyped_variable_is_refused_with_the_right_name() {
    let output = echo_fails(&mut echo(&[("SLIPRING_IDEL_MS", "1000")]));
    assert!(output.contains("SLIPRING_IDEL_MS") && output.contains("SLIPRING_IDLE_MS"), "{output}");
}

#[test]
fn a_value_out_of_bounds_is_refused_with_the_bounds() {
    for (name, value, parts) in [
        ("SLIPRING_IDLE_MS", "0", ["1", "86400000"]),
        ("SLIPRING_IDLE_MS", "90000000", ["1", "86400000"]),
        ("SLIPRING_SQ_ENTRIES", "500", ["power of two", "32768"]),
        ("SLIPRING_NODELAY", "yes", ["0", "1"]),
    ] {
        let output = echo_fails(&mut echo(&[(name, value)]));
        assert!(output.contains(name) && output.contains(value), "{output}");
        // Digits may be grouped, by `_` or not at all.
        let plain = output.replace('_', "");
        for part in parts {
            assert!(plain.contains(&part.replace('_', "")), "{part} in: {output}");
        }
    }
}

#[test]
fn an_address_in_use_is_refused_by_name() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = taken.local_addr().expect("it is bound").to_string();
    let output =
        echo_fails(&mut echo(&[("SLIPRING_LISTEN", &addr), ("SLIPRING_BIND_RETRY_MS", "20")]));
    assert!(output.contains(&addr) && output.contains("listens there"), "{output}");
}

#[test]
fn where_a_filter_forbids_io_uring_echo_says_so_and_ends() {
    let output = echo_fails(without_io_uring(&mut echo(&[])));
    assert!(output.contains("seccomp") && output.contains("io_uring_setup"), "{output}");
}

#[test]
fn doctor_finds_this_machine_fit() {
    let words = finish(&mut example("doctor"));
    let text = String::from_utf8(words.stdout).expect("it is UTF-8");
    assert_eq!(words.status.code(), Some(0), "{text}");
    assert!(text.starts_with("fit: ") && text.contains("\nkernel\n"), "{text}");
    for name in ["idle connection", "unacknowledged data", "output still queued", "half-closed"] {
        let found = text.lines().find(|line| line.contains(&format!("dead peer, {name}")));
        assert!(found.is_some_and(|line| line.contains("found after")), "{name}: {text}");
    }

    let json = finish(example("doctor").arg("--json"));
    let text = String::from_utf8(json.stdout).expect("it is UTF-8");
    assert_eq!(json.status.code(), Some(0), "{text}");
    let examination = Json::parse(text.trim_end());
    assert_eq!(examination.get("fit"), Some(&Json::Bool(true)), "{text}");
    assert_eq!(examination.get("refusal"), Some(&Json::Null), "{text}");
}

#[test]
fn doctor_finds_a_machine_without_io_uring_unfit() {
    let words = finish(without_io_uring(&mut example("doctor")));
    let text = String::from_utf8(words.stdout).expect("it is UTF-8");
    assert_eq!(words.status.code(), Some(1), "{text}");
    assert!(text.starts_with("not fit: ") && text.contains("seccomp"), "{text}");

    let json = finish(without_io_uring(example("doctor").arg("--json")));
    let text = String::from_utf8(json.stdout).expect("it is UTF-8");
    assert_eq!(json.status.code(), Some(1), "{text}");
    let examination = Json::parse(text.trim_end());
    assert_eq!(examination.get("fit"), Some(&Json::Bool(false)), "{text}");
    assert!(matches!(examination.get("refusal"), Some(Json::Text(why)) if why.contains("seccomp")));
}

#[test]
fn the_json_checker_accepts_json_and_nothing_else() {
    let json = Json::parse(r#"{"a":[1,-2.5e3,{}],"b":"x\"\\\u00e9\n","c":null,"d":[],"e":true}"#);
    let Some(Json::Array(items)) = json.get("a") else { panic!("{json:?}") };
    assert_eq!(items[..2], [Json::Number(1.0), Json::Number(-2500.0)]);
    assert_eq!(json.get("b"), Some(&Json::Text("x\"\\é\n".to_owned())));
    for bad in
        ["", "{", "{}x", "[1,]", "{\"a\"}", "{\"a\":1,}", "01", "\"\n\"", "nul", "'a'", "\"\\x\""]
    {
        assert!(Json::read(bad).is_none(), "{bad:?} is no JSON");
    }
}

/// The echo example while it serves; ended by force when a test fails.
struct Echo {
    process: Child,
    addr: SocketAddr,
    lines: Receiver<String>,
}

impl Echo {
    /// Starts it on a port that the kernel chooses, and reads from its output which one that is.
    fn start(variables: &[(&str, &str)]) -> Echo {
        let mut process = echo(variables).stdout(Stdio::piped()).spawn().expect("start echo");
        let output = BufReader::new(process.stdout.take().expect("it is a pipe"));
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in output.lines() {
                // Nobody listens any more when a test has failed.
                let _ = sender.send(line.expect("it is UTF-8"));
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut echo = Echo { process, addr: nowhere, lines };
        let line = echo.lines.recv_timeout(limit(10_000)).expect("it says where it listens");
        let addr = line.strip_prefix("listening on ").and_then(|addr| addr.parse().ok());
        echo.addr = addr.unwrap_or_else(|| panic!("no address in: {line}"));
        echo
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a plain system call; the process is our child and not waited for yet.
        let sent = unsafe { libc::kill(self.process.id() as libc::pid_t, signal) };
        assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    }

    /// Waits for the end; returns the exit status and what it printed after the address.
    fn end(&mut self) -> (ExitStatus, Vec<String>) {
        let status = wait_for(&mut self.process);
        (status, self.lines.iter().collect())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
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
    command.stdin(Stdio::null());
    command
}

fn echo(variables: &[(&str, &str)]) -> Command {
    let mut command = example("echo");
    command.env("SLIPRING_LISTEN", "127.0.0.1:0").env("SLIPRING_CONNECTIONS_MAX", "200");
    command.envs(variables.iter().copied());
    command
}

/// Runs an echo that can't serve: it says why, on one line, and its exit status is 2.
fn echo_fails(command: &mut Command) -> String {
    let output = finish(command);
    let text = String::from_utf8(output.stderr).expect("it is UTF-8");
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(output.stdout.is_empty(), "it said that it serves");
    assert!(text.starts_with("echo: ") && text.lines().count() == 1, "{text}");
    text
}

fn finish(command: &mut Command) -> Output {
    let mut process =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start an example");
    // What it prints is less than a pipe holds, so it need not be read meanwhile.
    wait_for(&mut process);
    process.wait_with_output().expect("read the output")
}

fn wait_for(process: &mut Child) -> ExitStatus {
    let give_up = Instant::now() + limit(10_000);
    let mut status = None;
    while status.is_none() {
        if Instant::now() > give_up {
            let _ = process.kill();
            panic!("the example did not end");
        }
        wait_until("a moment has passed", || {
            status = process.try_wait().expect("ask for the child");
            status.is_some() || Instant::now() > give_up
        });
    }
    status.expect("the loop ends with it")
}

/// Sends until nothing goes any more: the server's output, its handler and both kernels are full.
fn flood_until_stuck(peer: &mut TcpStream) {
    peer.set_write_timeout(Some(limit(500))).expect("set a time limit");
    let block = vec![b'x'; 1 << 16];
    loop {
        match peer.write(&block) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("send: {error}"),
        }
    }
}

/// Makes the kernel refuse `io_uring_setup` with EPERM, as a container's default profile does.
fn without_io_uring(command: &mut Command) -> &mut Command {
    const fn step(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf, k }
    }
    const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    static PROGRAM: [libc::sock_filter; 4] = [
        // The system call's number is the first word of `struct seccomp_data`.
        step(LOAD_WORD, 0, 0, 0),
        step(JUMP_IF_EQUAL, libc::SYS_io_uring_setup as u32, 0, 1),
        step(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let install = || {
        let filter =
            libc::sock_fprog { len: PROGRAM.len() as u16, filter: PROGRAM.as_ptr().cast_mut() };
        // SAFETY: a plain system call with numbers.
        let bound = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        let mode = libc::SECCOMP_MODE_FILTER;
        // SAFETY: the kernel copies the program, which lives for good, and does not write to it.
        let filtered = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter) };
        if bound == 0 && filtered == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: two system calls, which are all that the closure makes, are fine after a fork.
    unsafe { command.pre_exec(install) }
}

/// JSON as RFC 8259 has it, read strictly.
#[derive(Debug, PartialEq)]
enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    fn parse(text: &str) -> Json {
        Json::read(text).unwrap_or_else(|| panic!("this is no JSON: {text}"))
    }

    fn read(text: &str) -> Option<Json> {
        let mut rest = text;
        let value = Json::value(&mut rest)?;
        rest.is_empty().then_some(value)
    }

    fn get(&self, key: &str) -> Option<&Json> {
        let Json::Object(members) = self else { return None };
        members.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    fn number(&self, key: &str) -> f64 {
        match self.get(key) {
            Some(Json::Number(number)) => *number,
            other => panic!("{key} is {other:?}"),
        }
    }

    /// The sum of an object's numbers.
    fn sum(&self) -> f64 {
        let Json::Object(members) = self else { panic!("{self:?} is no object") };
        members.iter().map(|(key, _)| self.number(key)).sum()
    }

    fn value(rest: &mut &str) -> Option<Json> {
        skip_blanks(rest);
        let value = match rest.chars().next()? {
            '{' => Json::Object(list(rest, '}', |rest| {
                skip_blanks(rest);
                let key = string(rest)?;
                skip_blanks(rest);
                take(rest, ":")?;
                Some((key, Json::value(rest)?))
            })?),
            '[' => Json::Array(list(rest, ']', Json::value)?),
            '"' => Json::Text(string(rest)?),
            'n' => take(rest, "null").map(|()| Json::Null)?,
            't' => take(rest, "true").map(|()| Json::Bool(true))?,
            'f' => take(rest, "false").map(|()| Json::Bool(false))?,
            _ => Json::Number(number(rest)?),
        };
        skip_blanks(rest);
        Some(value)
    }
}

fn skip_blanks(rest: &mut &str) {
    *rest = rest.trim_start_matches([' ', '\t', '\n', '\r']);
}

fn take(rest: &mut &str, word: &str) -> Option<()> {
    *rest = rest.strip_prefix(word)?;
    Some(())
}

/// What stands between the bracket that comes next and `close`, with commas in between.
fn list<T>(
    rest: &mut &str,
    close: char,
    mut item: impl FnMut(&mut &str) -> Option<T>,
) -> Option<Vec<T>> {
    *rest = &rest[1..];
    let mut items = Vec::new();
    skip_blanks(rest);
    if let Some(after) = rest.strip_prefix(close) {
        *rest = after;
        return Some(items);
    }
    loop {
        items.push(item(rest)?);
        skip_blanks(rest);
        let more = rest.starts_with(',');
        *rest = rest.strip_prefix([',', close])?;
        if !more {
            return Some(items);
        }
    }
}

fn string(rest: &mut &str) -> Option<String> {
    take(rest, "\"")?;
    let mut text = String::new();
    loop {
        let letter = rest.chars().next()?;
        *rest = &rest[letter.len_utf8()..];
        match letter {
            '"' => return Some(text),
            '\\' => {
                let mark = rest.chars().next()?;
                *rest = &rest[mark.len_utf8()..];
                text.push(match mark {
                    '"' | '\\' | '/' => mark,
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    'u' => {
                        let code = u32::from_str_radix(rest.get(..4)?, 16).ok()?;
                        *rest = &rest[4..];
                        // The library escapes control characters only, so no pairs come here.
                        char::from_u32(code)?
                    }
                    _ => return None,
                });
            }
            control if control < ' ' => return None,
            other => text.push(other),
        }
    }
}

fn number(rest: &mut &str) -> Option<f64> {
    let is_part = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
    let text = &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())];
    let whole = text.trim_start_matches('-').split(['.', 'e', 'E']).next()?;
    if whole.is_empty() || (whole.len() > 1 && whole.starts_with('0')) || text.ends_with('.') {
        return None;
    }
    *rest = &rest[text.len()..];
    text.parse().ok()
}
