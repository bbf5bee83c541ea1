//! ntex's HTTP service without its web framework, as its `examples/hello-world.rs` has it.

use std::io;

use ntex::{
    SharedCfg,
    http::{HttpService, Request, Response, header},
    rt::{DefaultRuntime, System},
    server,
};

use super::{HELLO, Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let (listener, connections_max) = (order.listen()?, order.connections_max);
    let system = System::build().name("peers").ping_interval(0).build(DefaultRuntime);
    system.block_on(async move {
        server::build()
            .workers(1)
            .max_connections(connections_max)
            .disable_signals()
            .listen("hello", listener, SharedCfg::new("HELLO"), async |_| HttpService::h1(hello))?
            .run()
            .await
    })?;
    Ok(())
}

async fn hello(_: Request) -> io::Result<Response> {
    let mut response = Response::Ok();
    response.header(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    Ok(response.body(HELLO))
}
