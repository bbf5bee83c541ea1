//! Connecting to an address: what a program calls.

use std::fmt::Display;
use std::future::{Future, IntoFuture};
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use super::race::Race;
use super::resolve::resolve;
use crate::bind::ListenAddr;
use crate::conn::{Connection, limit_ms};
use crate::connecting::{Attempt, Failure};
use crate::core::CoreRef;
use crate::error::{Error, ErrorKind, Result};
use crate::local;
use crate::route::Route;
use crate::time::timeout;

/// Connects to an address: `127.0.0.1:7000`, `[::1]:7000`, `example.org:7000`, `unix:/run/x.sock`
/// or `unix:@name`; a [`SocketAddr`] and a [`ListenAddr`] have that text too. Await what it
/// returns, with options set before if need be.
///
/// A name is resolved on the pool of threads of the feature `blocking`, never on the core; its
/// addresses are tried as by [`connect_any`]. Without that feature a name is an error that says
/// so. All of it takes no longer than `SLIPRING_CONNECT_MS`, or [`Connect::timeout`].
///
/// # The connection
/// It belongs to the core of the calling task, in whose books it counts as `connected`. It takes
/// one of the `SLIPRING_CONNECTIONS_MAX` places, from when it is begun on; the limit per address
/// is for accepted ones. Options of the socket are those that accepted connections get.
///
/// Its deadlines are those of an accepted one, but for two: no first byte is due, since this side
/// speaks first in most protocols, and the peer's end of its side is no reason to hurry, since it
/// is the end of what was asked for. Waiting for an answer is bounded by
/// [`DeadlineKind::Idle`](crate::DeadlineKind::Idle).
///
/// It is never told `None` because it is idle, neither by a drain nor at the end of its lifetime,
/// and never evicted as such: its owner may wait for an answer. In a drain it ends when it is
/// dropped, and at the deadline at the latest. A drain waits for the handlers and tasks that hold
/// such connections; those that nobody uses any more, such as a pool in a core's state, are closed
/// when everything else is done and what was sent on them has left.
///
/// # Errors
/// * [`ErrorKind::Refused`]: nobody listens there; there is no such Unix socket.
/// * [`ErrorKind::Unreachable`]: there is no way to the address, or the name has none.
/// * [`ErrorKind::TimedOut`]: no answer in time.
/// * [`ErrorKind::Resource`]: no place, descriptor, memory or local port is left.
/// * [`ErrorKind::Config`]: the text is no address, or an option is out of its bounds.
/// * [`ErrorKind::Unsupported`]: a name, without the feature `blocking`; or something forbids it.
/// * [`ErrorKind::Closed`]: the drain's deadline has come.
/// * [`ErrorKind::Misuse`]: the calling thread is no core.
///
/// # Cancel safety
/// Dropping the future ends the attempt, and closes the socket when the kernel has let go of it.
///
/// # Kernel
/// `IORING_OP_CONNECT` is older than the 6.1 that slipring needs. For a Unix socket whose
/// listener's queue is full no kernel tells when it is not (`EAGAIN` in connect(2)): it is tried
/// again, each time a little later, at most 50 ms apart.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use slipring::net;
///
/// # async fn handler() -> slipring::Result<()> {
/// let mut upstream = net::connect("127.0.0.1:6379").timeout(Duration::from_secs(1)).await?;
/// upstream.write(b"PING\r\n").await?;
/// let answer = upstream.read_until(b'\n', 64).await?;
/// # Ok(())
/// # }
/// ```
pub fn connect(addr: impl Display) -> Connect {
    Connect { to: Target::Text(addr.to_string()), from: None, timeout: None }
}

