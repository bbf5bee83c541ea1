//! The connection as its handler sees it.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::panic::Location;
use std::rc::Rc;
use std::time::Duration;

use crate::buf::{Chunk, SendBuf};
use crate::closing::{Closing, until_closing};
use crate::core::{Core, CoreRef, NS_PER_MS};
use crate::deadline::DeadlineKind;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Scope;
use crate::listen::Handler;
use crate::local;
use crate::report::CloseReason;
use crate::split::{ReadHalf, WriteHalf};
use crate::sys::lazy::Lazy;
use crate::table::Id;
use crate::task::{JoinHandle, spawn_in};

/// A connection: an accepted one, owned by its handler, or one that
/// [`net::connect`](crate::net::connect()) has established, owned by who has called that.
///
/// It belongs to its core and stays there. Dropping it closes it well: queued
/// output is sent, a FIN follows, and input that is still unread is read and thrown away for up to
/// `SLIPRING_LINGER_MS`, since closing over unread input would reset the connection and destroy
/// output that the peer has not read yet.
///
/// Whatever the handler does, the connection has deadlines, one for each [`DeadlineKind`]. When one
/// passes, the connection is shut, pending calls return an error of kind [`ErrorKind::TimedOut`],
/// and the handler's future is dropped `SLIPRING_FORCE_GRACE_MS` later. At the end of its lifetime
/// it is first told, as by a drain: [`Connection::recv`] says `None` once it is idle.
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
    /// What it sends goes by the same link.
    pub(crate) read: ReadHalf,
}

/// Names a connection among all that the process has ever had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId {
    pub(crate) core: u64,
    pub(crate) id: Id,
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.core, self.id.index, self.id.generation)
    }
}

impl Connection {
    pub(crate) fn new(link: Link) -> Connection {
        Connection { read: ReadHalf { link, pieces: None } }
    }

    /// Receives what has come; `None` at the end of the stream.
    ///
    /// Once the server drains, it also says `None` to a connection that is idle, which is one
    /// whose handler waits here for input while everything received has been taken: no request is
    /// cut off, and the usual `while let` loop ends by itself.
    ///
    /// # Errors
    /// * [`ErrorKind::PeerReset`]: the peer reset the connection; what came before was returned.
    /// * [`ErrorKind::PeerDead`]: the peer has vanished, and the kernel has given it up.
    /// * [`ErrorKind::TimedOut`]: a deadline passed.
    /// * [`ErrorKind::Forced`]: the drain's deadline came.
    /// * [`ErrorKind::Resource`]: it was evicted to make room for others.
    /// * [`ErrorKind::Closed`]: the peer has ended its side, and `SLIPRING_HALF_CLOSE` is `abort`.
    ///
    /// # Cancel safety
    /// Safe: what was received stays with the connection for the next call. A future that is
    /// dropped waits no more: no task is woken for it.
    pub fn recv(&mut self) -> impl Future<Output = Result<Option<Chunk>>> {
        self.read.recv()
    }

    /// Fills `buf` entirely. See [`ReadHalf::read_exact`].
    ///
    /// # Errors
    /// As [`Connection::recv`], and [`ErrorKind::UnexpectedEof`].
    ///
    /// # Cancel safety
    /// Not safe: what was copied to `buf` is lost with it, and the message stays open.
    pub fn read_exact(&mut self, buf: &mut [u8]) -> impl Future<Output = Result<()>> {
        self.read.read_exact(buf)
    }

