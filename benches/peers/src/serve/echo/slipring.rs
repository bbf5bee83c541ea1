//! slipring's echo, with its whole lifecycle on and its own defaults but for the connections' cap.

use slipring::{Config, Connection, Server};

use super::{Order, Result, ready};

pub fn serve(order: &Order) -> Result<()> {
    let config = Config::default()
        .cpus(&slipring_peers::machine::cpu()?.to_string())
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
