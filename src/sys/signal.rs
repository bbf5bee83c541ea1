//! SIGTERM and SIGINT as rings of an eventfd, for those who ask for it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::wake::{EventFd, ring_raw};

/// While alive, the signals ring the bell and do nothing else; dropping it restores what was.
#[derive(Debug)]
pub(crate) struct SignalBell {
    previous: Vec<(libc::c_int, SigAction)>,
}

/// The bell, which is never closed: a handler may still be running on another thread when its
/// signal is handled otherwise again, and must not find its descriptor to be something else.
static BELL: OnceLock<EventFd> = OnceLock::new();
static INSTALLED: AtomicBool = AtomicBool::new(false);

#[derive(Clone, Copy)]
struct SigAction(libc::sigaction);

impl std::fmt::Debug for SigAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("sigaction")
    }
}

impl SignalBell {
    /// Installs the handlers.
    ///
    /// # Errors
    /// `AlreadyExists` when another bell of this process is installed: signals are global.
    pub(crate) fn install(signals: &[libc::c_int]) -> io::Result<SignalBell> {
        if INSTALLED.swap(true, Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        let mut installed = SignalBell { previous: Vec::new() };
        if BELL.get().is_none() {
            let _ = BELL.set(EventFd::new()?);
        }
        // What a signal of an earlier server has left is not for this one.
        installed.bell().clear();
        for &signal in signals {
            let previous = replace(signal, &ringing())?;
            installed.previous.push((signal, SigAction(previous)));
        }
        Ok(installed)
    }

    pub(crate) fn bell(&self) -> &'static EventFd {
        BELL.get().expect("invariant: set before the first bell is made")
    }
}

impl Drop for SignalBell {
    fn drop(&mut self) {
        for (signal, previous) in &self.previous {
            let _ = replace(*signal, &previous.0);
        }
        INSTALLED.store(false, Ordering::SeqCst);
    }
}

/// `sigaction(2)`: sets a signal's action and returns the one before, with its flags and mask.
fn replace(signal: libc::c_int, action: &libc::sigaction) -> io::Result<libc::sigaction> {
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: one action is read, one is written; ours only does what is safe in a handler.
    let result = unsafe { libc::sigaction(signal, action, previous.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: written by the call, which has succeeded.
    Ok(unsafe { previous.assume_init() })
}

fn ringing() -> libc::sigaction {
    // SAFETY: zero is a valid value of every field: the default action, an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // The interrupted threads' calls go on.
    action.sa_flags = libc::SA_RESTART;
    action
}

extern "C" fn on_signal(_signal: libc::c_int) {
    let Some(bell) = BELL.get() else { return };
    // SAFETY: errno's address is valid on this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; the interrupted code must find its errno unchanged.
    let saved = unsafe { *errno };
    ring_raw(bell.as_raw_fd());
    // SAFETY: as above.
    unsafe { *errno = saved };
}
