//! Reading and writing by polls, which is what the traits of others ask for.
//!
//! Who polls lends its buffer for the call only, so nothing of it is given to the kernel: received
//! bytes are copied out of the receive buffers, and output is copied to the connection's queue,
//! from which it leaves at the end of the turn.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use crate::conn::Link;
use crate::split::ReadHalf;

impl ReadHalf {
    /// The received bytes that have not been consumed; none at the end of the stream.
    ///
    /// Whoever does not ask again after [`Poll::Pending`] still counts as waiting for input: the
    /// traits have no way to say that it does not any more.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        self.poll_fill_amid(0, cx)
    }

    /// The same for a layer that has consumed `so_far` bytes of a unit that is still incomplete,
    /// which it ends by [`ReadHalf::end_read`].
    pub(crate) fn poll_fill_amid(
        &mut self,
        so_far: usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<&[u8]>> {
        if !self.has_partial()
            && let Some(chunk) = ready!(self.poll_next(so_far, cx))?
        {
            self.put_back(chunk);
        }
        Poll::Ready(Ok(self.partial()))
    }
}

impl Link {
    /// Copies a part of `bytes` to the output, at least one byte, as soon as there is room.
    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Link { core, id } = self;
        Poll::Ready(Ok(ready!(core.borrow_mut().poll_write(*id, bytes, cx))?))
    }

    pub(super) fn poll_write_vectored(
        &self,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Link { core, id } = self;
        let polled = core.borrow_mut().poll_write_vectored(*id, pieces, cx);
        Poll::Ready(Ok(ready!(polled)?))
    }

    /// What was accepted is delivered without anybody's waiting, and leaves with all other output
    /// of the turn: there is nothing to wait for.
    pub(super) fn poll_flush(&self) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shutdown = pin!(self.shutdown());
        Poll::Ready(Ok(ready!(shutdown.poll(cx))?))
    }
}
