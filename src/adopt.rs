//! Sockets that were passed in: bound and listening already, by a service manager or another
//! process, which keeps them open. They are checked, given what the connections inherit, and shared
//! out; what waits in their queues when this server ends is left there.

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use socket2::{Domain, Protocol, SockRef, Type};

use crate::bind::{Bound, ListenAddr, set_inherited};
use crate::config::Settings;
use crate::conn::{self, Connection};
use crate::core::Core;
use crate::driver::Socket;
use crate::error::{Error, ErrorKind, Result};
use crate::listen::Listener;
use crate::server::{CoreInfo, Server};

impl Server {
    /// Serves sockets that are bound and listen already, such as those that a service manager has
    /// opened (socket activation), with a handler as [`Server::listen`] does.
    ///
    /// They may be TCP and Unix stream sockets, of any number of addresses. The sockets of one
    /// address are shared out over the cores: one is accepted from by all cores, as many as there
    /// are cores (`SO_REUSEPORT`) by one each, and any other number in turn, so that none is
    /// forgotten. A single one is simple, and the kernel wakes whichever core it likes; one for
    /// each core spreads connections by the kernel's hash, as `listen` does.
    ///
    /// What the accepted connections inherit is set on them (`SLIPRING_NODELAY`, keepalive, user
    /// timeout); their backlog is left as it is, and [`Server::before_bind`] does not see them.
    /// They are made non-blocking, as a core must not wait for another one's connection. That is
    /// `O_NONBLOCK` of the open file (fcntl(2)), so it holds, and stays, for whoever has the same
    /// socket: an `accept` of theirs then fails with `WouldBlock` while nobody waits.
    ///
    /// # At the end
    /// Whoever has passed them in is taken to keep them open. So a drain just stops accepting:
    /// nothing is done to hold new handshakes off, and what waits in a queue stays there, for the
    /// next process that accepts. The report says how many those are (`queue_left`), and `stop` is
    /// [`StopMethod::LeftOpen`](crate::StopMethod::LeftOpen). If nobody else has the socket, the
    /// kernel resets them.
    ///
    /// # Errors
    /// [`Server::start`] fails with [`ErrorKind::Config`] for a descriptor that is no listening
    /// TCP or Unix stream socket, for none at all, and with
    /// [`Balance::Cpu`](crate::Balance::Cpu), as the order of sockets that others have
    /// opened is not known.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::net::TcpListener;
    /// use slipring::{Config, Connection, Server};
    ///
    /// # async fn echo(_conn: Connection) -> slipring::Result<()> { Ok(()) }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let kept = TcpListener::bind("127.0.0.1:7000")?;
    /// Server::new(Config::default()).listen_on([kept.try_clone()?], echo).run()?;
    /// // Whoever connects now waits in the queue of `kept`, whose `accept` is to block again.
    /// kept.set_nonblocking(false)?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn listen_on<S, H, F>(self, sockets: S, handler: H) -> Server
    where
        S: IntoIterator<Item: Into<OwnedFd>>,
        H: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        let handler = Arc::new(handler);
        let sockets = sockets.into_iter().map(Into::into).collect();
        self.endpoint_on(sockets, move |_| {
            let handler = Arc::clone(&handler);
            conn::handler(move |conn| handler(conn))
        })
    }

    /// As [`Server::listen_on`], with a handler that is made on each core, as
    /// [`Server::listen_with`] does.
    #[track_caller]
    pub fn listen_on_with<S, M, H, F>(self, sockets: S, make: M) -> Server
    where
        S: IntoIterator<Item: Into<OwnedFd>>,
        M: Fn(&CoreInfo) -> H + Send + Sync + 'static,
        H: Fn(Connection) -> F + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        let sockets = sockets.into_iter().map(Into::into).collect();
        self.endpoint_on(sockets, move |core| conn::handler(make(core)))
    }
}

/// A socket that somebody else keeps open, as the cores see it that accept from it.
#[derive(Debug)]
pub(crate) struct Kept {
    accepting: AtomicUsize,
}

impl Kept {
    /// A core stops accepting from it. True for the last one.
    pub(crate) fn leave(&self) -> bool {
        self.accepting.fetch_sub(1, Ordering::AcqRel) == 1
    }
}

