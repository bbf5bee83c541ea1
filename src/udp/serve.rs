//! Serving UDP on every core: a socket of its own for each, and the handler that has it.

use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::closing::until_closing;
use crate::core::CoreRef;
use crate::driver::Socket;
use crate::error::Result;
use crate::executor::{Scope, discard_panic};
use crate::server::{CoreInfo, Server};
use crate::sys::place::Place;
use crate::task::spawn_task;
use crate::time::timeout;
use crate::udp::UdpSocket;
use crate::udp::bind::UdpShare;

/// An address to be served, with what each core makes its handler with.
#[derive(Clone)]
pub(crate) struct UdpEndpoint {
    pub(crate) addr: String,
    make: Arc<dyn Fn(&CoreInfo) -> UdpHandler + Send + Sync>,
    place: Place,
}

impl fmt::Debug for UdpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UdpEndpoint({} at {})", self.addr, self.place)
    }
}

type UdpHandler = Rc<dyn Fn(UdpSocket) -> Pin<Box<dyn Future<Output = Result<()>>>>>;

/// One core's handler, ready for its socket.
pub(crate) struct UdpService {
    handler: UdpHandler,
    place: Place,
}

impl Server {
    /// Serves a UDP address: every core has a socket of its own there, and the handler runs once on
    /// each. The kernel sends all datagrams of one sender to the same core.
    ///
    /// The sockets are bound with those of [`Server::listen`], all or none. A handler that returns
    /// `Ok` is done, and its core's socket closes; one that fails or panics is counted
    /// (`udp_handler_failures`) and called again 100 ms later, with the same socket. Once the
    /// server drains, [`UdpSocket::recv_until_drain`] says `None`; whatever handler is left at the
    /// deadline is dropped, and named in the report.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use slipring::net::UdpSocket;
    /// use slipring::{Config, Server};
    ///
    /// async fn echo(socket: UdpSocket) -> slipring::Result<()> {
    ///     while let Some(datagram) = socket.recv_until_drain().await? {
    ///         let peer = datagram.peer();
    ///         socket.send_to(datagram, peer).await?;
    ///     }
    ///     Ok(())
    /// }
    ///
    /// # fn main() -> slipring::Result<()> {
    /// Server::new(Config::default()).serve_udp("127.0.0.1:7000", echo).run().map(drop)
    /// # }
    /// ```
    #[track_caller]
    pub fn serve_udp<H, F>(self, addr: impl Into<String>, handler: H) -> Server
    where
        H: Fn(UdpSocket) -> F + Send + Sync + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        let handler = Arc::new(handler);
        self.serve_udp_with(addr, move |_| {
            let handler = Arc::clone(&handler);
            move |socket| handler(socket)
        })
    }

    /// As [`Server::serve_udp`], with a handler that is made on each core, so that it can own state
    /// of that core which needs no lock.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::{cell::Cell, rc::Rc};
    /// use slipring::net::UdpSocket;
    /// use slipring::{Config, Server};
    ///
    /// # fn main() -> slipring::Result<()> {
    /// let server = Server::new(Config::default()).serve_udp_with("127.0.0.1:7000", |_core| {
    ///     let asked = Rc::new(Cell::new(0u64));
    ///     move |socket: UdpSocket| {
    ///         let asked = Rc::clone(&asked);
    ///         async move {
    ///             while let Some(datagram) = socket.recv_until_drain().await? {
    ///                 asked.set(asked.get() + 1);
    ///                 socket.send_to(format!("{}\n", asked.get()), datagram.peer()).await?;
    ///             }
    ///             Ok(())
    ///         }
    ///     }
    /// });
    /// # server.run().map(drop)
    /// # }
    /// ```
    #[track_caller]
    pub fn serve_udp_with<M, H, F>(mut self, addr: impl Into<String>, make: M) -> Server
    where
        M: Fn(&CoreInfo) -> H + Send + Sync + 'static,
        H: Fn(UdpSocket) -> F + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        let make = move |core: &CoreInfo| -> UdpHandler {
            let handle = make(core);
            Rc::new(move |socket| Box::pin(handle(socket)))
        };
        let (addr, place) = (addr.into(), Location::caller());
        self.udp.push(UdpEndpoint { addr, make: Arc::new(make), place });
        self
    }
}

impl UdpEndpoint {
    /// Makes a core's handler, on its thread.
    pub(crate) fn make(&self, core: &CoreInfo) -> UdpService {
        UdpService { handler: (self.make)(core), place: self.place }
    }
}

impl UdpService {
    /// Gives the handler its socket, in a task of the core.
    ///
    /// # Errors
    /// As [`spawn`](crate::task::spawn).
    pub(crate) fn start(self, core: &CoreRef, (socket, local): UdpShare) -> Result<()> {
        let socket = UdpSocket::adopt(core, Socket::Os(socket), local)?;
        let serving = serve(CoreRef::clone(core), socket, self.handler);
        spawn_task(core, Scope::Core, self.place, Box::pin(serving)).map(drop)
    }
}

/// Runs the handler until it is done or the drain has come.
async fn serve(core: CoreRef, socket: UdpSocket, handler: UdpHandler) {
    loop {
        let own = socket.share();
        let handled = pin!(async { handler(own).await });
        if let Some(Ok(())) = unless_it_panics(&core, handled).await {
            return;
        }
        core.borrow_mut().counters.udp_handler_failures.add(1);
        if timeout(PAUSE, until_closing(CoreRef::clone(&core), None)).await.is_ok() {
            return;
        }
    }
}

/// What a future comes to; `None` for a panic, which is counted as that of a task.
async fn unless_it_panics<F: Future>(core: &CoreRef, mut future: Pin<&mut F>) -> Option<F::Output> {
    poll_fn(|cx| {
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        polled.map(|poll| poll.map(Some)).unwrap_or_else(|panic| {
            discard_panic(panic);
            core.borrow_mut().counters.panics.add(1);
            Poll::Ready(None)
        })
    })
    .await
}

/// How long a service rests whose handler has failed.
const PAUSE: Duration = Duration::from_millis(100);
