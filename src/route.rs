//! Where an outbound connection leads and where it begins, and the socket for it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use socket2::{Domain, SockAddr, SockRef, Type};

use crate::bind::{ListenAddr, set_inherited};
use crate::config::Settings;
use crate::driver::Socket;
use crate::sys::sock;

/// One address to connect to, and the local one to do that from.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) to: ListenAddr,
    pub(crate) from: Option<SocketAddr>,
}

impl Route {
    /// The address as the kernel takes it.
    ///
    /// # Errors
    /// `InvalidInput` for the path of a Unix socket that is too long.
    pub(crate) fn address(&self) -> io::Result<SockAddr> {
        match &self.to {
            ListenAddr::Tcp(addr) => Ok((*addr).into()),
            ListenAddr::Unix(path) => SockAddr::unix(path),
            ListenAddr::Abstract(name) => SockAddr::unix(format!("\0{name}")),
        }
    }

    pub(crate) fn is_unix(&self) -> bool {
        !matches!(self.to, ListenAddr::Tcp(_))
    }

    /// A socket for it, with the options that an accepted connection has from its listener.
    ///
    /// One for TCP blocks, as accepted ones do: the ring waits for it. A Unix socket does not,
    /// until it is connected.
    pub(crate) fn open(&self, settings: &Settings) -> io::Result<OwnedFd> {
        let ListenAddr::Tcp(to) = self.to else {
            let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            return Ok(socket.into());
        };
        let socket = socket2::Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        set_inherited(&socket, settings)?;
        if let Some(from) = self.from {
            if from.port() == 0 {
                sock::bind_address_only(socket.as_fd())?;
            }
            socket.bind(&from.into())?;
        }
        Ok(socket.into())
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to)?;
        self.from.map_or(Ok(()), |from| write!(f, " from {from}"))
    }
}

impl Socket {
    /// Connects a Unix socket without waiting: `WouldBlock` where the listener's queue is full,
    /// which no poll tells the end of (`EAGAIN` in connect(2)).
    pub(crate) fn connect_now(&self, to: &SockAddr) -> io::Result<()> {
        match self {
            Socket::Os(fd) => {
                SockRef::from(fd).connect(to)?;
                SockRef::from(fd).set_nonblocking(false)
            }
            #[cfg(test)]
            Socket::Sim(socket) => socket.connect_now(),
        }
    }

    /// Whether a TCP connection has both ends here: where nobody listens at a port from which the
    /// kernel takes those of clients, a socket may be given that very port and meet itself
    /// (RFC 9293, 3.5, simultaneous open).
    pub(crate) fn has_met_itself(&self) -> bool {
        match self {
            Socket::Os(fd) => {
                let socket = SockRef::from(fd);
                let (own, peers) = (socket.local_addr(), socket.peer_addr());
                let (own, peers) = (own.ok().and_then(|a| a.as_socket()), peers.ok());
                own.is_some() && own == peers.and_then(|a| a.as_socket())
            }
            #[cfg(test)]
            Socket::Sim(_) => false,
        }
    }
}
