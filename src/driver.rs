//! The seam between the core's rules and whatever carries them out.
//!
//! The core pushes [`Op`]s and gets [`Completion`]s; it never sees a ring. An operation owns the
//! memory that the kernel will touch, and its completion gives it back, so dropping a completion
//! that nobody wants any more returns the buffer, closes the accepted socket and frees the bytes.
//! Descriptors are only named: the core keeps a [`Socket`] open until its last operation has
//! completed, and the simulator checks after every step that it does.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use socket2::SockAddr;

use crate::config::Settings;
use crate::route::Route;
#[cfg(test)]
use crate::sim::{Peer, SimDriver, SimSocket};
use crate::sys::bufs::{Lease, Pool};
use crate::sys::datagram::Outgoing;
use crate::sys::filter;
use crate::sys::gather::Gather;
use crate::sys::sock;
use crate::sys::uring::Uring;
use crate::token::Token;
pub(crate) use crate::wait::Wait;

/// Something that the kernel is asked to do. Each is answered by at least one [`Completion`].
#[derive(Debug)]
pub(crate) enum Op {
    /// Accept one connection.
    Accept { listener: Name },
    /// Receive into the pool's buffers, until cancelled, the end or an error, or just once.
    Receive { socket: Name, once: bool, group: Group },
    /// Send all of it; at most one for each slot at a time.
    Send { socket: Name, gather: Box<Gather> },
    /// Report once when the connection is broken or at its end, while no receive would notice.
    Hangup { socket: Name },
    /// Connect a socket to an address, which the operation owns.
    Connect { socket: Name, to: Box<SockAddr> },
    /// Receive datagrams into the pool for those, each behind a header, until cancelled or an
    /// error.
    ReceiveDatagrams { socket: Name },
    /// Send one datagram, or what the kernel is to cut into several.
    SendDatagram { socket: Name, outgoing: Box<Outgoing> },
    /// End another operation early; that one still completes by itself.
    Cancel { target: Token },
}

/// Which of the two sizes of receive buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Small,
    /// There may be none of them: then a receive ends with ENOBUFS.
    Large,
}

/// The answer to an operation, or one of the answers of a multishot one.
#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) token: Token,
    /// Whether the operation has ended; its slot's in-flight count goes down with this one.
    pub(crate) last: bool,
    pub(crate) outcome: Outcome,
}

/// What became of an operation, with what it gives back.
#[derive(Debug)]
pub(crate) enum Outcome {
    Accepted(Result<Socket, Errno>, Queue),
    /// `Ok(None)` is the end of the stream.
    Received(Result<Option<Lease>, Errno>),
    /// How much was taken, and the bytes again.
    Sent(Result<usize, Errno>, Box<Gather>),
    /// What has happened to the connection (`POLLERR`, `POLLHUP`, `POLLRDHUP`: poll(2)).
    Hangup(Result<i32, Errno>),
    Connected(Result<(), Errno>),
    /// Somebody rang the core's bell, or the poll on it ended.
    Doorbell,
    /// Whether the target was found; it completes by itself.
    Cancelled(Result<(), Errno>),
    /// A filled buffer, header and all.
    Datagram(Result<Lease, Errno>),
    /// How much was taken, and the bytes again.
    DatagramSent(Result<usize, Errno>, Box<Outgoing>),
    /// As `Cancelled`, for operations of UDP sockets.
    DatagramsCancelled(Result<(), Errno>),
}

/// What is behind an accepted connection in the listener's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    Empty,
    More,
    /// The kernel does not say.
    Unknown,
}

/// An error number of the kernel (errno(3)), positive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    /// The number in an error that a system call has returned; 0 if there is none.
    pub(crate) fn of(error: &io::Error) -> Errno {
        Errno(error.raw_os_error().unwrap_or(0))
    }

    pub(crate) fn to_io(self) -> io::Error {
        io::Error::from_raw_os_error(self.0)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_io())
    }
}

/// A descriptor's number, for an operation to name it. Whoever names it keeps it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name(pub(crate) i32);

