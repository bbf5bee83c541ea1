//! The connection as rustls sees it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::record::Record;
use crate::conn::{Connection, Link};
use crate::entry::Entry;

/// A connection whose records are messages: one that has begun has a deadline, and a drain lets it
/// come to its end.
#[derive(Debug)]
pub(super) struct Wire {
    conn: Connection,
    record: Record,
}

impl Wire {
    pub(super) fn new(conn: Connection) -> Wire {
        Wire { conn, record: Record::default() }
    }

    pub(super) fn conn(&self) -> &Connection {
        &self.conn
    }

    pub(super) fn conn_mut(&mut self) -> &mut Connection {
        &mut self.conn
    }

    pub(super) fn link(&self) -> &Link {
        self.conn.link()
    }

    /// Whether the end of the stream was our word, and not the peer's.
    pub(super) fn is_dismissed(&self) -> bool {
        self.is(|entry| entry.dismissed.is_some())
    }

    /// Whether what is decrypted already is not to be read any more: the message before it was the
    /// last one.
    pub(super) fn has_had_its_last(&self) -> bool {
        self.is(|entry| entry.had_its_last && entry.ended.is_none())
    }

    fn is(&self, what: impl Fn(&Entry) -> bool) -> bool {
        let Link { core, id } = self.link();
        core.borrow_mut().table.get(*id).is_some_and(what)
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Wire { conn, record } = self.get_mut();
        let bytes = ready!(conn.read.poll_fill_amid(record.so_far(), cx))?;
        let bytes = &bytes[..bytes.len().min(buf.remaining())];
        buf.put_slice(bytes);
        let (count, ended) = (bytes.len(), record.advance(bytes));
        conn.consume(count);
        if ended {
            conn.read.end_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.conn).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.conn).poll_write_vectored(cx, pieces)
    }
}

/// Takes the last bytes of a stream that goes, all of them.
pub(super) struct Last<'a>(pub(super) &'a Link);

impl io::Write for Last<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Link { core, id } = self.0;
        core.borrow_mut().write_last(*id, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
