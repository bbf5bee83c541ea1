//! SIGTERM and SIGINT as rings of an eventfd, for those who ask for it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use super::wake::{EventFd, ring_raw};

/// While alive, the signals ring the bell and do nothing else; dropping it restores what was.
#[derive(Debug)]
pub(crate) struct SignalBell {
    bell: EventFd,
    previous: Vec<(libc::c_int, libc::sighandler_t)>,
}

/// The descriptor that the handler writes to; a handler has no other way to be told.
static BELL: AtomicI32 = AtomicI32::new(-1);

impl SignalBell {
    /// Installs the handlers.
    ///
    /// # Errors
    /// `AlreadyExists` when another bell of this process is installed: signals are global.
    pub(crate) fn install(signals: &[libc::c_int]) -> io::Result<SignalBell> {
        let bell = EventFd::new()?;
        let fd = bell.as_raw_fd();
        if BELL.compare_exchange(-1, fd, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        let mut installed = SignalBell { bell, previous: Vec::new() };
        for &signal in signals {
            let handler = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
            // SAFETY: the handler only loads an atomic and writes to an eventfd, both
            // async-signal-safe. `signal` sets SA_RESTART, so other threads' calls go on.
            let previous = unsafe { libc::signal(signal, handler) };
            if previous == libc::SIG_ERR {
                return Err(io::Error::last_os_error());
            }
            installed.previous.push((signal, previous));
        }
        Ok(installed)
    }

    pub(crate) fn bell(&self) -> &EventFd {
        &self.bell
    }
}

impl Drop for SignalBell {
    fn drop(&mut self) {
        for &(signal, previous) in &self.previous {
            // SAFETY: `previous` is what `signal` gave us for this signal.
            unsafe { libc::signal(signal, previous) };
        }
        // The handlers are gone; one that still runs on another thread reads -1 or writes once
        // into an eventfd that closes after this line.
        BELL.store(-1, Ordering::SeqCst);
    }
}

extern "C" fn on_signal(_signal: libc::c_int) {
    let fd = BELL.load(Ordering::SeqCst);
    if fd >= 0 {
        // SAFETY: errno's address is valid on this thread.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above; the interrupted code must find its errno unchanged.
        let saved = unsafe { *errno };
        ring_raw(fd);
        // SAFETY: as above.
        unsafe { *errno = saved };
    }
}
