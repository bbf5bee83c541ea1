//! glommio: one executor where this process is pinned, a task and a buffer per connection. It sets
//! its rings up by itself and takes no flags.

use std::os::fd::{FromRawFd, IntoRawFd};

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement, net};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let cpu = slipring_peers::machine::cpu()?;
    let executor = LocalExecutorBuilder::new(Placement::Fixed(cpu)).ring_depth(1024).make()?;
    let (listener, buffer_bytes) = (order.listen()?, order.buffer_bytes);
    executor.run(async move {
        // SAFETY: the fd is a listening socket, and this takes it over.
        let listener = unsafe { net::TcpListener::from_raw_fd(listener.into_raw_fd()) };
        loop {
            let Ok(stream) = listener.accept().await else { continue };
            glommio::spawn_local(echo(stream, buffer_bytes)).detach();
        }
    })
}

async fn echo(mut stream: net::TcpStream, buffer_bytes: usize) {
    let mut buffer = vec![0; buffer_bytes];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
