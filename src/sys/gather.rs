//! What one send carries: the bytes it owns, and the list of pieces that the kernel walks.

use std::fmt;
use std::ptr;

use crate::buf::{Payload, SendBuf};

/// The queued output of a connection. While it collects, the connection fills it; once it is sent,
/// the driver owns it until the kernel has answered, so no byte of it moves or is freed before.
pub(crate) struct Gather {
    segments: Vec<SendBuf>,
    /// How much of the first segment is sent already.
    skip: usize,
    bytes: usize,
    /// The most that one send takes.
    most: usize,
    /// The last segment is of copies, to which more may be added until it is sent.
    copies: bool,
    /// An emptied buffer, kept so that the next `write` allocates nothing.
    spare: Vec<u8>,
    pieces: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl Gather {
    pub(crate) fn new() -> Gather {
        // SAFETY: a msghdr is plain integers and pointers, for which zero is a valid value.
        let header = unsafe { std::mem::zeroed() };
        Gather {
            segments: Vec::new(),
            skip: 0,
            bytes: 0,
            most: usize::MAX,
            copies: false,
            spare: Vec::new(),
            pieces: Vec::new(),
            header,
        }
    }

    /// Bounds what one send takes.
    pub(crate) fn bound(&mut self, most: usize) {
        self.most = most;
    }

    /// How many bytes wait to be sent.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether another piece would make the list too long for one call.
    pub(crate) fn is_full(&self) -> bool {
        self.segments.len() >= SEGMENTS_MAX
    }

    /// Appends a buffer, which is not empty, without copying it.
    #[inline]
    pub(crate) fn push(&mut self, buf: SendBuf) {
        self.bytes += buf.len();
        self.copies = false;
        self.segments.push(buf);
    }

    /// Appends a copy of the bytes; small ones in a row share a segment.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes += bytes.len();
        if let Some(last) = self.last_copies() {
            last.extend_from_slice(bytes);
            return;
        }
        self.copies = true;
        let mut copy = std::mem::take(&mut self.spare);
        copy.extend_from_slice(bytes);
        self.segments.push(SendBuf(Payload::Owned(copy)));
    }

    fn last_copies(&mut self) -> Option<&mut Vec<u8>> {
        match self.segments.last_mut() {
            Some(SendBuf(Payload::Owned(copies))) if self.copies => Some(copies),
            _ => None,
        }
    }

    /// Drops the first `sent` bytes, which the kernel has taken.
    pub(crate) fn advance(&mut self, sent: usize) {
        debug_assert!(sent <= self.bytes);
        if sent >= self.bytes {
            self.clear();
            return;
        }
        let mut left = sent;
        self.bytes -= left;
        let mut done = 0;
        while let Some(segment) = self.segments.get(done) {
            let rest = segment.len() - self.skip;
            if left < rest {
                self.skip += left;
                break;
            }
            left -= rest;
            self.skip = 0;
            done += 1;
        }
        self.segments.drain(..done);
    }

    /// Drops everything.
    #[inline]
    pub(crate) fn clear(&mut self) {
        (self.bytes, self.skip) = (0, 0);
        if let Some(copies) = self.last_copies()
            && copies.capacity() <= SPARE_BYTES_MAX
        {
            copies.clear();
            self.spare = std::mem::take(copies);
        }
        self.copies = false;
        self.segments.clear();
    }

    #[cfg(test)]
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.segments.iter().enumerate().map(|(n, s)| if n == 0 { &s[self.skip..] } else { &s[..] })
    }

    /// What is to be sent next, if it is of one piece: it goes out by a plain send.
    #[inline]
    pub(super) fn single(&self) -> Option<&[u8]> {
        let first = &self.segments.first()?[self.skip..];
        let alone = self.segments.len() == 1 || first.len() >= self.most;
        alone.then(|| &first[..first.len().min(self.most)])
    }

    /// Fills in the header for a vectored send of the next pieces and returns its address, which
    /// holds until this gather is next touched or moved.
    pub(super) fn header(&mut self) -> *const libc::msghdr {
        self.pieces.clear();
        let mut room = self.most;
        for (n, segment) in self.segments.iter().enumerate() {
            let piece = if n == 0 { &segment[self.skip..] } else { &segment[..] };
            // The kernel only reads through it: sendmsg(2).
            let base = piece.as_ptr().cast_mut().cast();
            let len = piece.len().min(room);
            self.pieces.push(libc::iovec { iov_base: base, iov_len: len });
            room -= len;
            if room == 0 {
                break;
            }
        }
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = self.pieces.len();
        ptr::from_ref(&self.header)
    }
}

impl fmt::Debug for Gather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gather({} bytes in {} segments)", self.bytes, self.segments.len())
    }
}

/// Far below the kernel's 1024 (`UIO_MAXIOV`), and enough that batching more gains nothing.
const SEGMENTS_MAX: usize = 128;
/// A buffer that has grown beyond this is freed, so that one large write does not stay for good.
const SPARE_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn content(gather: &Gather) -> Vec<u8> {
        gather.pieces().flatten().copied().collect()
    }

    #[test]
    fn small_writes_share_one_segment() {
        let mut gather = Gather::new();
        gather.write(b"one ");
        gather.write(b"two ");
        assert_eq!(gather.single(), Some(&b"one two "[..]));
        gather.push(SendBuf::from("three"));
        gather.write(b" four");
        assert_eq!(gather.single(), None);
        assert_eq!(content(&gather), b"one two three four");
    }

    #[test]
    fn advance_stops_at_any_byte() {
        for sent in 0..=9 {
            let mut gather = Gather::new();
            gather.push(SendBuf::from("abc"));
            gather.write(b"def");
            gather.push(SendBuf::from("ghi"));
            gather.advance(sent);
            assert_eq!(content(&gather), b"abcdefghi"[sent..]);
            assert_eq!(gather.bytes(), 9 - sent);
            gather.advance(gather.bytes());
            assert!(gather.is_empty() && gather.segments.is_empty());
        }
    }

    /// A length of any number of bytes leaves in turns of at most so many.
    #[test]
    fn a_turn_takes_no_more_than_its_share_of_any_pieces() {
        const MAX: usize = 64 * 1024;
        for lens in [&[5 * MAX][..], &[MAX], &[MAX - 1, 2, MAX], &[1, 3 * MAX + 1], &[9; 100]] {
            let mut gather = Gather::new();
            for len in lens {
                gather.push(SendBuf::from(vec![7; *len]));
            }
            gather.bound(MAX);
            let mut turns = 0;
            while !gather.is_empty() {
                let next = gather.single().map(<[u8]>::len).unwrap_or_else(|| {
                    gather.header();
                    gather.pieces.iter().map(|piece| piece.iov_len).sum()
                });
                assert_eq!(next, gather.bytes().min(MAX), "{lens:?}");
                gather.advance(next);
                turns += 1;
            }
            assert_eq!(turns, lens.iter().sum::<usize>().div_ceil(MAX), "{lens:?}");
        }
    }

    #[test]
    fn a_reused_gather_allocates_no_new_buffer_for_writes() {
        let mut gather = Gather::new();
        gather.write(&[1; 100]);
        let first = gather.single().unwrap().as_ptr();
        gather.clear();
        gather.write(&[2; 100]);
        assert_eq!(gather.single().unwrap().as_ptr(), first);
    }
}
