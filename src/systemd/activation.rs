//! The sockets that a service manager has opened for this process (sd_listen_fds(3)).

use std::os::fd::{OwnedFd, RawFd};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::inherit;

/// The sockets that were passed, with their names; see [`listen_fds`]. Dropping it closes those
/// that nobody has taken, which changes nothing for the service manager: it keeps them open.
#[derive(Debug, Default)]
#[must_use = "connections wait in the queues of sockets that nobody accepts from"]
pub struct ListenFds {
    named: Vec<(String, OwnedFd)>,
}

/// Takes the sockets that the service manager has passed to this process, as `LISTEN_PID`,
/// `LISTEN_FDS` and `LISTEN_FDNAMES` say. There are none where the variables are not set, or meant
/// for another process. They are closed on `exec`.
///
/// # Errors
/// [`ErrorKind::Config`] for variables that say what is not so, and [`ErrorKind::Misuse`] when they
/// were taken before.
///
/// # Examples
///
/// ```
/// let passed = slipring::systemd::listen_fds()?;
/// assert!(passed.is_empty(), "nobody has passed any to this test");
/// # Ok::<(), slipring::Error>(())
/// ```
pub fn listen_fds() -> Result<ListenFds> {
    let passed = sd_notify::listen_fds_with_names().map_err(|error| {
        Error::os("take the sockets of LISTEN_FDS", error).with_kind(ErrorKind::Config).because(
            "LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES are set by the service manager: a process \
             id, how many descriptors are open from 3 on, and as many names",
        )
    })?;
    let (fds, names): (Vec<RawFd>, Vec<String>) = passed.unzip();
    if fds.is_empty() {
        return Ok(ListenFds::default());
    }
    let fds = inherit::take_once(fds.into_iter()).ok_or_else(|| {
        Error::new(ErrorKind::Misuse, "take the sockets of LISTEN_FDS")
            .because("they were taken before, and have an owner")
    })?;
    Ok(ListenFds { named: names.into_iter().zip(fds).collect() })
}

impl ListenFds {
    /// Those with this name, `FileDescriptorName=` in the socket's unit, which is the unit's own
    /// name by default. In their order; none if there is none.
    pub fn take(&mut self, name: &str) -> Vec<OwnedFd> {
        let taken = self.named.extract_if(.., |(known, _)| known == name);
        taken.map(|(_, fd)| fd).collect()
    }

    /// All that are left, in their order.
    pub fn take_all(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.named).into_iter().map(|(_, fd)| fd).collect()
    }

    /// The names of those that are left, one for each.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.named.iter().map(|(name, _)| name.as_str())
    }

    /// How many are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.named.len()
    }

    /// Whether none is left, or none was passed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_taken_by_name_and_in_order() {
        let file = || OwnedFd::from(std::fs::File::open("Cargo.toml").expect("a file"));
        let named = ["http", "admin", "http"].map(|name| (name.to_owned(), file()));
        let mut passed = ListenFds { named: named.into() };
        assert_eq!(passed.take("https").len(), 0);
        assert_eq!(passed.take("http").len(), 2);
        assert_eq!(passed.names().collect::<Vec<_>>(), ["admin"]);
        assert_eq!((passed.take_all().len(), passed.is_empty()), (1, true));
    }
}
