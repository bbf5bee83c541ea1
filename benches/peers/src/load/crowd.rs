//! Connections that do nothing, once each has been answered.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsRawFd,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{STALL_S_MAX, check, silent};

/// Idle connections. Dropping them resets them.
pub struct Crowd {
    streams: Vec<TcpStream>,
}

impl Crowd {
    pub fn new() -> Self {
        Self { streams: Vec::new() }
    }

    /// Lets the crowd become that big. Each newcomer asks once and is answered, so that the server
    /// has touched all that it keeps for a connection.
    ///
    /// # Errors
    ///
    /// A connection is refused, a byte differs, or a reply takes longer than [`STALL_S_MAX`].
    pub fn grow(&mut self, address: SocketAddr, count: usize) -> io::Result<()> {
        let mut asked = VecDeque::with_capacity(UNDER_WAY);
        while self.streams.len() + asked.len() < count || !asked.is_empty() {
            let index = self.streams.len() + asked.len();
            if index < count && asked.len() < UNDER_WAY {
                let mut stream = connect(address, index)?;
                stream.write_all(&REQUEST)?;
                asked.push_back(stream);
                continue;
            }
            let Some(mut stream) = asked.pop_front() else { break };
            let mut reply = [0; REQUEST.len()];
            stream.read_exact(&mut reply).map_err(silent)?;
            if reply != REQUEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the reply differs"));
            }
            self.streams.push(stream);
        }
        Ok(())
    }
}

impl Default for Crowd {
    fn default() -> Self {
        Self::new()
    }
}

/// Connects from another loopback address after every so many, as each has only so many ports.
fn connect(address: SocketAddr, index: usize) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    let on: libc::c_int = 1;
    // The port is chosen by connect, which may use one again that is used to another address.
    // SAFETY: the kernel reads one int, which lives on this stack.
    check(unsafe {
        let (level, name) = (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT);
        let len = size_of::<libc::c_int>() as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const on).cast(), len)
    })?;
    let source = Ipv4Addr::from(u32::from(FIRST_SOURCE) + (index / PER_SOURCE) as u32);
    socket.bind(&SocketAddr::from((source, 0)).into())?;
    socket.connect(&address.into())?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_read_timeout(Some(Duration::from_secs(STALL_S_MAX)))?;
    Ok(socket.into())
}

const REQUEST: [u8; 64] = [0x5a; 64];
const UNDER_WAY: usize = 64;
const FIRST_SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 1, 1);
const PER_SOURCE: usize = 20_000;
