//! Programs that connect from the core of a server, and addresses that do not answer.

use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::channel;

use slipring::{Config, CoreStats, DrainReport, Handle, Running, Server};
use socket2::{Domain, Socket, Type};

use super::{config, first_cpus, limit, wait_until};

/// A server with one core and no address of its own, for what tests do on a core.
pub struct Client(Running);

impl Client {
    pub fn start(config: Config) -> Client {
        Client(Server::new(config.cpus(&first_cpus(1))).start().expect("the server starts"))
    }

    pub fn plain() -> Client {
        Client::start(config())
    }

    pub fn handle(&self) -> Handle {
        self.0.handle()
    }

    pub fn total(&self) -> CoreStats {
        self.handle().stats().total()
    }

    /// Runs a future on the core to its end.
    pub fn run<T, M, F>(&self, make: M) -> T
    where
        T: Send + 'static,
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = T> + 'static,
    {
        on_core(&self.handle(), make)
    }

    /// Drains it when nothing is left, and checks the books.
    pub fn end(self) -> CoreStats {
        wait_until("nothing is left", || (self.total().live, self.total().connecting) == (0, 0));
        self.drain(5_000).total()
    }

    /// Drains it as it is, and checks the books.
    pub fn drain(self, ms: u64) -> DrainReport {
        self.handle().begin_drain(limit(ms));
        let report = self.0.join().expect("no core fails");
        check_books(&report);
        report
    }
}

/// Whether every connection and every attempt has its end in the books, and nothing is left.
pub fn check_books(report: &DrainReport) {
    let total = report.total();
    assert!(report.is_balanced(), "{report}");
    assert_eq!(total.accepted + total.connected, total.closed.total(), "{report}");
    assert_eq!(total.connects, total.connected + failures(&total), "{report}");
    assert_eq!((total.connecting, total.leaked_operations, total.unknown), (0, 0, 0), "{report}");
}

/// Attempts that came to nothing.
pub fn failures(total: &CoreStats) -> u64 {
    total.connects_refused
        + total.connects_unreachable
        + total.connects_timed_out
        + total.connects_failed
        + total.connects_cancelled
}

/// Runs a future on the first core of a server to its end.
pub fn on_core<T, M, F>(handle: &Handle, make: M) -> T
where
    T: Send + 'static,
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = T> + 'static,
{
    let (done, result) = channel();
    let run = move || {
        let future = make();
        async move {
            // Whoever waits may have failed already.
            let _ = done.send(future.await);
        }
    };
    handle.spawn_on(0, run).expect("the core takes it");
    result.recv_timeout(limit(30_000)).expect("the future comes to its end")
}

/// A TCP address that answers no handshake, as long as this is kept: the listener's queue is full.
pub struct Mute {
    pub addr: SocketAddr,
    _listener: Socket,
    _queued: Vec<Socket>,
}

impl Mute {
    pub fn tcp() -> Mute {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("bind");
        listener.listen(0).expect("listen");
        let addr = listener.local_addr().expect("bound").as_socket().expect("TCP");
        let mut queued = Vec::new();
        // The queue holds one more than it was told; those behind that get no answer.
        while TcpStream::connect_timeout(&addr, limit(100)).map(|it| queued.push(it.into())).is_ok()
        {
            assert!(queued.len() < 8, "the queue has no end");
        }
        Mute { addr, _listener: listener, _queued: queued }
    }
}
