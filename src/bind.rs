//! Binding: every listener of every core, or none.
//!
//! `SO_REUSEPORT` gives each core a queue of its own, and takes away the guard against a second
//! instance, which would join the port in silence and get half of the connections. So before the
//! cores' sockets are bound, one is bound without it: that fails if anybody listens there.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use crate::adopt::Kept;
use crate::config::Settings;
use crate::error::{Error, ErrorKind, Result};
use crate::socket_file::{SocketFile, lock_start, remove_stale};

/// A user's hook that sees each listening socket before it is bound.
pub(crate) type Hook = dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ListenAddr {
    /// TCP over IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A Unix socket in the file system; removed again when the server has ended.
    Unix(PathBuf),
    /// A Unix socket in the abstract name space (unix(7)).
    Abstract(String),
}

impl ListenAddr {
    /// Reads `127.0.0.1:7000`, `[::1]:7000`, `localhost:7000`, `unix:/run/x.sock` or `unix:@name`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the text has none of these forms, or a name can't be resolved.
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::ListenAddr;
    ///
    /// assert_eq!(ListenAddr::parse("[::1]:80")?.to_string(), "[::1]:80");
    /// assert_eq!(ListenAddr::parse("unix:@x")?.to_string(), "unix:@x");
    /// assert!(ListenAddr::parse("80").is_err());
    /// # Ok::<(), slipring::Error>(())
    /// ```
    pub fn parse(text: &str) -> Result<ListenAddr> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.strip_prefix('@') {
                Some(name) if !name.is_empty() => Ok(ListenAddr::Abstract(name.to_owned())),
                None if !path.is_empty() => Ok(ListenAddr::Unix(PathBuf::from(path))),
                _ => Err(unreadable(text)),
            };
        }
        let resolved = text.to_socket_addrs().ok().and_then(|mut found| found.next());
        resolved.map(ListenAddr::Tcp).ok_or_else(|| unreadable(text))
    }
}

fn unreadable(text: &str) -> Error {
    Error::new(ErrorKind::Config, format!("listen address {text:?}")).because(
        "expected a host and port such as 127.0.0.1:7000 or [::1]:7000, unix:/path or unix:@name",
    )
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddr::Tcp(addr) => write!(f, "{addr}"),
            ListenAddr::Unix(path) => write!(f, "unix:{}", path.display()),
            ListenAddr::Abstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

/// The bound sockets of one address, one for each core, not yet listening; or those that were
/// passed in, which do.
#[derive(Debug)]
pub(crate) struct Bound {
    /// With the port that the kernel has chosen, where it was asked to.
    pub(crate) addr: ListenAddr,
    /// Of those that were passed in there may be several for each core, one row after the other.
    pub(crate) sockets: Vec<OwnedFd>,
    /// As many as sockets, where those were passed in.
    pub(crate) kept: Vec<Arc<Kept>>,
    backlog: i32,
    /// Keeps another server from starting on the address until this one listens.
    start: Option<OwnedFd>,
    /// Of a Unix socket that has one. It is dropped after the lock, which it takes to be removed.
    pub(crate) file: Option<SocketFile>,
}

/// Binds an address for `cores` cores.
///
/// A predecessor that is still dying holds its port for some milliseconds, so an address in use is
/// tried again for `bind_retry_ms`.
pub(crate) fn bind(
    addr: &ListenAddr,
    cores: usize,
    settings: &Settings,
    hook: Option<&Hook>,
) -> Result<Bound> {
    until_free(settings, || match addr {
        ListenAddr::Tcp(addr) => bind_tcp(*addr, cores, settings, hook),
        ListenAddr::Unix(path) => bind_unix(addr, SockAddr::unix(path), cores, settings, hook),
        ListenAddr::Abstract(name) => {
            let address = SockAddr::unix(format!("\0{name}"));
            bind_unix(addr, address, cores, settings, hook)
        }
    })
    .map_err(|error| refused(addr, error))
}

/// Tries again, while somebody has the address and there is time.
pub(crate) fn until_free<T>(
    settings: &Settings,
    bind: impl Fn() -> io::Result<T>,
) -> io::Result<T> {
    let give_up = Instant::now() + Duration::from_millis(settings.bind_retry_ms);
    loop {
        match bind() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < give_up => {
                std::thread::sleep(BIND_RETRY_STEP);
            }
            bound => return bound,
        }
    }
}

