//! tokio-uring, as its `examples/tcp_listener.rs` has it, with the ring flags that work with its
//! way of waiting (an epoll on the ring): deferred task work would wait there for ever.

use std::rc::Rc;

use tokio_uring::{buf::BoundedBuf, net};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let mut ring = tokio_uring::uring_builder();
    ring.setup_single_issuer().setup_coop_taskrun().setup_cqsize(4096);
    let (listener, buffer_bytes) = (order.listen()?, order.buffer_bytes);
    tokio_uring::builder().entries(1024).uring_builder(&ring).start(async move {
        let listener = net::TcpListener::from_std(listener);
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            tokio_uring::spawn(echo(Rc::new(stream), buffer_bytes));
        }
    })
}

async fn echo(stream: Rc<net::TcpStream>, buffer_bytes: usize) {
    let mut buffer = vec![0; buffer_bytes];
    loop {
        let (read, back) = stream.read(buffer).await;
        let Ok(read @ 1..) = read else { return };
        let (written, back) = stream.write_all(back.slice(..read)).await;
        if written.is_err() {
            return;
        }
        buffer = back.into_inner();
    }
}