    /// Reads up to and including `delimiter`. See [`ReadHalf::read_until`].
    ///
    /// # Errors
    /// As [`Connection::recv`], and [`ErrorKind::TooLong`].
    ///
    /// # Cancel safety
    /// Not safe: what was read of an unfinished line is lost, and the message stays open.
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
        self.link().send(buf.into())
    }

    /// Copies bytes to the output. See [`WriteHalf::write`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Not safe when `bytes` is longer than `SLIPRING_SEND_QUEUE_BYTES`: a part may be queued.
    pub fn write(&mut self, bytes: &[u8]) -> impl Future<Output = Result<()>> {
        self.link().write(bytes)
    }

    /// Waits until the kernel has taken all output. See [`WriteHalf::flush`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Safe.
    pub fn flush(&mut self) -> impl Future<Output = Result<()>> {
        self.link().flush()
    }

    /// Ends our side behind what is queued, and goes on receiving. See [`WriteHalf::shutdown`].
    ///
    /// # Errors
    /// As [`Connection::recv`].
    ///
    /// # Cancel safety
    /// Safe: once polled, the end follows the output whether or not somebody waits.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn handler(mut conn: slipring::Connection) -> slipring::Result<()> {
    /// conn.write(b"that is all; and you?\n").await?;
    /// conn.shutdown().await?;
    /// while let Some(chunk) = conn.recv().await? {
    ///     println!("{} bytes", chunk.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn shutdown(&mut self) -> impl Future<Output = Result<()>> {
        self.link().shutdown()
    }

    /// Splits it into halves that two tasks may use. It closes when both are dropped.
    #[must_use]
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        let write = WriteHalf { link: self.link().clone() };
        (self.read, write)
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

    /// Whether the server drains, or the connection has reached its greatest age: finish the
    /// message at hand and begin no other.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.link().is_leaving()
    }

    /// How long until the drain drops the handler; `None` while no drain runs.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.link().core.borrow_mut().remaining_ns().map(Duration::from_nanos)
    }

    /// Waits until the server or this core drains or the connection has reached its greatest age,
    /// which is advisory, or it is ended by a deadline, the peer or the drain's deadline, which is
    /// not: [`Closing`] says which.
    ///
    /// For a handler that is busy with something else than this connection. Those that
    /// wait for input need not ask: [`Connection::recv`] tells them. The future borrows nothing.
    ///
    /// # Cancel safety
    /// Safe.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn handler(conn: slipring::Connection) -> slipring::Result<()> {
    /// let closing = conn.closing();
    /// let why = conn.spawn(async move { closing.await })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn closing(&self) -> impl Future<Output = Closing> + use<> {
        let Link { core, id } = self.link();
        until_closing(Rc::clone(core), Some(*id))
    }

    /// Runs a future next to the handler; it is dropped when the connection ends.
    ///
    /// # Errors
    /// As [`task::spawn`](crate::task::spawn).
    #[track_caller]
    pub fn spawn<F>(&self, future: F) -> Result<JoinHandle<F::Output>>
    where
        F: Future + 'static,
        F::Output: 'static,
    {
        let Link { core, id } = self.link();
        spawn_in(core, Scope::Child(*id), Location::caller(), future)
    }

    /// Says that a message begins here. See [`ReadHalf::begin_message`].
    pub fn begin_message(&mut self) {
        self.read.begin_message();
    }

    /// Says that the message has come to its end. See [`ReadHalf::end_message`].
    pub fn end_message(&mut self) {
        self.read.end_message();
    }

    /// Sets one of this connection's limits anew, counted from what it always counts from.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for less than a millisecond or more than a year: no connection is
    /// without a deadline.
    pub fn set_deadline(&self, kind: DeadlineKind, limit: Duration) -> Result<()> {
        let limit_ms = limit_ms(limit, || format!("set the {kind:?} deadline to {limit:?}"))?;
        let Link { core, id } = self.link();
        core.borrow_mut().set_deadline(*id, kind, limit_ms);
        Ok(())
    }

    /// Gives one of this connection's deadlines more time: the one that runs, and those of its kind
    /// that follow.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] where that would be more than a year.
    pub fn extend_deadline(&self, kind: DeadlineKind, by: Duration) -> Result<()> {
        let limit_ms = self.link().core.borrow_mut().limit_ms(self.link().id, kind);
        self.set_deadline(kind, Duration::from_millis(limit_ms).saturating_add(by))
    }

    /// How long until a deadline passes if nothing more happens; `None` while it does not run.
    ///
    /// The handler that asks is busy, so [`DeadlineKind::Idle`] runs only if another task waits for
    /// input, with the [`ReadHalf`]. For [`DeadlineKind::WriteStall`] it asks the kernel.
    #[must_use]
    pub fn deadline(&self, kind: DeadlineKind) -> Option<Duration> {
        let Link { core, id } = self.link();
        core.borrow_mut().deadline_in_ms(*id, kind).map(Duration::from_millis)
    }

    /// Ends the connection with a reset: the peer is to know that it did not get everything.
    /// Output that was not delivered is dropped.
    pub fn abort(self) {
        self.link().abort();
    }

    pub(crate) fn read_half(&mut self) -> &mut ReadHalf {
        &mut self.read
    }

    pub(crate) fn link(&self) -> &Link {
        &self.read.link
    }
}

/// A counted hold on a connection's table entry; the last one to go closes the connection.
pub(crate) struct Link {
    pub(crate) core: CoreRef,
    pub(crate) id: Id,
}

impl Link {
    /// Takes over the one hold that a new entry counts.
    pub(crate) fn first(core: CoreRef, id: Id) -> Link {
        Link { core, id }
    }

    /// Whether the message at hand is to be the last one.
    pub(crate) fn is_leaving(&self) -> bool {
        let core = self.core.borrow_mut();
        let retired = || core.table.get(self.id).is_some_and(|it| it.deadlines.is_retired());
        core.drain.is_draining() || retired()
    }

    /// Ends the connection with a reset.
    pub(crate) fn abort(&self) {
        self.core.borrow_mut().end(self.id, CloseReason::Aborted);
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
        // The handler holds the connection from its first poll on, and may drop it early.
        Box::pin(Lazy::new(move || handle(Connection::new(link)), note_failure))
    })
}

/// Said by the task of a handler, as whose it is known to the core.
fn note_failure(result: Result<()>) {
    if result.is_err()
        && let Ok(core) = local::current("note a failure")
    {
        core.borrow_mut().fail_running_handler();
    }
}

/// A time limit in milliseconds.
///
/// # Errors
/// [`ErrorKind::Config`] for one that is none.
pub(crate) fn limit_ms(limit: Duration, operation: impl FnOnce() -> String) -> Result<u64> {
    u64::try_from(limit.as_nanos().div_ceil(u128::from(NS_PER_MS)))
        .ok()
        .filter(|ms| (1..=LIMIT_MS_MAX).contains(ms))
        .ok_or_else(|| {
            Error::new(ErrorKind::Config, operation()).because("expected 1 ms to 365 days")
        })
}

const LIMIT_MS_MAX: u64 = 365 * 24 * 60 * 60 * 1000;
