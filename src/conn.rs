//! The connection as its handler sees it.

use std::fmt;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::panic::Location;
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::Duration;

use crate::buf::{Chunk, SendBuf};
use crate::core::{Core, CoreRef, NS_PER_MS};
use crate::deadline::DeadlineKind;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Scope;
use crate::listen::Handler;
use crate::report::CloseReason;
use crate::table::Id;
use crate::task::{self, JoinHandle, spawn_in};

/// An accepted connection, owned by its handler.
///
/// It belongs to the core that accepted it and stays there. Dropping it closes it well: queued
/// output is sent, a FIN follows, and input that is still unread is read and thrown away for up to
/// `SLIPRING_LINGER_MS`, since closing over unread input would reset the connection and destroy
/// output that the peer has not read yet.
///
/// Whatever the handler does, the connection has deadlines: for its first byte, for being idle, for
/// output that the peer does not take, and for its lifetime. When one passes, the connection is
/// shut, pending calls return an error of kind [`ErrorKind::TimedOut`], and the handler's future is
/// dropped `SLIPRING_FORCE_GRACE_MS` later.
///
/// # Examples
///
/// ```no_run
/// use slipring::{Config, Connection, Server};
///
/// async fn shout(mut conn: Connection) -> slipring::Result<()> {
///     while let Some(line) = conn.read_until(b'\n', 1024).await? {
///         conn.write(&line.to_ascii_uppercase()).await?;
///     }
///     Ok(())
/// }
///
/// fn main() -> slipring::Result<()> {
///     Server::new(Config::default()).listen("127.0.0.1:7000", shout).run().map(drop)
/// }
/// ```
#[derive(Debug)]
pub struct Connection {
    read: ReadHalf,
    write: WriteHalf,
}

/// The receiving half of a [`Connection`]; see [`Connection::into_split`].
#[derive(Debug)]
pub struct ReadHalf {
    link: Link,
    /// The chunk that is being read piecemeal.
    partial: Option<Chunk>,
}

/// The sending half of a [`Connection`]; see [`Connection::into_split`].
#[derive(Debug)]
pub struct WriteHalf {
    link: Link,
}

/// Names a connection among all that the process has ever had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId {
    core: u64,
    id: Id,
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.core, self.id.index, self.id.generation)
    }
}

impl Connection {
    fn new(link: &Link) -> Connection {
        let read = ReadHalf { link: link.clone(), partial: None };
        Connection { read, write: WriteHalf { link: link.clone() } }
    }

    /// Receives what has come; `None` at the end of the stream.
    ///
    /// Once the server drains, it also says `None` to a connection that is idle, which is one
    /// whose handler waits here for input while everything received has been taken: no request is
    /// cut off, and the usual `while let` loop ends by itself.
    ///
    /// # Errors
    /// * [`ErrorKind::PeerReset`]: the peer reset the connection; what came before was returned.
    /// * [`ErrorKind::TimedOut`]: a deadline passed.
    /// * [`ErrorKind::Forced`]: the drain's deadline came.
    ///
    /// # Cancel safety
    /// Safe: what was received stays with the connection for the next call.
    pub fn recv(&mut self) -> impl Future<Output = Result<Option<Chunk>>> {
        self.read.recv()
    }

    /// Fills `buf` entirely. See [`ReadHalf::read_exact`].
    ///
    /// # Errors
    /// As [`Connection::recv`], and [`ErrorKind::UnexpectedEof`].
    ///
    /// # Cancel safety
    /// Not safe: what was copied to `buf` is lost with it.
    pub fn read_exact(&mut self, buf: &mut [u8]) -> impl Future<Output = Result<()>> {
        self.read.read_exact(buf)
    }

    /// Reads up to and including `delimiter`. See [`ReadHalf::read_until`].
    ///
    /// # Errors
    /// As [`Connection::recv`], and [`ErrorKind::TooLong`].
    ///
    /// # Cancel safety
    /// Not safe: what was read of an unfinished line is lost.
    pub fn read_until(
        &mut self,
        delimiter: u8,
        max: usize,
    ) -> impl Future<Output = Result<Option<Vec<u8>>>> {
        self.read.read_until(delimiter, max)
    }

    /// The received bytes that have not been consumed, waiting for some if there are none.
    /// See [`ReadHalf::fill_buf`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Safe.
    pub fn fill_buf(&mut self) -> impl Future<Output = Result<&[u8]>> {
        self.read.fill_buf()
    }

    /// Marks bytes that [`Connection::fill_buf`] has shown as read.
    ///
    /// # Panics
    /// When it has not shown that many.
    pub fn consume(&mut self, count: usize) {
        self.read.consume(count);
    }

    /// Gives bytes away to be sent, without a copy. See [`WriteHalf::send`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Safe in that no byte is sent twice; a buffer that was not accepted yet is dropped.
    pub fn send(&mut self, buf: impl Into<SendBuf>) -> impl Future<Output = Result<()>> {
        self.write.send(buf)
    }