/// Whose direction of a connection is shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shut {
    Write,
    Both,
}

/// A connected or listening socket; dropping it closes it.
#[derive(Debug)]
pub(crate) enum Socket {
    Os(OwnedFd),
    #[cfg(test)]
    Sim(SimSocket),
}

impl Socket {
    pub(crate) fn name(&self) -> Name {
        match self {
            Socket::Os(fd) => Name(fd.as_raw_fd()),
            #[cfg(test)]
            Socket::Sim(socket) => socket.name(),
        }
    }

    /// Readies it for another core, as no operation may be in flight on it.
    pub(crate) fn pack(self) -> Parcel {
        match self {
            Socket::Os(fd) => Parcel::Os(fd),
            #[cfg(test)]
            Socket::Sim(socket) => Parcel::Sim(Box::new(socket.pack())),
        }
    }

    /// Takes one connection from the queue without waiting.
    pub(crate) fn accept_now(&self) -> io::Result<Socket> {
        match self {
            Socket::Os(fd) => sock::accept(fd.as_fd()).map(Socket::Os),
            #[cfg(test)]
            Socket::Sim(socket) => socket.accept_now().map(Socket::Sim),
        }
    }

    /// How many connections wait in a listener's queue.
    pub(crate) fn queued_connections(&self) -> u64 {
        match self {
            Socket::Os(fd) => sock::queued_connections(fd.as_fd()).unwrap_or(0),
            #[cfg(test)]
            Socket::Sim(socket) => socket.queued_connections(),
        }
    }

    /// Reads and throws away what has come, no more than `most` bytes.
    pub(crate) fn discard_unread(&self, most: usize) {
        match self {
            Socket::Os(fd) => sock::discard(fd.as_fd(), most),
            #[cfg(test)]
            Socket::Sim(socket) => socket.discard(most),
        }
    }

    /// Holds off who would begin a handshake with this listener.
    ///
    /// # Errors
    /// `EPERM` where that takes a privilege that this process lacks.
    pub(crate) fn drop_syns(&self) -> io::Result<()> {
        match self {
            Socket::Os(fd) => filter::drop_syns(fd.as_fd()),
            #[cfg(test)]
            Socket::Sim(socket) => socket.drop_syns(),
        }
    }

