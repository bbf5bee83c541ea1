//! Real clients of HTTP, and the examples that they ask.

use std::io::Write;
use std::process::{Command, Stdio};

use super::child::{self, Process};
use super::not_run;
use super::peer::ANY;

/// An example that serves HTTP, as a process of its own.
pub struct HttpExample {
    process: Process,
    pub addr: String,
}

impl HttpExample {
    /// None where the client that is to ask it is not installed.
    pub fn start(name: &str, client: &str) -> Option<HttpExample> {
        if !is_installed(client) {
            return None;
        }
        let mut command = Command::new(child::example(name));
        command.env_clear().env("SLIPRING_LISTEN", ANY).env("SLIPRING_CONNECTIONS_MAX", "200");
        let mut process = Process::start(command);
        let addr = process.line_after("listening on ");
        Some(HttpExample { process, addr })
    }

    pub fn curl(&self, arguments: &[&str], expected: &str) {
        self.curl_with(arguments, "", expected);
    }

    pub fn curl_with(&self, arguments: &[&str], input: &str, expected: &str) {
        let answer = self.run(arguments, input);
        assert!(answer == expected, "curl {arguments:?}: {:.200}", answer);
    }

    /// Runs curl, whose last argument is a path.
    pub fn run(&self, arguments: &[&str], input: &str) -> String {
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
    pub fn end(&mut self) {
        self.process.signal(libc::SIGTERM);
        let status = self.process.child.wait().expect("its end");
        assert_eq!(status.code(), Some(0));
    }
}

pub fn is_installed(client: &str) -> bool {
    let found = Command::new(client).arg("--version").output();
    if let Err(error) = &found {
        not_run(client, format!("it is not installed: {error}"));
    }
    found.is_ok()
}

pub fn said(command: &mut Command) -> String {
    let output = command.output().expect("run it");
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words).into_owned();
    assert!(output.status.success(), "{words}");
    words
}

/// The number that stands before these words.
pub fn number_before(text: &str, words: &str) -> u64 {
    let before = text.split(words).next().expect("there is a first part");
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    assert!(text.contains(words), "no {words:?} in {text}");
    digits.parse().unwrap_or_else(|_| panic!("no number before {words:?} in {text}"))
}

/// What curl gets; `None` where there is no curl.
pub fn curl(test: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("curl");
    command.args(["-sS", "-m", "20"]).args(arguments).env("PATH", child::path());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            not_run(test, format!("curl: {error}"));
            return None;
        }
    };
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "curl {arguments:?}: {words}");
    Some(String::from_utf8(output.stdout).expect("it is UTF-8"))
}

/// wrk and h2load see no error, by any version of HTTP.
pub fn see_no_error(name: &str, path: &str) {
    if let Some(mut example) = HttpExample::start(name, "wrk") {
        let url = format!("http://{}/{path}", example.addr);
        let words = said(Command::new("wrk").args(["-t1", "-c16", "-d1s", &url]));
        assert!(!words.contains("errors") && !words.contains("Non-2xx"), "{words}");
        assert!(number_before(&words, " requests in ") > 100, "{words}");
        example.end();
    }
    if let Some(mut example) = HttpExample::start(name, "h2load") {
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
