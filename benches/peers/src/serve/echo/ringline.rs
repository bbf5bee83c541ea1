//! ringline: one worker, receive buffers forwarded as they are (`forward_recv_buf`, its path
//! without a copy). Its acceptor is a thread of its own, on the same CPU. It sets the flags itself.

use ringline::{AsyncEventHandler, ConfigBuilder, ConnCtx, ParseResult, RinglineBuilder};

use super::{Order, Result, ready};

pub fn serve(order: &Order) -> Result<()> {
    let config = ConfigBuilder::new()
        .workers(1)
        .pin_to_core(false)
        .backlog(4096)
        .max_connections(order.connections_max as u32 + 64)
        .sq_entries(512)
        // No tick each millisecond: nothing here waits for one.
        .tick_timeout_us(0)
        .recv_buffer(512, order.buffer_bytes as u32)
        .no_fs()
        .resolver_threads(0)
        .spawner_threads(0)
        .blocking_threads(0)
        .disk_io_threads(0)
        .build()?;
    let address = order.free_address()?;
    let (_shutdown, workers) = RinglineBuilder::new(config).bind(address).launch::<Echo>()?;
    ready(address);
    for worker in workers {
        worker.join().map_err(|_| "a worker panicked")??;
    }
    Ok(())
}

struct Echo;

impl AsyncEventHandler for Echo {
    #[expect(clippy::manual_async_fn, reason = "an async fn would borrow self")]
    fn on_accept(&self, conn: ConnCtx) -> impl Future<Output = ()> + 'static {
        async move {
            let echo = |data: &[u8]| match conn.forward_recv_buf(data) {
                Ok(()) => ParseResult::Consumed(data.len()),
                // The pool is empty until sends complete: the data stays for the next time.
                Err(_) => ParseResult::NeedMore,
            };
            while conn.with_data(echo).await > 0 {}
        }
    }

    fn create_for_worker(_id: usize) -> Self {
        Self
    }
}
