//! The halves of a connection: one receives, the other sends.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use crate::buf::{Chunk, SendBuf};
use crate::conn::Link;
use crate::deadline::Opened;
use crate::error::{Error, ErrorKind, Result};

/// The receiving half of a [`Connection`](crate::Connection); see
/// [`Connection::into_split`](crate::Connection::into_split).
#[derive(Debug)]
pub struct ReadHalf {
    pub(crate) link: Link,
    /// There once it reads piecemeal; most handlers never do.
    pub(crate) pieces: Option<Box<Pieces>>,
}

/// How far a half that reads piecemeal has come.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    /// The chunk that is being read.
    partial: Option<Chunk>,
    /// A call has had to wait amid a message, and opened it.
    in_message: bool,
}

/// The sending half of a [`Connection`](crate::Connection); see
/// [`Connection::into_split`](crate::Connection::into_split).
#[derive(Debug)]
pub struct WriteHalf {
    pub(crate) link: Link,
}

impl ReadHalf {
    /// Receives what has come; see [`Connection::recv`](crate::Connection::recv).
    ///
    /// # Errors
    /// As [`Connection::recv`](crate::Connection::recv).
    ///
    /// # Cancel safety
    /// Safe.
    pub fn recv(&mut self) -> impl Future<Output = Result<Option<Chunk>>> {
        self.next_chunk(0)
    }

