//! A received datagram.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;

use crate::buf::{Chunk, SendBuf};
use crate::sys::bufs::Lease;
use crate::sys::datagram::{Arrival, HEADER_BYTES};

/// A received datagram, on loan from the core's buffers for datagrams, with its sender's address.
///
/// It derefs to its bytes. It can be sent on as it is, from that same memory; dropping it gives the
/// buffer back. It may be kept as long as one likes: once more than half of the buffers are on
/// loan, what is received is copied to memory of its own.
///
/// On a socket with [`set_gro`](crate::net::UdpSocket::set_gro) it may be several datagrams of one
/// sender: [`Datagram::segments`] has them one by one, and on any other socket the only one.
///
/// # Examples
///
/// ```
/// # async fn task(socket: slipring::net::UdpSocket) -> slipring::Result<()> {
/// let datagram = socket.recv_from().await?;
/// println!("{} bytes of {}", datagram.len(), datagram.peer());
/// let peer = datagram.peer();
/// socket.send_to(datagram, peer).await
/// # }
/// ```
pub struct Datagram {
    payload: Chunk,
    peer: SocketAddr,
    segment: Option<usize>,
    sent_bytes: usize,
}

impl Datagram {
    /// Reads the header before the payload. `None` for one that no kernel writes.
    pub(super) fn new(lease: Lease) -> Option<(Datagram, Arrival)> {
        let arrival = Arrival::read(&lease)?;
        let Arrival { peer, segment, sent_bytes, .. } = arrival;
        let payload = Chunk::of_datagram(lease, HEADER_BYTES);
        Some((Datagram { payload, peer, segment, sent_bytes }, arrival))
    }

    /// Who has sent it.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Whether it was longer than the buffer that it was received into, so that its end is lost:
    /// see `SLIPRING_LARGE_BUFFER_BYTES`. With the default none is.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        self.sent_bytes > self.payload.len()
    }

    /// How many bytes were sent, those included that are lost if it [was
    /// truncated](Datagram::is_truncated).
    #[must_use]
    pub fn sent_bytes(&self) -> usize {
        self.sent_bytes
    }

    /// How long each of several datagrams is that the kernel has put together; the last one may be
    /// shorter. `None` for a single one.
    ///
    /// # Kernel
    /// `UDP_GRO`, udp(7), since Linux 5.0.
    #[must_use]
    pub fn segment_size(&self) -> Option<usize> {
        self.segment
    }

    /// The datagrams in it, one by one; a single empty one is one, too.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn task(socket: slipring::net::UdpSocket) -> slipring::Result<()> {
    /// socket.set_gro(true)?;
    /// let datagram = socket.recv_from().await?;
    /// for segment in datagram.segments() {
    ///     println!("{} bytes of {}", segment.len(), datagram.peer());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn segments(&self) -> impl Iterator<Item = &[u8]> {
        let single = self.payload.is_empty().then_some(&[][..]);
        let size = self.segment.unwrap_or(self.payload.len()).max(1);
        self.payload.chunks(size).chain(single)
    }
}

impl Deref for Datagram {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.payload
    }
}

impl AsRef<[u8]> for Datagram {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Datagram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Datagram({} bytes of {})", self.len(), self.peer)
    }
}

impl From<Datagram> for SendBuf {
    fn from(datagram: Datagram) -> SendBuf {
        SendBuf::from(datagram.payload)
    }
}
