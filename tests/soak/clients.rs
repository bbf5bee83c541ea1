//! The clients of the soak: a process whose threads are a few clients of each kind, each with one
//! connection at a time or a crowd of them. It does what its standard input says: `pause`, in which
//! no life begins, `go` and `end`. A client that is treated otherwise than its kind must be ends
//! the process with a panic.

use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use super::common::{length, limit, wait_until};

/// What a client is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Asks, gets its answer, closes; every byte is compared.
    Good,
    /// Half-closes, and reads to the end.
    HalfCloses,
    /// Has one byte answered, and then the server closes.
    Once,
    /// Sends a byte now and then, and has each answered.
    Slow,
    /// Answers whenever it is asked for a sign of life, and closes.
    Answers,
    /// Is asked for a sign of life, and gives none.
    Hangs,
    /// Never says a word.
    Silent,
    /// Has said one.
    Quiet,
    /// Sends a line that does not end, byte by byte.
    Drips,
    /// Chats for longer than any connection may live.
    Chatters,
    /// Has a handler that does nothing for it.
    Waits,
    /// The same, and ends its side.
    WaitsHalfClosed,
    /// Sends as fast as it can, and reads nothing.
    Firehose,
    /// Resets at any moment.
    Resets,
    /// Comes as more than one address may be, and idles.
    Crowd,
}

const CLIENTS: [(Manner, usize); 15] = [
    (Manner::Good, 3),
    (Manner::HalfCloses, 2),
    (Manner::Once, 2),
    (Manner::Slow, 3),
    (Manner::Answers, 3),
    (Manner::Hangs, 3),
    (Manner::Silent, 3),
    (Manner::Quiet, 4),
    (Manner::Drips, 3),
    (Manner::Chatters, 3),
    (Manner::Waits, 2),
    (Manner::WaitsHalfClosed, 2),
    (Manner::Firehose, 2),
    (Manner::Resets, 2),
    (Manner::Crowd, 1),
];

impl Manner {
    /// Whether its lives are so short that a pause waits for their end.
    fn is_brief(self) -> bool {
        matches!(self, Manner::Good | Manner::HalfCloses | Manner::Once | Manner::Resets)
    }

    /// What it says first, which names what the server does for it.
    fn word(self) -> &'static [u8] {
        match self {
            Manner::Silent => b"",
            Manner::Once => b"o",
            Manner::Quiet => b"i",
            Manner::Drips => b"l",
            Manner::Waits | Manner::WaitsHalfClosed => b"s",
            _ => b"e",
        }
    }

    /// An address of its own, since the server counts by address.
    fn address(self) -> SocketAddr {
        (Ipv4Addr::new(127, 0, 1, self as u8 + 1), 0).into()
    }
}

/// How a connection ends that the client does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Fin,
    Reset,
    /// The clients are to end first.
    Over,
}

/// What all clients share.
struct Stage {
    port: u16,
    heartbeat_port: u16,
    paused: AtomicBool,
    over: AtomicBool,
    /// Lives of the brief that are under way.
    brief: AtomicU64,
    /// Lives by manner, and exchanges that were compared.
    lives: [AtomicU64; CLIENTS.len()],
    compared: AtomicU64,
}

/// Is the clients; the role has the server's two ports.
pub fn be(role: &str) {
    let mut ports = role.split(' ').skip(1).map(|port| port.parse().expect("a port"));
    let mut port = || ports.next().expect("two ports");
    let stage = Stage {
        port: port(),
        heartbeat_port: port(),
        paused: AtomicBool::new(false),
        over: AtomicBool::new(false),
        brief: AtomicU64::new(0),
        lives: Default::default(),
        compared: AtomicU64::new(0),
    };
    thread::scope(|scope| {
        let stage = &stage;
        for (manner, count) in CLIENTS {
            (0..count).for_each(|n| drop(scope.spawn(move || stage.live(manner, n as u64))));
        }
        for line in std::io::stdin().lines() {
            match line.expect("a line").as_str() {
                "pause" => {
                    stage.paused.store(true, SeqCst);
                    wait_until("the brief pause", || stage.brief.load(SeqCst) == 0);
                    println!("\npaused");
                }
                "go" => stage.paused.store(false, SeqCst),
                _ => break,
            }
        }
        stage.over.store(true, SeqCst);
    });
    let lives: Vec<_> = CLIENTS.iter().map(|(manner, _)| (manner, stage.lives(*manner))).collect();
    eprintln!("soak: lives of clients: {lives:?}");
    assert!(lives.iter().all(|(_, count)| *count >= length()), "too few: {lives:?}");
    println!("\ncompared {}", stage.compared.load(SeqCst));
    assert!(stage.compared.load(SeqCst) > COMPARED_MIN * length(), "hardly anything happened");
}

