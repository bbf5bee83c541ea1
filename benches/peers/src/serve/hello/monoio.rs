//! hyper on monoio, by its compatibility crate: readiness by polls on the ring, as that one asks.

use hyper::service::service_fn;
use monoio::{IoUringDriver, RuntimeBuilder, io::IntoPollIo, net::TcpListener};
use monoio_compat::hyper::MonoioIo;

use super::{
    super::echo::monoio_flags,
    Order, Result,
    answer::{builder, hello},
};

pub fn serve(order: &Order) -> Result<()> {
    let driver = RuntimeBuilder::<IoUringDriver>::new().with_entries(1024);
    let mut runtime = driver.uring_builder(monoio_flags()).build()?;
    let listener = order.listen()?;
    runtime.block_on(async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let stream = MonoioIo::new(stream.into_poll_io()?);
            monoio::spawn(builder().serve_connection(stream, service_fn(hello)));
        }
    })
}
