//! What the benches' two hand-written rings share: set-up, `io_uring_enter`, and a provided-buffer
//! ring.
//!
//! Nothing here is slipring's: the yardstick and the load generator must not get slower or faster
//! with it.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU16, Ordering},
};

use io_uring::{IoUring, Submitter, types::BufRingEntry, types::CancelBuilder};

/// The buffer group of the one buffer ring that each of these rings has.
pub const GROUP: u16 = 0;

/// Bits of `ioprio` on a receive (`include/uapi/linux/io_uring.h`); the crate's `RecvMulti` cannot
/// set the first.
pub const POLL_FIRST: u16 = 1;
pub const RECV_MULTISHOT: u16 = 2;

/// A ring for the thread that calls: nothing completes behind its back, and no other thread may
/// submit.
pub fn open(sq_entries: u32, cq_entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_taskrun_flag()
        .setup_cqsize(cq_entries)
        .setup_clamp();
    let mut without_array = builder.clone();
    without_array.setup_no_sqarray();
    match without_array.build(sq_entries) {
        // NO_SQARRAY came with 6.6.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => builder.build(sq_entries),
        built => built,
    }
}

/// The way into the kernel: `io_uring_enter` on the registered ring fd, counted.
///
/// The crate keeps the registration in the `Submitter`, and its short-hands build a fresh one each
/// time, so that a registered fd would go unused; this makes the call itself.
pub struct Door<'r> {
    submitter: Submitter<'r>,
    ring_fd: RawFd,
    fd: RawFd,
    flags: u32,
    /// Calls of `io_uring_enter` so far.
    pub enters: u64,
}

impl<'r> Door<'r> {
    pub fn new(submitter: Submitter<'r>, ring_fd: RawFd) -> Self {
        let mut update = RsrcUpdate { offset: u32::MAX, resv: 0, data: ring_fd as u64 };
        // SAFETY: the kernel reads and writes one update, which lives on this stack for the whole
        // call.
        let registered = unsafe {
            let (op, at) = (REGISTER_RING_FDS, ptr::from_mut(&mut update));
            libc::syscall(libc::SYS_io_uring_register, ring_fd, op, at, 1)
        };
        // All 16 slots of a thread may be taken; the plain fd then costs about 50 ns more per call.
        let (fd, flags) = match registered {
            1 => (update.offset as RawFd, ENTER_GETEVENTS | ENTER_REGISTERED_RING),
            _ => (ring_fd, ENTER_GETEVENTS),
        };
        Self { submitter, ring_fd, fd, flags, enters: 0 }
    }

    pub fn submitter(&self) -> &Submitter<'r> {
        &self.submitter
    }

    /// Submits the first `submit` entries, runs the deferred work and waits for `want` completions.
    ///
    /// A wait that was cut short is no error: the caller reaps, looks around and enters again.
    pub fn enter(&mut self, submit: usize, want: u32) -> io::Result<()> {
        self.enters += 1;
        let null = ptr::null::<libc::c_void>();
        // SAFETY: no argument is a pointer that the kernel follows; what the entries point to is
        // the pushers' duty.
        let entered = unsafe {
            let (call, submit) = (libc::SYS_io_uring_enter, submit as u32);
            libc::syscall(call, self.fd, submit, want, self.flags, null, 0usize)
        };
        if entered >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(()),
            _ => Err(error),
        }
    }

    /// Asks the kernel to end every operation; their completions still have to be reaped.
    pub fn cancel_all(&self) -> io::Result<()> {
        self.submitter.register_sync_cancel(None, CancelBuilder::any())
    }
}

impl Drop for Door<'_> {
    fn drop(&mut self) {
        if self.flags & ENTER_REGISTERED_RING == 0 {
            return;
        }
        // A registered fd keeps the ring, and so its sockets, alive until the thread exits.
        let mut update = RsrcUpdate { offset: self.fd as u32, resv: 0, data: 0 };
        // SAFETY: the kernel reads one update, which lives on this stack for the whole call.
        unsafe {
            let (op, at) = (UNREGISTER_RING_FDS, ptr::from_mut(&mut update));
            libc::syscall(libc::SYS_io_uring_register, self.ring_fd, op, at, 1)
        };
    }
}

/// A provided-buffer ring and its buffers, in one mapping that is leaked unless
/// [`Buffers::release`] is called.
pub struct Buffers {
    entries: NonNull<BufRingEntry>,
    data: NonNull<u8>,
    map_bytes: usize,
    count: u16,
    bytes: u32,
    stride: usize,
    tail: u16,
}

