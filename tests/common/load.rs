//! Clients that connect, ask, read the answer and leave, again and again, and how each try ended.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use slipring::Connection;

use super::{limit, not_run};

/// How a try has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// Nobody listened.
    Refused,
    /// The handshake did not begin: it is tried again a second later.
    HeldOff,
    Reset,
    /// A FIN before a byte of the answer.
    Eof,
    /// A FIN in the middle of the answer.
    Truncated,
    /// Connected, and then nothing came.
    TimedOut,
}

/// How many tries have ended how.
#[derive(Debug, Default)]
pub struct Outcomes([AtomicU64; 7]);

impl Outcomes {
    pub fn get(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize].load(SeqCst)
    }

    pub fn count(&self, outcome: Outcome) {
        self.0[outcome as usize].fetch_add(1, SeqCst);
    }

    pub fn add(&self, other: &Outcomes) {
        for (mine, theirs) in self.0.iter().zip(&other.0) {
            mine.fetch_add(theirs.load(SeqCst), SeqCst);
        }
    }

    /// Those that had a connection and no answer.
    pub fn harmed(&self) -> u64 {
        [Outcome::Reset, Outcome::Eof, Outcome::Truncated, Outcome::TimedOut]
            .iter()
            .map(|outcome| self.get(*outcome))
            .sum()
    }
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Outcome::{Eof, HeldOff, Ok, Refused, Reset, TimedOut, Truncated};
        for outcome in [Ok, Refused, HeldOff, Reset, Eof, Truncated, TimedOut] {
            write!(f, "{outcome:?} {} ", self.get(outcome))?;
        }
        f.write_str("")
    }
}

/// Answers one message with itself, and closes.
pub async fn answer_one(mut conn: Connection) -> slipring::Result<()> {
    let mut message = [0; MESSAGE];
    conn.read_exact(&mut message).await?;
    conn.write(&message).await
}

/// One try.
pub fn attempt(addr: SocketAddr) -> Outcome {
    let mut stream = match TcpStream::connect_timeout(&addr, HELD_OFF_AFTER) {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Outcome::Refused,
        Err(error) if error.kind() == ErrorKind::TimedOut => return Outcome::HeldOff,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Outcome::Reset,
        Err(error) => panic!("connect: {error}"),
    };
    stream.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    let (mut got, mut answer) = (0, [0; MESSAGE]);
    let result = stream.write_all(&[b'm'; MESSAGE]);
    // Who was closed meanwhile may have its FIN before it, which the read tells.
    let broken = result.is_err();
    while got < MESSAGE {
        match stream.read(&mut answer[got..]) {
            Ok(0) if broken && got == 0 => return Outcome::Reset,
            Ok(0) if got == 0 => return Outcome::Eof,
            Ok(0) => return Outcome::Truncated,
            Ok(count) => got += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Outcome::TimedOut,
            Err(_) => return Outcome::Reset,
        }
    }
    assert_eq!(answer, [b'm'; MESSAGE]);
    // The server closes first, so that this side's port is free again at once.
    let _ = stream.read(&mut [0]);
    Outcome::Ok
}

/// Clients that go on until they are stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    outcomes: Arc<Outcomes>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn start(addr: SocketAddr, clients: usize) -> Load {
        let (stop, outcomes) = (Arc::new(AtomicBool::new(false)), Arc::new(Outcomes::default()));
        let client = |_| {
            let (stop, outcomes) = (Arc::clone(&stop), Arc::clone(&outcomes));
            std::thread::spawn(move || {
                while !stop.load(SeqCst) {
                    let outcome = attempt(addr);
                    outcomes.count(outcome);
                    if outcome == Outcome::Refused {
                        // A port that nobody has needs no storm.
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            })
        };
        Load { clients: (0..clients).map(client).collect(), stop, outcomes }
    }

    pub fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }

    /// Lets the tries that are under way end.
    pub fn stop(self) -> Arc<Outcomes> {
        self.stop.store(true, SeqCst);
        for client in self.clients {
            client.join().expect("a client does not panic");
        }
        self.outcomes
    }
}

/// Whether this process may attach a filter to a listener, as the test needs it.
pub fn may_filter(test: &str) -> bool {
    let attached = attach_filter();
    if let Err(error) = &attached {
        not_run(test, format!("a filter on a listener: {error}"));
    }
    attached.is_ok()
}

/// Attaches a filter to a listener.
pub fn attach_filter() -> std::io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    // Lets everything through.
    let program = [socket2::SockFilter::new(0x06, 0, 0, u32::MAX)];
    socket2::SockRef::from(&listener).attach_filter(&program)
}

const MESSAGE: usize = 16;
const HELD_OFF_AFTER: Duration = Duration::from_millis(300);
