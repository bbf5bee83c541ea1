//! tokio-uring's TCP echo, as its own `examples/tcp_listener.rs` has it: one thread, one 4 KiB
//! buffer per connection.
//!
//! # Coming from tokio-uring
//!
//! - `stream.read(buf).await -> (result, buf)` passes a buffer in and out, one per connection, used
//!   or not. In slipring `conn.recv().await?` returns a lease on a buffer of the core's ring (None
//!   at the end of the stream), and dropping the lease gives it back. An idle connection holds no
//!   buffer.
//! - `stream.write_all(buf).await -> (result, buf)` becomes `conn.send(buf).await?`, for anything
//!   that is `impl Into<SendBuf>`, a received lease too; `conn.write(&[u8])` copies, and collects
//!   small writes into one send.
//! - `tokio_uring::start(future)` becomes `Server::new(config).listen(address, handler).run()`: one
//!   thread per core.
//! - The accept loop is the server's; the handler starts with the connection.
//! - `tokio_uring::spawn` becomes `slipring::task::spawn`, or `conn.spawn` for a child that ends
//!   with its connection.
//! - tokio-uring has no shutdown: `start` returns when its future does, and what is in flight then
//!   is abandoned. A slipring server drains (`handle.drain(deadline)`, `drain_on_signals()`) and
//!   reports where each connection went.
//! - Dropping tokio-uring 0.5's runtime with operations in flight frees their buffers while the
//!   kernel may still write to them. slipring frees such memory on the operation's last completion,
//!   and leaks and counts what never comes back.
//! - tokio-uring runs inside tokio, so tokio's timers and channels work in it; slipring brings
//!   `time` and `task`.

use std::{io, net::TcpListener, rc::Rc};

use tokio_uring::{buf::BoundedBuf, net};

/// Echoes on `listener` for ever.
pub fn serve(listener: TcpListener) -> io::Result<()> {
    tokio_uring::start(async {
        let listener = net::TcpListener::from_std(listener);
        loop {
            let (stream, _peer) = listener.accept().await?;
            tokio_uring::spawn(echo(Rc::new(stream)));
        }
    })
}

async fn echo(stream: Rc<net::TcpStream>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let (read, back) = stream.read(buffer).await;
        buffer = back;
        let Ok(read @ 1..) = read else { return };
        let (written, back) = stream.write_all(buffer.slice(..read)).await;
        buffer = back.into_inner();
        if written.is_err() {
            return;
        }
    }
}

const BUFFER_BYTES: usize = 4096;
