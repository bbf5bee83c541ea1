//! Real clients ask the HTTP example, which runs as a process of its own: curl, wrk and h2load.
//! And drains under the load of the latter two, whose own counts are compared with the handlers'.

use std::convert::Infallible;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::common::clients::{self, HttpExample, is_installed, number_before};
use crate::common::peer::ANY;
use crate::common::{config, length, limit, load, start, wait_until};
use hyper::service::service_fn;
use hyper::{Request, Response};
use slipring::http::{Http, Incoming};
use slipring::{CloseReason, DrainReport, Server};

#[test]
fn curl_gets_what_the_http_example_promises() {
    let Some(mut example) = HttpExample::start("http", "curl") else { return };
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
    }
    // Two requests, one connection; 7.88 can't keep one of HTTP/2 that it has not negotiated.
    let twice = ["--http1.1", "-w", "%{num_connects};", "-o", "/dev/null", "-o", "/dev/null"];
    let url = format!("http://{}/served", example.addr);
    example.curl(&[&twice[..], &[&url, "/hello"]].concat(), "1;0;");
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
fn wrk_and_h2load_see_no_error() {
    clients::see_no_error("http", "hello");
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
