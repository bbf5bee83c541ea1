//! The C-style loop of `benches/support/epoll.rs`; its one buffer has 4 KiB.

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    slipring_peers::epoll::serve(order.listen()?, || false)?;
    Ok(())
}