/// Connects to whichever of several addresses of one host answers first (happy eyeballs, RFC
/// 8305): they are tried in turn, IPv6 and IPv4 alternating from the first on, the next one after
/// 250 ms or as soon as one has failed. The first to be established is the result, and the other
/// attempts are cancelled and closed.
///
/// # Errors
/// As [`connect`]; when all have failed, the error names each with its cause, and has their kind
/// if it is the same for all, or else [`ErrorKind::Io`].
///
/// # Cancel safety
/// As [`connect`].
///
/// # Examples
///
/// ```
/// # async fn handler() -> slipring::Result<()> {
/// let addrs = ["[2001:db8::1]:443".parse().unwrap(), "192.0.2.1:443".parse().unwrap()];
/// let upstream = slipring::net::connect_any(&addrs).await?;
/// # Ok(())
/// # }
/// ```
pub fn connect_any(addrs: &[SocketAddr]) -> Connect {
    Connect { to: Target::Any(addrs.to_vec()), from: None, timeout: None }
}

/// A connection to be, with its options; it is begun when this is awaited. See [`connect()`].
#[derive(Clone, Debug)]
#[must_use = "nothing is connected until this is awaited"]
pub struct Connect {
    to: Target,
    from: Option<SocketAddr>,
    timeout: Option<Duration>,
}

#[derive(Clone, Debug)]
enum Target {
    Text(String),
    Any(Vec<SocketAddr>),
}

impl Connect {
    /// How long all of it may take, names and every address included: 1 ms to 365 days instead of
    /// `SLIPRING_CONNECT_MS`.
    pub fn timeout(self, limit: Duration) -> Connect {
        Connect { timeout: Some(limit), ..self }
    }

    /// The local address to connect from; with port 0 the kernel chooses one. Addresses of another
    /// family then can't be connected to.
    pub fn bind(self, from: SocketAddr) -> Connect {
        Connect { from: Some(from), ..self }
    }

    async fn run(self) -> Result<Connection> {
        let core = local::current("net::connect")?;
        let timeout_ms = match self.timeout {
            None => core.borrow_mut().settings.connect_ms,
            Some(limit) => limit_ms(limit, || format!("connect within {limit:?}"))?,
        };
        let begun_ms = core.borrow_mut().stamp_ms;
        let deadline_ms = begun_ms.saturating_add(timeout_ms);
        let addrs = match self.to {
            Target::Any(addrs) => addrs,
            Target::Text(text) => match Named::parse(&text)? {
                Named::Addr(ListenAddr::Tcp(addr)) => vec![addr],
                Named::Addr(to) => return to_unix(&core, to, self.from, deadline_ms).await,
                Named::Host => {
                    let found = timeout(Duration::from_millis(timeout_ms), resolve(text.clone()));
                    found.await.map_err(|_| late(format!("resolve {text}"), timeout_ms))??
                }
            },
        };
        let family = |addr: &&SocketAddr| self.from.is_none_or(|f| f.is_ipv4() == addr.is_ipv4());
        let reachable: Vec<SocketAddr> = addrs.iter().filter(family).copied().collect();
        if reachable.is_empty() {
            let error = Error::new(ErrorKind::Config, format!("connect to {addrs:?}"));
            return Err(error.because(match self.from {
                Some(from) => format!("none of them is of the family of {from}, to connect from"),
                None => "expected at least one address".to_owned(),
            }));
        }
        Race::new(&core, &reachable, self.from, deadline_ms).first().await
    }
}

