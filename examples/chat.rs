//! A chat: `SLIPRING_LISTEN=127.0.0.1:7001 cargo run --release --example chat`, then
//! `nc 127.0.0.1 7001` twice or more often. The first line is your name, each further one goes to
//! everybody, on whatever core they are.
//!
//! Whoever reads too slowly misses lines and is told how many; nobody else waits for them. A drain
//! says goodbye to everybody.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::Poll;

use slipring::broadcast::{Receiver, RecvError, Sender};
use slipring::{Config, Connection, DrainReport, ErrorKind, ReadHalf, Result, Server, WriteHalf};

fn main() -> ExitCode {
    match serve() {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chat: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<DrainReport> {
    let config = Config::from_env()?;
    let room = Sender::<Arc<str>>::new(LINES_KEPT);
    let mut server = Server::new(config.clone()).drain_on_signals();
    for address in config.listen_addresses() {
        let room = room.clone();
        server = server.listen(address, move |conn| chat(conn, room.clone()));
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    println!("{report}");
    Ok(report)
}

async fn chat(mut conn: Connection, room: Sender<Arc<str>>) -> Result<()> {
    conn.write(b"* your name?\n").await?;
    let Some(name) = conn.read_until(b'\n', LINE_BYTES_MAX).await? else { return Ok(()) };
    let name = String::from_utf8_lossy(&name).trim().to_owned();
    let mut news = room.subscribe()?;
    room.send(format!("* {name} has come\n").into());
    let (mut read, mut write) = conn.into_split();
    let talked = talk(&name, &mut read, &mut write, &room, &mut news).await;
    room.send(format!("* {name} has left\n").into());
    match talked {
        Err(error) if error.kind() == ErrorKind::TooLong => {
            write.write(b"* your line is too long\n").await
        }
        Err(error) => Err(error),
        // The client has ended its side, or the server drains.
        Ok(()) => write.write(b"* goodbye\n").await,
    }
}

async fn talk(
    name: &str,
    read: &mut ReadHalf,
    write: &mut WriteHalf,
    room: &Sender<Arc<str>>,
    news: &mut Receiver<Arc<str>>,
) -> Result<()> {
    loop {
        let mut line = pin!(read.read_until(b'\n', LINE_BYTES_MAX));
        let said = loop {
            // Whatever comes: news, or else a line of this client.
            let next = poll_fn(|cx| match news.poll_recv(cx) {
                Poll::Ready(news) => Poll::Ready(Ok(news)),
                Poll::Pending => line.as_mut().poll(cx).map(Err),
            });
            match next.await {
                Ok(Ok(line)) => write.write(line.as_bytes()).await?,
                Ok(Err(RecvError::Lagged(missed))) => {
                    write.write(format!("* you have missed {missed} lines\n").as_bytes()).await?;
                }
                Ok(Err(RecvError::Closed)) => return Ok(()),
                Err(line) => break line?,
            }
        };
        let Some(said) = said else { return Ok(()) };
        let said = String::from_utf8_lossy(&said);
        room.send(format!("{name}: {}\n", said.trim_end()).into());
    }
}

/// What somebody may lag behind before lines are lost to them.
const LINES_KEPT: usize = 1024;
const LINE_BYTES_MAX: usize = 512;
