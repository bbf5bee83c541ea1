//! The UDP socket as a task sees it.

pub(crate) mod account;
pub(crate) mod bind;
mod close;
mod datagram;
mod receive;
mod send;
pub(crate) mod serve;
pub(crate) mod sockets;

use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;

use crate::bind::refused;
use crate::buf::SendBuf;
use crate::core::CoreRef;
use crate::drain::Phase;
use crate::driver::Socket;
use crate::error::{Error, ErrorKind, Result};
use crate::local;
use crate::sys::sock;
use crate::table::Id;
use crate::udp::receive::core_gone;
use crate::udp::send::Wanted;

pub use datagram::Datagram;

/// A UDP socket of the core that it was bound on.
///
/// Datagrams are received into buffers of the core, and sent from memory that is given away:
/// nothing is copied, and whatever future is dropped, the memory stays until the kernel is done
/// with it. All calls take `&self`: several tasks may share a socket, by an [`Rc`](std::rc::Rc),
/// and each datagram goes to one of them.
///
/// It holds at most 128 datagrams and `SLIPRING_RECEIVE_QUEUE_BYTES` that nobody has taken, then
/// leaves what comes to the kernel, whose buffer (`SO_RCVBUF`, socket(7)) drops what it has no room
/// for; that is counted (`datagrams_lost`). At most 128 sends and `SLIPRING_SEND_QUEUE_BYTES` are
/// in flight before a send waits.
///
/// Dropping it lets what was sent leave, for up to a second, and closes it. It does not end by
/// itself when the server drains, but with the task that owns it, at the latest at the deadline:
/// [`UdpSocket::recv_until_drain`] and [`task::draining`](crate::task::draining) tell of a drain.
/// A drain waits until what was sent has left.
///
/// # Kernel
/// `IORING_OP_RECVMSG` with `IORING_RECV_MULTISHOT`, since Linux 6.0.
///
/// # Examples
///
/// ```
/// use slipring::net::UdpSocket;
///
/// # async fn task() -> slipring::Result<()> {
/// let socket = UdpSocket::bind(([127, 0, 0, 1], 0))?;
/// socket.connect(([127, 0, 0, 1], 53))?;
/// socket.send("a question").await?;
/// let limit = std::time::Duration::from_secs(1);
/// let answer = slipring::time::timeout(limit, socket.recv_from()).await??;
/// println!("{} bytes", answer.len());
/// # Ok(())
/// # }
/// ```
pub struct UdpSocket {
    core: CoreRef,
    id: Id,
}

impl UdpSocket {
    /// Binds a socket that has its address alone; port 0 lets the kernel choose one.
    ///
    /// # Errors
    /// * [`ErrorKind::Misuse`]: the calling thread is no core.
    /// * [`ErrorKind::Closed`]: the core's drain has reached its deadline.
    /// * [`ErrorKind::AddressInUse`]: somebody is bound there.
    /// * [`ErrorKind::Resource`]: descriptors or memory do not suffice.
    /// * [`ErrorKind::Unsupported`], [`ErrorKind::Io`]: what else bind(2) answers.
    pub fn bind(addr: impl Into<SocketAddr>) -> Result<UdpSocket> {
        UdpSocket::bind_one(addr.into(), false)
    }

    /// Binds a socket beside others of the same address, such as one of each core; the kernel
    /// chooses one by the sender's address (`SO_REUSEPORT`, socket(7)). All of them have to be
    /// bound so, by the same user. [`Server::serve_udp`](crate::Server::serve_udp) does that for
    /// all cores.
    ///
    /// # Errors
    /// As [`UdpSocket::bind`].
    pub fn bind_shared(addr: impl Into<SocketAddr>) -> Result<UdpSocket> {
        UdpSocket::bind_one(addr.into(), true)
    }

    fn bind_one(addr: SocketAddr, shared: bool) -> Result<UdpSocket> {
        let core = local::current("UdpSocket::bind")?;
        if core.borrow_mut().drain.phase() >= Phase::Force {
            let error = Error::new(ErrorKind::Closed, format!("bind udp {addr}"));
            return Err(error.because("the drain's deadline has come"));
        }
        let bound = bind::bind(addr, shared, None);
        let (socket, local) = bound.map_err(|error| refused(format!("udp {addr}"), error))?;
        UdpSocket::adopt(&core, Socket::Os(socket), local)
    }

