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

    /// How much of the stream's output may be written now; at least a record's worth, as that is
    /// what rustls makes of it.
    pub(super) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Link { core, id } = self.link();
        let room = ready!(core.borrow_mut().poll_room(*id, cx))?;
        Poll::Ready(Ok(room.max(RECORD_BYTES_MAX)))
    }

    fn write_whole(&self, bytes: &[u8]) -> io::Result<usize> {
        let Link { core, id } = self.link();
        core.borrow_mut().write_all(*id, bytes)?;
        Ok(bytes.len())
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

/// Takes all at once, so that rustls keeps no output for itself: the stream has asked for room
/// before, and what rustls says on its own account is little.
impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(self.write_whole(bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_shutdown(cx)
    }
}

/// The same, for a stream that goes and can't wait for anything.
impl io::Write for &Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_whole(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a record carries at most (RFC 8446, section 5.1).
const RECORD_BYTES_MAX: usize = 1 << 14;
