//! The examples of TLS and of tokio's world, run as a person would and driven by real clients.
#![cfg(all(feature = "hyper", feature = "rustls"))]

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

mod common;

use common::example::Example;
use common::{child, limit, not_run, wait_until};

#[test]
fn tls_serves_curl_with_both_versions_of_http() {
    let example = Example::start("tls", &[], &[]);
    let url = format!("https://{}/hello", example.addr);
    for (option, protocol) in [("--http1.1", "http/1.1"), ("--http2", "h2")] {
        let Some(text) = curl("tls", &["-k", option, &url]) else { return };
        assert_eq!(text, format!("/hello over TLSv1_3, {protocol}\n"));
    }
    let urls: Vec<String> = (0..20).map(|n| format!("https://{}/{n}", example.addr)).collect();
    let urls = urls.iter().map(String::as_str);
    let many: Vec<&str> = ["-k", "--http2", "--parallel"].into_iter().chain(urls).collect();
    let text = curl("tls", &many).expect("curl");
    assert_eq!(text.matches(" over TLSv1_3, h2\n").count(), 20, "{text}");
    let text = curl("tls", &["-k", "--tls-max", "1.2", "--no-alpn", &url]).expect("curl");
    assert_eq!(text, "/hello over TLSv1_2, no protocol\n");
    // Without trust in the certificate there is no answer.
    let refused = Command::new("curl").args(["-sS", "-m", "20", &url]).output().expect("curl");
    assert!(!refused.status.success() && refused.stdout.is_empty());
    example.terminate();
    assert!(example.end().contains("books balance"));
}

