//! Real clients ask the HTTP examples, which run as processes of their own: curl, wrk and h2load.
//! And drains under the load of the latter two, whose own counts are compared with the handlers'.
//!
//! `RING_TEST_EXAMPLES` names the folder of the built examples, as in `tests/examples.rs`.
#![cfg(feature = "hyper")]

mod common;

use std::convert::Infallible;
use std::env;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use common::child::Process;
use common::peer::ANY;
use common::{config, length, limit, load, not_run, start, wait_until};
use hyper::service::service_fn;
use hyper::{Request, Response};
use slipring::http::{Http, Incoming};
use slipring::{CloseReason, DrainReport, Server};

#[test]
fn curl_gets_what_the_http_example_promises() {
    let Some(mut example) = Example::start("http", "curl") else { return };
    for version in ["--http1.1", "--http1.0", "--http2-prior-knowledge"] {
        example.curl(&[version, "/hello"], "hello\n");
        example.curl(&[version, "-d", "text", "/upper"], "TEXT");
        example.curl(&[version, "-w", "%{http_code}", "-o", "/dev/null", "/nowhere"], "404");
        example.curl(&[version, "-w", "%{http_code}", "-o", "/dev/null", "-I", "/hello"], "404");
    }
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        // A body of unknown length: in chunks, or in frames.
        let body = "b".repeat(300_000);
        let upper = body.to_ascii_uppercase();
        example.curl_with(&[version, "-X", "POST", "-T", "-", "/upper"], &body, &upper);
        // Two requests, one connection.
        let twice = ["-w", "%{num_connects};", "-o", "/dev/null", "-o", "/dev/null"];
        let url = format!("http://{}/served", example.addr);
        example.curl(&[&[version], &twice[..], &[&url, "/hello"]].concat(), "1;0;");
    }
    // By HTTP/2 the answer is followed by a reset without an error, for the rest of the body (RFC
    // 9113, section 8.1), which some versions of curl take for one.
    let too_much = "b".repeat(3_000_000);
    let refused = ["--http1.1", "-w", "%{http_code}", "-o", "/dev/null", "--data-binary", "@-"];
    example.curl_with(&[&refused[..], &["/upper"]].concat(), &too_much, "413");
    let expects = ["--http1.1", "-i", "-H", "Expect: 100-continue", "-d", "text", "/upper"];
    let answer = example.run(&expects, "");
    assert!(answer.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nTEXT"), "{answer}");
    example.end();
}

