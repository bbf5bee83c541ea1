//! A Unix socket from both ends: `cargo run --release --example unix -- unix:/tmp/shout.sock`
//! serves, and `cargo run --release --example unix -- unix:/tmp/shout.sock "hello"` asks, as does
//! `nc -U /tmp/shout.sock`.
//!
//! The server sends each line back in capitals until Ctrl-C or SIGTERM. The client is a server
//! without an address: it connects from its core, prints the answer, and drains itself.

use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::time::Duration;

use slipring::{Config, Connection, Error, Result, Server, net};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let done = match (arguments.next(), arguments.next()) {
        (Some(address), None) => serve(&address),
        (Some(address), Some(text)) => ask(address, text),
        _ => {
            eprintln!("usage: unix ADDRESS [TEXT], such as unix:/tmp/shout.sock or unix:@shout");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("unix: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(address: &str) -> Result<()> {
    let server = Server::new(Config::from_env()?).listen(address, shout).drain_on_signals();
    let running = server.start()?;
    println!("listening on {address}");
    println!("{}", running.join()?);
    Ok(())
}

async fn shout(mut conn: Connection) -> Result<()> {
    while let Some(line) = conn.read_until(b'\n', LINE_BYTES_MAX).await? {
        conn.send(line.to_ascii_uppercase()).await?;
    }
    Ok(())
}

fn ask(address: String, text: String) -> Result<()> {
    let running = Server::new(Config::from_env()?).start()?;
    let (tell, told) = channel();
    running.handle().spawn_on(0, move || async move {
        let answer = async {
            let mut conn = net::connect(&address).await?;
            conn.send(format!("{text}\n")).await?;
            conn.shutdown().await?;
            let line = conn.read_until(b'\n', LINE_BYTES_MAX).await?;
            Ok::<_, Error>(line.unwrap_or_default())
        };
        // The main thread waits for it.
        let _ = tell.send(answer.await);
    })?;
    let answer = told.recv().expect("the core answers");
    running.handle().drain(Duration::from_secs(1))?;
    print!("{}", String::from_utf8_lossy(&answer?));
    Ok(())
}

const LINE_BYTES_MAX: usize = 4096;
