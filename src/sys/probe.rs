//! Questions to the kernel's io_uring that are answered by trying, never by a version number.
//!
//! Each question makes a small ring of its own and closes it. An `Err` holds the errno that the
//! kernel answered with; what it means is for [`refusal`](crate::refusal) to say.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use io_uring::{IoUring, Probe, opcode, squeue, types};

/// `IORING_SETUP_*`, from the kernel's `include/uapi/linux/io_uring.h`.
pub(crate) mod setup {
    pub(crate) const CQSIZE: u32 = 1 << 3;
    pub(crate) const CLAMP: u32 = 1 << 4;
    pub(crate) const SUBMIT_ALL: u32 = 1 << 7;
    pub(crate) const COOP_TASKRUN: u32 = 1 << 8;
    pub(crate) const TASKRUN_FLAG: u32 = 1 << 9;
    pub(crate) const SINGLE_ISSUER: u32 = 1 << 12;
    pub(crate) const DEFER_TASKRUN: u32 = 1 << 13;
    pub(crate) const NO_SQARRAY: u32 = 1 << 16;
}

/// `IORING_FEAT_*`, from the same header.
pub(crate) mod feature {
    pub(crate) const EXT_ARG: u32 = 1 << 8;
    /// Came with accepts that wait before they try, which have no bit of their own.
    pub(crate) const RECVSEND_BUNDLE: u32 = 1 << 14;
    pub(crate) const NO_IOWAIT: u32 = 1 << 17;
}

/// Sets up a ring with these `IORING_SETUP_*` flags and closes it.
///
/// `sq` and `cq` are the numbers of entries; `cq` counts only with [`setup::CQSIZE`]. Returns the
/// kernel's `IORING_FEAT_*` bits.
pub(crate) fn setup_flags_accepted(flags: u32, sq: u32, cq: u32) -> Result<u32, i32> {
    let mut params = Params { cq_entries: cq, flags, ..Params::default() };
    // SAFETY: io_uring_setup(2) takes a count and a pointer to its parameters, which are a live
    // local of the kernel's size and layout and are written before the call returns.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, sq, &raw mut params) };
    let fd = RawFd::try_from(result).unwrap_or(-1);
    if fd < 0 {
        return Err(errno(&io::Error::last_os_error()));
    }
    // SAFETY: the kernel made this descriptor for us just now, and nobody else knows of it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(params.features)
}

/// Whether a ring of provided buffers can be registered.
pub(crate) fn buffer_ring() -> Result<(), i32> {
    // Made before the ring and thus dropped after it, also on an early return.
    let memory = Box::new(Page([0; PAGE_BYTES_MAX]));
    let ring = small_ring()?;
    let address = (&raw const *memory).expose_provenance() as u64;
    let submitter = ring.submitter();
    // SAFETY: the memory is page-aligned, holds far more than 8 entries of 16 bytes, and lives
    // until after it is unregistered below. No receive ever selects from this group.
    unsafe { submitter.register_buf_ring_with_flags(address, 8, GROUP, 0) }
        .map_err(|error| errno(&error))?;
    submitter.unregister_buf_ring(GROUP).map_err(|error| errno(&error))
}

/// Whether the ring's own descriptor can be registered, which spares each enter a look-up.
pub(crate) fn registered_ring_fd() -> Result<(), i32> {
    let ring = small_ring()?;
    // One submitter for both calls: the registration is the submitter's state, and one that is
    // not undone pins the ring until the thread ends.
    let mut submitter = ring.submitter();
    submitter.register_ring_fd().map_err(|error| errno(&error))?;
    submitter.unregister_ring_fd().map_err(|error| errno(&error))
}

/// Whether one receive can be armed for many arrivals.
pub(crate) fn multishot_recv() -> Result<(), i32> {
    let (near, _far) = UnixStream::pair().map_err(|error| errno(&error))?;
    let receive = opcode::RecvMulti::new(types::Fd(near.as_raw_fd()), GROUP).build();
    match first_completion(&receive)? {
        // No buffers were provided, and to miss them is as good as to wait for data.
        None => Ok(()),
        Some(result) if result >= 0 || result == -libc::ENOBUFS => Ok(()),
        Some(result) => Err(-result),
    }
}

/// Whether one receive of datagrams can be armed for many arrivals.
pub(crate) fn multishot_recvmsg() -> Result<(), i32> {
    let (near, _far) = UnixDatagram::pair().map_err(|error| errno(&error))?;
    let header = super::datagram::receive_header();
    let receive = opcode::RecvMsgMulti::new(types::Fd(near.as_raw_fd()), &raw const header, GROUP);
    match first_completion(&receive.build())? {
        None => Ok(()),
        Some(result) if result >= 0 || result == -libc::ENOBUFS => Ok(()),
        Some(result) => Err(-result),
    }
}

