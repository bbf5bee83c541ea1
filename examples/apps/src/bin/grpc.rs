//! A gRPC service by tonic, the standard health service:
//! `cargo run --release -p slipring-apps --bin grpc`, then
//!
//! ```sh
//! printf '\0\0\0\0\0' | curl -s --http2-prior-knowledge --data-binary @- \
//!     -H 'content-type: application/grpc' \
//!     http://127.0.0.1:7000/grpc.health.v1.Health/Check | od -c
//! ```
//!
//! whose last byte is 1: it serves. Any gRPC client can ask, such as grpcurl with the standard's
//! `health.proto`:
//! `grpcurl -plaintext -proto health.proto 127.0.0.1:7000 grpc.health.v1.Health/Check`.
//!
//! When it is drained, by Ctrl-C or SIGTERM, whoever watches hears that it no longer serves, and
//! the stream ends.
//! Exit status: 0 when the books balance, 1 when they do not, 2 when it could not serve.

use std::process::ExitCode;

use slipring::http::{Http, tower};
use slipring::{Config, DrainReport, Result, Server};
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("grpc: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport> {
    let (reporter, health) = health_reporter();
    let routes = Routes::new(health).prepare();
    let config = Config::from_env()?;
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        let http = Http::new().http2_only();
        server = server.listen(address, http.handler(tower(routes.clone())));
    }
    let server = server.on_drain(move |core| {
        let reporter = reporter.clone();
        async move {
            if core.index == 0 {
                leave(reporter).await;
            }
        }
    });
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    println!("{report}");
    Ok(report)
}

/// Tells those who watch, and ends their streams, which would otherwise last until the deadline.
async fn leave(mut reporter: HealthReporter) {
    reporter.set_service_status("", ServingStatus::NotServing).await;
    reporter.clear_service_status("").await;
}
