//! Receive buffers that the kernel picks from, and the leases on those it has filled.
//!
//! A buffer is at any time in exactly one of three places: with the kernel, leased to whoever
//! holds its [`Lease`], or in the list of returned ones that waits to be given to the kernel
//! again. The memory outlives every lease, and the driver leaks it rather than freeing it when it
//! could not see the end of every operation (see `Uring::drop`).

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::ops::Deref;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::pages::Pages;

/// The memory of a core's receive buffers and the account of who has which. It goes with the last
/// lease, each of which holds the pool; and the driver forgets its own hold on the pool unless it
/// has seen the end of every operation, so the kernel does not write any more.
pub(crate) struct Pool {
    memory: Memory,
    /// A power of two.
    buffers: u32,
    buffer_bytes: u32,
    /// The id of its first buffer: a core's pools share the range of ids.
    first: u16,
    books: RefCell<Books>,
    leased: Cell<u32>,
}

enum Memory {
    Pages(Pages),
    /// Of a pool that the kernel never has, with one buffer in it.
    Heap(Box<[u8]>),
}

#[derive(Default)]
struct Books {
    /// Who may touch the buffer; indexed by buffer id.
    places: Vec<Place>,
    /// Those to be given to the kernel, latest return last.
    returned: Vec<u16>,
    /// How many the kernel has.
    kernels: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Kernel,
    Leased,
    Returned,
}

impl Pool {
    /// Makes `buffers` (a power of two up to 2^15) of `buffer_bytes` each, all returned. Their ids
    /// count from `first`. They take up memory once they are used.
    pub(crate) fn new(first: u16, buffers: u16, buffer_bytes: u32) -> io::Result<Rc<Pool>> {
        assert!(u64::from(buffer_bytes) <= Span::MASK && buffers <= Span::BUFFERS);
        let memory = Pages::new(usize::from(buffers) * (buffer_bytes + COLOUR_BYTES) as usize)?;
        let memory = Memory::Pages(memory);
        let places = vec![Place::Returned; usize::from(buffers)];
        // The kernel takes from the front: start it with the lowest buffers.
        let returned = (0..buffers).rev().collect();
        let books = RefCell::new(Books { places, returned, kernels: 0 });
        let leased = Cell::new(0);
        let buffers = buffers.into();
        Ok(Rc::new(Pool { memory, buffers, buffer_bytes, first, books, leased }))
    }

    pub(crate) fn buffers(&self) -> u32 {
        self.buffers
    }

    pub(crate) fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// How many buffers are out with leases.
    pub(crate) fn leased(&self) -> u32 {
        self.leased.get()
    }

    /// How many wait to be given to the kernel.
    pub(crate) fn returned(&self) -> usize {
        self.books.borrow().returned.len()
    }

    /// Takes over a buffer that the kernel says it has filled with `len` bytes.
    ///
    /// `None` when the kernel can't have had it: an id out of range, one that is leased or
    /// returned already, or more bytes than the buffer holds.
    pub(crate) fn lease(self: &Rc<Pool>, id: u16, len: u32) -> Option<Lease> {
        let buffer = id.checked_sub(self.first)?;
        let mut books = self.books.borrow_mut();
        let place = books.places.get_mut(usize::from(buffer))?;
        if *place != Place::Kernel || len > self.buffer_bytes {
            return None;
        }
        *place = Place::Leased;
        books.kernels -= 1;
        self.leased.set(self.leased.get() + 1);
        Some(Lease { pool: Rc::clone(self), span: Span::new(buffer, len) })
    }

    /// Moves returned buffers to the kernel until it has `wanted`, handing each to `give`, latest
    /// return first: it is the likeliest to be in cache.
    pub(crate) fn give(&self, wanted: usize, mut give: impl FnMut(u16)) {
        let books = &mut *self.books.borrow_mut();
        while books.kernels < wanted
            && let Some(buffer) = books.returned.pop()
        {
            books.places[usize::from(buffer)] = Place::Kernel;
            books.kernels += 1;
            give(self.first + buffer);
        }
    }

    fn stride(&self) -> usize {
        (self.buffer_bytes + COLOUR_BYTES) as usize
    }

    /// Where a buffer is, by its place in the pool.
    fn address(&self, buffer: u16) -> NonNull<u8> {
        let (address, bytes) = match &self.memory {
            Memory::Pages(pages) => (pages.address(), pages.bytes()),
            Memory::Heap(bytes) => (NonNull::from(&**bytes).cast(), bytes.len()),
        };
        let offset = usize::from(buffer) * self.stride();
        assert!(offset <= bytes);
        // SAFETY: the offset was just checked to lie inside the memory, or right behind it.
        unsafe { address.add(offset) }
    }

