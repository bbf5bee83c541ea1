//! TLS on a connection, by rustls.
//!
//! The handshake is a message like any other: its first byte has `SLIPRING_FIRST_BYTE_MS` to come,
//! all of it has `SLIPRING_MESSAGE_MS`, and the least rate holds, so that nobody holds a place by a
//! handshake that never ends. So is each record: a drain lets one that has begun come to its end,
//! and what it carries is served.
//!
//! # How a stream ends
//! * [`TlsStream`]'s `shutdown`, and its drop, say `close_notify` behind all that was written, and
//!   then FIN follows, as on a plain connection. A handler that returns early with an error drops
//!   its stream too: what it has written is delivered, and where the peer is to see that something
//!   is missing, that is [`TlsStream::abort`].
//! * A panic, a deadline, the drain's force phase and `abort` say nothing: the peer sees a stream
//!   that is cut off.
//! * A peer that ends without `close_notify` may have been cut off by somebody on the way
//!   (RFC 8446, section 6.1): reading then is an error of kind
//!   [`ErrorKind::UnexpectedEof`], and never the end of the stream.
//! * Once the server drains, an idle connection's stream ends as a plain one does: without an
//!   error, though the peer has not ended it.
//!
//! # What is whose
//! The [`rustls::ServerConfig`] is yours: certificates, client authentication, ALPN, session
//! tickets, and the crypto provider, of which this crate enables none. Types of rustls in this
//! interface are those of tokio-rustls 0.26, which is rustls 0.23; they change when it does. The
//! cryptography runs on the connection's core: a full handshake takes it about a millisecond with
//! an RSA key, and a fraction of that with an ECDSA key or a session ticket. Output is queued by
//! the connection and counted there; rustls keeps its state and at most a record of input, which
//! `SLIPRING_MEMORY_BYTES_MAX` does not count.
//!
//! [`Server::heartbeat`](crate::Server::heartbeat) writes plain bytes and is not for TLS.
//!
//! # Examples
//!
//! ```no_run
//! use std::sync::Arc;
//! use slipring::tls::{Acceptor, rustls};
//! use slipring::{Config, Connection, Server};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//!
//! fn serve(config: rustls::ServerConfig) -> slipring::Result<()> {
//!     let acceptor = Acceptor::new(Arc::new(config));
//!     let echo = move |conn: Connection| {
//!         let acceptor = acceptor.clone();
//!         async move {
//!             let mut stream = acceptor.accept(conn).await?;
//!             let mut buf = [0; 4096];
//!             loop {
//!                 let count = stream.read(&mut buf).await?;
//!                 if count == 0 {
//!                     return Ok(()); // dropping it says close_notify
//!                 }
//!                 stream.write_all(&buf[..count]).await?;
//!             }
//!         }
//!     };
//!     Server::new(Config::from_env()?).listen("127.0.0.1:7443", echo).run().map(drop)
//! }
//! ```

mod record;
mod stream;
mod wire;

use std::fmt;
use std::io;
use std::sync::Arc;

pub use tokio_rustls::rustls;

pub use self::stream::TlsStream;
use self::wire::Wire;
use crate::conn::{Connection, Link};
use crate::deadline::Opened;
use crate::error::{Error, ErrorKind, Result};
use crate::report::CloseReason;

/// Makes TLS streams of connections. Cheap to clone; one may serve all cores.
#[derive(Clone)]
pub struct Acceptor {
    inner: tokio_rustls::TlsAcceptor,
}

impl Acceptor {
    /// An acceptor with that configuration.
    #[must_use]
    pub fn new(config: Arc<rustls::ServerConfig>) -> Acceptor {
        Acceptor { inner: config.into() }
    }

    /// Waits for the handshake and makes it.
    ///
    /// # Errors
    /// In each case the connection is closed; the peer is sent an alert where TLS has one.
    /// * [`ErrorKind::Protocol`]: what came is no TLS, or nothing could be agreed on.
    /// * [`ErrorKind::Closed`]: the peer left without a byte, as one does that only asks whether
    ///   somebody listens. It does not count as the handler's failure.
    /// * [`ErrorKind::UnexpectedEof`]: the peer left amid the handshake.
    /// * As [`Connection::recv`], such as [`ErrorKind::TimedOut`].
    ///
    /// # Cancel safety
    /// Not safe: the connection belongs to the future and is closed with it.
    pub async fn accept(&self, mut conn: Connection) -> Result<TlsStream> {
        let Some(first) = conn.fill_buf().await?.first().copied() else {
            conn.link().excuse();
            return Err(Error::new(ErrorKind::Closed, HANDSHAKE).because("the peer sent nothing"));
        };
        conn.begin_message();
        match self.inner.accept(Wire::new(conn)).into_fallible().await {
            Ok(inner) => {
                inner.get_ref().0.link().end_handshake();
                Ok(TlsStream::new(inner))
            }
            Err((error, _)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let error = Error::new(ErrorKind::UnexpectedEof, HANDSHAKE);
                Err(error.because("the peer ended the stream amid it"))
            }
            Err((error, _)) => {
                let error = explain(HANDSHAKE, error);
                let plain = error.kind() == ErrorKind::Protocol && first != HANDSHAKE_RECORD;
                let words = "what came is no TLS; a client that speaks a plain protocol?";
                Err(if plain { error.because(words) } else { error })
            }
        }
    }
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor").finish_non_exhaustive()
    }
}

impl Link {
    /// A message that was none of the layer above: it may be followed by others, though the server
    /// drains.
    fn end_handshake(&self) {
        self.core.borrow_mut().end_message(self.id, Opened::ByLayer);
    }

    /// That the handler fails is no failure.
    fn excuse(&self) {
        let mut core = self.core.borrow_mut();
        let dismissed = core.table.get(self.id).and_then(|entry| entry.dismissed);
        core.fail(self.id, dismissed.unwrap_or(CloseReason::Finished));
    }
}

/// What an error that has come through rustls was: of the connection, or of TLS.
fn explain(operation: &'static str, error: io::Error) -> Error {
    if error.get_ref().is_some_and(|source| source.is::<rustls::Error>()) {
        Error::os(operation, error).with_kind(ErrorKind::Protocol)
    } else {
        Error::from(error)
    }
}

const HANDSHAKE: &str = "tls handshake";
/// The content type of a handshake's records (RFC 8446, section 5.1).
const HANDSHAKE_RECORD: u8 = 22;
