//! Received bytes and bytes to send: who owns them, and that nobody copies them.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::sys::bufs::Lease;

/// Received bytes, on loan from the core's receive buffers.
///
/// It derefs to `[u8]`. Dropping it gives the buffer back to the kernel; sending it with
/// [`Connection::send`](crate::Connection::send) sends from that same memory and gives it back when
/// the kernel is done. It may be kept as long as the handler likes: once more than half of the
/// core's buffers are on loan, what is received is copied to memory of its own instead, so that
/// nobody who keeps chunks can stop the others from receiving.
///
/// # Examples
///
/// ```
/// # async fn handler(mut conn: slipring::Connection) -> slipring::Result<()> {
/// while let Some(chunk) = conn.recv().await? {
///     println!("{} bytes", chunk.len());
/// }
/// # Ok(())
/// # }
/// ```
pub struct Chunk(Lease);

impl Chunk {
    /// How many bytes there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops the first `count` bytes; the rest stays where it is.
    ///
    /// # Panics
    /// When the chunk is shorter than `count`.
    pub fn advance(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// The payload of a datagram, which begins at `start`. It keeps the lease, or copies when the
    /// receive buffers run short: there are no others to receive datagrams into.
    pub(crate) fn of_datagram(mut lease: Lease, start: usize) -> Chunk {
        lease.advance(start);
        Chunk(if lease.is_pool_half_out() { Lease::copied(&lease) } else { lease })
    }

    /// Keeps the lease, or copies when the receive buffers run short.
    pub(crate) fn new(lease: Lease) -> Chunk {
        Chunk(if lease.is_pool_short() { Lease::copied(&lease) } else { lease })
    }
}

impl Deref for Chunk {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({} bytes)", self.len())
    }
}

/// Bytes given away to be sent; see [`Connection::send`](crate::Connection::send).
///
/// Made by `From` for a [`Chunk`], a `Vec<u8>`, a `String`, a `Box<[u8]>`, an `Arc<[u8]>` and the
/// `'static` slices; none of them is copied.
///
/// # Examples
///
/// ```
/// use slipring::SendBuf;
///
/// assert_eq!(SendBuf::from("pong\r\n").len(), 6);
/// assert_eq!(&*SendBuf::from(vec![1, 2, 3]), [1, 2, 3]);
/// ```
pub struct SendBuf(pub(crate) Payload);

/// Whose memory a [`SendBuf`] is.
pub(crate) enum Payload {
    /// A received chunk on its way out again.
    Chunk(Chunk),
    Owned(Vec<u8>),
    /// Shared with others, such as a cached response.
    Shared(Arc<[u8]>),
    Static(&'static [u8]),
}

const _: () = assert!(size_of::<Chunk>() == 16 && size_of::<SendBuf>() == 24);

impl SendBuf {
    /// How many bytes there are.
    #[inline]
    pub fn len(&self) -> usize {
        match &self.0 {
            Payload::Chunk(chunk) => chunk.len(),
            Payload::Owned(bytes) => bytes.len(),
            Payload::Shared(bytes) => bytes.len(),
            Payload::Static(bytes) => bytes.len(),
        }
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Deref for SendBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Payload::Chunk(chunk) => chunk,
            Payload::Owned(bytes) => bytes,
            Payload::Shared(bytes) => bytes,
            Payload::Static(bytes) => bytes,
        }
    }
}

impl fmt::Debug for SendBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SendBuf({} bytes)", self.len())
    }
}

impl From<Chunk> for SendBuf {
    fn from(chunk: Chunk) -> SendBuf {
        SendBuf(Payload::Chunk(chunk))
    }
}

impl From<Vec<u8>> for SendBuf {
    fn from(bytes: Vec<u8>) -> SendBuf {
        SendBuf(Payload::Owned(bytes))
    }
}

impl From<String> for SendBuf {
    fn from(text: String) -> SendBuf {
        SendBuf(Payload::Owned(text.into_bytes()))
    }
}

impl From<Box<[u8]>> for SendBuf {
    fn from(bytes: Box<[u8]>) -> SendBuf {
        SendBuf(Payload::Owned(bytes.into_vec()))
    }
}

impl From<Arc<[u8]>> for SendBuf {
    fn from(bytes: Arc<[u8]>) -> SendBuf {
        SendBuf(Payload::Shared(bytes))
    }
}

impl From<&'static [u8]> for SendBuf {
    fn from(bytes: &'static [u8]) -> SendBuf {
        SendBuf(Payload::Static(bytes))
    }
}

impl<const N: usize> From<&'static [u8; N]> for SendBuf {
    fn from(bytes: &'static [u8; N]) -> SendBuf {
        SendBuf(Payload::Static(bytes))
    }
}

impl From<&'static str> for SendBuf {
    fn from(text: &'static str) -> SendBuf {
        SendBuf(Payload::Static(text.as_bytes()))
    }
}
