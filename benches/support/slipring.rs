//! slipring's echo with everything that is on by default: table, deadlines, counters, drain.

use std::time::Duration;

use slipring::{Config, Connection, Server};

/// Echoes on a port of its own choice on CPU 0, tells `ready` the address, and drains once `wait`
/// returns; returns the calls of `io_uring_enter`.
pub fn serve(ready: impl FnOnce(String), wait: impl FnOnce()) -> slipring::Result<u64> {
    let running = Server::new(Config::default().cpus("0")).listen("127.0.0.1:0", echo).start()?;
    ready(running.local_addrs()[0].to_string());
    wait();
    let handle = running.handle();
    let enters = handle.stats().total().enters;
    handle.begin_drain(DRAIN);
    running.join()?;
    Ok(enters)
}

async fn echo(mut conn: Connection) -> slipring::Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}

const DRAIN: Duration = Duration::from_millis(500);
