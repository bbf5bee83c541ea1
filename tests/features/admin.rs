//! The admin listener: what it answers, to whom, and until when.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::common::exposition::Page;
use crate::common::web::{Reply, ask, ask_over, get};
use crate::common::{
    config, connect, echo, echo_or_loop, ignore_all, late, limit, settle, start, wait_until,
};
use slipring::{Admin, ErrorKind, ListenAddr, Phase, Running, Server};

/// Starts an echo server with an admin listener. Returns its address and that of the other.
fn watched(admin: impl Into<Admin>) -> (Running, SocketAddr, SocketAddr) {
    let server = Server::new(config()).listen("127.0.0.1:0", echo).admin(admin);
    let (running, addr) = start(server);
    let admin = admin_of(&running);
    (running, addr, admin)
}

fn admin_of(running: &Running) -> SocketAddr {
    match running.admin_addr() {
        Some(ListenAddr::Tcp(addr)) => addr,
        other => panic!("{other:?}"),
    }
}

/// How long after its deadline a drain may return, and the machine may be late.
fn in_time() -> Duration {
    Duration::from_millis(100) + late::allowance()
}

fn ok(addr: SocketAddr, path: &str) -> Reply {
    let reply = get(addr, path).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(reply.status, 200, "{path}: {}", reply.body);
    reply
}

fn status(addr: SocketAddr, head: &str) -> u16 {
    ask(addr, head).unwrap_or_else(|error| panic!("{head:?}: {error}")).status
}

