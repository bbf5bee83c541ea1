//! compio with a buffer per connection and all the flags that its proactor takes.

use compio::{
    BufResult,
    driver::ProactorBuilder,
    io::{AsyncRead, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Runtime, RuntimeBuilder},
};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let (listener, buffer_bytes) = (order.listen()?, order.buffer_bytes);
    runtime()?.block_on(async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            compio::runtime::spawn(echo(stream, buffer_bytes)).detach();
        }
    })
}

pub fn runtime() -> std::io::Result<Runtime> {
    let mut proactor = ProactorBuilder::new();
    proactor.capacity(1024).cqsize(4096);
    proactor.single_issuer(true).defer_taskrun(true).taskrun_flag(true);
    RuntimeBuilder::new().with_proactor(proactor).build()
}

async fn echo(mut stream: TcpStream, buffer_bytes: usize) {
    let mut buffer: Vec<u8> = Vec::with_capacity(buffer_bytes);
    loop {
        let BufResult(read, back) = stream.read(buffer).await;
        let Ok(1..) = read else { return };
        let BufResult(written, back) = stream.write_all(back).await;
        if written.is_err() {
            return;
        }
        buffer = back;
        buffer.clear();
    }
}