impl Buffers {
    /// Maps and registers `count` (a power of two) buffers of `bytes` each, and gives all of them
    /// to the kernel.
    pub fn register(submitter: &Submitter<'_>, count: u16, bytes: u32) -> io::Result<Self> {
        assert!(count.is_power_of_two(), "a buffer ring has a power of two of entries");
        let ring_bytes = usize::from(count) * size_of::<BufRingEntry>();
        // One cache line more than a buffer: starts a page apart would all fall into the same few
        // cache sets.
        let stride = bytes as usize + CACHE_LINE_BYTES;
        let map_bytes = ring_bytes.next_multiple_of(PAGE_BYTES) + usize::from(count) * stride;
        // SAFETY: a new private mapping at an address that the kernel chooses touches no memory of
        // ours.
        let map = unsafe {
            let (prot, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(ptr::null_mut(), map_bytes, prot, flags, -1, 0)
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(map.cast::<BufRingEntry>()).expect("a mapping is never at null");
        // SAFETY: the mapping is `ring_bytes`, rounded up to a page, plus the buffers: the sum is
        // inside of it.
        let data = unsafe { entries.cast::<u8>().add(ring_bytes.next_multiple_of(PAGE_BYTES)) };
        let mut buffers = Self { entries, data, map_bytes, count, bytes, stride, tail: 0 };
        // SAFETY: the mapping is page-aligned, zeroed, holds `count` entries and is unmapped only
        // by `release`, whose caller promises that the ring does not use it any more.
        unsafe { submitter.register_buf_ring_with_flags(map as u64, count, GROUP, 0) }?;
        for bid in 0..count {
            buffers.give(bid);
        }
        buffers.publish();
        Ok(buffers)
    }

    /// Puts a buffer back; the kernel sees it after the next [`Buffers::publish`].
    #[inline]
    pub fn give(&mut self, bid: u16) {
        let address = self.address(bid) as u64;
        let index = usize::from(self.tail & (self.count - 1));
        // SAFETY: `index` is below `count`, so the entry is inside the mapping.
        let mut at = unsafe { self.entries.add(index) };
        // SAFETY: the kernel reads entries up to the published tail only, and this one is not below
        // it yet; fields are set one by one, because the ring's tail lives in the last two bytes of
        // entry 0.
        let entry = unsafe { at.as_mut() };
        entry.set_addr(address);
        entry.set_len(self.bytes);
        entry.set_bid(bid);
        self.tail = self.tail.wrapping_add(1);
    }

    /// Shows the kernel all buffers that were given.
    #[inline]
    pub fn publish(&mut self) {
        // SAFETY: `entries` is the start of a live, registered buffer ring.
        let tail = unsafe { BufRingEntry::tail(self.entries.as_ptr()) };
        // SAFETY: the tail is an aligned u16 in the mapping, and the kernel only reads it.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// Where a buffer starts.
    #[inline]
    pub fn address(&self, bid: u16) -> *const u8 {
        assert!(bid < self.count, "the kernel names a buffer that does not exist");
        // SAFETY: `bid` is below `count`, so the sum stays inside the mapping.
        unsafe { self.data.add(usize::from(bid) * self.stride) }.as_ptr()
    }

    /// The first `len` bytes of a buffer.
    ///
    /// # Safety
    ///
    /// A completion has handed out `bid` with at least `len` bytes, and it has not been given back
    /// since.
    #[inline]
    pub unsafe fn filled(&self, bid: u16, len: usize) -> &[u8] {
        debug_assert!(len <= self.bytes as usize);
        // SAFETY: the buffer is inside the mapping, initialised (fresh pages are zero), and not the
        // kernel's now.
        unsafe { std::slice::from_raw_parts(self.address(bid), len) }
    }

    /// Unmaps the ring and its buffers.
    ///
    /// # Safety
    ///
    /// No operation of the ring is in flight, and none will be started.
    pub unsafe fn release(self, submitter: &Submitter<'_>) -> io::Result<()> {
        submitter.unregister_buf_ring(GROUP)?;
        // SAFETY: this is the whole mapping, nothing borrows from it (`self` is owned), and the
        // kernel has let go.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.map_bytes) };
        Ok(())
    }
}

/// Opens a ring and returns it with its raw fd, which `split` does not give.
pub fn open_with_fd(sq_entries: u32, cq_entries: u32) -> io::Result<(IoUring, RawFd)> {
    let ring = open(sq_entries, cq_entries)?;
    let fd = ring.as_raw_fd();
    Ok((ring, fd))
}

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct RsrcUpdate {
    offset: u32,
    resv: u32,
    data: u64,
}

const ENTER_GETEVENTS: u32 = 1;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;
const PAGE_BYTES: usize = 4096;
const CACHE_LINE_BYTES: usize = 64;
