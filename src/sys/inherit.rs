//! Descriptors that this process was started with.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes over the descriptors that a service manager has passed to this process, all of which are
/// open. `None` when that was done before: they have an owner then.
pub(crate) fn take_once(fds: impl Iterator<Item = RawFd>) -> Option<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return None;
    }
    // SAFETY: open since before this program began, passed for it to own (sd_listen_fds(3)), and
    // taken here only, once.
    Some(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect())
}
