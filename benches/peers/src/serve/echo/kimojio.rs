//! kimojio with `setup_single_issuer` (its only flag), blocking waits, and a buffer in each task.

use std::os::fd::OwnedFd;

use kimojio::{
    Runtime,
    configuration::Configuration,
    operations::{self, RecvFlags, SendFlags, recv, send},
};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let mut runtime = Runtime::new(0, Configuration::new());
    let (listener, buffer_bytes) = (OwnedFd::from(order.listen()?), order.buffer_bytes);
    let ended = runtime.block_on(async move {
        loop {
            let Ok(socket) = operations::accept(&listener).await else { continue };
            operations::spawn_task(echo(socket, buffer_bytes));
        }
    });
    match ended {
        Some(Ok(())) | None => Ok(()),
        Some(Err(_)) => Err("the runtime panicked".into()),
    }
}

async fn echo(socket: OwnedFd, buffer_bytes: usize) {
    let mut buffer = vec![0; buffer_bytes];
    'open: while let Ok(read @ 1..) = recv(&socket, &mut buffer, RecvFlags::empty(), None).await {
        let mut unsent = &buffer[..read];
        while !unsent.is_empty() {
            match send(&socket, unsent, SendFlags::NOSIGNAL, None).await {
                Ok(sent @ 1..) => unsent = &unsent[sent..],
                _ => break 'open,
            }
        }
    }
}
