//! A service for a manager such as systemd: `cargo build --features systemd --example systemd`,
//! then `systemd-socket-activate -l 127.0.0.1:7000 target/debug/examples/systemd`, and talk to it
//! by `nc 127.0.0.1 7000`. The units for it are in `docs/deploy.md`.
//!
//! It echoes on the sockets that it was given, or on `SLIPRING_LISTEN` where there are none, and
//! tells its manager when it is ready, that its cores turn, and how long its drain may take. Ctrl-C
//! or SIGTERM drains it; what waits in the sockets' queues then is the next process's. Exit status:
//! 0 when the books balance, 1 when they do not, 2 when it could not serve.

use std::process::ExitCode;

use slipring::{Config, Connection, DrainReport, ReportFormat, Result, Server, systemd};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("systemd: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport> {
    let config = Config::from_env()?;
    let mut server = Server::new(config.clone())
        .drain_on_signals()
        .notify_systemd(|error| eprintln!("systemd: {error}"));
    let mut passed = systemd::listen_fds()?;
    if passed.is_empty() {
        for address in config.listen_addresses() {
            server = server.listen(address, echo);
        }
    } else {
        server = server.listen_on(passed.take_all(), echo);
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    match config.report_format() {
        ReportFormat::Json => println!("{}", report.to_json()),
        ReportFormat::Text => println!("{report}"),
    }
    Ok(report)
}

async fn echo(mut conn: Connection) -> Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}