#[test]
fn each_page_is_there_for_get_and_head_and_for_nothing_else() {
    let (running, _, admin) = watched("127.0.0.1:0");
    for (path, kind) in [
        ("/", "text/plain; charset=utf-8"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        ("/healthz", "text/plain; charset=utf-8"),
        ("/readyz", "text/plain; charset=utf-8"),
        ("/connections", "application/json"),
        ("/connections.json", "application/json"),
        ("/connections.html", "text/html; charset=utf-8"),
    ] {
        let reply = ok(admin, path);
        assert_eq!(reply.header("content-type"), Some(kind), "{path}");
        assert!(!reply.body.is_empty(), "{path}");
        for (header, value) in [
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("cross-origin-resource-policy", "same-origin"),
        ] {
            assert_eq!(reply.header(header), Some(value), "{path}");
        }
        let policy = reply.header("content-security-policy").expect("a policy");
        assert!(policy.starts_with("default-src 'none'"), "{path}: {policy}");
        let head = ask(admin, &format!("HEAD {path} HTTP/1.1\r\nhost: localhost\r\n"));
        let head = head.expect("an answer");
        assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
        assert!(head.header("content-length").is_some_and(|length| length != "0"), "{path}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
            let reply = ask(admin, &format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n"));
            let reply = reply.expect("an answer");
            assert_eq!((reply.status, reply.header("allow")), (405, Some("GET, HEAD")), "{path}");
        }
    }
    for path in ["/nothing", "/metrics/", "/connections.xml", "//", "/..%2fetc"] {
        assert_eq!(get(admin, path).expect("an answer").status, 404, "{path}");
    }
    let html = "GET / HTTP/1.1\r\nhost: localhost\r\naccept: text/html,*/*;q=0.8\r\n";
    for path in ["/", "/connections"] {
        let reply = ask(admin, &html.replace(" / ", &format!(" {path} "))).expect("an answer");
        assert!(reply.body.starts_with("<!doctype html>"), "a browser gets a page at {path}");
    }
    settle(running, 0);
}

#[test]
fn the_metrics_are_those_of_the_server_and_of_the_listener_itself() {
    let (running, addr, admin) = watched("127.0.0.1:0");
    let mut client = connect(addr);
    client.write_all(b"hello").expect("send");
    client.read_exact(&mut [0; 5]).expect("an echo");
    assert_eq!(get(admin, "/nothing").expect("an answer").status, 404);
    ok(admin, "/healthz");
    let page = Page::read(&ok(admin, "/metrics").body);
    assert_eq!(page.sum("slipring_connections_accepted_total"), 1.0, "its own are not among them");
    assert_eq!(page.sum("slipring_received_bytes_total"), 5.0);
    assert_eq!(page.sum("slipring_admin_connections_accepted_total"), 3.0);
    assert!(page.sum("slipring_admin_connections") >= 1.0);
    let by_code: Vec<_> = page.of("slipring_admin_requests_total").collect();
    let count =
        |code: &str| by_code.iter().find(|(labels, _)| labels["code"] == code).map(|it| it.1);
    assert_eq!((count("200"), count("404"), by_code.len()), (Some(1.0), Some(1.0), 2));
    drop(client);
    settle(running, 1);
}

#[test]
fn the_list_of_connections_is_json_with_every_field_and_as_long_as_asked() {
    let (running, addr, admin) = watched("127.0.0.1:0");
    let mut clients: Vec<_> = (0..5).map(|_| connect(addr)).collect();
    for client in &mut clients {
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an echo");
    }
    let list = |path: &str| -> serde_json::Value {
        serde_json::from_str(&ok(admin, path).body).expect("JSON")
    };
    let all = list("/connections");
    let peers: Vec<_> = all["connections"].as_array().expect("a list").iter().collect();
    assert_eq!((&all["total"], peers.len()), (&5.into(), 5));
    assert_eq!((&all["phase"], &all["ready"]), (&"running".into(), &true.into()));
    for client in &clients {
        let peer = client.local_addr().expect("an address").to_string();
        assert!(peers.iter().any(|it| it["peer"] == peer.as_str()), "{peer} in {all}");
    }
    assert_eq!(peers[0]["state"], "idle");
    assert!(peers[0]["handler"].as_str().is_some_and(|place| place.contains("admin.rs:")));
    let some = list("/connections.json?limit=2");
    assert_eq!(
        (some["connections"].as_array().map(Vec::len), &some["total"]),
        (Some(2), &5.into())
    );
    for query in ["limit=0", "limit=20001", "limit=x", "limit", "order=age", "limit=1&limit=1"] {
        assert_eq!(get(admin, &format!("/connections?{query}")).expect("an answer").status, 400);
    }
    drop(clients);
    settle(running, 5);
}

#[test]
fn it_answers_in_each_phase_of_a_drain_and_is_not_ready_from_the_first_on() {
    late::watch();
    let server = Server::new(config().lameduck_ms(300)).listen("127.0.0.1:0", ignore_all);
    let (running, addr) = start(server.admin("127.0.0.1:0"));
    let (admin, handle) = (admin_of(&running), running.handle());
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("an answer");
    assert_eq!(ok(admin, "/readyz").body, "ready\n");
    // One that is kept open, as a scraper's is, holds nothing up.
    let mut kept = connect(admin);
    kept.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("send");
    kept.read_exact(&mut [0; 12]).expect("an answer");

    let since = Instant::now();
    handle.begin_drain(limit(1_000));
    let mut phases = Vec::new();
    let probes = std::thread::spawn(move || {
        while handle.phase() != Phase::Down {
            let phase = handle.phase();
            let Ok(ready) = get(admin, "/readyz") else { break };
            assert_eq!(ready.status, 503, "{phase:?}: {}", ready.body);
            assert!(ready.body.starts_with("draining: "), "{}", ready.body);
            let answers = ["/healthz", "/metrics", "/connections"].map(|path| get(admin, path));
            if handle.phase() != Phase::Down {
                let codes = answers.map(|it| it.expect("it is answered").status);
                assert_eq!(codes, [200; 3], "{phase:?}");
            }
            if !phases.contains(&phase) {
                phases.push(phase);
            }
        }
        phases
    });
    let report = running.join().expect("every core ends well");
    assert!(since.elapsed() <= limit(1_000) + in_time(), "{report}");
    let phases = probes.join().expect("no probe has failed");
    assert!(phases.contains(&Phase::LameDuck), "{phases:?}");
    assert!(phases.contains(&Phase::DrainConnections), "{phases:?}");
    assert!(TcpStream::connect(admin).is_err(), "it ends with the server");
    TcpListener::bind(admin).expect("its port is free");
    let mut rest = String::new();
    kept.read_to_string(&mut rest).expect("a FIN, no reset");
}

#[test]
fn it_answers_while_every_core_is_stuck_and_says_so() {
    late::watch();
    static STOP: AtomicBool = AtomicBool::new(false);
    let config = config().cpus("0").stall_ms(50);
    let server = Server::new(config).listen("127.0.0.1:0", |conn| echo_or_loop(conn, &STOP));
    let admin = Admin::at("127.0.0.1:0").unhealthy_after(Duration::from_millis(400));
    let (running, addr) = start(server.admin(admin));
    let (admin, handle) = (admin_of(&running), running.handle());
    ok(admin, "/healthz");
    let mut client = connect(addr);
    client.write_all(b"loop").expect("send");
    wait_until("it is unhealthy", || get(admin, "/healthz").expect("an answer").status == 503);
    let health = get(admin, "/healthz").expect("an answer");
    assert!(health.body.starts_with("core 0 is kept by ") && health.body.contains("admin.rs:"));
    let list: serde_json::Value =
        serde_json::from_str(&ok(admin, "/connections").body).expect("JSON");
    let silent = &list["silent_cores"][0];
    assert_eq!((&silent["core"], &silent["connections"]), (&0.into(), &1.into()), "{list}");
    assert_eq!(Page::read(&ok(admin, "/metrics").body).sum("slipring_connections"), 1.0);
    let since = Instant::now();
    handle.begin_drain(limit(100));
    let report = running.join().expect("the report");
    assert!(since.elapsed() <= limit(100) + in_time(), "{:?}", since.elapsed());
    assert!(report.cores()[0].stuck.is_some(), "{report}");
    assert!(TcpStream::connect(admin).is_err(), "it ends with the join");
    STOP.store(true, SeqCst);
}

#[test]
fn many_that_say_nothing_keep_nobody_from_asking() {
    let (running, _, admin) = watched("127.0.0.1:0");
    let silent: Vec<_> = (0..40).map(|_| connect(admin)).collect();
    let page = Page::read(&ok(admin, "/metrics").body);
    let there = page.sum("slipring_admin_connections");
    assert!(there <= 16.0, "{there} connections");
    let since = Instant::now();
    for _ in 0..20 {
        ok(admin, "/healthz");
    }
    assert!(since.elapsed() < limit(20_000), "{:?}", since.elapsed());
    drop(silent);
    settle(running, 0);
}

#[test]
fn others_can_reach_it_only_if_that_was_said() {
    for addr in ["0.0.0.0:0", "[::]:0"] {
        let server = Server::new(config()).listen("127.0.0.1:0", echo);
        let error = server.admin(addr).start().expect_err("not without being told");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains("allow_remote"), "{error}");
    }
    let (running, _, admin) = watched(Admin::at("0.0.0.0:0").allow_remote());
    ok(SocketAddr::from(([127, 0, 0, 1], admin.port())), "/healthz");
    settle(running, 0);
    let name = format!("slipring-admin-{}", std::process::id());
    let server = Server::new(config()).listen("127.0.0.1:0", echo).admin(format!("unix:@{name}"));
    let (running, _) = start(server);
    let addr = std::os::unix::net::SocketAddr::from_abstract_name(name).expect("a name");
    let mut stream = UnixStream::connect_addr(&addr).expect("connect");
    let reply = ask_over(&mut stream, "GET /readyz HTTP/1.1\r\nhost: localhost\r\n", "");
    assert_eq!(reply.expect("an answer").body, "ready\n");
    settle(running, 0);
}

#[test]
fn when_it_cannot_start_the_server_does_not_either_and_nothing_is_left() {
    let (running, _, admin) = watched("127.0.0.1:0");
    let addr = crate::common::free_address();
    let fds = crate::common::open_fds();
    let server = Server::new(config().bind_retry_ms(0)).listen(addr.to_string(), echo);
    let error = server.admin(admin.to_string()).start().expect_err("its port is taken");
    assert_eq!(error.kind(), ErrorKind::AddressInUse, "{error}");
    assert!(error.to_string().contains(&admin.to_string()), "{error}");
    TcpListener::bind(addr).expect("the server's port is free");
    wait_until("nothing is left open", || crate::common::open_fds() <= fds);
    settle(running, 0);
}

#[test]
fn only_who_calls_it_by_a_name_that_no_page_can_have_is_answered() {
    let (running, _, admin) = watched(Admin::at("127.0.0.1:0").allow_host("box.internal"));
    let with = |host: &str| format!("GET /connections HTTP/1.1\r\nhost: {host}\r\n");
    for host in ["localhost", "127.0.0.1:9100", "[::1]", "box.internal:80"] {
        assert_eq!(status(admin, &with(host)), 200, "{host}");
    }
    for host in ["evil.example", "localhost.evil.example", "box.internal.evil.example"] {
        assert_eq!(status(admin, &with(host)), 421, "{host}");
    }
    assert_eq!(status(admin, "GET / HTTP/1.1\r\n"), 400);
    assert_eq!(status(admin, "GET / HTTP/1.0\r\n"), 200);
    assert_eq!(status(admin, "GET http://evil.example/ HTTP/1.1\r\nhost: localhost\r\n"), 421);
    settle(running, 0);
}

#[test]
fn a_drain_takes_a_post_and_a_right_and_is_nothing_for_other_sites() {
    let (running, _, admin) = watched("127.0.0.1:0");
    let post = |more: &str| format!("POST /drain{more}\r\n");
    let plain = " HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0";
    assert_eq!(status(admin, &post(plain)), 403, "not without being told");
    let got = get(admin, "/drain").expect("an answer");
    assert_eq!((got.status, got.header("allow")), (405, Some("POST")));
    assert!(running.handle().is_ready());
    settle(running, 0);

    let server = Server::new(config().drain_ms(9_000)).listen("127.0.0.1:0", ignore_all);
    let (running, addr) = start(server.admin(Admin::at("127.0.0.1:0").allow_drain()));
    let (admin, handle) = (admin_of(&running), running.handle());
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("an answer");
    for (more, code) in [
        (format!("{plain}\r\nsec-fetch-site: cross-site"), 403),
        (format!("{plain}\r\norigin: http://evil.example"), 403),
        (format!("{plain}\r\norigin: null"), 403),
        (format!("?deadline_ms=x{plain}"), 400),
        (format!("?deadline_ms=3600001{plain}"), 400),
        (format!("?deadline=5{plain}"), 400),
    ] {
        assert_eq!(status(admin, &post(&more)), code, "{more}");
    }
    assert_eq!(status(admin, "HEAD /drain HTTP/1.1\r\nhost: localhost\r\n"), 405);
    assert!(handle.is_ready(), "none of them was an order");
    let begun = |more: &str| -> serde_json::Value {
        let reply = ask(admin, &post(&format!("{more}{plain}"))).expect("an answer");
        assert_eq!(reply.status, 202, "{}", reply.body);
        serde_json::from_str(&reply.body).expect("JSON")
    };
    let left = |json: serde_json::Value| json["deadline_in_ms"].as_u64().expect("a time");
    let first = left(begun(""));
    assert!((8_000..=9_000).contains(&first), "the configured one: {first}");
    assert!(left(begun("?deadline_ms=60000")) <= 9_000, "it can only be shortened");
    assert!(left(begun("?deadline_ms=200")) <= 200);
    let report = running.join().expect("every core ends well");
    assert!(report.is_balanced(), "{report}");
}

#[test]
fn it_ends_with_the_server_though_nobody_joins() {
    let (running, _, admin) = watched("127.0.0.1:0");
    let handle = running.handle();
    drop(running);
    ok(admin, "/healthz");
    handle.drain(limit(5_000)).expect("the report");
    wait_until("it has ended", || TcpStream::connect(admin).is_err());
}