    pub(crate) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Socket::Os(fd) => Some(fd.as_fd()),
            #[cfg(test)]
            Socket::Sim(_) => None,
        }
    }

    pub(crate) fn is_unix(&self) -> bool {
        match self {
            Socket::Os(fd) => {
                socket2::SockRef::from(fd).domain().is_ok_and(|is| is == socket2::Domain::UNIX)
            }
            #[cfg(test)]
            Socket::Sim(_) => false,
        }
    }

    /// Whether a receive on its connections has to be armed anew for each answer.
    ///
    /// Linux 6.17 and later lose the end of a Unix stream that came with the last data: a multishot
    /// receive takes the data, hears that no more is queued, and waits for a wake-up that was
    /// before. See <https://github.com/axboe/liburing/issues/1549>.
    pub(crate) fn receives_once(&self) -> bool {
        self.is_unix()
    }

    /// `shutdown(2)`, by system call: the ring's operation of that name goes to a worker thread.
    /// A peer that is gone already is no error worth hearing of.
    pub(crate) fn shut(&self, shut: Shut) {
        match self {
            Socket::Os(fd) => {
                let how = match shut {
                    Shut::Write => std::net::Shutdown::Write,
                    Shut::Both => std::net::Shutdown::Both,
                };
                let _ = socket2::SockRef::from(fd).shutdown(how);
            }
            #[cfg(test)]
            Socket::Sim(socket) => socket.shut(shut),
        }
    }

    /// Makes the coming close a reset that frees what the peer will not take.
    pub(crate) fn abort_on_close(&self) {
        match self {
            Socket::Os(fd) => {
                let _ = socket2::SockRef::from(fd).set_linger(Some(Duration::ZERO));
            }
            #[cfg(test)]
            Socket::Sim(socket) => socket.abort_on_close(),
        }
    }

    /// How much input the kernel holds that nobody has read.
    pub(crate) fn unread_bytes(&self) -> usize {
        match self {
            Socket::Os(fd) => sock::unread_bytes(fd.as_fd()),
            #[cfg(test)]
            Socket::Sim(socket) => socket.unread_bytes(),
        }
    }

    /// How much output the peer has not acknowledged, or not read on a Unix socket.
    pub(crate) fn unsent_bytes(&self) -> usize {
        match self {
            Socket::Os(fd) => sock::unsent_bytes(fd.as_fd()),
            #[cfg(test)]
            Socket::Sim(_) => 0,
        }
    }

    /// Whether the kernel has closed the connection. Unix sockets never say so.
    pub(crate) fn is_closed(&self) -> bool {
        match self {
            Socket::Os(fd) => sock::is_closed(fd.as_fd()),
            #[cfg(test)]
            Socket::Sim(socket) => socket.is_closed(),
        }
    }

    /// The error that the connection has met and nobody was told of; it is told once.
    pub(crate) fn take_error(&self) -> Errno {
        match self {
            Socket::Os(fd) => {
                let error = socket2::SockRef::from(fd).take_error().ok().flatten();
                error.map_or(Errno(0), |error| Errno::of(&error))
            }
            #[cfg(test)]
            Socket::Sim(_) => Errno(libc::ECONNRESET),
        }
    }

    /// Whether the kernel has closed the connection as the peer did not answer.
    pub(crate) fn is_given_up(&self, user_timeout_ms: u64) -> bool {
        match self {
            Socket::Os(fd) => sock::is_given_up(fd.as_fd(), user_timeout_ms),
            #[cfg(test)]
            Socket::Sim(_) => false,
        }
    }

    /// How many bytes the peer has taken of those that the kernel has, `sent` at least; and whether
    /// that is exact. On a Unix socket the kernel only tells how much memory is taken up.
    pub(crate) fn acknowledged_bytes(&self, sent: u64) -> (u64, bool) {
        match self {
            Socket::Os(fd) => match sock::acknowledged_bytes(fd.as_fd()) {
                Some(bytes) => (bytes, true),
                None => (sent.saturating_sub(sock::unsent_bytes(fd.as_fd()) as u64), false),
            },
            #[cfg(test)]
            Socket::Sim(socket) => (socket.acknowledged_bytes(), true),
        }
    }

    /// Where it is bound, as far as that is an address of IP.
    pub(crate) fn local_addr(&self) -> Option<SocketAddr> {
        socket2::SockRef::from(&self.as_fd()?).local_addr().ok()?.as_socket()
    }

    /// How many datagrams a UDP socket has lost so far for want of room.
    pub(crate) fn lost_datagrams(&self) -> Option<u32> {
        match self {
            Socket::Os(fd) => sock::lost_datagrams(fd.as_fd()),
            #[cfg(test)]
            Socket::Sim(socket) => socket.lost_datagrams(),
        }
    }

    /// The peer's address; `None` for Unix sockets and peers that are gone.
    pub(crate) fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Socket::Os(fd) => socket2::SockRef::from(fd).peer_addr().ok()?.as_socket(),
            #[cfg(test)]
            Socket::Sim(_) => None,
        }
    }
}

/// A connected socket on its way to another core.
#[derive(Debug)]
pub(crate) enum Parcel {
    Os(OwnedFd),
    #[cfg(test)]
    Sim(Box<Peer>),
}

/// The drivers. An enum rather than a trait object: the release build has one variant and pays
/// for no dispatch.
#[derive(Debug)]
pub(crate) enum Driver {
    Uring(Box<Uring>),
    #[cfg(test)]
    Sim(SimDriver),
}

macro_rules! either {
    ($self:ident, $driver:ident => $call:expr) => {
        match $self {
            Driver::Uring($driver) => $call,
            #[cfg(test)]
            Driver::Sim($driver) => $call,
        }
    };
}

