//! A connection behind TLS.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::rustls;

use super::explain;
use super::wire::Wire;
use crate::conn::Connection;
use crate::error::{Error, ErrorKind};

/// A connection behind TLS, after its handshake: tokio's I/O traits, and hyper's with the feature
/// `hyper`.
///
/// As on a plain connection, what was accepted is delivered whole, whether or not somebody flushes.
/// Reads are safe to cancel, as nothing is taken before it is handed over. See the [module](super)
/// for how a stream ends.
///
/// # Examples
///
/// ```
/// # async fn handler(
/// #     acceptor: slipring::tls::Acceptor,
/// #     conn: slipring::Connection,
/// # ) -> slipring::Result<()> {
/// use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
///
/// let mut stream = acceptor.accept(conn).await?;
/// let mut line = String::new();
/// stream.read_line(&mut line).await?;
/// stream.write_all(line.as_bytes()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TlsStream {
    inner: tokio_rustls::server::TlsStream<Wire>,
}

impl TlsStream {
    pub(super) fn new(inner: tokio_rustls::server::TlsStream<Wire>) -> TlsStream {
        TlsStream { inner }
    }

    /// The connection beneath, for its deadlines, addresses and state.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        self.inner.get_ref().0.conn()
    }

    /// rustls' side: version, cipher suite, the client's certificates.
    #[must_use]
    pub fn session(&self) -> &rustls::ServerConnection {
        self.inner.get_ref().1
    }

    /// The protocol that was agreed on by ALPN (RFC 7301), such as `h2`; `None` where the client or
    /// the configuration named none.
    #[must_use]
    pub fn alpn(&self) -> Option<&[u8]> {
        self.session().alpn_protocol()
    }

    /// The name that the client asked for (SNI: RFC 6066, section 3).
    #[must_use]
    pub fn server_name(&self) -> Option<&str> {
        self.session().server_name()
    }

    /// Says that a message begins here. See
    /// [`ReadHalf::begin_message`](crate::ReadHalf::begin_message).
    pub fn begin_message(&mut self) {
        self.inner.get_mut().0.conn_mut().begin_message();
    }

    /// Says that the message has come to its end. See
    /// [`ReadHalf::end_message`](crate::ReadHalf::end_message).
    pub fn end_message(&mut self) {
        self.inner.get_mut().0.conn_mut().end_message();
    }

    /// Ends the connection with a reset and without `close_notify`: the peer is to know that it
    /// did not get everything. Output that was not delivered is dropped.
    pub fn abort(self) {
        self.connection().link().abort();
    }

    /// The decrypted bytes that have not been consumed; none at the end of the stream.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        if self.inner.get_ref().0.has_had_its_last() {
            return Poll::Ready(Ok(&[]));
        }
        let filled = ready!(Pin::new(&mut self.inner).poll_fill_buf(cx));
        match filled.map(|bytes| bytes.len()) {
            Ok(0) => Poll::Ready(Ok(&[])),
            // They are there, so it reads no more.
            Ok(_) => Pin::new(&mut self.inner).poll_fill_buf(cx),
            Err(error) => Poll::Ready(self.ended(error).map(|()| &[][..])),
        }
    }

    /// What it means that reading has come to its end by an error.
    fn ended(&self, error: io::Error) -> io::Result<()> {
        if error.kind() != io::ErrorKind::UnexpectedEof {
            return Err(explain("tls", error).into());
        }
        if self.inner.get_ref().0.is_dismissed() {
            return Ok(());
        }
        let error = Error::new(ErrorKind::UnexpectedEof, "recv over tls");
        let words = "the peer ended without close_notify: something may be missing";
        Err(error.because(words).into())
    }

    fn take(&mut self, count: usize) {
        Pin::new(&mut self.inner).consume(count);
    }
}

/// # Cancel safety
/// Safe: nothing is taken from the stream before it is handed over.
impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let bytes = ready!(this.poll_fill(cx))?;
        let count = bytes.len().min(buf.remaining());
        buf.put_slice(&bytes[..count]);
        this.take(count);
        Poll::Ready(Ok(()))
    }
}

/// # Cancel safety
/// Safe.
impl AsyncBufRead for TlsStream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        self.get_mut().poll_fill(cx)
    }

    fn consume(self: Pin<&mut Self>, count: usize) {
        self.get_mut().take(count);
    }
}

/// Encrypts, and copies to the connection's output as soon as that has room, of which it may take
/// a record's worth more. What was accepted is delivered also when nobody flushes, and `flush`
/// returns at once. `shutdown` says `close_notify` and ends our side, while the peer may go on to
/// send.
impl AsyncWrite for TlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let room = ready!(self.inner.get_ref().0.poll_room(cx))?;
        let bytes = &bytes[..bytes.len().min(room)];
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let room = ready!(self.inner.get_ref().0.poll_room(cx))?;
        // Those without bytes always fit; alone they would be taken for a stream that takes none.
        let empty = pieces.iter().take_while(|piece| piece.is_empty()).count();
        let pieces = &pieces[empty..];
        let mut left = room;
        let fits = |piece: &&io::IoSlice<'_>| {
            let fits = piece.len() <= left;
            left = left.saturating_sub(piece.len());
            fits
        };
        let whole = pieces.iter().take_while(fits).count();
        match (whole, pieces.first()) {
            (0, Some(first)) => Pin::new(&mut self.inner).poll_write(cx, &first[..room]),
            _ => Pin::new(&mut self.inner).poll_write_vectored(cx, &pieces[..whole]),
        }
    }
}

#[cfg(feature = "hyper")]
impl hyper::rt::Read for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let bytes = ready!(this.poll_fill(cx))?;
        let count = bytes.len().min(buf.remaining());
        buf.put_slice(&bytes[..count]);
        this.take(count);
        Poll::Ready(Ok(()))
    }
}

/// As tokio's trait.
#[cfg(feature = "hyper")]
impl hyper::rt::Write for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(self, cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(self, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(self, cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write_vectored(self, cx, pieces)
    }
}

#[cfg(feature = "hyper")]
impl crate::http::Transport for TlsStream {
    fn connection(&self) -> &Connection {
        TlsStream::connection(self)
    }
}

/// Says `close_notify` behind what was written, unless that was done, or the connection has ended,
/// or a panic has left it unsaid whether that was all.
impl Drop for TlsStream {
    fn drop(&mut self) {
        let (wire, session) = self.inner.get_mut();
        if !std::thread::panicking() {
            session.send_close_notify();
        }
        let mut wire = &*wire;
        while session.wants_write() && session.write_tls(&mut wire).is_ok_and(|count| count > 0) {}
    }
}