impl Stage {
    fn is_over(&self) -> bool {
        self.over.load(SeqCst)
    }

    fn is_paused(&self) -> bool {
        self.paused.load(SeqCst)
    }

    fn lives(&self, manner: Manner) -> u64 {
        self.lives[manner as usize].load(SeqCst)
    }

    /// One life after the other.
    fn live(&self, manner: Manner, n: u64) {
        let _over = OnPanic(&self.over);
        let mut turn = n * 7919;
        while !self.is_over() {
            turn += 1;
            // Counted before it looks, so that whoever sees none under way can be sure.
            self.brief.fetch_add(u64::from(manner.is_brief()), SeqCst);
            let paused = self.is_paused();
            if !paused {
                self.one_life(manner, turn);
            }
            self.brief.fetch_sub(u64::from(manner.is_brief()), SeqCst);
            if paused {
                pause(5);
            }
        }
    }

    fn one_life(&self, manner: Manner, turn: u64) {
        if manner == Manner::Crowd {
            self.crowd();
        } else {
            let mut stream = self.connect(manner);
            self.be(manner, &mut stream, turn);
        }
        // What was cut off at the end is no life.
        if !self.is_over() {
            self.lives[manner as usize].fetch_add(1, SeqCst);
        }
    }

    /// Connects, says its word, and has it back.
    fn connect(&self, manner: Manner) -> TcpStream {
        let beats = matches!(manner, Manner::Answers | Manner::Hangs);
        let port = if beats { self.heartbeat_port } else { self.port };
        let mut stream = connect(manner.address(), port);
        let word = manner.word();
        stream.write_all(word).expect("send");
        stream.read_exact(&mut [0][..word.len()]).expect("it is confirmed");
        stream
    }

    fn be(&self, manner: Manner, stream: &mut TcpStream, turn: u64) {
        let ended = match manner {
            Manner::Good => return self.exchange(stream, &random(turn)),
            Manner::HalfCloses => return self.ask_for_all(stream, &random(turn)),
            Manner::Slow => return self.exchange_slowly(stream, turn),
            Manner::Answers => return self.answer_heartbeats(stream),
            Manner::Resets => return reset(stream, turn),
            Manner::Firehose => {
                let ended = self.flood(stream);
                assert!(matches!(ended, Ending::Reset | Ending::Over), "{manner:?}: {ended:?}");
                return;
            }
            // What they say may meet a socket that is closed already, so a reset is possible.
            Manner::Drips | Manner::Chatters => {
                self.until_the_end(stream, |stream| {
                    let _ = stream.write_all(b"d");
                    let _ = stream.read(&mut [0; 64]);
                    pause(50);
                });
                return;
            }
            Manner::WaitsHalfClosed => {
                stream.shutdown(Shutdown::Write).expect("half-close");
                self.until_the_end(stream, |_| pause(20))
            }
            _ => self.until_the_end(stream, |_| pause(20)),
        };
        assert!(matches!(ended, Ending::Fin | Ending::Over), "{manner:?}: {ended:?}");
    }

    fn exchange(&self, stream: &mut TcpStream, bytes: &[u8]) {
        for piece in bytes.chunks(997) {
            stream.write_all(piece).expect("a good client can send");
            let mut answer = vec![0; piece.len()];
            stream.read_exact(&mut answer).expect("a good client gets its answer");
            assert!(answer == piece, "another connection's bytes");
            self.compared.fetch_add(1, SeqCst);
        }
    }

    fn exchange_slowly(&self, stream: &mut TcpStream, turn: u64) {
        for byte in random(turn).into_iter().take(8) {
            if self.is_over() {
                return;
            }
            self.exchange(stream, &[byte]);
            pause(turn % 300);
        }
    }

    fn ask_for_all(&self, stream: &mut TcpStream, bytes: &[u8]) {
        stream.write_all(bytes).expect("a good client can send");
        stream.shutdown(Shutdown::Write).expect("half-close");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("a good client gets its answer and a FIN");
        assert!(answer == bytes, "another connection's bytes");
        self.compared.fetch_add(1, SeqCst);
    }