    /// Plays the kernel in the simulator: writes into a buffer that the kernel has.
    #[cfg(test)]
    pub(crate) fn write_as_kernel(&self, id: u16, bytes: &[u8]) {
        let buffer = id - self.first;
        assert_eq!(self.books.borrow().places[usize::from(buffer)], Place::Kernel);
        assert!(bytes.len() <= self.buffer_bytes as usize);
        let to = self.address(buffer);
        // SAFETY: the buffer is the kernel's, so no lease reads it, and the bytes fit.
        unsafe { to.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
    }

    /// The books of the buffers as (with the kernel, leased, returned); the three add up.
    #[cfg(test)]
    pub(crate) fn census(&self) -> (usize, usize, usize) {
        let books = self.books.borrow();
        let count = |place| books.places.iter().filter(|p| **p == place).count();
        (count(Place::Kernel), count(Place::Leased), count(Place::Returned))
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("buffers", &self.buffers())
            .field("buffer_bytes", &self.buffer_bytes)
            .field("leased", &self.leased())
            .finish_non_exhaustive()
    }
}

/// The bytes in one filled receive buffer. Dropping it returns the buffer.
///
/// Two words, as each is moved a dozen times on its way to the handler and out again.
pub(crate) struct Lease {
    pool: Rc<Pool>,
    span: Span,
}

/// Which bytes of which buffer: from the lowest bits, 24 for where they begin, 24 for where they
/// end, 15 for the buffer, and whether the kernel had more behind these.
#[derive(Clone, Copy)]
struct Span(u64);

impl Span {
    const END: u32 = 24;
    const BUFFER: u32 = 48;
    const LEFT_SOME: u64 = 1 << 63;
    /// The largest position in a buffer.
    const MASK: u64 = (1 << 24) - 1;
    const BUFFERS: u16 = 1 << 15;

    fn new(buffer: u16, len: u32) -> Span {
        Span(u64::from(buffer) << Span::BUFFER | u64::from(len) << Span::END)
    }

    fn buffer(self) -> u16 {
        (self.0 >> Span::BUFFER) as u16 & (Span::BUFFERS - 1)
    }

    fn start(self) -> usize {
        (self.0 & Span::MASK) as usize
    }

    fn len(self) -> usize {
        (self.0 >> Span::END & Span::MASK) as usize - self.start()
    }
}

impl Lease {
    /// Bytes that are in nobody's way: a pool for themselves.
    pub(crate) fn copied(bytes: &[u8]) -> Lease {
        let pool = Pool {
            memory: Memory::Heap(bytes.into()),
            buffers: 1,
            buffer_bytes: bytes.len() as u32,
            first: 0,
            books: RefCell::default(),
            leased: Cell::new(1),
        };
        Lease { pool: Rc::new(pool), span: Span::new(0, bytes.len() as u32) }
    }

    /// With what the kernel has said of the bytes behind these.
    pub(crate) fn leaving_some(mut self, left_some: bool) -> Lease {
        if left_some {
            self.span.0 |= Span::LEFT_SOME;
        }
        self
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.span.len()
    }

    /// Drops the first `count` bytes.
    ///
    /// # Panics
    /// When there are fewer.
    #[inline]
    pub(crate) fn advance(&mut self, count: usize) {
        assert!(count <= self.len(), "advance by {count} in a chunk of {}", self.len());
        self.span.0 += count as u64;
    }

    /// Whether more bytes were there that did not fit.
    pub(crate) fn left_some(&self) -> bool {
        self.span.0 & Span::LEFT_SOME != 0
    }

    /// Whether more than half of the pool is out with leases, so that whoever wants to keep these
    /// bytes had better copy them; not when they are many, as then a copy costs more than that
    /// others have to do with smaller buffers.
    pub(crate) fn is_pool_short(&self) -> bool {
        self.is_pool_half_out() && self.len() <= COPY_BYTES_MAX
    }

