//! The eventfd that wakes a core from another thread (`eventfd(2)`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A counter in the kernel that the core polls; ringing it is one system call and never blocks.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    pub(crate) fn new() -> io::Result<EventFd> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just created, owned by nobody else.
        Ok(EventFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds one. The counter saturates only after 2^64 rings without a reader, and a full one is
    /// readable all the same, so the result does not matter. Safe in a signal handler.
    pub(crate) fn ring(&self) {
        ring_raw(self.0.as_raw_fd());
    }

    /// Sleeps until the counter is not zero, takes it back to zero and says what it was.
    pub(crate) fn wait(&self) -> io::Result<u64> {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        loop {
            // SAFETY: one valid pollfd.
            if unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            return Ok(self.clear());
        }
    }

    /// Takes the counter back to zero and says what it was.
    pub(crate) fn clear(&self) -> u64 {
        let mut count = 0u64;
        // SAFETY: eight writable bytes, as an eventfd wants; it does not block.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
        count
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

pub(super) fn ring_raw(fd: RawFd) {
    let one = 1u64;
    // SAFETY: eight readable bytes; `write` is async-signal-safe (signal-safety(7)).
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no eventfd poll")]
    fn a_ring_before_the_wait_is_not_lost() {
        let bell = EventFd::new().unwrap();
        bell.ring();
        bell.ring();
        assert_eq!(bell.wait().unwrap(), 2);
        std::thread::scope(|scope| {
            scope.spawn(|| bell.ring());
            bell.wait().unwrap();
        });
    }
}
