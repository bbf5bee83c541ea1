//! The example of TLS, driven by curl and openssl.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use crate::common::clients::curl;
use crate::common::example::Example;
use crate::common::{child, not_run, wait_until};

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
