//! Certificates that nobody else trusts, and clients that do.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, OnceLock};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use slipring::tls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use slipring::tls::rustls::server::WebPkiClientVerifier;
use slipring::tls::rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned,
    SupportedProtocolVersion,
};

use crate::common::connect;

/// A certificate and its key, which an authority has signed that [`roots`] has.
struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

struct World {
    authority: CertificateDer<'static>,
    server: Identity,
    client: Identity,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let key = || KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new([]).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = key();
        let authority = params.self_signed(&authority_key).expect("a certificate").der().clone();
        let issuer = Issuer::new(params, authority_key);
        let sign = |name: &str| {
            let key = key();
            let params = CertificateParams::new([name.to_owned()]).expect("a name");
            let certificate = params.signed_by(&key, &issuer).expect("a certificate").der().clone();
            let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
            Identity { certificate, key }
        };
        World { authority, server: sign("localhost"), client: sign("somebody") }
    })
}

fn roots() -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(world().authority.clone()).expect("a certificate");
    Arc::new(roots)
}

/// A server of these protocols, which asks no client who it is.
pub fn server(alpn: &[&str]) -> ServerConfig {
    let Identity { certificate, key } = &world().server;
    let config = ServerConfig::builder().with_no_client_auth();
    let mut config = config
        .with_single_cert(vec![certificate.clone()], key.clone_key())
        .expect("a key for the certificate");
    config.alpn_protocols = protocols(alpn);
    config
}

/// A server that asks its clients for a certificate.
pub fn mutual_server() -> ServerConfig {
    let Identity { certificate, key } = &world().server;
    let verifier = WebPkiClientVerifier::builder(roots()).build().expect("a verifier");
    ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.clone()], key.clone_key())
        .expect("a key for the certificate")
}

/// A client of these protocols without a certificate.
pub fn client(alpn: &[&str]) -> ClientConfig {
    let mut config = ClientConfig::builder().with_root_certificates(roots()).with_no_client_auth();
    config.alpn_protocols = protocols(alpn);
    config
}

/// A client that speaks one version only.
pub fn client_of(version: &'static SupportedProtocolVersion) -> ClientConfig {
    ClientConfig::builder_with_protocol_versions(&[version])
        .with_root_certificates(roots())
        .with_no_client_auth()
}

/// A client that has a certificate.
pub fn known_client(version: &'static SupportedProtocolVersion) -> ClientConfig {
    let Identity { certificate, key } = &world().client;
    ClientConfig::builder_with_protocol_versions(&[version])
        .with_root_certificates(roots())
        .with_client_auth_cert(vec![certificate.clone()], key.clone_key())
        .expect("a key for the certificate")
}

fn protocols(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter().map(|name| name.as_bytes().to_vec()).collect()
}

pub type Client = StreamOwned<ClientConnection, TcpStream>;

/// A client before its handshake.
pub fn dial(addr: SocketAddr, config: &Arc<ClientConfig>) -> Client {
    StreamOwned::new(session(config), connect(addr))
}

/// A client's side of TLS, without a connection.
pub fn session(config: &Arc<ClientConfig>) -> ClientConnection {
    let name = ServerName::try_from("localhost").expect("a name");
    ClientConnection::new(Arc::clone(config), name).expect("a client")
}

/// A client that has made its handshake.
pub fn meet(addr: SocketAddr, config: &Arc<ClientConfig>) -> Client {
    let mut client = dial(addr, config);
    while client.conn.is_handshaking() {
        client.conn.complete_io(&mut client.sock).expect("the handshake");
    }
    client
}

/// Sends `close_notify`, and FIN behind it.
pub fn end_mine(client: &mut Client) {
    client.conn.send_close_notify();
    while client.conn.wants_write() {
        client.conn.write_tls(&mut client.sock).expect("send close_notify");
    }
    client.sock.shutdown(std::net::Shutdown::Write).expect("half-close");
}

/// Reads to the end, which must be one by `close_notify`, with FIN behind it and no reset.
pub fn read_to_clean_end(client: &mut Client) -> Vec<u8> {
    let mut all = Vec::new();
    client.read_to_end(&mut all).expect("the end by close_notify");
    assert_eq!(client.sock.read(&mut [0]).expect("a FIN"), 0);
    all
}

/// Sends all and ends its side, while it reads to the clean end.
pub fn ask(mut client: Client, request: &[u8]) -> Vec<u8> {
    let (mut sent, mut answer, mut buf) = (0, Vec::new(), vec![0; 1 << 16]);
    client.sock.set_nonblocking(true).expect("set non-blocking");
    let mut last = std::time::Instant::now();
    loop {
        let mut moved = false;
        if sent < request.len() {
            let piece = &request[sent..request.len().min(sent + 50_000)];
            if let Some(count) = block(client.write(piece)) {
                (sent, moved) = (sent + count, true);
            }
        } else if client.conn.wants_write() {
            moved = block(client.conn.write_tls(&mut client.sock)).is_some();
        } else if sent == request.len() {
            client.conn.send_close_notify();
            if !client.conn.wants_write() {
                sent += 1;
                client.sock.shutdown(std::net::Shutdown::Write).expect("half-close");
            }
        }
        match block(client.read(&mut buf)) {
            Some(0) => break,
            Some(count) => (moved, _) = (true, answer.extend(&buf[..count])),
            None => {}
        }
        if moved {
            last = std::time::Instant::now();
        } else {
            assert!(last.elapsed() < crate::common::limit(10_000), "nothing moves any more");
            std::thread::yield_now();
        }
    }
    client.sock.set_nonblocking(false).expect("set blocking");
    assert_eq!(client.sock.read(&mut [0]).expect("a FIN"), 0);
    answer
}

fn block<T>(result: std::io::Result<T>) -> Option<T> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
        result => Some(result.expect("send or receive")),
    }
}
