//! Sends every datagram back, on every core: `cargo run --release --example udp_echo`, then
//! `nc -u 127.0.0.1 7000`.
//!
//! It serves the addresses of `SLIPRING_LISTEN`. Ctrl-C or SIGTERM drains it: what has come is
//! answered, and the sockets close. On the way out it prints the account, as one line of JSON when
//! `SLIPRING_REPORT=json`. Exit status: 0 when the books balance, 1 when they do not, 2 when it
//! could not serve.

use std::process::ExitCode;

use slipring::net::UdpSocket;
use slipring::{Config, DrainReport, ReportFormat, Result, Server};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("udp_echo: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport> {
    let config = Config::from_env()?;
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        server = server.serve_udp(address, echo);
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.udp_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    match config.report_format() {
        ReportFormat::Json => println!("{}", report.to_json()),
        ReportFormat::Text => println!("{report}"),
    }
    Ok(report)
}

/// Runs once on each core, with that core's socket. A datagram goes back out of the buffer that it
/// came in; several of one sender that the kernel has put together go back as several.
async fn echo(socket: UdpSocket) -> Result<()> {
    socket.set_gro(true)?;
    while let Some(datagram) = socket.recv_until_drain().await? {
        let peer = datagram.peer();
        match datagram.segment_size() {
            Some(bytes) => socket.send_segments(datagram, bytes, peer).await?,
            None => socket.send_to(datagram, peer).await?,
        }
    }
    Ok(())
}