    /// Takes a bound socket over.
    pub(crate) fn adopt(core: &CoreRef, socket: Socket, local: SocketAddr) -> Result<UdpSocket> {
        let id = core.borrow_mut().add_socket(socket, local)?;
        Ok(UdpSocket { core: CoreRef::clone(core), id })
    }

    /// Another hold on the same socket.
    fn share(&self) -> UdpSocket {
        if let Some(port) = self.core.borrow_mut().udp.table.get_mut(self.id) {
            port.holds += 1;
        }
        UdpSocket { core: CoreRef::clone(&self.core), id: self.id }
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] when the core has ended.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        let core = self.core.borrow_mut();
        core.udp.table.get(self.id).map(|port| port.local).ok_or_else(|| core_gone("local_addr"))
    }

    /// Whom it is connected to, if it is.
    #[must_use]
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.core.borrow_mut().udp.table.get(self.id)?.peer
    }

    /// Connects it to one peer: from now on it receives from that one only, [`UdpSocket::send`]
    /// needs no address, and a peer whose machine says that nobody is there is an error with the
    /// number `ECONNREFUSED` of the next receive. What it has received before stays.
    ///
    /// It says nothing to the peer, and waits for nothing: connect(2), udp(7).
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] when the core has ended, and what connect(2) answers.
    pub fn connect(&self, peer: impl Into<SocketAddr>) -> Result<()> {
        let peer = peer.into();
        let core = &mut *self.core.borrow_mut();
        let Some(port) = core.udp.table.get_mut(self.id) else { return Err(core_gone("connect")) };
        if let Some(fd) = port.socket.as_fd() {
            let connected = socket2::SockRef::from(&fd).connect(&peer.into());
            connected.map_err(|error| Error::os(format!("connect udp to {peer}"), error))?;
        }
        // The kernel has chosen the address that leads there, where none was given.
        port.local = port.socket.local_addr().unwrap_or(port.local);
        port.peer = Some(peer);
        Ok(())
    }

    /// Lets the kernel put datagrams of one sender together that come one after the other and are
    /// of one size: [`Datagram::segments`] has them one by one. It saves work per datagram; a
    /// reader that does not look at the segments would take several for one. Off by default.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the kernel has no such thing, [`ErrorKind::Closed`] when
    /// the core has ended.
    ///
    /// # Kernel
    /// `UDP_GRO`, udp(7), since Linux 5.0.
    pub fn set_gro(&self, on: bool) -> Result<()> {
        let core = self.core.borrow_mut();
        let Some(port) = core.udp.table.get(self.id) else { return Err(core_gone("set_gro")) };
        let Some(fd) = port.socket.as_fd() else { return Ok(()) };
        sock::set_option(fd, libc::SOL_UDP, libc::UDP_GRO, on.into()).map_err(|error| {
            let error = Error::os("set UDP_GRO", error).with_kind(ErrorKind::Unsupported);
            error.because("this kernel puts no datagrams together; go on without")
        })
    }

    /// Receives the next datagram.
    ///
    /// # Errors
    /// * [`ErrorKind::Io`] and others: what the kernel answers, such as `ECONNREFUSED` on a socket
    ///   that is connected. The next call goes on.
    /// * [`ErrorKind::Closed`]: the core has ended.
    ///
    /// # Cancel safety
    /// Safe: what was received stays with the socket for the next call.
    pub async fn recv_from(&self) -> Result<Datagram> {
        match self.receive(false).await {
            Ok(Some(datagram)) => Ok(datagram),
            Ok(None) => Err(core_gone("recv_from")),
            Err(error) => Err(error),
        }
    }

    /// Receives the next datagram until the core begins to drain; then what was queued by then, and
    /// `None` from then on. For the loop of a server: what comes later finds another instance, or
    /// nobody.
    ///
    /// # Errors
    /// As [`UdpSocket::recv_from`].
    ///
    /// # Cancel safety
    /// Safe, as [`UdpSocket::recv_from`] is.
    pub async fn recv_until_drain(&self) -> Result<Option<Datagram>> {
        self.receive(true).await
    }

    /// Sends one datagram. It waits for room only: the datagram leaves at the end of the core's
    /// turn, from the memory that was given. Like any datagram it may be lost on its way, and one
    /// that the kernel does not take counts as that, too (`datagrams_unsent`); [`UdpSocket::flush`]
    /// says why.
    ///
    /// # Errors
    /// * [`ErrorKind::TooLong`]: more bytes than a datagram may have.
    /// * [`ErrorKind::Misuse`]: an IPv6 address on an IPv4 socket.
    /// * [`ErrorKind::Closed`]: the core has ended.
    ///
    /// # Cancel safety
    /// Safe in that nothing is sent twice; a buffer that was not accepted yet is dropped.
    pub async fn send_to(
        &self,
        buf: impl Into<SendBuf>,
        peer: impl Into<SocketAddr>,
    ) -> Result<()> {
        let (buf, peer) = (buf.into(), Some(peer.into()));
        self.hand_over(Wanted { buf, segment: None, peer }).await
    }

    /// Sends one datagram to the peer that it is [connected](UdpSocket::connect) to, as
    /// [`UdpSocket::send_to`] does.
    ///
    /// # Errors
    /// As [`UdpSocket::send_to`], and [`ErrorKind::Misuse`] on a socket that is not connected.
    ///
    /// # Cancel safety
    /// As [`UdpSocket::send_to`].
    pub async fn send(&self, buf: impl Into<SendBuf>) -> Result<()> {
        self.hand_over(Wanted { buf: buf.into(), segment: None, peer: None }).await
    }

    /// Sends a buffer as datagrams of `segment_bytes` each; the last one may be shorter. The kernel
    /// cuts it, 64 datagrams at a time, which costs it little more than one; on a way where it
    /// can't, such as a device that computes no checksums, they are sent one by one.
    ///
    /// # Errors
    /// As [`UdpSocket::send_to`], and [`ErrorKind::Misuse`] for a size of 0. The buffer may be
    /// longer than a datagram.
    ///
    /// # Cancel safety
    /// As [`UdpSocket::send_to`].
    ///
    /// # Kernel
    /// `UDP_SEGMENT`, udp(7), since Linux 4.18.
    pub async fn send_segments(
        &self,
        buf: impl Into<SendBuf>,
        segment_bytes: usize,
        peer: impl Into<SocketAddr>,
    ) -> Result<()> {
        let (buf, peer) = (buf.into(), Some(peer.into()));
        self.hand_over(Wanted { buf, segment: Some(segment_bytes), peer }).await
    }

    /// Waits until the kernel has answered all sends, and tells of the first one that has failed
    /// since this was last called: it names the peer.
    ///
    /// # Errors
    /// What sendmsg(2) has answered, and [`ErrorKind::Closed`] when the core has ended.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn flush(&self) -> Result<()> {
        let mut seat = Seat::new(self, Side::Writer);
        poll_fn(|cx| self.core.borrow_mut().poll_flush_datagrams(self.id, &mut seat.place, cx))
            .await
    }

    async fn receive(&self, until_drain: bool) -> Result<Option<Datagram>> {
        let mut seat = Seat::new(self, Side::Reader);
        poll_fn(|cx| {
            let core = &mut *self.core.borrow_mut();
            core.poll_datagram(self.id, &mut seat.place, until_drain, cx)
        })
        .await
    }

    async fn hand_over(&self, wanted: Wanted) -> Result<()> {
        let mut wanted = Some(wanted);
        let mut seat = Seat::new(self, Side::Writer);
        poll_fn(|cx| {
            let core = &mut *self.core.borrow_mut();
            core.poll_send_datagram(self.id, &mut seat.place, &mut wanted, cx)
        })
        .await
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        self.core.borrow_mut().release_socket(self.id);
    }
}

impl fmt::Debug for UdpSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UdpSocket({}.{}.{})", self.core.serial(), self.id.index, self.id.generation)
    }
}

/// A future's place among those that wait, which it leaves when it is dropped.
struct Seat<'a> {
    socket: &'a UdpSocket,
    side: Side,
    place: Option<Id>,
}

enum Side {
    Reader,
    Writer,
}

impl<'a> Seat<'a> {
    fn new(socket: &'a UdpSocket, side: Side) -> Seat<'a> {
        Seat { socket, side, place: None }
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let Some(place) = self.place else { return };
        let core = &mut *self.socket.core.borrow_mut();
        if let Some(port) = core.udp.table.get_mut(self.socket.id) {
            let waiters = match self.side {
                Side::Reader => &mut port.readers,
                Side::Writer => &mut port.writers,
            };
            waiters.leave(place, &mut core.tasks);
        }
    }
}
