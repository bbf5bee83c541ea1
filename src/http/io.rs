//! What hyper reads from and writes to: a transport whose input is watched.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use hyper::rt::{Read, ReadBufCursor, Write};

use super::exchange::Exchange;
use crate::conn::Connection;

/// What HTTP can be served on: a connection, or a layer on one, such as TLS.
///
/// # Examples
///
/// ```
/// use slipring::Connection;
/// use slipring::http::Transport;
///
/// fn name<T: Transport>(transport: &T) -> String {
///     transport.connection().id().to_string()
/// }
/// # let _ = name::<Connection>;
/// ```
pub trait Transport: Read + Write + Unpin + 'static {
    /// The connection below.
    fn connection(&self) -> &Connection;
}

impl Transport for Connection {
    fn connection(&self) -> &Connection {
        self
    }
}

pub(super) struct HttpIo<T> {
    transport: T,
    exchange: Rc<Exchange>,
    /// What was read to know the version, and how much of it hyper has.
    head: Vec<u8>,
    taken: usize,
}

impl<T: Transport> HttpIo<T> {
    pub(super) fn new(transport: T, exchange: Rc<Exchange>) -> HttpIo<T> {
        HttpIo { transport, exchange, head: Vec::new(), taken: 0 }
    }

    /// Puts aside what was read before hyper.
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        self.head.extend_from_slice(bytes);
    }

    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Puts aside what hyper has read and not used.
    pub(super) fn put_back(&mut self, bytes: &[u8]) {
        let rest = [bytes, &self.head[self.taken..]].concat();
        (self.head, self.taken) = (rest, 0);
    }

    /// The transport, and what was put aside and hyper has not had.
    pub(super) fn into_parts(mut self) -> (T, Vec<u8>) {
        let rest = self.head.split_off(self.taken);
        (self.transport, rest)
    }
}

impl<T: Transport> HttpIo<T> {
    /// Reads past what was put aside.
    pub(super) fn poll_more(
        &mut self,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.exchange.is_to_be_looked_at() {
            self.exchange.has_asked(false);
            return Poll::Pending;
        }
        self.exchange.asks();
        let amid_message = self.exchange.is_amid_message();
        let polled = Pin::new(&mut self.transport).poll_read(cx, buf);
        self.exchange.has_asked(polled.is_ready());
        match polled {
            // TLS clients may leave without a word where nothing can be missing (RFC 9112,
            // section 9.8).
            Poll::Ready(Err(error))
                if error.kind() == io::ErrorKind::UnexpectedEof && !amid_message =>
            {
                Poll::Ready(Ok(()))
            }
            polled => polled,
        }
    }
}

impl<T: Transport> Read for HttpIo<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.taken < this.head.len() {
            let rest = &this.head[this.taken..];
            let count = rest.len().min(buf.remaining());
            buf.put_slice(&rest[..count]);
            this.taken += count;
            return Poll::Ready(Ok(()));
        }
        this.poll_more(cx, buf)
    }
}

impl<T: Transport> Write for HttpIo<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.exchange.writes();
        Pin::new(&mut self.transport).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.transport).poll_flush(cx);
        if polled.is_ready() {
            self.exchange.has_flushed();
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.exchange.finishes();
        // An answer may still be on its way to a peer that goes on sending.
        let flushed = ready!(Pin::new(&mut self.transport).poll_flush(cx));
        let shut = match flushed {
            Ok(()) => ready!(Pin::new(&mut self.transport).poll_shutdown(cx)),
            failed => failed,
        };
        // All that HTTP/1 had to say was accepted; its connection has a reason of its own by then.
        Poll::Ready(if self.exchange.is_http2() { shut } else { Ok(()) })
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.exchange.writes();
        Pin::new(&mut self.transport).poll_write_vectored(cx, pieces)
    }
}