    /// Fills `buf` entirely. An empty stream is an error like one that ends too early; where the
    /// end may come, ask [`ReadHalf::fill_buf`] first.
    ///
    /// # Errors
    /// As [`Connection::recv`](crate::Connection::recv), and [`ErrorKind::UnexpectedEof`].
    ///
    /// # Cancel safety
    /// Not safe: what was copied to `buf` is lost with it, and the message stays open.
    pub async fn read_exact(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            let Some(mut chunk) = self.next_chunk(filled).await? else {
                self.end_read();
                return Err(Error::new(ErrorKind::UnexpectedEof, "read_exact")
                    .because(format!("{filled} of {} bytes had come", buf.len())));
            };
            let count = chunk.len().min(buf.len() - filled);
            buf[filled..filled + count].copy_from_slice(&chunk[..count]);
            filled += count;
            chunk.advance(count);
            self.put_back(chunk);
        }
        self.end_read();
        Ok(())
    }

    /// Reads up to and including `delimiter`, at most `max` bytes. `None` at the end of the
    /// stream; a last line without its delimiter is returned as it is.
    ///
    /// # Errors
    /// As [`Connection::recv`](crate::Connection::recv), and [`ErrorKind::TooLong`] when `max`
    /// bytes hold no delimiter.
    ///
    /// # Cancel safety
    /// Not safe: what was read of an unfinished line is lost, and the message stays open.
    pub async fn read_until(&mut self, delimiter: u8, max: usize) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        loop {
            let Some(mut chunk) = self.next_chunk(line.len()).await? else {
                self.end_read();
                return Ok(Some(line).filter(|line| !line.is_empty()));
            };
            let found = chunk.iter().position(|byte| *byte == delimiter);
            let count = found.map_or(chunk.len(), |at| at + 1);
            if line.len() + count > max {
                self.put_back(chunk);
                self.end_read();
                return Err(Error::new(ErrorKind::TooLong, "read_until")
                    .because(format!("no delimiter within {max} bytes")));
            }
            line.extend_from_slice(&chunk[..count]);
            chunk.advance(count);
            self.put_back(chunk);
            if found.is_some() {
                self.end_read();
                return Ok(Some(line));
            }
        }
    }

    /// The received bytes that have not been consumed, waiting for some if there are none. Empty
    /// at the end of the stream.
    ///
    /// # Errors
    /// As [`Connection::recv`](crate::Connection::recv).
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn fill_buf(&mut self) -> Result<&[u8]> {
        if let Some(chunk) = self.next_chunk(0).await? {
            self.put_back(chunk);
        }
        Ok(self.partial())
    }

    /// Marks bytes that [`ReadHalf::fill_buf`] has shown as read.
    ///
    /// # Panics
    /// When it has not shown that many.
    pub fn consume(&mut self, count: usize) {
        if let Some(mut chunk) = self.take_partial() {
            chunk.advance(count);
            self.put_back(chunk);
        } else {
            assert_eq!(count, 0, "consume of bytes that were not shown");
        }
    }

    /// Says that a message begins here, for a protocol layer that parses by itself.
    ///
    /// Until [`ReadHalf::end_message`], however many calls it takes to receive it, the message's
    /// deadline (`SLIPRING_MESSAGE_MS`) and the least rate hold, and a drain lets it come to its
    /// end. A message within a message is the same one. [`ReadHalf::read_until`] and
    /// [`ReadHalf::read_exact`] do both by themselves when they have to wait amid one, and leave
    /// alone what was begun by this call.
    ///
    /// Call it at the first byte, not while waiting for it: that is what the idle deadline is for.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn handler(mut conn: slipring::Connection) -> slipring::Result<()> {
    /// while !conn.fill_buf().await?.is_empty() {
    ///     conn.begin_message();
    ///     let mut length = [0; 2];
    ///     conn.read_exact(&mut length).await?;
    ///     let mut body = vec![0; u16::from_be_bytes(length).into()];
    ///     conn.read_exact(&mut body).await?; // both of them within one deadline
    ///     conn.end_message();
    ///     conn.send(body).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn begin_message(&mut self) {
        let Link { core, id } = &self.link;
        core.borrow_mut().begin_message(*id);
    }

    /// Says that the message has come to its end, or one that a read has left open which was
    /// dropped before it was done.
    ///
    /// Once the server drains or the connection has reached its greatest age, it was the last one:
    /// from then on there is no more input, though the peer may have sent further messages.
    pub fn end_message(&mut self) {
        let id = self.link.id;
        let was_last = self.link.core.borrow_mut().end_layers_message(id);
        if was_last && self.take_partial().is_some() {
            self.link.core.borrow_mut().note_unread(id);
        }
    }

    /// The next chunk, for a call that has `so_far` bytes of a message already.
    fn next_chunk(&mut self, so_far: usize) -> NextChunk<'_> {
        NextChunk { half: self, so_far, waits: false }
    }

    /// Polls for what comes behind the chunk that is being read, for a call that has `so_far` bytes
    /// of a message already: one that has to wait amid a message opens it.
    pub(crate) fn poll_next(
        &mut self,
        so_far: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Chunk>>> {
        let Link { core, id } = &self.link;
        let polled = core.borrow_mut().poll_receive(*id, so_far, cx);
        if so_far > 0 && polled.is_pending() {
            self.pieces.get_or_insert_default().in_message = true;
        }
        polled
    }

    /// A call that reads a message has come to its end.
    pub(crate) fn end_read(&mut self) {
        if self.pieces.as_mut().is_some_and(|pieces| std::mem::take(&mut pieces.in_message)) {
            let Link { core, id } = &self.link;
            core.borrow_mut().end_message(*id, Opened::ByRead);
        }
    }

    #[cfg(any(feature = "hyper", feature = "tokio-io"))]
    pub(crate) fn has_partial(&self) -> bool {
        self.pieces.as_ref().is_some_and(|pieces| pieces.partial.is_some())
    }

    /// What is left of the chunk that is being read.
    pub(crate) fn partial(&self) -> &[u8] {
        self.pieces.as_ref().and_then(|pieces| pieces.partial.as_deref()).unwrap_or(&[])
    }

    pub(crate) fn put_back(&mut self, chunk: Chunk) {
        if !chunk.is_empty() {
            self.pieces.get_or_insert_default().partial = Some(chunk);
        }
    }

    fn take_partial(&mut self) -> Option<Chunk> {
        self.pieces.as_mut()?.partial.take()
    }
}

/// The future of [`ReadHalf::next_chunk`]. Who drops it waits for input no more.
struct NextChunk<'a> {
    half: &'a mut ReadHalf,
    so_far: usize,
    waits: bool,
}

