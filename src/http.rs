//! HTTP/1 and HTTP/2 by [hyper](https://hyper.rs), on slipring's connections, with their deadlines
//! and their drain. Feature `hyper`.
//!
//! hyper parses and writes; this module tells the core what it needs to know of it:
//!
//! * A request that has begun has to come whole within `SLIPRING_MESSAGE_MS`, and no slower than
//!   `SLIPRING_MIN_RATE_BYTES_PER_S`, its body included. That is the limit on headers that hyper
//!   wants a timer for, without a timer per request. HTTP/2's requests, of which many are on their
//!   way at once and some are silent for hours, have no such limit: while one is open, its peer has
//!   to answer a ping every 20 s, and the end is that of the connection, `SLIPRING_LIFETIME_MS` and
//!   then `SLIPRING_DRAIN_MS`. A service whose answers are never so late says so itself, with
//!   [`timeout`](crate::time::timeout()).
//! * Between requests a connection is idle, and `SLIPRING_IDLE_MS` holds; HTTP/2's pings are no
//!   activity. While a request is being answered, it is `SLIPRING_HANDLER_MS`, counted from the
//!   last byte in either direction; so it is while the handler does not ask for what may still come
//!   of a body, for which the peer is not to blame.
//! * When the server drains, or the connection has reached its greatest age, HTTP/1 responses say
//!   `connection: close`, and HTTP/2 peers get a GOAWAY; what has begun is answered. An idle HTTP/1
//!   connection ends as any other that is idle. One of HTTP/2 that is idle for too long gets a
//!   GOAWAY too, and has a second to answer that before the FIN.
//! * Of a next HTTP/1 request whose beginning came in one read with the last one, hyper says
//!   nothing. It is looked for before its connection ends as idle or drained, and is a message from
//!   then on. Behind a request with a body it can't be: there the connection is idle until the next
//!   byte comes.
//!
//! An upload that may take longer than `SLIPRING_MESSAGE_MS` needs a handler that says so; the
//! least rate goes on to hold for it:
//!
//! ```
//! # use hyper::service::service_fn;
//! # use hyper::{Request, Response};
//! # use slipring::http::{Http, Incoming};
//! # use slipring::{Connection, DeadlineKind};
//! # use std::time::Duration;
//! # async fn store(_: Request<Incoming>) -> Result<Response<String>, std::convert::Infallible> {
//! #     Ok(Response::default())
//! # }
//! async fn uploads(conn: Connection) -> slipring::Result<()> {
//!     conn.set_deadline(DeadlineKind::Message, Duration::from_secs(3600))?;
//!     Http::new().serve(conn, service_fn(store)).await
//! }
//! ```
//!
//! Services are hyper's, or tower's by way of [`tower`]; they need not be `Send`, so that the
//! state of a core needs no lock. A request's body may be read on any thread,
//! and need not be read at all.
//!
//! # Examples
//!
//! ```no_run
//! use std::convert::Infallible;
//!
//! use hyper::{Request, Response, service::service_fn};
//! use slipring::http::{Http, Incoming};
//! use slipring::{Config, Server};
//!
//! async fn hello(request: Request<Incoming>) -> Result<Response<String>, Infallible> {
//!     Ok(Response::new(format!("you asked for {}\n", request.uri().path())))
//! }
//!
//! fn main() -> slipring::Result<()> {
//!     Server::new(Config::from_env()?)
//!         .listen("127.0.0.1:8080", Http::new().handler(service_fn(hello)))
//!         .drain_on_signals()
//!         .run()
//!         .map(drop)
//! }
//! ```

mod exchange;
mod io;
mod runtime;
mod version;

use std::error::Error as StdError;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::rt::Write;
use hyper::server::conn::{http1, http2};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;

use self::exchange::{Exchange, Watched};
use self::io::HttpIo;
use self::version::Version;
use crate::conn::Connection;
use crate::error::{Error, ErrorKind, Result};
use crate::requests::Stance;
use crate::time::sleep;

pub use hyper::body::Incoming;

pub use self::io::Transport;
pub use self::runtime::{Executor, Timer};

type BoxError = Box<dyn StdError + Send + Sync>;

