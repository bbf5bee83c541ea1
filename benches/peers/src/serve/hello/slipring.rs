//! hyper on slipring, with its whole lifecycle on, and its own defaults but for the cap on
//! connections.

use hyper::service::service_fn;
use slipring::{
    Config, Connection, Server,
    http::{Http, Incoming},
};

use super::{Order, Result, answer::hello};
use crate::ready;

pub fn serve(order: &Order) -> Result<()> {
    run(order, Http::new().handler(service_fn(hello::<Incoming>)))
}

/// Serves with a handler on the CPU that this process has.
pub fn run<H, F>(order: &Order, handler: H) -> Result<()>
where
    H: Fn(Connection) -> F + Send + Sync + 'static,
    F: Future<Output = slipring::Result<()>> + 'static,
{
    let config = Config::default()
        .cpus(&slipring_peers::machine::cpu()?.to_string())
        .evict_percent(0)
        .connections_max(order.connections_max);
    let running = Server::new(config).listen(order.address.to_string(), handler).start()?;
    ready(running.local_addrs()[0].to_string().parse()?);
    running.join()?;
    Ok(())
}
