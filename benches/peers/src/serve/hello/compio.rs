//! hyper on compio, by cyper's stream, as cyper-axum does.

use compio::net::TcpListener;
use cyper_core::HyperStream;
use hyper::service::service_fn;

use super::{
    super::echo::compio_runtime,
    Order, Result,
    answer::{builder, hello},
};

pub fn serve(order: &Order) -> Result<()> {
    let listener = order.listen()?;
    compio_runtime()?.block_on(async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let stream = HyperStream::new_plain(stream);
            let connection = builder().serve_connection(stream, service_fn(hello));
            compio::runtime::spawn(connection).detach();
        }
    })
}