#[test]
fn curl_gets_what_the_axum_example_promises() {
    let Some(mut example) = Example::start("axum", "curl") else { return };
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        example.curl(&[version, "/"], "hello\n");
        example.curl(&[version, "/sum?a=2&b=3"], "5\n");
        let status = [version, "-w", "%{http_code}", "-o", "/dev/null"];
        example.curl(&[&status[..], &["/sum?a=2&b=x"]].concat(), "400");
        let greeting = example.run(&[version, "--json", r#"{"name":"you"}"#, "/greet"], "");
        assert!(greeting.starts_with(r#"{"text":"hello, you","number":"#), "{greeting}");
        example.curl(&[&status[..], &["--json", "{", "/greet"]].concat(), "400");
        example.curl(&[version, "/slow"], "that took its time\n");
    }
    example.end();
}

#[test]
fn wrk_and_h2load_see_no_error() {
    for (name, path) in [("http", "hello"), ("axum", "")] {
        if let Some(mut example) = Example::start(name, "wrk") {
            let url = format!("http://{}/{path}", example.addr);
            let words = said(Command::new("wrk").args(["-t1", "-c16", "-d1s", &url]));
            assert!(!words.contains("errors") && !words.contains("Non-2xx"), "{words}");
            assert!(number_before(&words, " requests in ") > 100, "{words}");
            example.end();
        }
        if let Some(mut example) = Example::start(name, "h2load") {
            let url = format!("http://{}/{path}", example.addr);
            for version in [&["-m16"][..], &["--h1", "-m4"]] {
                let load = ["-n4000", "-c8", &url];
                let words = said(Command::new("h2load").args(version).args(load));
                let all = "4000 done, 4000 succeeded, 0 failed, 0 errored, 0 timeout";
                assert!(words.contains(all), "{words}");
            }
            example.end();
        }
    }
}

/// What wrk has got is what was begun, and it has seen no broken answer.
#[test]
fn a_drain_under_wrk_loses_no_request() {
    if !is_installed("wrk") || !load::may_filter("a_drain_under_wrk_loses_no_request") {
        return;
    }
    for round in 0..2 * length() {
        let (begun, report, words) = drain_under(|url| {
            let mut wrk = Command::new("wrk");
            wrk.args(["-t1", "-c16", "-d2s", url]);
            wrk
        });
        assert_eq!(number_before(&words, " requests in "), begun, "round {round}: {words}{report}");
        // Those that are refused afterwards count as writes.
        let broken = words.contains("errors") && !words.contains("read 0, ");
        assert!(!broken && !words.contains("Non-2xx"), "round {round}: {words}{report}");
        assert!(!words.contains("errors") || words.contains("timeout 0"), "{words}");
    }
}

#[test]
fn a_drain_under_h2load_loses_no_stream() {
    if !is_installed("h2load") {
        return;
    }
    for round in 0..2 * length() {
        let (begun, report, words) = drain_under(|url| {
            let mut h2load = Command::new("h2load");
            h2load.args(["-n100000000", "-c8", "-m16", url]);
            h2load
        });
        assert_eq!(number_before(&words, " succeeded"), begun, "round {round}: {words}{report}");
        assert_eq!(number_before(&words, " timeout"), 0, "round {round}: {words}{report}");
        assert_eq!(number_before(&words, " 5xx"), 0, "round {round}: {words}{report}");
    }
}

/// Drains a server under a load. Says how many requests its handlers have begun, and what the
/// load has to say.
fn drain_under(load: impl Fn(&str) -> Command) -> (u64, DrainReport, String) {
    let begun = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&begun);
    let service = service_fn(move |_: Request<Incoming>| {
        count.fetch_add(1, SeqCst);
        async {
            slipring::task::yield_now().await;
            Ok::<_, Infallible>(Response::new("hello\n".to_owned()))
        }
    });
    let config = config().idle_min_keep_ms(500);
    let (running, addr) = start(Server::new(config).listen(ANY, Http::new().handler(service)));
    let mut load = load(&format!("http://{addr}/"));
    let load = load.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start it");
    wait_until("the load is under way", || begun.load(SeqCst) > 1_000);
    running.handle().begin_drain(limit(8_000));
    let report = running.join().expect("the report");
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
    let output = load.wait_with_output().expect("its output");
    let words = [output.stdout, output.stderr].concat();
    (begun.load(SeqCst), report, String::from_utf8_lossy(&words).into_owned())
}

/// An example that serves.
struct Example {
    process: Process,
    addr: String,
}

impl Example {
    /// None where the client that is to ask it is not installed.
    fn start(name: &str, client: &str) -> Option<Example> {
        if !is_installed(client) {
            return None;
        }
        let folder = env::var_os("RING_TEST_EXAMPLES").map(PathBuf::from).unwrap_or_else(|| {
            let this = env::current_exe().expect("this executable has a path");
            // target/PROFILE/deps/this
            this.ancestors().nth(2).expect("it is in a profile's folder").join("examples")
        });
        let path = folder.join(name);
        assert!(path.exists(), "{}: `cargo build --examples` makes it", path.display());
        let mut command = Command::new(path);
        command.env_clear().env("SLIPRING_LISTEN", ANY).env("SLIPRING_CONNECTIONS_MAX", "200");
        let mut process = Process::start(command);
        let addr = process.line_after("listening on ");
        Some(Example { process, addr })
    }

    fn curl(&self, arguments: &[&str], expected: &str) {
        self.curl_with(arguments, "", expected);
    }

    fn curl_with(&self, arguments: &[&str], input: &str, expected: &str) {
        let answer = self.run(arguments, input);
        assert!(answer == expected, "curl {arguments:?}: {:.200}", answer);
    }

    /// Runs curl, whose last argument is a path.
    fn run(&self, arguments: &[&str], input: &str) -> String {
        let (path, arguments) = arguments.split_last().expect("a path");
        let mut curl = Command::new("curl");
        curl.args(["-q", "-sS", "--max-time", "30", "--noproxy", "*"]).args(arguments);
        curl.arg(format!("http://{}{path}", self.addr));
        let piped = curl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("start curl");
        let mut stdin = child.stdin.take().expect("its input");
        let input = input.to_owned();
        // It may have its answer before it has read all.
        let writer = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
        let output = child.wait_with_output().expect("its output");
        writer.join().expect("no panic");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "curl {arguments:?} {path}: {complaint}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// It drains, and its books balance.
    fn end(&mut self) {
        self.process.signal(libc::SIGTERM);
        let status = self.process.child.wait().expect("its end");
        assert_eq!(status.code(), Some(0));
    }
}

fn is_installed(client: &str) -> bool {
    let found = Command::new(client).arg("--version").output();
    if let Err(error) = &found {
        not_run(client, format!("it is not installed: {error}"));
    }
    found.is_ok()
}

fn said(command: &mut Command) -> String {
    let output = command.output().expect("run it");
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words).into_owned();
    assert!(output.status.success(), "{words}");
    words
}

/// The number that stands before these words.
fn number_before(text: &str, words: &str) -> u64 {
    let before = text.split(words).next().expect("there is a first part");
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    assert!(text.contains(words), "no {words:?} in {text}");
    digits.parse().unwrap_or_else(|_| panic!("no number before {words:?} in {text}"))
}