/// How HTTP is served.
///
/// What is not set is as hyper has it: at most 100 headers, heads and buffers of about 400 KiB,
/// 200 concurrent streams of HTTP/2.
///
/// # Examples
///
/// ```
/// use slipring::http::Http;
///
/// let http = Http::new().max_headers(64).max_head_bytes(16 * 1024);
/// ```
#[derive(Clone)]
pub struct Http {
    http1: http1::Builder,
    http2: Option<Arc<SetHttp2>>,
    max_streams: u32,
    versions: Versions,
}

type SetHttp2 = dyn Fn(&mut http2::Builder<Executor>) + Send + Sync;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Versions {
    Both,
    Http1,
    Http2,
}

impl Default for Http {
    fn default() -> Http {
        Http::new()
    }
}

impl Http {
    /// HTTP/1 and, for those who begin with its preface, HTTP/2.
    #[must_use]
    pub fn new() -> Http {
        let mut http1 = http1::Builder::new();
        // The connection's own deadline for a message does it. And a peer that has ended its side
        // still wants its answer; `SLIPRING_HALF_CLOSE` says otherwise, and the core sees to that.
        http1.header_read_timeout(None).half_close(true);
        Http { http1, http2: None, max_streams: STREAMS_MAX, versions: Versions::Both }
    }

    /// Speaks HTTP/1 only.
    #[must_use]
    pub fn http1_only(mut self) -> Http {
        self.versions = Versions::Http1;
        self
    }

    /// Speaks HTTP/2 only, to peers that know so beforehand.
    #[must_use]
    pub fn http2_only(mut self) -> Http {
        self.versions = Versions::Http2;
        self
    }

    /// The most headers of an HTTP/1 request; more are answered with 431. 100 unless set.
    #[must_use]
    pub fn max_headers(mut self, headers: usize) -> Http {
        self.http1.max_headers(headers);
        self
    }

    /// The longest head of an HTTP/1 request, in bytes, and the most that is buffered of a body;
    /// at least 8192. A longer head is answered with 431.
    #[must_use]
    pub fn max_head_bytes(mut self, bytes: usize) -> Http {
        self.http1.max_buf_size(bytes.max(HEAD_BYTES_LEAST));
        self
    }

    /// The most requests of one HTTP/2 connection at a time. 200 unless set.
    #[must_use]
    pub fn max_streams(mut self, streams: u32) -> Http {
        self.max_streams = streams;
        self
    }

    /// Sets what else there is of HTTP/1 in hyper's own terms.
    ///
    /// With `pipeline_flush` hyper keeps an answer for as long as it has the beginning of another
    /// request in hand, and when the connection ends meanwhile, as in a drain, it is lost.
    #[must_use]
    pub fn http1(mut self, set: impl FnOnce(&mut http1::Builder)) -> Http {
        set(&mut self.http1);
        self
    }

    /// Sets what else there is of HTTP/2 in hyper's own terms, once for each connection.
    #[must_use]
    pub fn http2<F>(mut self, set: F) -> Http
    where
        F: Fn(&mut http2::Builder<Executor>) + Send + Sync + 'static,
    {
        self.http2 = Some(Arc::new(set));
        self
    }

    /// A handler that serves every connection with a clone of `service`, for
    /// [`Server::listen`](crate::Server::listen), or for
    /// [`Server::listen_with`](crate::Server::listen_with) where the service has state of its core.
    ///
    /// # Errors
    /// Those of [`Http::serve`], from the handler.
    pub fn handler<S, B>(
        self,
        service: S,
    ) -> impl Fn(Connection) -> Pin<Box<dyn Future<Output = Result<()>>>>
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + 'static,
        S::Future: 'static,
        S::Error: Into<BoxError>,
        B: Body + 'static,
        B::Error: Into<BoxError>,
    {
        move |conn| {
            let (http, service) = (self.clone(), service.clone());
            Box::pin(async move { http.serve(conn, service).await })
        }
    }

    /// Serves one connection until it ends: a [`Connection`], or what else is a [`Transport`].
    ///
    /// # Errors
    /// * [`ErrorKind::Protocol`]: the peer broke the protocol, or left amid a request.
    /// * [`ErrorKind::Service`]: the service, or the body of a response, returned an error.
    /// * Those of [`Connection::recv`], when the connection was ended.
    ///
    /// # Cancel safety
    /// Not safe: dropping it ends the connection and the requests at work.
    pub async fn serve<T, S, B>(&self, transport: T, service: S) -> Result<()>
    where
        T: Transport,
        S: Service<Request<Incoming>, Response = Response<B>> + 'static,
        S::Future: 'static,
        S::Error: Into<BoxError>,
        B: Body + 'static,
        B::Error: Into<BoxError>,
    {
        self.serve_with_upgrade(transport, service, |_, _| async { Ok(()) }).await
    }

