//! ntex on its own io_uring reactor (`neon-uring`), with one worker. Its accept loop is a thread of
//! its own, on the same CPU. Pages keep ntex's sizes: reads grow from 4 KiB to 64 KiB.

use ntex::{
    SharedCfg,
    io::Io,
    rt::{DefaultRuntime, System},
    server,
    service::fn_service,
};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let (listener, connections_max) = (order.listen()?, order.connections_max);
    let system = System::build().name("peers").ping_interval(0).build(DefaultRuntime);
    system.block_on(async move {
        server::build()
            .workers(1)
            .max_connections(connections_max)
            .disable_signals()
            .listen("echo", listener, SharedCfg::new("ECHO"), async |_| fn_service(echo))?
            .run()
            .await
    })?;
    Ok(())
}

async fn echo(io: Io) -> std::io::Result<()> {
    while io.read_more().await?.is_some() {
        let chunk = io.with_read_dst(|buffer| buffer.take());
        io.encode_bytes(chunk)?;
        io.flush(false).await?;
    }
    Ok(())
}
