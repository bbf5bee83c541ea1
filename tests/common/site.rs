//! A server on a subnet of its own, and the peers that talk to it over a link that can fail.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use slipring::{CloseReason, Config, Connection, CoreStats, ErrorKind, Running, Server};
use socket2::{SockRef, Socket};

use super::world::World;
use super::{first_cpus, limit, wait_until};

/// Runs the cases at the same time, each with the number of a subnet of its own.
pub fn side_by_side<C: Send, const N: usize>(cases: [C; N], run: impl Fn(u8, C) + Sync) {
    thread::scope(|scope| {
        for (n, case) in (1..).zip(cases) {
            let run = &run;
            scope.spawn(move || run(n, case));
        }
    });
}

/// One core, and no limit that a test does not set.
pub fn base() -> Config {
    let config = Config::default().cpus(&first_cpus(1)).pin(Some(false));
    let config = config.connections_max(16).buffers(16);
    let config = config.first_byte_ms(60_000).idle_ms(60_000).write_stall_ms(60_000);
    config.min_rate_bytes_per_s(0).user_timeout_ms(0).keepalive_idle_s(60)
}

/// A server on a subnet of its own.
pub struct Site {
    n: u8,
    pub addr: SocketAddr,
    pub running: Running,
    /// What the handlers that wait for it wait for.
    pub go: Arc<AtomicBool>,
    pub told: Arc<Mutex<Told>>,
}

/// What the last handler has to say.
#[derive(Default)]
pub struct Told {
    pub error: Option<ErrorKind>,
    pub wrote: bool,
}

impl Site {
    pub fn new(world: &World, n: u8, config: Config) -> Site {
        let addr = world.subnet(n);
        let (go, told) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Told>>::default());
        let server = Server::new(config)
            .before_bind(|socket| SockRef::from(&socket).set_send_buffer_size(16 * 1024));
        let server = server.listen(addr.to_string(), {
            let (go, told) = (Arc::clone(&go), Arc::clone(&told));
            move |conn| obey(conn, Arc::clone(&go), Arc::clone(&told))
        });
        let server = server.heartbeat(BEAT);
        let running = server.start().expect("the server starts");
        Site { n, addr, running, go, told }
    }

    /// A peer with little room for what it does not read.
    pub fn connect(&self, world: &World) -> TcpStream {
        let addr = self.addr;
        world.far(move || {
            let socket = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
            let socket = socket.expect("a socket");
            socket.set_recv_buffer_size(4_096).expect("a small buffer");
            socket.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
            socket.set_write_timeout(Some(limit(10_000))).expect("set a time limit");
            socket.connect_timeout(&addr.into(), limit(10_000)).expect("connect");
            TcpStream::from(socket)
        })
    }

    pub fn total(&self) -> CoreStats {
        self.running.handle().stats().total()
    }

    /// How long it takes until the last connection has ended, which must be for that reason.
    pub fn await_end(&self, reason: CloseReason, since: Instant) -> Duration {
        wait_until("the connection has ended", || self.total().live == 0);
        let took = since.elapsed();
        let closed = self.total().closed;
        println!("subnet {}: {} after {took:?}", self.n, reason.as_str());
        assert_eq!((closed.get(reason), closed.total()), (1, 1), "subnet {}: {closed:?}", self.n);
        took
    }

    /// The error that the handler got.
    pub fn told(&self) -> Option<ErrorKind> {
        self.told.lock().expect("no panic").error
    }

    pub fn end(self) {
        let report = self.running.handle().drain(limit(1_000)).expect("a report");
        assert!(report.is_balanced(), "{report}");
        assert_eq!(report.total().leaked_operations, 0, "{report}");
        self.running.join().expect("no core failed");
    }
}

async fn obey(
    mut conn: Connection,
    go: Arc<AtomicBool>,
    told: Arc<Mutex<Told>>,
) -> slipring::Result<()> {
    let result = follow(&mut conn, &go, &told).await;
    told.lock().expect("no panic").error = result.as_ref().err().map(slipring::Error::kind);
    result
}

/// Does what the first byte says, which it sends back first; what else comes is thrown away.
async fn follow(
    conn: &mut Connection,
    go: &AtomicBool,
    told: &Mutex<Told>,
) -> slipring::Result<()> {
    static OUTPUT: [u8; ANSWER] = [b'w'; ANSWER];
    let mut command = [0];
    conn.read_exact(&mut command).await?;
    conn.write(&command).await?;
    match command[0] {
        // An answer, and a finished handler.
        b'b' => return conn.send(&OUTPUT).await,
        // A byte when it is time.
        b'g' => {
            while !go.load(SeqCst) {
                slipring::time::sleep(Duration::from_millis(5)).await;
            }
            conn.write(b"!").await?;
            conn.flush().await?;
            told.lock().expect("no panic").wrote = true;
        }
        // Output without end.
        b'w' => loop {
            conn.send(&OUTPUT).await?;
        },
        // Looks at nothing but the connection's end; then at nothing at all.
        b'p' => drop(conn.closing().await),
        b's' => slipring::time::sleep(Duration::from_secs(60)).await,
        _ => {}
    }
    while conn.recv().await?.is_some() {}
    Ok(())
}

/// Waits until no more comes to a peer that reads nothing. Returns when it came last, at the
/// latest.
pub fn await_stall(peer: &TcpStream) -> Instant {
    let (mut buf, mut seen, mut since) = ([0; 65_536], 0, Instant::now());
    wait_until("the output stalls", || {
        let waiting = peer.peek(&mut buf).expect("output");
        if waiting != seen {
            (seen, since) = (waiting, Instant::now());
        }
        seen > 1 && since.elapsed() > Duration::from_millis(200)
    });
    since
}

/// Sends a command and reads the byte that confirms it.
pub fn ask(peer: &mut TcpStream, command: &[u8]) {
    peer.write_all(command).expect("send");
    peer.read_exact(&mut [0]).expect("an answer");
}

pub const ANSWER: usize = 1 << 20;
/// What a silent peer is asked with, where a heartbeat is configured.
const BEAT: &[u8] = b"?";