    /// Copies bytes to the output. See [`WriteHalf::write`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Not safe when `bytes` is longer than `SLIPRING_SEND_QUEUE_BYTES`: a part may be queued.
    pub fn write(&mut self, bytes: &[u8]) -> impl Future<Output = Result<()>> {
        self.write.write(bytes)
    }

    /// Waits until the kernel has taken all output. See [`WriteHalf::flush`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Safe.
    pub fn flush(&mut self) -> impl Future<Output = Result<()>> {
        self.write.flush()
    }

    /// Splits it into halves that two tasks may use. It closes when both are dropped.
    #[must_use]
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    /// Its name in reports.
    #[must_use]
    pub fn id(&self) -> ConnectionId {
        ConnectionId { core: self.link().core.serial(), id: self.link().id }
    }

    /// The peer's address; `None` on a Unix socket, and when the peer is gone.
    ///
    /// Asks the kernel each time (`getpeername(2)`).
    #[must_use]
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        let core = self.link().core.borrow_mut();
        core.table.get(self.link().id)?.socket.as_ref()?.peer_addr()
    }

    /// Whether the server drains: finish the message at hand and begin no other.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.link().core.borrow_mut().drain.is_draining()
    }

    /// How long until the drain drops the handler; `None` while no drain runs.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.link().core.borrow_mut().remaining_ns().map(Duration::from_nanos)
    }

    /// Waits until the server drains or the connection is ended by a deadline or the peer.
    ///
    /// Advisory, for a handler that is busy with something else than this connection. Those that
    /// wait for input need not ask: [`Connection::recv`] tells them.
    ///
    /// # Cancel safety
    /// Safe.
    pub fn closing(&self) -> impl Future<Output = ()> {
        let Link { core, id } = self.link();
        task::until_closing(Rc::clone(core), Some(*id))
    }

    /// Runs a future next to the handler; it is dropped when the connection ends.
    ///
    /// # Errors
    /// As [`task::spawn`].
    #[track_caller]
    pub fn spawn<F>(&self, future: F) -> Result<JoinHandle<F::Output>>
    where
        F: Future + 'static,
        F::Output: 'static,
    {
        let Link { core, id } = self.link();
        spawn_in(core, Scope::Child(*id), Location::caller(), future)
    }

    /// Sets one of this connection's deadlines anew, counted from what it always counts from.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for less than a millisecond or more than a year: no connection is
    /// without a deadline.
    pub fn set_deadline(&self, kind: DeadlineKind, limit: Duration) -> Result<()> {
        let limit_ms = u64::try_from(limit.as_nanos().div_ceil(u128::from(NS_PER_MS)))
            .ok()
            .filter(|ms| (1..=LIMIT_MS_MAX).contains(ms))
            .ok_or_else(|| {
                Error::new(ErrorKind::Config, format!("set the {kind:?} deadline to {limit:?}"))
                    .because("expected 1 ms to 365 days")
            })?;
        let Link { core, id } = self.link();
        let mut core = core.borrow_mut();
        if let Some(entry) = core.table.get_mut(*id) {
            entry.deadlines.set(kind, limit_ms);
            core.arm_deadline(*id);
        }
        Ok(())
    }

    fn link(&self) -> &Link {
        &self.write.link
    }
}

impl ReadHalf {
    /// Receives what has come; see [`Connection::recv`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Safe.
    pub fn recv(&mut self) -> impl Future<Output = Result<Option<Chunk>>> {
        self.next_chunk(false)
    }

