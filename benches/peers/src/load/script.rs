//! What a client says, and what it must hear.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    ops::Range,
    time::Duration,
};

/// A conversation.
#[derive(Clone, Copy, Debug)]
pub enum Talk {
    /// Random bytes, to be sent back.
    Echo { bytes: usize },
    /// `GET /`, to be answered with [`HELLO`].
    Http,
}

/// The body that an HTTP server of the comparison answers with.
pub const HELLO: &str = "Hello, World!";

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

impl Talk {
    pub(super) fn request_bytes(self) -> usize {
        match self {
            Self::Echo { bytes } => bytes,
            Self::Http => REQUEST.len(),
        }
    }
}

/// A stream of requests and the stream of replies to it; both repeat.
pub(super) struct Script {
    /// Twice the period, so that every window of a period is contiguous.
    requests: Box<[u8]>,
    pub request_bytes: usize,
    /// One period.
    replies: Box<[u8]>,
    pub reply_bytes: usize,
    /// Where a reply tells the time, which is not compared. Empty for an echo.
    date: Range<usize>,
}

impl Script {
    /// A random pattern of `pipeline * bytes`, so that lost, doubled, reordered and misdirected
    /// bytes all show.
    pub fn echo(bytes: usize, pipeline: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let replies: Box<[u8]> = (0..bytes * pipeline).map(|_| random.byte()).collect();
        let requests = [&*replies, &*replies].concat().into();
        Self { requests, request_bytes: bytes, replies, reply_bytes: bytes, date: 0..0 }
    }

    /// Asks the server once, to learn what its reply looks like. All later ones must be the same,
    /// but for the date.
    pub fn http(address: SocketAddr, pipeline: usize) -> io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(REQUEST)?;
        let mut reply = Vec::new();
        while !is_whole(&reply) {
            let mut part = [0; 4096];
            match stream.read(&mut part) {
                Ok(0) => return Err(wrong("the reply is cut short")),
                Ok(read) => reply.extend_from_slice(&part[..read]),
                // The ring of a session that has ended may still have work for this thread.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if !reply.starts_with(b"HTTP/1.1 200 ") || !reply.ends_with(HELLO.as_bytes()) {
            return Err(wrong("the reply is not the one asked for"));
        }
        let date = find(&reply, b"\r\ndate: ").map_or(0..0, |at| {
            let end = find(&reply[at + 2..], b"\r\n").map_or(reply.len(), |len| at + 2 + len);
            at + 2..end
        });
        Ok(Self {
            requests: REQUEST.repeat(2 * pipeline).into(),
            request_bytes: REQUEST.len(),
            reply_bytes: reply.len(),
            replies: reply.into(),
            date,
        })
    }

    pub fn requests_period(&self) -> usize {
        self.requests.len() / 2
    }

    pub fn replies_period(&self) -> usize {
        self.replies.len()
    }

    #[inline]
    pub fn requests(&self, at: usize, len: usize) -> &[u8] {
        &self.requests[at..at + len]
    }

    /// Whether bytes that came in at this place of the period are the right ones.
    #[inline]
    pub fn matches(&self, at: usize, bytes: &[u8]) -> bool {
        let expected = &self.replies[at..at + bytes.len()];
        if self.date.is_empty() {
            return bytes == expected;
        }
        let before = self.date.start.saturating_sub(at).min(bytes.len());
        let after = self.date.end.saturating_sub(at).min(bytes.len());
        bytes[..before] == expected[..before] && bytes[after..] == expected[after..]
    }
}

/// Whether the header is there, and the body that it announces.
fn is_whole(reply: &[u8]) -> bool {
    let Some(end) = find(reply, b"\r\n\r\n") else { return false };
    reply.len() >= end + 4 + HELLO.len()
}

/// Where the needle, which is in lower case, first is.
fn find(text: &[u8], needle: &[u8]) -> Option<usize> {
    text.windows(needle.len()).position(|window| window.eq_ignore_ascii_case(needle))
}

fn wrong(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_that_differs_in_a_byte_or_its_place_does_not_match() {
        let script = Script::echo(64, 4, 1);
        let right = script.requests(0, 256).to_vec();
        assert!(script.matches(0, &right) && script.matches(100, &right[100..200]));
        assert!(!script.matches(64, &right[..64]), "a message that comes twice");
        for at in [0, 63, 255] {
            let mut wrong = right.clone();
            wrong[at] ^= 1;
            assert!(!script.matches(0, &wrong), "byte {at}");
        }
    }

    #[test]
    fn only_the_date_of_a_reply_may_change() {
        let reply = b"HTTP/1.1 200 OK\r\ndate: now\r\n\r\nHello, World!";
        let at = find(reply, b"\r\ndate: ").expect("it is there") + 2;
        let (requests, replies) = (REQUEST.repeat(2).into(), reply.to_vec().into());
        let (request_bytes, reply_bytes) = (REQUEST.len(), reply.len());
        let date = at..at + 9;
        let script = Script { requests, request_bytes, replies, reply_bytes, date: date.clone() };
        for split in 0..reply.len() {
            for changed in 0..reply.len() {
                let mut heard = reply.to_vec();
                heard[changed] ^= 1;
                let (first, second) = heard.split_at(split);
                let right = script.matches(0, first) && script.matches(split, second);
                assert_eq!(right, date.contains(&changed), "split {split}, changed {changed}");
            }
        }
    }

    #[test]
    fn a_reply_is_whole_with_its_body() {
        let reply = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\nHello, World!";
        assert!(is_whole(reply) && !is_whole(&reply[..reply.len() - 1]) && !is_whole(b""));
    }
}