/// Says what stands in the way, and what to do about it.
pub(crate) fn refused(addr: impl fmt::Display, error: io::Error) -> Error {
    let remedy = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            "somebody listens there; end that process or take another address"
        }
        Some(libc::EACCES) => {
            "ports below 1024 need CAP_NET_BIND_SERVICE, a path needs write access"
        }
        Some(libc::EADDRNOTAVAIL) => "no interface of this machine has that address",
        _ => "",
    };
    let refused = Error::os(format!("bind {addr}"), error);
    if remedy.is_empty() { refused } else { refused.because(remedy) }
}

fn bind_tcp(
    addr: SocketAddr,
    cores: usize,
    settings: &Settings,
    hook: Option<&Hook>,
) -> io::Result<Bound> {
    let domain = Domain::for_address(addr);
    let mut start = None;
    if addr.port() != 0 {
        start = Some(lock_start(addr)?);
        let guard = Socket::new(domain, Type::STREAM, None)?;
        guard.set_reuse_address(true)?;
        guard.bind(&addr.into())?;
    }
    let mut addr = addr;
    let mut sockets = Vec::with_capacity(cores);
    for _ in 0..cores {
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        set_inherited(&socket, settings)?;
        if let Some(hook) = hook {
            hook(socket.as_fd())?;
        }
        socket.bind(&addr.into())?;
        if let Some(chosen) = socket.local_addr()?.as_socket() {
            addr = chosen;
        }
        sockets.push(OwnedFd::from(socket));
    }
    let (addr, backlog) = (ListenAddr::Tcp(addr), settings.backlog as i32);
    Ok(Bound { addr, sockets, kept: Vec::new(), file: None, backlog, start })
}

/// Options that every accepted connection inherits, so that none of them needs a system call.
pub(crate) fn set_inherited(socket: &Socket, settings: &Settings) -> io::Result<()> {
    socket.set_tcp_nodelay(settings.nodelay)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(settings.keepalive_idle_s.into()))
        .with_interval(Duration::from_secs(settings.keepalive_interval_s.into()))
        .with_retries(settings.keepalive_count);
    socket.set_tcp_keepalive(&keepalive)?;
    if settings.user_timeout_ms > 0 {
        let timeout = Duration::from_millis(settings.user_timeout_ms);
        socket.set_tcp_user_timeout(Some(timeout))?;
    }
    Ok(())
}

/// A Unix socket has one queue; every core gets its own descriptor of it.
fn bind_unix(
    addr: &ListenAddr,
    address: io::Result<SockAddr>,
    cores: usize,
    settings: &Settings,
    hook: Option<&Hook>,
) -> io::Result<Bound> {
    let address = address?;
    let mut start = None;
    if let ListenAddr::Unix(path) = addr {
        start = Some(lock_start(path.display())?);
        remove_stale(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    if let Some(hook) = hook {
        hook(socket.as_fd())?;
    }
    socket.bind(&address)?;
    let file = match addr {
        ListenAddr::Unix(path) => Some(SocketFile::of(path)?),
        _ => None,
    };
    let (first, backlog) = (OwnedFd::from(socket), settings.backlog as i32);
    let mut sockets = Vec::with_capacity(cores);
    for _ in 1..cores {
        sockets.push(first.try_clone()?);
    }
    sockets.push(first);
    Ok(Bound { addr: addr.clone(), sockets, kept: Vec::new(), file, backlog, start })
}

impl Bound {
    /// What was passed in, shared out over the cores.
    pub(crate) fn adopted(addr: ListenAddr, shares: Vec<(OwnedFd, Arc<Kept>)>) -> Bound {
        let (sockets, kept) = shares.into_iter().unzip();
        Bound { addr, sockets, kept, backlog: 0, start: None, file: None }
    }

    /// Lets connections in. What was passed in does already, with a backlog of its owner's.
    pub(crate) fn listen(&mut self) -> Result<()> {
        let own = if self.kept.is_empty() { &self.sockets[..] } else { &[] };
        for socket in own {
            SockRef::from(socket)
                .listen(self.backlog)
                .map_err(|error| Error::os(format!("listen on {}", self.addr), error))?;
        }
        self.start = None;
        Ok(())
    }
}

const BIND_RETRY_STEP: Duration = Duration::from_millis(5);