    /// Gives three signs of life; they are echoed.
    fn answer_heartbeats(&self, stream: &mut TcpStream) {
        let mut asked = 0;
        while asked < 3 && !self.is_over() {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("it is asked, not ended");
            if byte == *b"?" {
                stream.write_all(b"!").expect("send");
                asked += 1;
            }
        }
    }

    fn flood(&self, stream: &mut TcpStream) -> Ending {
        stream.set_write_timeout(Some(Duration::from_millis(20))).expect("set a time limit");
        let piece = vec![b'f'; 60_000];
        let reset = Cell::new(false);
        let ended = self.until_the_end(stream, |stream| {
            if self.is_paused() {
                return pause(20);
            }
            // Whoever hears of the reset first has it, and nobody else.
            let result = stream.write(&piece).map_err(|error| error.kind());
            reset.set(reset.get() || result == Err(ErrorKind::ConnectionReset));
        });
        if reset.get() { Ending::Reset } else { ended }
    }

    /// As many as one address may have idle for a while, and some are idle for so long that they
    /// have to go.
    fn crowd(&self) {
        let addr = Manner::Crowd.address();
        let crowd: Vec<_> = (0..CROWD)
            .map(|_| {
                let mut stream = connect(addr, self.port);
                // Those for whom there is no place may have heard so by now.
                let _ = stream.write_all(b"e");
                stream
            })
            .collect();
        let until = Instant::now() + limit(1_600);
        while Instant::now() < until && !self.is_over() {
            pause(20);
        }
        drop(crowd);
        pause(200);
    }

    /// Does something again and again until the server has ended the connection, which takes no
    /// longer than any connection may live.
    fn until_the_end(&self, stream: &mut TcpStream, each: impl Fn(&mut TcpStream)) -> Ending {
        stream.set_read_timeout(Some(Duration::from_millis(1))).expect("set a time limit");
        let give_up = Instant::now() + limit(8_000);
        while !self.is_over() {
            if let Some(ending) = ending(stream) {
                return ending;
            }
            each(stream);
            assert!(Instant::now() < give_up, "the server keeps it for ever");
        }
        Ending::Over
    }
}

/// Whether the connection has ended, whatever has come and was not read.
fn ending(stream: &TcpStream) -> Option<Ending> {
    let mut info = libc::pollfd { fd: 0, events: libc::POLLRDHUP, revents: 0 };
    info.fd = std::os::fd::AsRawFd::as_raw_fd(stream);
    // SAFETY: one entry, which outlives the call.
    let ready = unsafe { libc::poll(&raw mut info, 1, 0) };
    assert!(ready >= 0, "poll: {}", std::io::Error::last_os_error());
    if info.revents & libc::POLLERR != 0 {
        return Some(Ending::Reset);
    }
    (info.revents & libc::POLLRDHUP != 0).then_some(Ending::Fin)
}

fn connect(from: SocketAddr, port: u16) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    // Many thousand short lives would use all ports of an address up.
    socket.set_reuse_address(true).expect("set SO_REUSEADDR");
    socket.bind(&from.into()).expect("an address of loopback");
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    socket.connect_timeout(&to.into(), limit(10_000)).expect("connect");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    stream.set_write_timeout(Some(limit(10_000))).expect("set a time limit");
    stream
}

fn reset(stream: &mut TcpStream, turn: u64) {
    let bytes = random(turn);
    let _ = stream.write_all(&bytes[..turn as usize % bytes.len()]);
    SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
    pause(turn % 3);
}

fn pause(ms: u64) {
    thread::sleep(Duration::from_millis(ms));
}

/// Bytes that differ from turn to turn, 1 to 60 KiB of them.
fn random(turn: u64) -> Vec<u8> {
    let mut state = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words = 128 + next() % 7_500;
    (0..words).flat_map(|_| next().to_le_bytes()).collect()
}

/// Ends all clients when one fails.
struct OnPanic<'a>(&'a AtomicBool);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, SeqCst);
            // The server waits for a word of this process.
            eprintln!("soak: a client was not treated as it should be");
            std::process::exit(1);
        }
    }
}

/// Exchanges that are compared at least, in an ordinary run.
const COMPARED_MIN: u64 = 1_000;
const CROWD: usize = 60;
