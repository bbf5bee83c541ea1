//! A server while it serves, and waiting for its end.

use std::net::SocketAddr;
use std::thread::JoinHandle;

#[cfg(feature = "admin")]
use crate::admin;
use crate::bind::ListenAddr;
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::report::DrainReport;
use crate::sys::thread::join_until;

/// A server that serves. Dropping it changes nothing for the server, which goes on until it is
/// drained.
#[derive(Debug)]
pub struct Running {
    pub(crate) handle: Handle,
    pub(crate) threads: Vec<JoinHandle<()>>,
    /// Those that watch and tell.
    pub(crate) beside: Vec<JoinHandle<()>>,
    pub(crate) addrs: Vec<ListenAddr>,
    pub(crate) udp_addrs: Vec<SocketAddr>,
    #[cfg(feature = "admin")]
    pub(crate) admin: Option<Box<Running>>,
}

impl Running {
    /// A handle that any thread may use.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Where it listens, in the order of the `listen` calls, with the ports that the kernel chose;
    /// of sockets that were passed in, each address once.
    #[must_use]
    pub fn local_addrs(&self) -> &[ListenAddr] {
        &self.addrs
    }

    /// Where it serves UDP, in the order of the `serve_udp` calls, with the ports that the kernel
    /// chose.
    #[must_use]
    pub fn udp_addrs(&self) -> &[SocketAddr] {
        &self.udp_addrs
    }

    /// Waits until the server has been drained, and returns the account. It returns at most 100 ms
    /// after the drain's deadline; its ports are free then, unless a core is stuck.
    ///
    /// # Errors
    /// [`ErrorKind::Panicked`] when a core has failed; the message has the report.
    /// [`ErrorKind::Misuse`] on a core of the server, which would wait for itself.
    pub fn join(self) -> Result<DrainReport> {
        self.handle.wait_allowed("join a server")?;
        let report = self.handle.control().wait();
        traced!(self.handle.control().events.joined(&report));
        // Of a server with a core that is stuck, nobody else will.
        self.handle.control().let_go();
        for (thread, core) in self.threads.into_iter().zip(report.cores()) {
            // A thread's own destructors are anyone's code too: they get no more time.
            if core.stuck.is_none() {
                join_until(thread, || self.handle.control().is_over());
            }
        }
        for thread in self.beside {
            // What they call is anyone's as well.
            join_until(thread, || self.handle.control().is_over());
        }
        #[cfg(feature = "admin")]
        let admin = self.admin.map_or(Ok(()), |admin| admin::join(*admin, &report));
        if report.cores().iter().any(|core| core.failure.is_some()) {
            return Err(Error::new(ErrorKind::Panicked, "serve").because(report.to_string()));
        }
        #[cfg(feature = "admin")]
        admin?;
        Ok(report)
    }
}