    /// Serves one connection as [`Http::serve`] does; if a response switches protocols (status
    /// 101, or 2xx to a CONNECT), `upgraded` goes on with the connection and the bytes that were
    /// received behind the request.
    ///
    /// hyper's own `upgrade::on` can't be used: it sends the connection to whatever thread asks.
    ///
    /// # Errors
    /// As [`Http::serve`], and what `upgraded` returns.
    ///
    /// # Cancel safety
    /// Not safe: dropping it ends the connection and the requests at work.
    pub async fn serve_with_upgrade<T, S, B, U, F>(
        &self,
        transport: T,
        service: S,
        upgraded: U,
    ) -> Result<()>
    where
        T: Transport,
        S: Service<Request<Incoming>, Response = Response<B>> + 'static,
        S::Future: 'static,
        S::Error: Into<BoxError>,
        B: Body + 'static,
        B::Error: Into<BoxError>,
        U: FnOnce(T, Bytes) -> F,
        F: Future<Output = Result<()>>,
    {
        let exchange = Rc::new(Exchange::new(transport.connection().link().clone()));
        let mut io = HttpIo::new(transport, Rc::clone(&exchange));
        let version = match self.versions {
            Versions::Both => poll_fn(|cx| version::poll_version(&mut io, cx)).await?,
            Versions::Http1 => Version::Http1,
            Versions::Http2 => Version::Http2,
        };
        let service = Watched::new(service, Rc::clone(&exchange));
        exchange.link().says_farewell(true);
        if version == Version::Http2 {
            exchange.speaks_http2();
            return self.serve_http2(io, service, &exchange).await;
        }
        let mut conn = self.http1.serve_connection(io, service);
        let mut parts = loop {
            let done = poll_fn(|cx| poll_http1(Pin::new(&mut conn), &exchange, cx)).await?;
            let mut parts = conn.into_parts();
            if done {
                break parts;
            }
            exchange.looked_at(&parts.read_buf);
            parts.io.put_back(&parts.read_buf);
            conn = self.http1.serve_connection(parts.io, parts.service);
        };
        if !exchange.has_switched() {
            // hyper leaves it open where it takes the last request for one to switch protocols.
            let _ = poll_fn(|cx| Write::poll_shutdown(Pin::new(&mut parts.io), cx)).await;
            return Ok(());
        }
        exchange.ends();
        exchange.link().says_farewell(false);
        exchange.link().stop_waiting();
        // The connection closes when who goes on with it drops it, whatever is left here.
        drop((exchange, parts.service));
        let (transport, rest) = parts.io.into_parts();
        let ahead = match rest.is_empty() {
            true => parts.read_buf,
            false => [&parts.read_buf[..], &rest].concat().into(),
        };
        upgraded(transport, ahead).await
    }

    async fn serve_http2<T, S, B>(
        &self,
        io: HttpIo<T>,
        service: Watched<S>,
        exchange: &Exchange,
    ) -> Result<()>
    where
        T: Transport,
        S: Service<Request<Incoming>, Response = Response<B>> + 'static,
        S::Future: 'static,
        S::Error: Into<BoxError>,
        B: Body + 'static,
        B::Error: Into<BoxError>,
    {
        let mut http2 = http2::Builder::new(Executor::of(exchange.link()));
        // A stream may be silent for longer than a connection: the peer is asked whether it lives.
        http2
            .timer(Timer)
            .max_concurrent_streams(self.max_streams)
            .keep_alive_interval(PING_INTERVAL)
            .max_send_buf_size(STREAM_BYTES_MAX)
            .keep_alive_timeout(PING_TIMEOUT);
        if let Some(set) = &self.http2 {
            set(&mut http2);
        }
        let mut conn = pin!(http2.serve_connection(io, service));
        let (mut told, mut idle) = (false, false);
        let mut patience = None;
        let served = poll_fn(|cx: &mut Context<'_>| {
            loop {
                if !told && (idle || exchange.link().is_leaving()) {
                    told = true;
                    // It waits for the peer's answer now, which is not being idle; whoever is idle
                    // would be told of the end of the input, and could say no farewell.
                    exchange.begin();
                    conn.as_mut().graceful_shutdown();
                }
                if let Poll::Ready(served) = conn.as_mut().poll(cx) {
                    return Poll::Ready(served.map_err(of_hyper));
                }
                if !told || exchange.open() > 1 {
                    patience = None;
                } else if pin!(patience.get_or_insert_with(|| sleep(FAREWELL))).poll(cx).is_ready()
                {
                    // Nothing is at work, and the peer does not answer.
                    return Poll::Ready(Ok(()));
                }
                match exchange.stance(cx) {
                    Stance::Ended(error) => return Poll::Ready(Err(error)),
                    Stance::Leave if !told => {}
                    Stance::Idle if !told => idle = true,
                    Stance::Leave | Stance::Idle | Stance::Stay => return Poll::Pending,
                }
            }
        })
        .await;
        if idle { served.and(Err(exchange.link().leave_idle())) } else { served }
    }
}

