//! Binding UDP sockets: one, or one for each core of a server, or none.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use socket2::{Domain, Protocol, Socket, Type};

use crate::bind::{Hook, ListenAddr, refused, until_free};
use crate::config::Settings;
use crate::error::{Error, ErrorKind, Result};
use crate::socket_file::lock_start;
use crate::sys::sock;
use crate::udp::serve::UdpEndpoint;

/// Binds a socket, alone or beside others of the same address.
pub(super) fn bind(addr: SocketAddr, shared: bool, hook: Option<&Hook>) -> io::Result<UdpShare> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(shared)?;
    // From here on each datagram that was lost for want of room is told of by the next.
    sock::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)?;
    if let Some(hook) = hook {
        hook(socket.as_fd())?;
    }
    socket.bind(&addr.into())?;
    let local = socket.local_addr()?.as_socket().unwrap_or(addr);
    Ok((OwnedFd::from(socket), local))
}

/// A socket, and where it is bound.
pub(crate) type UdpShare = (OwnedFd, SocketAddr);

/// All cores' sockets.
#[derive(Debug, Default)]
pub(crate) struct DealtUdp {
    /// Those of each core, in the order of the addresses.
    pub(crate) cores: Vec<Vec<UdpShare>>,
    /// With the ports that the kernel has chosen, where it was asked to.
    pub(crate) addrs: Vec<SocketAddr>,
}

impl DealtUdp {
    /// Binds all addresses for all cores.
    ///
    /// # Errors
    /// Nothing stays bound then.
    pub(crate) fn bind(
        endpoints: &[UdpEndpoint],
        cores: usize,
        settings: &Settings,
        hook: Option<&Hook>,
    ) -> Result<DealtUdp> {
        let mut dealt = DealtUdp::default();
        dealt.cores.resize_with(cores, Vec::new);
        for endpoint in endpoints {
            let bound = bind_all(&endpoint.addr, cores, settings, hook)?;
            dealt.addrs.extend(bound.first().map(|(_, addr)| *addr));
            for (core, share) in dealt.cores.iter_mut().zip(bound) {
                core.push(share);
            }
        }
        Ok(dealt)
    }
}

/// Binds an address for so many cores, as [`crate::bind::bind`] does for TCP: while the first is
/// tried, nobody else may have it.
fn bind_all(
    text: &str,
    cores: usize,
    settings: &Settings,
    hook: Option<&Hook>,
) -> Result<Vec<UdpShare>> {
    let asked = ListenAddr::parse(text)?;
    let ListenAddr::Tcp(asked) = asked else {
        let error = Error::new(ErrorKind::Config, format!("serve UDP at {text:?}"));
        return Err(error.because("expected a host and port such as 127.0.0.1:7000 or [::1]:7000"));
    };
    let name = format!("udp {asked}");
    until_free(settings, || {
        let mut start = None;
        if asked.port() != 0 {
            start = Some(lock_start(&name)?);
            bind(asked, false, None)?;
        }
        let mut bound: Vec<UdpShare> = Vec::with_capacity(cores);
        for _ in 0..cores {
            let addr = bound.last().map_or(asked, |(_, addr)| *addr);
            bound.push(bind(addr, true, hook)?);
        }
        drop(start);
        Ok(bound)
    })
    .map_err(|error| refused(&name, error))
}
