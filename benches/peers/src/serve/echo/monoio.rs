//! monoio, as its `examples/echo.rs` has it, on the io_uring driver without timers, with the flags
//! that its builder passes on.

use monoio::{
    IoUringDriver, RuntimeBuilder,
    io::{AsyncReadRent, AsyncWriteRentExt},
    net::{TcpListener, TcpStream},
};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let builder = RuntimeBuilder::<IoUringDriver>::new().with_entries(1024);
    let mut runtime = builder.uring_builder(flags()).build()?;
    let (listener, buffer_bytes) = (order.listen()?, order.buffer_bytes);
    runtime.block_on(async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            monoio::spawn(echo(stream, buffer_bytes));
        }
    })
}

pub fn flags() -> io_uring_06::Builder {
    let mut ring = io_uring_06::IoUring::builder();
    ring.setup_single_issuer().setup_defer_taskrun().setup_cqsize(4096);
    ring
}

async fn echo(mut stream: TcpStream, buffer_bytes: usize) {
    let mut buffer: Vec<u8> = Vec::with_capacity(buffer_bytes);
    loop {
        let (read, back) = stream.read(buffer).await;
        let Ok(1..) = read else { return };
        let (written, back) = stream.write_all(back).await;
        if written.is_err() {
            return;
        }
        buffer = back;
        buffer.clear();
    }
}