impl Listener {
    /// Of a socket that was passed in, unless there is nothing to keep.
    pub(crate) fn left_to(mut self, kept: Option<Arc<Kept>>) -> Listener {
        self.kept = kept;
        self
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// How many are still taken from its queue when it is left: of one that was passed in and is
    /// left by the whole server, one. The accept that was cancelled may have taken the only word of
    /// a connection for all who share the queue.
    pub(crate) fn last_call_of(&self, backlog: u32, retired: bool) -> u32 {
        if self.is_kept() && !retired { 1 } else { backlog }
    }

    /// What is left in the queue of a socket that was passed in, told by the last core to leave it.
    pub(crate) fn left_queued(&self) -> u64 {
        let last = self.kept.as_ref().is_some_and(|kept| self.is_open() && kept.leave());
        let queued = |socket: &Socket| if last { socket.queued_connections() } else { 0 };
        self.socket().map_or(0, queued)
    }
}

impl Core {
    /// Whether somebody else serves what a listener leaves in its queue: the next process one that
    /// was passed in, and the cores that stay a Unix socket.
    pub(crate) fn is_shared(&self, index: u32) -> bool {
        let listener = &self.listeners[index as usize];
        listener.is_kept() || (self.retired && listener.receives_once())
    }
}

/// Checks what was passed in and readies it for `cores` cores, each address by itself.
///
/// # Errors
/// [`ErrorKind::Config`] for what can't be accepted from.
pub(crate) fn adopt(fds: Vec<OwnedFd>, cores: usize, settings: &Settings) -> Result<Vec<Bound>> {
    let mut addresses: Vec<(ListenAddr, Vec<OwnedFd>)> = Vec::new();
    for fd in fds {
        let operation = || format!("listen on descriptor {}", fd.as_raw_fd());
        let addr = examine(&fd).map_err(|why| match why {
            Unfit::Os(error) => {
                Error::os(operation(), error).with_kind(ErrorKind::Config).because(NO_SOCKET)
            }
            Unfit::Kind(why) => Error::new(ErrorKind::Config, operation()).because(why),
        })?;
        ready(&fd, &addr, settings).map_err(|error| Error::os(operation(), error))?;
        match addresses.iter_mut().find(|(known, _)| *known == addr) {
            Some((_, sockets)) => sockets.push(fd),
            None => addresses.push((addr, vec![fd])),
        }
    }
    if addresses.is_empty() {
        return Err(Error::new(ErrorKind::Config, "listen on sockets that were passed in")
            .because("there is none; see sd_listen_fds(3) for what a service manager passes"));
    }
    let share = |(addr, sockets): (ListenAddr, Vec<OwnedFd>)| {
        share_out(&sockets, cores)
            .map(|shares| Bound::adopted(addr.clone(), shares))
            .map_err(|error| Error::os(format!("share the sockets of {addr}"), error))
    };
    addresses.into_iter().map(share).collect()
}

/// Why a descriptor can't be accepted from.
enum Unfit {
    Os(io::Error),
    Kind(String),
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Unfit {
        Unfit::Os(error)
    }
}

/// Where a socket listens, if it does.
fn examine(fd: &OwnedFd) -> std::result::Result<ListenAddr, Unfit> {
    let socket = SockRef::from(fd);
    let (kind, domain) = (socket.r#type()?, socket.domain()?);
    if kind != Type::STREAM {
        return Err(Unfit::Kind(format!("a socket of {kind:?} is no stream: use ListenStream=")));
    }
    if !socket.is_listener()? {
        return Err(Unfit::Kind(
            "it does not listen: a service manager passes connections with Accept=yes, and \
             listening sockets with Accept=no"
                .to_owned(),
        ));
    }
    let addr = socket.local_addr()?;
    if domain == Domain::UNIX {
        let path = addr.as_pathname().map(|path| ListenAddr::Unix(path.to_owned()));
        return path.or_else(|| abstract_name(&addr)).ok_or_else(|| {
            Unfit::Kind("a Unix socket without a name can't be connected to".to_owned())
        });
    }
    let protocol = socket.protocol()?;
    match addr.as_socket() {
        Some(addr) if protocol == Some(Protocol::TCP) => Ok(ListenAddr::Tcp(addr)),
        _ => Err(Unfit::Kind(format!(
            "expected TCP over IPv4 or IPv6, or a Unix stream, and it is {domain:?} with \
             {protocol:?}"
        ))),
    }
}

fn abstract_name(addr: &socket2::SockAddr) -> Option<ListenAddr> {
    let name = addr.as_abstract_namespace()?;
    Some(ListenAddr::Abstract(String::from_utf8_lossy(name).into_owned()))
}

fn ready(fd: &OwnedFd, addr: &ListenAddr, settings: &Settings) -> io::Result<()> {
    let socket = SockRef::from(fd);
    socket.set_cloexec(true)?;
    // A core that finds the queue empty, as another was faster, must not wait.
    socket.set_nonblocking(true)?;
    if matches!(addr, ListenAddr::Tcp(_)) { set_inherited(&socket, settings) } else { Ok(()) }
}

/// Each core's share, in rows of one for each core: all sockets are used, and no core has more
/// than one more than another needs. Every share is a descriptor of its own.
fn share_out(sockets: &[OwnedFd], cores: usize) -> io::Result<Vec<(OwnedFd, Arc<Kept>)>> {
    let rows = sockets.len().div_ceil(cores).max(1);
    let uses = |n: usize| (n..rows * cores).step_by(sockets.len()).count();
    let kept: Vec<_> = (0..sockets.len())
        .map(|n| Arc::new(Kept { accepting: AtomicUsize::new(uses(n)) }))
        .collect();
    let share = |n: usize| Ok((sockets[n].try_clone()?, Arc::clone(&kept[n])));
    (0..rows * cores).map(|at| share(at % sockets.len())).collect()
}

const NO_SOCKET: &str = "expected a socket that listens, of TCP or a Unix stream";

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn every_socket_is_used_and_the_last_of_its_cores_is_known() {
        for (count, cores, expected) in [(1, 4, 4), (4, 4, 4), (2, 4, 4), (3, 2, 4), (5, 2, 6)] {
            let sockets: Vec<OwnedFd> = (0..count)
                .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port").into())
                .collect();
            let shares = share_out(&sockets, cores).expect("descriptors");
            assert_eq!(shares.len(), expected, "{count} on {cores}");
            let mut last = 0;
            for (_, kept) in &shares {
                last += usize::from(kept.leave());
            }
            assert_eq!(last, count, "each socket has one last core");
        }
    }
}