impl IntoFuture for Connect {
    type Output = Result<Connection>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Connection>>>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

async fn to_unix(
    core: &CoreRef,
    to: ListenAddr,
    from: Option<SocketAddr>,
    deadline_ms: u64,
) -> Result<Connection> {
    let route = Route { to, from };
    if let Some(from) = from {
        let error = Error::new(ErrorKind::Config, format!("connect to {route}"));
        return Err(error.because(format!("a Unix socket can't be connected to from {from}")));
    }
    let connection = match Attempt::begin(core, &route, deadline_ms) {
        Ok(attempt) => attempt.await,
        Err(failure) => Err(failure),
    };
    connection.map_err(|failure| describe(core, &route, failure))
}

/// What the text of an address names.
enum Named {
    Addr(ListenAddr),
    /// A host and its port.
    Host,
}

impl Named {
    fn parse(text: &str) -> Result<Named> {
        if text.starts_with("unix:") {
            return ListenAddr::parse(text).map(Named::Addr).map_err(|_| unreadable(text));
        }
        if let Ok(addr) = text.parse() {
            return Ok(Named::Addr(ListenAddr::Tcp(addr)));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| unreadable(text))?;
        let named = !host.is_empty() && !host.contains([':', '/', '[', ']', ' ']);
        match port.parse::<u16>() {
            Ok(_) if named => Ok(Named::Host),
            _ => Err(unreadable(text)),
        }
    }
}

fn unreadable(text: &str) -> Error {
    Error::new(ErrorKind::Config, format!("connect to {text:?}")).because(
        "expected a host and port such as 127.0.0.1:7000, [::1]:7000 or example.org:7000, \
         unix:/path or unix:@name",
    )
}

fn late(operation: String, timeout_ms: u64) -> Error {
    let limit = Duration::from_millis(timeout_ms);
    Error::new(ErrorKind::TimedOut, operation)
        .because(format!("no answer within {limit:?} (SLIPRING_CONNECT_MS, or the call's timeout)"))
}

/// A failed attempt in words.
pub(super) fn describe(core: &CoreRef, route: &Route, failure: Failure) -> Error {
    let operation = format!("connect to {route}");
    let errno = match failure {
        Failure::Os(errno) => errno,
        Failure::Late => {
            return Error::new(ErrorKind::TimedOut, operation)
                .because("no answer in time (SLIPRING_CONNECT_MS, or the call's timeout)");
        }
        Failure::NoPlace => {
            let max = core.borrow_mut().settings.connections_max;
            return Error::new(ErrorKind::Resource, operation).because(format!(
                "this core has as many connections as it may have, outbound ones included \
                 (SLIPRING_CONNECTIONS_MAX = {max})"
            ));
        }
        Failure::Forced => {
            return Error::new(ErrorKind::Closed, operation)
                .because("the drain's deadline has come");
        }
        Failure::MetItself => {
            return Error::new(ErrorKind::Refused, operation)
                .because("nobody listens there: the kernel has connected the socket to itself");
        }
    };
    let error = Error::os(operation, errno.to_io());
    match errno.0 {
        libc::ECONNREFUSED => error.because("nobody listens there"),
        libc::ENOENT => {
            error.with_kind(ErrorKind::Refused).because("there is no such socket, nobody listens")
        }
        libc::EHOSTUNREACH | libc::ENETUNREACH => error
            .with_kind(ErrorKind::Unreachable)
            .because("there is no way to it; see ip-route(8)"),
        libc::ETIMEDOUT => error.with_kind(ErrorKind::TimedOut),
        libc::EADDRNOTAVAIL if route.from.is_some() => {
            error.because("this machine has no such address to connect from, or no port left")
        }
        libc::EADDRNOTAVAIL => error
            .with_kind(ErrorKind::Resource)
            .because("no local port is left; see ip_local_port_range in ip(7)"),
        libc::EINVAL if route.is_unix() => error
            .with_kind(ErrorKind::Config)
            .because("the path of a Unix socket has at most 107 bytes and none of them is zero"),
        libc::EPERM | libc::EACCES => {
            error.because("a firewall, or the permissions of a Unix socket, forbid it")
        }
        libc::EMFILE => error.because("the process has no descriptor left; see RLIMIT_NOFILE"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_address_is_refused_with_the_forms_that_are() {
        for bad in ["", "80", ":80", "host:", "host:65536", "::1:80", "[::1]", "a b:1", "unix:"] {
            let error = Named::parse(bad).err().unwrap_or_else(|| panic!("{bad} was taken"));
            assert_eq!(error.kind(), ErrorKind::Config, "{bad}");
            assert!(error.to_string().contains("[::1]:7000"), "{error}");
        }
        for host in ["localhost:80", "a-b.example.org:1"] {
            assert!(matches!(Named::parse(host), Ok(Named::Host)), "{host}");
        }
        for addr in ["127.0.0.1:1", "[::1]:2", "unix:/x", "unix:@x"] {
            assert!(matches!(Named::parse(addr), Ok(Named::Addr(_))), "{addr}");
        }
    }
}
