//! The same axum application on tokio's single thread, as `axum::serve` does it, and on slipring.

use axum::{Router, routing::get};
use slipring::http::{Http, tower};
use tokio::net::TcpListener;

use super::{HELLO, Order, Result, slipring::run};

pub fn serve_on_tokio(order: &Order) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = order.listen()?;
    listener.set_nonblocking(true)?;
    runtime.block_on(async move {
        let listener = TcpListener::from_std(listener)?;
        axum::serve(listener, app()).await?;
        Ok(())
    })
}

pub fn serve_on_slipring(order: &Order) -> Result<()> {
    run(order, Http::new().handler(tower(app())))
}

fn app() -> Router {
    Router::new().route("/", get(|| async { HELLO }))
}