/// True when it is done, and false when it is to be taken apart, as there is no telling otherwise
/// whether the beginning of another request has come.
fn poll_http1<T, S, B>(
    conn: Pin<&mut http1::Connection<HttpIo<T>, Watched<S>>>,
    exchange: &Exchange,
    cx: &mut Context<'_>,
) -> Poll<Result<bool>>
where
    T: Transport,
    S: Service<Request<Incoming>, Response = Response<B>> + 'static,
    S::Future: 'static,
    S::Error: Into<BoxError>,
    B: Body + 'static,
    B::Error: Into<BoxError>,
{
    if let Poll::Ready(served) = conn.poll(cx) {
        return Poll::Ready(served.map(|()| true).map_err(of_hyper));
    }
    exchange.rests();
    if exchange.is_to_be_looked_at() {
        return Poll::Ready(Ok(false));
    }
    match exchange.stance(cx) {
        Stance::Ended(error) => return Poll::Ready(Err(error)),
        Stance::Idle if exchange.may_have_more() => return Poll::Ready(Ok(false)),
        // Which wakes whoever is here.
        Stance::Idle => exchange.link().end_idle(),
        Stance::Stay | Stance::Leave => {}
    }
    Poll::Pending
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("versions", &self.versions)
            .field("max_streams", &self.max_streams)
            .finish_non_exhaustive()
    }
}

/// Makes a tower service, such as axum's `Router` or tonic's `Routes`, one of hyper's. It is cloned
/// for each request.
///
/// # Examples
///
/// ```no_run
/// # fn main() -> slipring::Result<()> {
/// use std::convert::Infallible;
///
/// use hyper::{Request, Response};
/// use slipring::http::{Http, Incoming, tower};
/// use slipring::{Config, Server};
///
/// // Of axum, this would be a `Router`.
/// let app = ::tower::service_fn(|_: Request<Incoming>| async {
///     Ok::<_, Infallible>(Response::new("hello\n".to_owned()))
/// });
/// Server::new(Config::default())
///     .listen("127.0.0.1:8080", Http::new().handler(tower(app)))
///     .run()
///     .map(drop)
/// # }
/// ```
pub fn tower<S>(service: S) -> TowerToHyperService<S> {
    TowerToHyperService::new(service)
}

/// What hyper says of a connection's end, in our terms.
fn of_hyper(error: hyper::Error) -> Error {
    if error.is_user() {
        // Of what a service has returned hyper's text says only that it was an error.
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        return Error::new(ErrorKind::Service, "serve HTTP").because(format!("{error}{cause}"));
    }
    let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
    while let Some(inner) = cause {
        // I/O errors of ours carry the error that they were made from.
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            let ours = io.get_ref().and_then(|error| error.downcast_ref::<Error>());
            let kind = ours.map_or(ErrorKind::Protocol, Error::kind);
            return Error::new(kind, "serve HTTP").because(error.to_string());
        }
        cause = inner.source();
    }
    Error::new(ErrorKind::Protocol, "serve HTTP").because(error.to_string())
}

/// As hyper has it.
const STREAMS_MAX: u32 = 200;
/// hyper takes no less.
const HEAD_BYTES_LEAST: usize = 8192;
/// Well below `SLIPRING_HANDLER_MS`, unless that was set low.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long an idle HTTP/2 peer has to answer a GOAWAY.
const FAREWELL: Duration = Duration::from_secs(1);
/// hyper buffers so much of each stream's output beside the connection's own queue.
const STREAM_BYTES_MAX: usize = 64 * 1024;
