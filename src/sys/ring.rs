//! The ring itself: how it is made, filled and entered.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};

use super::uring::RingSetup;

/// The ring itself and how it is entered.
pub(super) struct Ring {
    pub(super) uring: IoUring,
    /// The index that stands for the ring's descriptor, if registering it worked.
    registered: Option<u32>,
    enter_flags: u32,
    /// Accepts wait before they try, and say whether more are queued: since 6.10.
    pub(super) accepts_well: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring(fd {})", self.uring.as_raw_fd())
    }
}

impl Ring {
    pub(super) fn new(setup: RingSetup) -> io::Result<Ring> {
        let uring = build(setup)?;
        let enter_flags = if uring.params().is_feature_no_iowait() { ENTER_NO_IOWAIT } else { 0 };
        // Both came with the same release.
        let accepts_well = uring.params().is_feature_recvsend_bundle();
        Ok(Ring { uring, registered: None, enter_flags, accepts_well })
    }

    #[inline]
    pub(super) fn push(&mut self, entry: &squeue::Entry) -> bool {
        let mut queue = self.uring.submission();
        // SAFETY: what the entry points to is owned by `Uring` until its final completion.
        unsafe { queue.push(entry) }.is_ok()
    }

    /// `io_uring_enter(2)` with the flags and the descriptor that this ring wants; who waits may
    /// have a limit.
    pub(super) fn enter(
        &self,
        to_submit: u32,
        waits: bool,
        limit: Option<Duration>,
    ) -> io::Result<u32> {
        let (fd, mut flags) = match self.registered {
            Some(index) => (index as libc::c_int, self.enter_flags | ENTER_REGISTERED_RING),
            None => (self.uring.as_raw_fd(), self.enter_flags),
        };
        flags |= ENTER_GETEVENTS;
        let want = u32::from(waits);
        let (timeout, arguments);
        let (argument, size) = if let Some(limit) = limit {
            timeout = Timespec::from(limit);
            arguments = SubmitArgs::new().timespec(&timeout);
            flags |= ENTER_EXT_ARG;
            (std::ptr::from_ref(&arguments).cast(), size_of_val(&arguments))
        } else {
            (std::ptr::null::<libc::c_void>(), 0)
        };
        // SAFETY: the argument is null, or a `SubmitArgs` that outlives the call and wraps the
        // kernel's io_uring_getevents_arg, whose size is passed.
        let result = unsafe {
            libc::syscall(libc::SYS_io_uring_enter, fd, to_submit, want, flags, argument, size)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as u32) }
    }

    /// Registers the ring's descriptor, which saves the kernel a look-up at every enter. Not
    /// being able to is no error: a task has only 16 places for this.
    pub(super) fn register_fd(&mut self) {
        let mut update =
            RsrcUpdate { offset: u32::MAX, resv: 0, data: self.uring.as_raw_fd() as u64 };
        if self.ring_fds(REGISTER_RING_FDS, &mut update) == 1 {
            self.registered = Some(update.offset);
        }
    }

    /// A registered ring would live until its thread ends, and its listeners with it.
    pub(super) fn unregister_fd(&mut self) {
        if let Some(offset) = self.registered.take() {
            let mut update = RsrcUpdate { offset, resv: 0, data: 0 };
            self.ring_fds(UNREGISTER_RING_FDS, &mut update);
        }
    }

    fn ring_fds(&self, opcode: u32, update: &mut RsrcUpdate) -> i64 {
        let (fd, update) = (self.uring.as_raw_fd(), std::ptr::from_mut(update));
        // SAFETY: one io_uring_rsrc_update, as both opcodes want, alive during the call.
        unsafe { libc::syscall(libc::SYS_io_uring_register, fd, opcode, update, 1) }
    }
}

fn build(setup: RingSetup) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_taskrun_flag()
        .setup_cqsize(setup.cq_entries)
        .setup_clamp()
        .dontfork();
    // NO_SQARRAY came with 6.6 and is all that may be missing from 6.1 on.
    match builder.clone().setup_no_sqarray().build(setup.sq_entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder.build(setup.sq_entries),
        result => result,
    }
}

/// Sets a field of an entry that the crate has no name for.
pub(super) fn with_ioprio(mut entry: squeue::Entry, ioprio: u16) -> squeue::Entry {
    // SAFETY: an entry is the kernel's io_uring_sqe and nothing else, whose third and fourth byte
    // are this field.
    let field = unsafe { (&raw mut entry).cast::<u16>().add(1) };
    // SAFETY: inside of the entry, which is aligned for more than this.
    unsafe { field.write(ioprio) };
    entry
}

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct RsrcUpdate {
    offset: u32,
    resv: u32,
    data: u64,
}

// From linux/io_uring.h; the crate keeps them to itself.
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const ENTER_NO_IOWAIT: u32 = 1 << 7;
const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;
pub(super) const RECV_MULTISHOT: u16 = 1 << 1;
pub(super) const ACCEPT_POLL_FIRST: u16 = 1 << 2;
const _: () = assert!(size_of::<squeue::Entry>() == 64);
/// `SubmitArgs` is passed as the `struct io_uring_getevents_arg` that it wraps.
const _: () = assert!(size_of::<SubmitArgs<'static, 'static>>() == 24);