#[test]
fn tls_serves_openssl_with_a_certificate_of_ones_own_and_says_close_notify_at_the_drain() {
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let folder = std::env::temp_dir().join(format!("slipring-tls-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let [certificate, key] = ["certificate.pem", "key.pem"].map(|name| folder.join(name));
    std::fs::write(&certificate, own.cert.pem()).expect("write it");
    std::fs::write(&key, own.signing_key.serialize_pem()).expect("write it");
    let [certificate, key] = [certificate, key].map(|path| path.display().to_string());

    let example = Example::start("tls", &[&certificate, &key], &[]);
    let client = Command::new("openssl")
        .args(["s_client", "-connect", &example.addr.to_string(), "-servername", "localhost"])
        .args(["-CAfile", &certificate, "-verify_return_error", "-alpn", "http/1.1"])
        .args(["-state", "-nocommands", "-ign_eof"])
        .env("PATH", child::path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut client = match client {
        Ok(client) => client,
        Err(error) => return not_run("openssl", format!("openssl s_client: {error}")),
    };
    let mut input = client.stdin.take().expect("it is a pipe");
    input.write_all(b"GET /open HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("send");
    let mut output = BufReader::new(client.stdout.take().expect("it is a pipe"));
    let (mut lines, mut line) = (String::new(), String::new());
    while !line.contains("over TLS") {
        line.clear();
        assert!(output.read_line(&mut line).expect("it is UTF-8") > 0, "{lines}");
        lines += &line;
    }
    assert_eq!(line, "/open over TLSv1_3, http/1.1\n");
    assert!(lines.contains("ALPN protocol: http/1.1"), "{lines}");
    example.terminate();
    let mut states = String::new();
    client.stderr.take().expect("it is a pipe").read_to_string(&mut states).expect("it is UTF-8");
    assert!(states.contains("read:warning:close notify"), "{states}");
    wait_until("it has ended", || client.try_wait().expect("ask for the child").is_some());
    assert!(example.end().contains("books balance"));
    std::fs::remove_dir_all(folder).expect("remove it");
}

#[test]
fn grpc_serves_a_tonic_client_and_ends_its_streams_at_the_drain() {
    let example = Example::start("grpc", &[], &[]);
    let address = format!("http://{}", example.addr);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut clients = Vec::new();
        for _ in 0..5 {
            let endpoint = Endpoint::try_from(address.clone()).expect("an address");
            let endpoint = endpoint.timeout(limit(20_000)).connect_timeout(limit(10_000));
            clients.push(HealthClient::new(endpoint.connect().await.expect("connect")));
        }
        let (serving, leaving) = (ServingStatus::Serving, ServingStatus::NotServing);
        for client in &mut clients {
            for _ in 0..20 {
                let answer = client.check(whole_server()).await.expect("an answer").into_inner();
                assert_eq!(answer.status(), serving);
            }
            let unknown = HealthCheckRequest { service: "nobody".to_owned() };
            let refused = client.check(unknown).await.expect_err("there is no such service");
            assert_eq!(refused.code(), tonic::Code::NotFound);
        }
        let mut watches = Vec::new();
        for client in &mut clients {
            let mut watch = watch(client).await;
            let first = watch.message().await.expect("no error").expect("a message");
            assert_eq!(first.status(), serving);
            watches.push(watch);
        }
        example.terminate();
        for mut watch in watches {
            let last = watch.message().await.expect("no error").expect("a message");
            assert_eq!(last.status(), leaving);
            assert!(watch.message().await.expect("an end and no error").is_none());
        }
    });
    assert!(example.end().contains("books balance"));
}

#[test]
fn grpc_serves_grpcurl() {
    let probe = Command::new("grpcurl").arg("-version").env("PATH", child::path()).output();
    if let Err(error) = probe {
        return not_run("grpcurl", format!("grpcurl: {error}"));
    }
    let folder = std::env::temp_dir().join(format!("slipring-grpc-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("health.proto"), PROTO).expect("write it");
    let example = Example::start("grpc", &[], &[]);
    let output = Command::new("grpcurl")
        .args(["-plaintext", "-max-time", "20", "-proto", "health.proto"])
        .args([&example.addr.to_string(), "grpc.health.v1.Health/Check"])
        .env("PATH", child::path())
        .current_dir(&folder)
        .output()
        .expect("run it");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("\"SERVING\""), "{text}{output:?}");
    example.terminate();
    assert!(example.end().contains("books balance"));
    std::fs::remove_dir_all(folder).expect("remove it");
}

#[test]
fn sql_keeps_notes_in_memory_and_in_a_file() {
    let file = std::env::temp_dir().join(format!("slipring-notes-{}.db", std::process::id()));
    let file = file.display().to_string();
    for (arguments, found, deletes) in
        [(&[][..], "0\n", true), (&[&file[..]], "0\n", false), (&[&file[..]], "1\n", true)]
    {
        let example = Example::start("sql", arguments, &[]);
        let url = |path: &str| format!("http://{}{path}", example.addr);
        let Some(count) = curl("sql", &[&url("/notes")]) else { return };
        assert_eq!(count, found, "{arguments:?}");
        let number = curl("sql", &["-d", "buy milk", &url("/notes")]).expect("curl");
        let note = url(&format!("/notes/{}", number.trim()));
        assert_eq!(curl("sql", &[&note]).expect("curl"), "buy milk");
        // Requests of HTTP/2 are tasks of their own.
        let by_http2 = curl("sql", &["--http2-prior-knowledge", &note]).expect("curl");
        assert_eq!(by_http2, "buy milk");
        if deletes {
            assert_eq!(curl("sql", &["-X", "DELETE", &note]).expect("curl"), "1\n");
            assert_eq!(curl("sql", &["-X", "DELETE", &note]).expect("curl"), "0\n");
            let missing = curl("sql", &[&note]).expect("curl");
            assert_eq!(missing, format!("there is no note {}\n", number.trim()));
        }
        example.terminate();
        assert!(example.end().contains("books balance"));
    }
    std::fs::remove_file(file).expect("remove it");
}

#[test]
fn graceful_answers_what_has_begun_while_its_owner_drains_it() {
    for round in 0..5 {
        let example = Example::start("graceful", &[], &[]);
        let mut peers: Vec<_> = (0..4).map(|_| BufReader::new(example.connect())).collect();
        let mut numbers = Vec::new();
        for n in 0..100 {
            for peer in &mut peers {
                peer.get_mut().write_all(format!("line {n}\n").as_bytes()).expect("send");
            }
            for peer in &mut peers {
                let mut line = String::new();
                peer.read_line(&mut line).expect("an answer");
                numbers.push(line.trim().parse::<u64>().expect("a number"));
            }
        }
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(1..=400), "each line has a number of its own");
        // One has begun a line when the drain comes, and ends it after that.
        peers[0].get_mut().write_all(b"a late ").expect("send");
        peers[1].get_mut().write_all(b"last\n").expect("send");
        let mut line = String::new();
        peers[1].read_line(&mut line).expect("an answer");
        assert_eq!(line, "401\n");
        example.terminate();
        assert_eq!(peers[1].read(&mut [0]).expect("a FIN, no reset"), 0, "round {round}");
        peers[0].get_mut().write_all(b"line\n").expect("send");
        let mut rest = String::new();
        peers[0].read_to_string(&mut rest).expect("a FIN, no reset");
        assert_eq!(rest, "402\n", "round {round}");
        let words = example.end();
        assert!(words.starts_with("402 lines\n") && words.contains("books balance"), "{words}");
    }
}

fn whole_server() -> HealthCheckRequest {
    HealthCheckRequest { service: String::new() }
}

async fn watch(
    client: &mut HealthClient<Channel>,
) -> tonic::Streaming<tonic_health::pb::HealthCheckResponse> {
    // The time limit of the channel ends the call, not the stream.
    let mut request = tonic::Request::new(whole_server());
    request.set_timeout(Duration::from_secs(60));
    client.watch(request).await.expect("a stream").into_inner()
}

/// What curl gets; `None` where there is no curl.
fn curl(test: &str, arguments: &[&str]) -> Option<String> {
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

/// The standard's definition, as far as it is called here.
const PROTO: &str = r#"syntax = "proto3";
package grpc.health.v1;
message HealthCheckRequest { string service = 1; }
message HealthCheckResponse {
  enum ServingStatus { UNKNOWN = 0; SERVING = 1; NOT_SERVING = 2; SERVICE_UNKNOWN = 3; }
  ServingStatus status = 1;
}
service Health { rpc Check(HealthCheckRequest) returns (HealthCheckResponse); }
"#;