/// Whether the kernel has all operations that the driver submits.
pub(crate) fn operations() -> Result<(), i32> {
    let ring = small_ring()?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|error| errno(&error))?;
    let has_all = OPERATIONS.iter().all(|operation| probe.is_supported(*operation));
    if has_all { Ok(()) } else { Err(libc::EOPNOTSUPP) }
}

/// Whether a call can cancel everything that is in flight.
pub(crate) fn synchronous_cancel() -> Result<(), i32> {
    let ring = small_ring()?;
    match ring.submitter().register_sync_cancel(None, types::CancelBuilder::any().all()) {
        // There was nothing to cancel.
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(errno(&error)),
        _ => Ok(()),
    }
}

/// Whether a ring can have a table of open files whose places are filled and emptied one by one.
pub(crate) fn direct_descriptors() -> Result<(), i32> {
    let ring = small_ring()?;
    let submitter = ring.submitter();
    submitter.register_files_sparse(SMALL).map_err(|error| errno(&error))?;
    submitter.unregister_files().map_err(|error| errno(&error))
}

/// Submits an operation that carries no pointer but to its own header, and returns what the kernel
/// says to it at once.
fn first_completion(entry: &squeue::Entry) -> Result<Option<i32>, i32> {
    let mut ring = small_ring()?;
    // SAFETY: a receive selects from a group that has no buffers, so it writes nothing; the header
    // that one of them points to, and the socket that each names, outlive the call.
    let pushed = unsafe { ring.submission().push(entry) };
    if pushed.is_err() {
        return Err(libc::EBUSY);
    }
    ring.submit().map_err(|error| errno(&error))?;
    let result = ring.completion().next().map(|completion| completion.result());
    // Ends what was armed, so that the socket is free before its owner closes it.
    let _ = ring.submitter().register_sync_cancel(None, types::CancelBuilder::any());
    Ok(result)
}

fn small_ring() -> Result<IoUring, i32> {
    IoUring::new(SMALL).map_err(|error| errno(&error))
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// `struct io_uring_params`; the two offset tables at its end are opaque here.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq_offsets: [u64; 5],
    cq_offsets: [u64; 5],
}

const _: () = assert!(size_of::<Params>() == 120);

/// Aligned for the largest page of any Linux that io_uring runs on (64 KiB on arm64).
#[repr(C, align(65536))]
struct Page([u8; PAGE_BYTES_MAX]);

const PAGE_BYTES_MAX: usize = 65536;
const SMALL: u32 = 8;
const OPERATIONS: [u8; 10] = [
    opcode::Accept::CODE,
    opcode::Recv::CODE,
    opcode::RecvMsg::CODE,
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::Connect::CODE,
    opcode::PollAdd::CODE,
    opcode::Timeout::CODE,
    opcode::AsyncCancel::CODE,
    opcode::FilesUpdate::CODE,
];
const GROUP: u16 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps: 1. ask whether a plain ring is to be had; 2. if so, each question has an answer;
    /// 3. if not, each question fails the same way, and none panics.
    #[test]
    fn every_question_is_answered_with_or_without_io_uring() {
        let plain = setup_flags_accepted(0, SMALL, 0);
        match plain {
            Ok(features) => assert_ne!(features & feature::EXT_ARG, 0),
            Err(errno) => assert!(errno > 0),
        }
        for answer in [
            buffer_ring(),
            registered_ring_fd(),
            multishot_recv(),
            multishot_recvmsg(),
            operations(),
            synchronous_cancel(),
            direct_descriptors(),
        ] {
            if let Err(errno) = plain {
                assert_eq!(answer, Err(errno));
            }
        }
    }

    #[test]
    fn an_unknown_flag_and_an_empty_ring_are_refused_with_an_errno() {
        assert!(setup_flags_accepted(1 << 31, SMALL, 0).is_err());
        assert!(setup_flags_accepted(0, 0, 0).is_err());
    }

    #[test]
    fn asking_leaves_no_descriptor_open() {
        // Other tests open descriptors meanwhile, so the leak would have to be large to count.
        let before = crate::sys::limits::open_fds().unwrap();
        for _ in 0..200 {
            let _ = setup_flags_accepted(setup::CLAMP, SMALL, 0);
        }
        assert!(crate::sys::limits::open_fds().unwrap() < before + 150);
    }
}