impl Driver {
    /// Queues an operation for the next [`Driver::enter`]. It always succeeds: when the queue to
    /// the kernel is full, the operation waits in a list.
    #[inline(always)]
    pub(crate) fn push(&mut self, token: Token, op: Op) {
        either!(self, driver => driver.push(token, op));
    }

    /// A connection's socket is about to be closed: nothing may keep it open. Nothing is in flight
    /// on it.
    pub(crate) fn forget(&mut self, token: Token) {
        either!(self, driver => driver.forget(token));
    }

    /// Gives returned buffers to the kernel, submits what is queued, and waits as told.
    ///
    /// # Errors
    /// What `io_uring_enter(2)` answers, apart from a timeout, which is no error. What was queued
    /// stays queued or is in flight; nothing is lost by an error.
    pub(crate) fn enter(&mut self, wait: Wait) -> io::Result<()> {
        either!(self, driver => driver.enter(wait))
    }

    /// Whether an [`Driver::enter`] that does not wait would find something to do. No system call.
    pub(crate) fn has_news(&mut self) -> bool {
        either!(self, driver => driver.has_news())
    }

    /// How long the calling thread has waited for its CPU so far, while others had it.
    pub(crate) fn waited_ns(&self) -> Option<u64> {
        either!(self, driver => driver.waited_ns())
    }

    /// Takes over the next completion, if one is there.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<Completion> {
        either!(self, driver => driver.next())
    }

    /// Whether there is one.
    pub(crate) fn is_ready(&mut self) -> bool {
        either!(self, driver => driver.is_ready())
    }

    /// A socket that has come from another core.
    pub(crate) fn unpack(&self, parcel: Parcel) -> Socket {
        match (parcel, self) {
            (Parcel::Os(fd), _) => Socket::Os(fd),
            #[cfg(test)]
            (Parcel::Sim(peer), Driver::Sim(driver)) => Socket::Sim(driver.unpack(*peer)),
            #[cfg(test)]
            (Parcel::Sim(_), Driver::Uring(_)) => panic!("a simulated connection in a real ring"),
        }
    }

    /// A socket that is to be connected.
    pub(crate) fn open(&self, route: &Route, settings: &Settings) -> io::Result<Socket> {
        match self {
            Driver::Uring(_) => route.open(settings).map(Socket::Os),
            #[cfg(test)]
            Driver::Sim(driver) => Ok(Socket::Sim(driver.open())),
        }
    }

    pub(crate) fn pool(&self) -> &Rc<Pool> {
        either!(self, driver => driver.pool())
    }

    /// Makes the buffers that datagrams are received into, unless they are there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn open_datagrams(&mut self, buffers: u16, buffer_bytes: u32) -> io::Result<()> {
        either!(self, driver => driver.open_datagrams(buffers, buffer_bytes))
    }

    /// Those buffers.
    pub(crate) fn datagram_pool(&self) -> Option<&Rc<Pool>> {
        either!(self, driver => driver.datagram_pool())
    }

    /// Nanoseconds since the epoch that all cores of a server share.
    pub(crate) fn now_ns(&self) -> u64 {
        either!(self, driver => driver.now_ns())
    }

    /// Operations in flight, those of cancellations and the bell included.
    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> usize {
        either!(self, driver => driver.in_flight())
    }

    pub(crate) fn counters(&self) -> DriverCounters {
        either!(self, driver => driver.counters())
    }

    /// Cancels everything and takes completions, up to `limit`, until nothing is in flight.
    ///
    /// Returns how many operations did not end; whatever they own is leaked when the driver is
    /// dropped.
    pub(crate) fn quiesce(&mut self, limit: Duration, into: &mut Vec<Completion>) -> usize {
        either!(self, driver => driver.quiesce(limit, into))
    }
}

/// What a driver counts by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DriverCounters {
    /// System calls that entered the ring.
    pub(crate) enters: u64,
    /// Operations submitted.
    pub(crate) submissions: u64,
    /// Completions taken.
    pub(crate) completions: u64,
    /// Completions that belonged to nothing in flight.
    pub(crate) stale: u64,
    /// Times the kernel had to keep completions back because the queue was full.
    pub(crate) overflows: u64,
}
