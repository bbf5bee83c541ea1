//! slipring's echo, with its whole lifecycle on and its own defaults but for the connections' cap,
//! and that a crowd which nearly reaches it is left alone.

use slipring::{Config, Connection, Server};

use super::{Order, Result, ready};

pub fn serve(order: &Order) -> Result<()> {
    run(order, Config::default())
}

/// It is allowed to spin before it blocks, on the one CPU that it has here.
pub fn serve_spinning(order: &Order) -> Result<()> {
    run(order, Config::default().spin_us(SPIN_US).spin_shared(true))
}

fn run(order: &Order, config: Config) -> Result<()> {
    let config = config
        .cpus(&slipring_peers::machine::cpu()?.to_string())
        .evict_percent(0)
        .connections_max(order.connections_max);
    let running = Server::new(config).listen(order.address.to_string(), echo).start()?;
    ready(running.local_addrs()[0].to_string().parse()?);
    running.join()?;
    Ok(())
}

async fn echo(mut conn: Connection) -> slipring::Result<()> {
    while let Some(chunk) = conn.recv().await? {
        conn.send(chunk).await?;
    }
    Ok(())
}

/// Longer than nearly all of the gaps between what comes while a server is busy.
const SPIN_US: u32 = 20;
