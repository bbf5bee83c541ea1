//! slipring inside a tokio service that owns main, the signals and other tasks:
//! `cargo run --release --example graceful`, then `nc 127.0.0.1 7000` and some lines.
//!
//! Connections are slipring's; each line is counted by a task of tokio's, over channels, which need
//! no runtime where they are used. Ctrl-C or SIGTERM drains the server while tokio's tasks go on,
//! a second one forces it.
//! Exit status: 0 when the books balance, 1 when they do not, 2 when it could not serve.

use std::process::ExitCode;

use slipring::{Config, Connection, DrainReport, Error, Result, Server};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// A line, and where its number is awaited.
type Line = (Vec<u8>, oneshot::Sender<u64>);

#[tokio::main(worker_threads = 1)]
async fn main() -> ExitCode {
    match serve().await {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("graceful: {error}");
            ExitCode::from(2)
        }
    }
}

async fn serve() -> Result<DrainReport> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (lines, to_count) = mpsc::channel(1024);
    let counter = tokio::spawn(count(to_count));

    let config = Config::from_env()?;
    let mut server = Server::new(config.clone());
    for address in config.listen_addresses() {
        let lines = lines.clone();
        server = server.listen(address, move |conn| number_lines(conn, lines.clone()));
    }
    drop(lines);
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));

    let handle = running.handle();
    // Joining blocks, so it has a thread of its own and tokio's go on.
    let mut joining = tokio::task::spawn_blocking(|| running.join());
    let mut draining = false;
    let report = loop {
        tokio::select! {
            report = &mut joining => break report.map_err(std::io::Error::other)??,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if draining {
            handle.close();
        } else {
            handle.begin_drain(handle.drain_default());
            draining = true;
        }
    };
    // No handler is left, so this task comes to its end too.
    let counted = counter.await.map_err(|error| Error::from(std::io::Error::other(error)))?;
    println!("{counted} lines\n{report}");
    Ok(report)
}

/// Answers each line with its number among all lines.
async fn number_lines(mut conn: Connection, lines: mpsc::Sender<Line>) -> Result<()> {
    while let Some(line) = conn.read_until(b'\n', LINE_BYTES_MAX).await? {
        let (reply, number) = oneshot::channel();
        if lines.send((line, reply)).await.is_err() {
            break;
        }
        let Ok(number) = number.await else { break };
        conn.write(format!("{number}\n").as_bytes()).await?;
    }
    Ok(())
}

async fn count(mut lines: mpsc::Receiver<Line>) -> u64 {
    let mut counted = 0;
    while let Some((line, reply)) = lines.recv().await {
        counted += u64::from(!line.is_empty());
        // A connection that is gone needs no number.
        let _ = reply.send(counted);
    }
    counted
}

const LINE_BYTES_MAX: usize = 64 * 1024;