    /// Whether more than half of the pool is out with leases.
    pub(crate) fn is_pool_half_out(&self) -> bool {
        self.pool.leased() > self.pool.buffers() / 2
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let buffer = self.pool.address(self.span.buffer());
        // SAFETY: it begins before its end, which was checked against the buffer's size.
        let begin = unsafe { buffer.add(self.span.start()) };
        // SAFETY: the place is `Leased` until this lease is dropped, so the kernel does not write
        // here and nobody else does; the bytes are inside of the buffer; the pool's memory is
        // initialised and lives as long as the lease.
        unsafe { std::slice::from_raw_parts(begin.as_ptr(), self.len()) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let buffer = self.span.buffer();
        let mut books = self.pool.books.borrow_mut();
        // A pool of copied bytes has no books: it goes with them.
        if let Some(place) = books.places.get_mut(usize::from(buffer)) {
            *place = Place::Returned;
            books.returned.push(buffer);
            self.pool.leased.set(self.pool.leased.get() - 1);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({} bytes in buffer {})", self.len(), self.span.buffer())
    }
}

/// The ring through which returned buffers reach the kernel (`io_uring_register_buf_ring(3)`).
#[derive(Debug)]
pub(crate) struct BufRing {
    /// The driver drops it only after the ring was unregistered and every operation has ended, and
    /// forgets it otherwise.
    entries: Pages,
    tail: u16,
    pool: Rc<Pool>,
}

impl BufRing {
    pub(crate) fn new(pool: Rc<Pool>) -> io::Result<BufRing> {
        let entries = Pages::new(pool.buffers() as usize * size_of::<BufRingEntry>())?;
        Ok(BufRing { entries, tail: 0, pool })
    }

    /// Registers the buffers of a pool as a group; none of them is the kernel's yet. The entries
    /// have to live until the group is unregistered, or for good.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(super) fn register(uring: &IoUring, group: u16, pool: Rc<Pool>) -> io::Result<BufRing> {
        let bufs = BufRing::new(pool)?;
        let (submitter, entries) = (uring.submitter(), bufs.pool.buffers() as u16);
        let address = bufs.address();
        // SAFETY: see above; `Uring::drop` does either.
        unsafe { submitter.register_buf_ring_with_flags(address, entries, group, 0) }?;
        Ok(bufs)
    }

    fn entries(&self) -> NonNull<BufRingEntry> {
        self.entries.address().cast()
    }

    pub(crate) fn address(&self) -> u64 {
        self.entries().as_ptr() as u64
    }

    pub(crate) fn pool(&self) -> &Rc<Pool> {
        &self.pool
    }

    /// Gives returned buffers to the kernel until it has `wanted`.
    pub(crate) fn publish(&mut self, wanted: usize) {
        if self.pool.returned() == 0 {
            return;
        }
        let mask = self.pool.buffers() as u16 - 1;
        let (entries, pool, tail) = (self.entries(), &self.pool, &mut self.tail);
        pool.give(wanted, |id| {
            // SAFETY: masked by the number of entries, a power of two.
            let entry = unsafe { entries.add(usize::from(*tail & mask)) };
            // SAFETY: the entry lies behind the published tail, so the kernel does not read it;
            // its fields are set one by one, since the first entry's last word is the tail.
            let entry = unsafe { &mut *entry.as_ptr() };
            entry.set_addr(pool.address(id - pool.first).as_ptr() as u64);
            entry.set_len(pool.buffer_bytes());
            entry.set_bid(id);
            *tail = tail.wrapping_add(1);
        });
        // SAFETY: the first entry of a ring is where its tail lives.
        let published = unsafe { BufRingEntry::tail(self.entries().as_ptr()) };
        // SAFETY: aligned, alive as long as `self`, and only ever accessed atomically.
        let published = unsafe { AtomicU16::from_ptr(published.cast_mut()) };
        // Release: the entries must be seen before the tail that covers them.
        published.store(self.tail, Ordering::Release);
    }
}

/// Buffers that begin a page apart would all fall into the same few sets of the caches, so there is
/// a cache line between them.
const COLOUR_BYTES: u32 = 64;

/// More bytes than this are not copied out of a buffer, however short the pool is.
const COPY_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_in_one_place_at_a_time() {
        let pool = Pool::new(0, 8, 64).unwrap();
        assert_eq!(pool.census(), (0, 0, 8));
        assert!(pool.lease(3, 10).is_none(), "not with the kernel yet");
        let mut given = Vec::new();
        pool.give(usize::MAX, |buffer| given.push(buffer));
        assert_eq!(given, [0, 1, 2, 3, 4, 5, 6, 7]);
        pool.write_as_kernel(3, b"hello");
        let lease = pool.lease(3, 5).unwrap();
        assert_eq!(&*lease, b"hello");
        assert!(pool.lease(3, 5).is_none(), "a second lease of the same buffer");
        assert!(pool.lease(8, 5).is_none(), "no such buffer");
        assert!(pool.lease(4, 65).is_none(), "more than a buffer holds");
        assert_eq!(pool.census(), (7, 1, 0));
        drop(lease);
        assert_eq!(pool.census(), (7, 0, 1));
    }

    #[test]
    fn ids_count_from_the_first_of_the_pool() {
        let pool = Pool::new(512, 4, 64).unwrap();
        let mut given = Vec::new();
        pool.give(usize::MAX, |buffer| given.push(buffer));
        assert_eq!(given, [512, 513, 514, 515]);
        pool.write_as_kernel(513, b"large");
        assert_eq!(&*pool.lease(513, 5).unwrap(), b"large");
        assert!(pool.lease(1, 5).is_none() && pool.lease(516, 5).is_none(), "not of this pool");
    }

    #[test]
    fn a_lease_keeps_the_memory_alive() {
        let pool = Pool::new(0, 8, 64).unwrap();
        pool.give(usize::MAX, |_| ());
        pool.write_as_kernel(0, b"still here");
        let lease = pool.lease(0, 10).unwrap();
        drop(pool);
        assert_eq!(&*lease, b"still here");
    }

    #[test]
    fn the_pool_is_short_above_half() {
        let pool = Pool::new(0, 4, 64).unwrap();
        pool.give(usize::MAX, |_| ());
        let leases: Vec<Lease> = (0..2).map(|n| pool.lease(n, 1).unwrap()).collect();
        assert!(!leases[0].is_pool_short());
        let third = pool.lease(2, 1).unwrap();
        assert!(third.is_pool_short());
    }
}
