//! Passes connections on to another server: `cargo run --release --example proxy -- 127.0.0.1:7000`
//! beside `cargo run --release --example echo`, then `nc 127.0.0.1 7001`.
//!
//! The upstream is `ip:port`, `unix:/path`, or `host:port` with `--features blocking`; the proxy
//! listens on `SLIPRING_LISTEN`, or on 127.0.0.1:7001. Bytes go both ways without a copy, a
//! half-close and a reset are passed on, and a drain lets what is in flight finish. Each connection
//! that fails is a line on the standard error, and the account comes at the end.

use std::process::ExitCode;
use std::sync::Arc;

use slipring::{Config, Connection, DrainReport, Result, Server, net};

fn main() -> ExitCode {
    let Some(upstream) = std::env::args().nth(1) else {
        eprintln!("usage: proxy UPSTREAM, such as 127.0.0.1:7000 or unix:/run/x.sock");
        return ExitCode::from(2);
    };
    match serve(upstream) {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("proxy: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(upstream: String) -> Result<DrainReport> {
    let mut addresses = vec!["127.0.0.1:7001".to_owned()];
    if std::env::var_os("SLIPRING_LISTEN").is_some_and(|listen| !listen.is_empty()) {
        addresses = Config::from_env()?.listen_addresses();
    }
    let upstream: Arc<str> = upstream.into();
    let mut server = Server::new(Config::from_env()?).drain_on_signals();
    for address in addresses {
        let upstream = Arc::clone(&upstream);
        server = server.listen(address, move |client| pass_on(client, Arc::clone(&upstream)));
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}, for {upstream}", addresses.join(", "));
    let report = running.join()?;
    println!("{report}");
    Ok(report)
}

async fn pass_on(mut client: Connection, upstream: Arc<str>) -> Result<()> {
    let who = client.id();
    let passed_on = async {
        let mut upstream = net::connect(&upstream).await?;
        net::proxy(&mut client, &mut upstream).await
    };
    passed_on.await.map(drop).inspect_err(|error| eprintln!("{who}: {error}"))
}
