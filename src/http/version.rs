//! Which version a peer speaks: HTTP/2 begins with a preface (RFC 9113, section 3.4) that no HTTP/1
//! request begins with.

use std::mem::MaybeUninit;
use std::task::{Context, Poll, ready};

use hyper::rt::ReadBuf;

use super::io::{HttpIo, Transport};
use crate::error::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Http1,
    Http2,
}

/// Reads until it is known. A stream that ends before is one of HTTP/1, which can say what is
/// missing.
pub(super) fn poll_version<T: Transport>(
    io: &mut HttpIo<T>,
    cx: &mut Context<'_>,
) -> Poll<Result<Version>> {
    loop {
        let known = io.head().len();
        let mut room = [MaybeUninit::uninit(); PREFACE.len()];
        let mut buf = ReadBuf::uninit(&mut room[known..]);
        ready!(io.poll_more(cx, buf.unfilled()))?;
        let more = buf.filled();
        io.keep(more);
        if more.is_empty() || !PREFACE[known..].starts_with(more) {
            return Poll::Ready(Ok(Version::Http1));
        }
        if io.head().len() == PREFACE.len() {
            return Poll::Ready(Ok(Version::Http2));
        }
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