    /// Fills `buf` entirely. An empty stream is an error like one that ends too early; where the
    /// end may come, ask [`ReadHalf::fill_buf`] first.
    ///
    /// # Errors
    /// As [`Connection::recv`], and [`ErrorKind::UnexpectedEof`].
    ///
    /// # Cancel safety
    /// Not safe: what was copied to `buf` is lost with it.
    pub async fn read_exact(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            let Some(mut chunk) = self.next_chunk(filled > 0).await? else {
                return Err(Error::new(ErrorKind::UnexpectedEof, "read_exact")
                    .because(format!("{filled} of {} bytes had come", buf.len())));
            };
            let count = chunk.len().min(buf.len() - filled);
            buf[filled..filled + count].copy_from_slice(&chunk[..count]);
            filled += count;
            chunk.advance(count);
            self.put_back(chunk);
        }
        Ok(())
    }

    /// Reads up to and including `delimiter`, at most `max` bytes. `None` at the end of the
    /// stream; a last line without its delimiter is returned as it is.
    ///
    /// # Errors
    /// As [`Connection::recv`], and [`ErrorKind::TooLong`] when `max` bytes hold no delimiter.
    ///
    /// # Cancel safety
    /// Not safe: what was read of an unfinished line is lost.
    pub async fn read_until(&mut self, delimiter: u8, max: usize) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        loop {
            let Some(mut chunk) = self.next_chunk(!line.is_empty()).await? else {
                return Ok(Some(line).filter(|line| !line.is_empty()));
            };
            let found = chunk.iter().position(|byte| *byte == delimiter);
            let count = found.map_or(chunk.len(), |at| at + 1);
            if line.len() + count > max {
                self.put_back(chunk);
                return Err(Error::new(ErrorKind::TooLong, "read_until")
                    .because(format!("no delimiter within {max} bytes")));
            }
            line.extend_from_slice(&chunk[..count]);
            chunk.advance(count);
            self.put_back(chunk);
            if found.is_some() {
                return Ok(Some(line));
            }
        }
    }

    /// The received bytes that have not been consumed, waiting for some if there are none. Empty
    /// at the end of the stream.
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn fill_buf(&mut self) -> Result<&[u8]> {
        if let Some(chunk) = self.next_chunk(false).await? {
            self.put_back(chunk);
        }
        Ok(self.partial.as_deref().unwrap_or(&[]))
    }

    /// Marks bytes that [`ReadHalf::fill_buf`] has shown as read.
    ///
    /// # Panics
    /// When it has not shown that many.
    pub fn consume(&mut self, count: usize) {
        if let Some(mut chunk) = self.partial.take() {
            chunk.advance(count);
            self.put_back(chunk);
        } else {
            assert_eq!(count, 0, "consume of bytes that were not shown");
        }
    }

    fn next_chunk(&mut self, mid_message: bool) -> impl Future<Output = Result<Option<Chunk>>> {
        poll_fn(move |cx| match self.partial.take() {
            Some(chunk) => Poll::Ready(Ok(Some(chunk))),
            None => {
                let Link { core, id } = &self.link;
                core.borrow_mut().poll_receive(*id, mid_message, cx)
            }
        })
    }

    fn put_back(&mut self, chunk: Chunk) {
        self.partial = (!chunk.is_empty()).then_some(chunk);
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
    /// As [`Connection::recv`]. A failure to deliver shows in a later call.
    ///
    /// # Cancel safety
    /// Safe in that no byte is sent twice; a buffer that was not accepted yet is dropped.
    pub fn send(&mut self, buf: impl Into<SendBuf>) -> impl Future<Output = Result<()>> {
        let mut buf = Some(buf.into());
        let Link { core, id } = &self.link;
        poll_fn(move |cx| core.borrow_mut().poll_send(*id, &mut buf, cx))
    }

    /// Copies bytes to the output: many small writes of a turn leave as one send.
    ///
    /// # Errors
    /// As [`WriteHalf::send`].
    ///
    /// # Cancel safety
    /// Not safe when `bytes` is longer than `SLIPRING_SEND_QUEUE_BYTES`: a part may be queued.
    pub fn write(&mut self, mut bytes: &[u8]) -> impl Future<Output = Result<()>> {
        let Link { core, id } = &self.link;
        poll_fn(move |cx| {
            while !bytes.is_empty() {
                let count = ready!(core.borrow_mut().poll_write(*id, bytes, cx))?;
                bytes = &bytes[count..];
            }
            Poll::Ready(Ok(()))
        })
    }

    /// Waits until the kernel has taken all output. It may still be on its way to the peer.
    ///
    /// # Errors
    /// As [`WriteHalf::send`].
    ///
    /// # Cancel safety
    /// Safe.
    pub fn flush(&mut self) -> impl Future<Output = Result<()>> {
        let Link { core, id } = &self.link;
        poll_fn(|cx| core.borrow_mut().poll_flush(*id, cx))
    }
}

/// A counted hold on a connection's table entry; the last one to go closes the connection.
pub(crate) struct Link {
    core: CoreRef,
    id: Id,
}

impl Link {
    /// Takes over the one hold that a new entry counts.
    pub(crate) fn first(core: CoreRef, id: Id) -> Link {
        Link { core, id }
    }
}

impl Clone for Link {
    fn clone(&self) -> Link {
        if let Some(entry) = self.core.borrow_mut().table.get_mut(self.id) {
            entry.handles += 1;
        }
        Link { core: Rc::clone(&self.core), id: self.id }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let core: &mut Core = &mut self.core.borrow_mut();
        core.release(self.id);
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", ConnectionId { core: self.core.serial(), id: self.id })
    }
}

/// Makes of a user's handler what a listener wants: a task for each connection, whose failure is
/// noted in the books.
pub(crate) fn handler<H, F>(handle: H) -> Handler
where
    H: Fn(Connection) -> F + 'static,
    F: Future<Output = Result<()>> + 'static,
{
    let handle = Rc::new(handle);
    Rc::new(move |link| {
        let handle = Rc::clone(&handle);
        Box::pin(async move {
            let (core, id, conn) = (Rc::clone(&link.core), link.id, Connection::new(&link));
            // From here on it is the handler that holds the connection, and may drop it early.
            drop(link);
            if handle(conn).await.is_err() {
                core.borrow_mut().fail(id, CloseReason::HandlerError);
            }
        })
    })
}

const LIMIT_MS_MAX: u64 = 365 * 24 * 60 * 60 * 1000;
