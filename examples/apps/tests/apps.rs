//! The applications, driven by real clients as a person or a service manager would.

#[path = "../../../tests/common/mod.rs"]
mod common;

use std::process::Command;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use common::clients::{HttpExample, curl, see_no_error};
use common::example::Example;
use common::{child, limit, not_run};

#[test]
fn curl_gets_what_the_axum_example_promises() {
    let Some(mut example) = HttpExample::start(AXUM, "curl") else { return };
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
fn wrk_and_h2load_see_no_error_of_axum() {
    see_no_error(AXUM, "");
}

#[test]
fn grpc_serves_a_tonic_client_and_ends_its_streams_at_the_drain() {
    let example = Example::start(GRPC, &[], &[]);
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
    let example = Example::start(GRPC, &[], &[]);
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
        let example = Example::start(SQL, arguments, &[]);
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

/// Where cargo has built them.
const AXUM: &str = env!("CARGO_BIN_EXE_axum");
const GRPC: &str = env!("CARGO_BIN_EXE_grpc");
const SQL: &str = env!("CARGO_BIN_EXE_sql");
