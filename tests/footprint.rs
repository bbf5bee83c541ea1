//! What an idle connection holds of the server's memory, after one echo.
//!
//! The allocator counts what the core's thread has allocated and not freed, with what malloc adds.
//! Connections come in the same small groups from beginning to end, so that what they share for
//! the moment is as large before as after; and as many as leave the tables' room about as full.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};

use slipring::Server;

mod common;

#[test]
fn an_idle_connection_holds_less_than_512_bytes() {
    let config = common::config().cpus(&common::first_cpus(1));
    let server = Server::new(config).listen_with("127.0.0.1:0", |_core| {
        IS_CORE.set(true);
        common::echo
    });
    let (running, addr) = common::start(server);
    let mut streams = Vec::with_capacity(2 * CROWD);
    let first = grow(&mut streams, addr);
    let second = grow(&mut streams, addr);
    let each = (second - first) / CROWD as isize;
    println!("{each} bytes for each of {CROWD} idle connections");
    assert!((300..EACH_MAX).contains(&each), "{each} bytes each");
    drop(streams);
    common::settle(running, 2 * CROWD as u64);
}

/// Adds connections that have echoed once, and says how much the core holds then.
fn grow(streams: &mut Vec<TcpStream>, addr: SocketAddr) -> isize {
    for _ in 0..CROWD / GROUP {
        let mut group: Vec<_> = (0..GROUP).map(|_| common::connect(addr)).collect();
        let mut answer = [0; 64];
        group.iter_mut().for_each(|stream| stream.write_all(&[7; 64]).expect("send"));
        group.iter_mut().for_each(|stream| stream.read_exact(&mut answer).expect("receive"));
        streams.append(&mut group);
    }
    HELD.load(Relaxed)
}

struct CountBytes;

thread_local! {
    /// Constant and without a destructor: reading it allocates nothing and works at any time.
    static IS_CORE: Cell<bool> = const { Cell::new(false) };
}

/// Bytes that the core has allocated and not freed.
static HELD: AtomicIsize = AtomicIsize::new(0);

/// What malloc takes for so much: a word more, in steps of two words.
fn taken(layout: Layout) -> isize {
    let word = size_of::<usize>();
    (layout.size() + word).next_multiple_of(2 * word) as isize
}

fn count(more: isize) {
    if IS_CORE.get() {
        HELD.fetch_add(more, Relaxed);
    }
}

#[global_allocator]
static ALLOCATOR: CountBytes = CountBytes;

// SAFETY: every call goes to the system's allocator as it is, and counting allocates nothing.
unsafe impl GlobalAlloc for CountBytes {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(taken(layout));
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-taken(layout));
        // SAFETY: the caller keeps the promises of `dealloc`, and the block is the system's.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let new = Layout::from_size_align(size, layout.align());
        count(new.map_or(0, taken) - taken(layout));
        // SAFETY: the caller keeps the promises of `realloc`, and the block is the system's.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// Twice as many fill tables that grow by doubling as much as so many do.
const CROWD: usize = 1_000;
const GROUP: usize = 20;
const EACH_MAX: isize = 512;
