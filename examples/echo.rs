//! Sends everything back: `cargo run --release --example echo`, then `nc 127.0.0.1 7000`.
//!
//! Ctrl-C or SIGTERM drains it, a second one forces it. On the way out it prints the account, as
//! one line of JSON when `SLIPRING_REPORT=json`. Exit status: 0 when the books balance, 1 when they
//! do not, 2 when it could not serve.

use std::process::ExitCode;

use slipring::{Config, Connection, DrainReport, ReportFormat, Result, Server};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("echo: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport> {
    let config = Config::from_env()?;
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        server = server.listen(address, echo);
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
