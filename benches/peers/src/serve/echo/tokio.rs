//! tokio on one thread: a task and a buffer per connection, reads first (`TcpStream::read` tries
//! the call before it waits). Its own echo example (`tokio/examples/echo-tcp.rs`) has this shape.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (listener, buffer_bytes) = (order.listen()?, order.buffer_bytes);
    listener.set_nonblocking(true)?;
    let tasks = tokio::task::LocalSet::new();
    runtime.block_on(tasks.run_until(async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            // A connection that was reset while it waited is no reason to stop.
            let Ok((stream, _)) = listener.accept().await else { continue };
            tokio::task::spawn_local(echo(stream, buffer_bytes));
        }
    }))
}

async fn echo(mut stream: TcpStream, buffer_bytes: usize) {
    let mut buffer = vec![0; buffer_bytes];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