impl Future for NextChunk<'_> {
    type Output = Result<Option<Chunk>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let NextChunk { half, so_far, waits } = self.get_mut();
        if let Some(chunk) = half.take_partial() {
            return Poll::Ready(Ok(Some(chunk)));
        }
        let polled = half.poll_next(*so_far, cx);
        *waits = polled.is_pending();
        polled
    }
}

impl Drop for NextChunk<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.waits {
            let Link { core, id } = &self.half.link;
            core.borrow_mut().stop_waiting(*id);
        }
    }
}

impl WriteHalf {
    /// Gives bytes away to be sent, without a copy.
    ///
    /// Returns as soon as they are accepted, which is at once unless `SLIPRING_SEND_QUEUE_BYTES`
    /// are queued already; all output of one turn of the loop leaves together. What was accepted
    /// is delivered whole, also when the handler returns right after, unless the peer goes away or
    /// the drain's deadline comes.
    ///
    /// # Errors
    /// As [`Connection::recv`](crate::Connection::recv). A failure to deliver shows in a later
    /// call.
    ///
    /// # Cancel safety
    /// Safe in that no byte is sent twice; a buffer that was not accepted yet is dropped.
    pub fn send(&mut self, buf: impl Into<SendBuf>) -> impl Future<Output = Result<()>> {
        self.link.send(buf.into())
    }

    /// Copies bytes to the output: many small writes of a turn leave as one send.
    ///
    /// # Errors
    /// As [`WriteHalf::send`].
    ///
    /// # Cancel safety
    /// Not safe when `bytes` is longer than `SLIPRING_SEND_QUEUE_BYTES`: a part may be queued.
    pub fn write(&mut self, bytes: &[u8]) -> impl Future<Output = Result<()>> {
        self.link.write(bytes)
    }

    /// Waits until the kernel has taken all output. It may still be on its way to the peer.
    ///
    /// # Errors
    /// As [`WriteHalf::send`].
    ///
    /// # Cancel safety
    /// Safe.
    pub fn flush(&mut self) -> impl Future<Output = Result<()>> {
        self.link.flush()
    }

    /// Ends our side: the peer gets what was queued and then the end of the stream, while it may
    /// go on to send (`shutdown(2)` with `SHUT_WR`). Returns when the kernel has taken all output.
    /// Sending after that is an error of kind [`ErrorKind::Misuse`].
    ///
    /// Dropping a connection does the same, and more: who still wants to receive calls this.
    ///
    /// # Errors
    /// As [`WriteHalf::send`].
    ///
    /// # Cancel safety
    /// Safe: once polled, the end follows the output whether or not somebody waits.
    pub fn shutdown(&mut self) -> impl Future<Output = Result<()>> {
        self.link.shutdown()
    }
}

/// What sends, whoever holds the link: only one at a time does.
impl Link {
    #[inline]
    pub(crate) fn send(&self, buf: SendBuf) -> SendFuture<'_> {
        SendFuture { link: self, buf: Some(buf) }
    }

    pub(crate) fn write(&self, mut bytes: &[u8]) -> impl Future<Output = Result<()>> {
        let Link { core, id } = self;
        poll_fn(move |cx| {
            while !bytes.is_empty() {
                let count = ready!(core.borrow_mut().poll_write(*id, bytes, cx))?;
                bytes = &bytes[count..];
            }
            Poll::Ready(Ok(()))
        })
    }

    pub(crate) fn flush(&self) -> impl Future<Output = Result<()>> {
        let Link { core, id } = self;
        poll_fn(|cx| core.borrow_mut().poll_flush(*id, cx))
    }

    pub(crate) fn shutdown(&self) -> impl Future<Output = Result<()>> {
        let Link { core, id } = self;
        poll_fn(|cx| {
            core.borrow_mut().finish(*id);
            core.borrow_mut().poll_flush(*id, cx)
        })
    }
}

/// The future of [`Link::send`].
pub(crate) struct SendFuture<'a> {
    link: &'a Link,
    /// Until it is accepted.
    buf: Option<SendBuf>,
}

impl Future for SendFuture<'_> {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let SendFuture { link: Link { core, id }, buf } = self.get_mut();
        core.borrow_mut().poll_send(*id, buf, cx)
    }
}
