//! Clients of an echo server that know what must come back.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use slipring::{ListenAddr, Running};
use socket2::Socket;

use super::limit;

/// A client that sends, receives and compares without ever blocking, so that one thread can be
/// many of them.
pub struct Peer {
    socket: Socket,
    bytes: &'static [u8],
    /// The most that one write carries.
    piece: usize,
    sent: usize,
    received: usize,
    half_closed: bool,
    ended: bool,
}

/// How far `exchange` goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Everything has come back; the connections stay open.
    Echoed,
    /// The clients have half-closed then, and seen the end.
    End,
}

impl Peer {
    pub fn new(socket: impl Into<Socket>, bytes: &'static [u8]) -> Peer {
        let socket = socket.into();
        socket.set_nonblocking(true).expect("set non-blocking");
        let (piece, half_closed, ended) = (PIECE, false, false);
        Peer { socket, bytes, piece, sent: 0, received: 0, half_closed, ended }
    }

    /// Sends no more than so much at once.
    pub fn in_pieces_of(self, piece: usize) -> Peer {
        Peer { piece, ..self }
    }

    fn is_done(&self, until: Until) -> bool {
        self.ended || (until == Until::Echoed && self.received == self.bytes.len())
    }

    /// Sends and receives once. False when neither was possible.
    fn step(&mut self, until: Until, buf: &mut [u8]) -> bool {
        let piece = &self.bytes[self.sent..(self.sent + self.piece).min(self.bytes.len())];
        let wrote = if piece.is_empty() { None } else { moved((&self.socket).write(piece)) };
        self.sent += wrote.unwrap_or(0);
        if self.sent == self.bytes.len() && until == Until::End && !self.half_closed {
            self.half_closed = true;
            self.socket.shutdown(Shutdown::Write).expect("half-close");
        }
        let read = moved((&self.socket).read(buf));
        if let Some(count) = read {
            let expected = &self.bytes[self.received..];
            assert!(count <= expected.len(), "more came back than was sent");
            assert!(buf[..count] == expected[..count], "differs after {} bytes", self.received);
            self.received += count;
            self.ended = count == 0;
            assert!(!self.ended || expected.is_empty(), "ended after {} bytes", self.received);
        }
        wrote.is_some() || read.is_some()
    }
}

/// The count, or `None` where it would have blocked.
fn moved(result: std::io::Result<usize>) -> Option<usize> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        result => Some(result.expect("send or receive")),
    }
}

/// Runs all of them; panics when a byte differs, or none moves for ten seconds.
pub fn exchange(peers: &mut [Peer], until: Until) {
    let mut buf = vec![0; PIECE];
    let mut last_move = Instant::now();
    while peers.iter().any(|peer| !peer.is_done(until)) {
        let mut any = false;
        for peer in peers.iter_mut().filter(|peer| !peer.is_done(until)) {
            any |= peer.step(until, &mut buf);
        }
        if any {
            last_move = Instant::now();
        } else {
            assert!(last_move.elapsed() < limit(10_000), "nothing moves any more");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Sends all and half-closes, while it reads all that comes until the end.
pub fn ask(stream: TcpStream, request: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(request).expect("send the request");
            stream.shutdown(Shutdown::Write).expect("half-close");
        });
        (&stream).read_to_end(&mut answer).expect("read the answer");
    });
    answer
}

/// The TCP addresses, in the order of the `listen` calls.
pub fn tcp_addrs(running: &Running) -> Vec<SocketAddr> {
    let tcp = |addr: &ListenAddr| match addr {
        ListenAddr::Tcp(addr) => Some(*addr),
        _ => None,
    };
    running.local_addrs().iter().filter_map(tcp).collect()
}

/// The bytes of stream `n`: random, another part of the same for each stream.
pub fn bytes(n: usize, len: usize) -> &'static [u8] {
    static RANDOM: OnceLock<Vec<u8>> = OnceLock::new();
    let random = RANDOM.get_or_init(|| {
        let mut state: u64 = std::env::var("RING_TEST_SEED")
            .map_or(0x5eed, |seed| seed.parse().expect("RING_TEST_SEED is a number"));
        eprintln!("RING_TEST_SEED={state}");
        let mut next = || {
            // splitmix64, <https://prng.di.unimi.it/splitmix64.c>.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)).to_le_bytes()
        };
        (0..(5 * MB + 500 * STRIDE).div_ceil(8)).flat_map(|_| next()).collect()
    });
    &random[n * STRIDE..][..len]
}

/// Any port.
pub const ANY: &str = "127.0.0.1:0";
/// A mebibyte.
pub const MB: usize = 1 << 20;
/// The most that a client writes or reads at once.
pub const PIECE: usize = 64 * 1024;
/// From stream to stream; a prime, so that no two of them agree at the borders of buffers.
const STRIDE: usize = 4099;
