//! HTTPS, with HTTP/1 and HTTP/2 by ALPN:
//! `cargo run --release --features hyper,rustls --example tls`, then
//! `curl -k https://127.0.0.1:7000/` or `openssl s_client -connect 127.0.0.1:7000`.
//!
//! It signs itself a certificate, or takes what `-- certificates.pem key.pem` names.
//! Ctrl-C or SIGTERM drains it: idle connections get close_notify and a FIN.
//! Exit status: 0 when the books balance, 1 when they do not, 2 when it could not serve.

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use hyper::service::service_fn;
use hyper::{Request, Response};
use slipring::http::{Http, Incoming};
use slipring::tls::rustls::ServerConfig;
use slipring::tls::rustls::pki_types::pem::PemObject;
use slipring::tls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use slipring::tls::{Acceptor, TlsStream};
use slipring::{Config, Connection, DrainReport, Server};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("tls: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport, Box<dyn Error>> {
    let config = Config::from_env()?;
    let acceptor = Acceptor::new(Arc::new(tls_config()?));
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        let (acceptor, http) = (acceptor.clone(), Http::new());
        server = server.listen(address, move |conn: Connection| {
            let (acceptor, http) = (acceptor.clone(), http.clone());
            async move {
                let stream = acceptor.accept(conn).await?;
                let about: Arc<str> = describe(&stream).into();
                let hello = service_fn(move |request| answer(Arc::clone(&about), request));
                http.serve(stream, hello).await
            }
        });
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    println!("{report}");
    Ok(report)
}

/// How the client and we have agreed to talk.
fn describe(stream: &TlsStream) -> String {
    let session = stream.session();
    let version = session.protocol_version().and_then(|version| version.as_str());
    let alpn = stream.alpn().map(String::from_utf8_lossy);
    let (version, alpn) =
        (version.unwrap_or("?"), alpn.as_deref().unwrap_or("no protocol").to_owned());
    format!("{version}, {alpn}")
}

async fn answer(
    about: Arc<str>,
    request: Request<Incoming>,
) -> Result<Response<String>, Infallible> {
    Ok(Response::new(format!("{} over {about}\n", request.uri().path())))
}

fn tls_config() -> Result<ServerConfig, Box<dyn Error>> {
    let files: Vec<String> = std::env::args().skip(1).collect();
    let (certificates, key) = match &files[..] {
        [certificates, key] => {
            let chain = CertificateDer::pem_file_iter(certificates)?.collect::<Result<_, _>>()?;
            (chain, PrivateKeyDer::from_pem_file(key)?)
        }
        [] => {
            let own = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
            let key = PrivateKeyDer::try_from(own.signing_key.serialize_der())?;
            (vec![own.cert.der().clone()], key)
        }
        _ => return Err("name a file of certificates and one with their key, or none".into()),
    };
    let config = ServerConfig::builder().with_no_client_auth();
    let mut config = config.with_single_cert(certificates, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
