//! hyper on tokio's single thread.

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::{
    Order, Result,
    answer::{builder, hello},
};

pub fn serve(order: &Order) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let listener = order.listen()?;
    listener.set_nonblocking(true)?;
    let tasks = tokio::task::LocalSet::new();
    runtime.block_on(tasks.run_until(async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let connection = builder().serve_connection(TokioIo::new(stream), service_fn(hello));
            tokio::task::spawn_local(connection);
        }
    }))
}
