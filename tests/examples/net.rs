//! The examples `proxy` and `unix`, as processes of their own with real clients: redis-cli and
//! redis-server on the two sides of the proxy, and the Unix example on both sides of its socket.
//! `cargo test --test net_examples` alone builds no examples.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;

use crate::common::child::Process;
use crate::common::peer::{MB, bytes};
use crate::common::{connect, limit, not_run, wait_until};

/// An example, with nothing of slipring's in its environment but a port that the kernel chooses.
fn example(name: &str) -> Command {
    let folder = std::env::var_os("RING_TEST_EXAMPLES").map(PathBuf::from).unwrap_or_else(|| {
        let this = std::env::current_exe().expect("this executable has a path");
        // target/PROFILE/deps/this
        this.ancestors().nth(2).expect("it is in a profile's folder").join("examples")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is not there: `cargo build --examples` makes it", path.display());
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"SLIPRING_") {
            command.env_remove(name);
        }
    }
    command.env("SLIPRING_LISTEN", "127.0.0.1:0").env("SLIPRING_CONNECTIONS_MAX", "200");
    command
}

/// The proxy example before an upstream, and its address.
fn proxy(upstream: &str) -> (Process, String) {
    let mut proxy = Process::start({
        let mut command = example("proxy");
        command.arg(upstream).stderr(Stdio::null());
        command
    });
    let line = proxy.line_after("listening on ");
    let addr = line.split(',').next().expect("it says where").to_owned();
    (proxy, addr)
}

/// Ends an example that serves, and checks that its books balance.
fn end(mut process: Process) {
    process.signal(libc::SIGTERM);
    let words = process.line_after("");
    assert!(words.contains("books balance"), "{words}");
    assert!(process.child.wait().expect("wait for it").success());
}

/// A path for a socket of this process.
fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("slipring-{name}-{}", std::process::id()))
}

/// A child that ends with the test.
struct Kept(Child);

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn redis_cli_reaches_redis_server_through_the_proxy() {
    let socket = path("redis");
    let server = Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
        .arg(&socket)
        .stdout(Stdio::null())
        .spawn();
    let server = match server {
        Ok(server) => Kept(server),
        Err(error) => {
            let test = "redis_cli_reaches_redis_server_through_the_proxy";
            return not_run(test, format!("redis-server: {error}"));
        }
    };
    wait_until("redis listens", || UnixStream::connect(&socket).is_ok());
    let (proxy, addr) = proxy(&format!("unix:{}", socket.display()));
    let (host, port) = addr.rsplit_once(':').expect("host and port");
    let ask = |words: &[&str]| {
        let cli = Command::new("redis-cli").args(["-h", host, "-p", port]).args(words).output();
        String::from_utf8(cli.expect("redis-cli").stdout).expect("it is UTF-8")
    };
    assert_eq!(ask(&["PING"]), "PONG\n");
    for n in 0..20 {
        let (key, value) = (format!("key {n}"), "v".repeat(n * 5_000));
        assert_eq!(ask(&["SET", &key, &value]), "OK\n");
        assert_eq!(ask(&["GET", &key]).trim_end(), value);
    }
    drop(server);
    let _ = std::fs::remove_file(&socket);
    // The upstream is down now, which is a line on the standard error and no more.
    assert_eq!(connect(addr.parse().expect("it is one")).read(&mut [0]).expect("a FIN"), 0);
    end(proxy);
}

#[test]
fn curl_gets_a_large_answer_whole_through_the_proxy() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let upstream = listener.local_addr().expect("bound").to_string();
    let body = bytes(0, 3 * MB);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            stream.set_read_timeout(Some(limit(5_000))).expect("set a time limit");
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a request");
                head.push(byte[0]);
            }
            // The end of the connection is that of the answer: a half-close that must arrive.
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").expect("answer");
            stream.write_all(body).expect("answer");
        }
    });
    let (proxy, addr) = proxy(&upstream);
    for _ in 0..5 {
        let curl = Command::new("curl").args(["--silent", "--noproxy", "*"]).arg(&addr).output();
        let answer = match curl {
            Ok(answer) => answer,
            Err(error) => {
                let test = "curl_gets_a_large_answer_whole_through_the_proxy";
                return not_run(test, format!("curl: {error}"));
            }
        };
        assert!(answer.status.success() && answer.stdout == body, "{:?}", answer.status);
    }
    end(proxy);
}

#[test]
fn the_unix_example_answers_itself_and_others() {
    let file = path("shout");
    for address in [format!("unix:{}", file.display()), format!("unix:@{}", file.display())] {
        let mut server = Process::start({
            let mut command = example("unix");
            command.arg(&address);
            command
        });
        assert_eq!(server.line_after("listening on "), address);
        let asked = example("unix").args([&address, "hello"]).output().expect("start the example");
        assert_eq!(String::from_utf8_lossy(&asked.stdout), "HELLO\n");
        assert!(asked.status.success());
        if !address.contains('@') {
            let mut stream = UnixStream::connect(&file).expect("connect");
            stream.write_all(b"one\ntwo\n").expect("send");
            let mut lines = [0; 8];
            stream.read_exact(&mut lines).expect("an answer");
            assert_eq!(&lines, b"ONE\nTWO\n");
        }
        end(server);
        let nobody = example("unix").args([&address, "hello"]).output().expect("start it");
        let words = String::from_utf8_lossy(&nobody.stderr).into_owned();
        assert!(!nobody.status.success() && words.contains(&address), "{words}");
    }
}
