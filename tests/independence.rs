//! On the hot path no core writes to what another one uses. The hardware watches: memory that must
//! not be written is protected, and a write to it is a fault.
//!
//! 1. Each core, and the thread that starts the server, allocates in a region of its own, where
//!    each allocation has pages of its own.
//! 2. The connections of one core echo, and all regions but its own are protected. A fault is noted
//!    with who has written, and the page is opened for good, so that the server goes on.
//! 3. The same for each core in turn, and then for all of them at the same time, when only what the
//!    starting thread has allocated is protected.
//!
//! A core may write to nothing that another thread has allocated, but for what is its own: to that
//! no other core writes, and it fills cache lines, wherever an allocator puts it. Whatever cores
//! share is allocated by one of those threads; apart from statics, of which the library has none
//! that a core writes to once it runs, and from what the kernel maps for a core's ring.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::SeqCst};

use common::{config, connect, length, settle, start};
use slipring::{Balance, Connection, Running, Server};

#[test]
fn an_echo_writes_to_no_memory_that_cores_share() {
    note_faults();
    let (running, mut clients) = serve();
    clients.iter_mut().for_each(|clients| echo(clients, b'e', 100));
    let mut owners = BTreeMap::new();
    let mut faults = Vec::new();
    for (core, clients) in clients.iter_mut().enumerate() {
        let own = REGION_OF[core].load(SeqCst);
        let others: Vec<usize> = (0..REGIONS).filter(|region| *region != own).collect();
        let writes = watch(&others, || echo(clients, b'e', ECHOES));
        assert!(!writes.is_empty(), "its counters at least: nothing is watched");
        faults.extend(judge(&mut owners, writes));
    }
    for _ in 0..20 * length() {
        let together = || {
            let echo = |clients: &mut Vec<_>| echo(clients, b'e', ECHOES / 20);
            std::thread::scope(|scope| {
                clients.iter_mut().for_each(|clients| drop(scope.spawn(|| echo(clients))));
            });
        };
        let writes = watch(&[STARTER], together);
        faults.extend(judge(&mut owners, writes));
    }
    println!("allocations of the starting thread that a core writes to: {owners:?}");
    assert!(faults.is_empty(), "{faults:?}");

    // And if one did, it would be seen.
    for clients in &mut clients {
        let writes = watch(&[STARTER], || echo(clients, b's', 1));
        faults.extend(judge(&mut owners, writes));
    }
    assert!(faults.len() >= CORES, "of {CORES} cores that write to one counter: {faults:?}");
    let connects = clients.iter().map(Vec::len).sum::<usize>() as u64;
    drop(clients);
    settle(running, connects);
}

/// A write that was not to be: to which page, and the region whose thread wrote.
#[derive(Debug)]
struct Written {
    page: usize,
    writer: usize,
}

/// What is wrong with the writes. `owners` knows who has written to each page so far.
fn judge(owners: &mut BTreeMap<usize, usize>, writes: Vec<Written>) -> Vec<String> {
    let fault = |Written { page, writer }| {
        let region = page / REGION_PAGES;
        if writer == region {
            return None; // An idle core that had something to do after all.
        }
        let fault = match owners.insert(page, writer) {
            Some(other) if other != writer => format!("{other} writes there too"),
            _ if region != STARTER => "it belongs to another core".to_owned(),
            _ if !FILLS_LINES[page].load(SeqCst) => "it may share a cache line".to_owned(),
            _ => return None,
        };
        Some(format!("the thread of region {writer} writes to page {page}: {fault}"))
    };
    writes.into_iter().filter_map(fault).collect()
}

/// A server of several cores, and its connections by core.
fn serve() -> (Running, Vec<Vec<TcpStream>>) {
    STARTING.store(true, SeqCst);
    REGION.set(STARTER);
    let shared = Arc::new(AtomicU64::new(0));
    let config = config().cpus(&format!("0-{}", CORES - 1)).balance(Balance::Least).check_ms(0);
    let server = Server::new(config).listen_with("127.0.0.1:0", move |core| {
        REGION_OF[core.index].store(region().expect("a core's"), SeqCst);
        let (index, shared) = (core.index as u8, Arc::clone(&shared));
        move |conn| answer(conn, index, Arc::clone(&shared))
    });
    let (running, addr) = start(server);
    STARTING.store(false, SeqCst);
    REGION.set(NOWHERE);
    let mut clients: Vec<Vec<TcpStream>> = (0..CORES).map(|_| Vec::new()).collect();
    for _ in 0..CORES * CONNECTIONS_EACH {
        let (mut client, mut core) = (connect(addr), [0]);
        client.read_exact(&mut core).expect("the number of its core");
        clients[usize::from(core[0])].push(client);
    }
    assert!(clients.iter().all(|clients| !clients.is_empty()), "{clients:?}");
    let used: Vec<usize> = USED.iter().map(|used| used.load(SeqCst)).collect();
    assert!(used.iter().all(|used| *used <= REGION_BYTES), "regions' bytes: {used:?}");
    (running, clients)
}

/// Tells the number of its core, then echoes; what begins with an `s` is counted, for all cores.
async fn answer(mut conn: Connection, core: u8, shared: Arc<AtomicU64>) -> slipring::Result<()> {
    conn.write(&[core]).await?;
    while let Some(chunk) = conn.recv().await? {
        if chunk[0] == b's' {
            shared.fetch_add(1, SeqCst);
        }
        conn.send(chunk).await?;
    }
    Ok(())
}

/// So many echoes on all connections together, all of them in flight at once.
fn echo(clients: &mut [TcpStream], first: u8, echoes: usize) {
    let mut message = [0; 64];
    message[0] = first;
    for _ in 0..echoes.div_ceil(clients.len()) {
        clients.iter_mut().for_each(|client| client.write_all(&message).expect("send"));
        clients.iter_mut().for_each(|client| client.read_exact(&mut message).expect("an answer"));
    }
}

// ---- the regions ----

struct Regions;

#[global_allocator]
static ALLOCATOR: Regions = Regions;

// SAFETY: memory in a region is given out once and never again; all else is the system's.
unsafe impl GlobalAlloc for Regions {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(region) = region().filter(|_| layout.align() <= PAGE_BYTES) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc(layout) };
        };
        let bytes = layout.size().next_multiple_of(PAGE_BYTES);
        let offset = USED[region].fetch_add(bytes, SeqCst);
        if offset + bytes > REGION_BYTES {
            return std::ptr::null_mut();
        }
        let offset = region * REGION_BYTES + offset;
        let fills_lines = layout.align() >= LINE_BYTES && layout.size().is_multiple_of(LINE_BYTES);
        FILLS_LINES[offset / PAGE_BYTES].store(fills_lines, SeqCst);
        std::ptr::with_exposed_provenance_mut(BASE.load(SeqCst) + offset)
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        if page_of(address.addr()).is_none() {
            // SAFETY: the caller's promise, and it is not of a region, so it is the system's.
            unsafe { System.dealloc(address, layout) };
        }
    }
}

/// The region that this thread allocates in. Threads that begin while a server starts are cores.
fn region() -> Option<usize> {
    let region = REGION.try_with(|region| {
        if region.get() == UNSEEN {
            let starting = STARTING.load(SeqCst);
            region.set(if starting { 1 + CORES_SEEN.fetch_add(1, SeqCst) } else { NOWHERE });
        }
        region.get()
    });
    region.ok().filter(|region| *region < REGIONS)
}

fn page_of(address: usize) -> Option<usize> {
    let offset = address.checked_sub(BASE.load(SeqCst))?;
    Some(offset / PAGE_BYTES).filter(|page| *page < PAGES)
}

/// Protects the regions meanwhile. Which pages of them are written, and by whom?
fn watch(regions: &[usize], act: impl FnOnce()) -> Vec<Written> {
    WRITERS.iter().for_each(|writer| writer.store(0, SeqCst));
    let protect_all = |protection| {
        regions.iter().for_each(|region| protect(region * REGION_PAGES, REGION_PAGES, protection));
    };
    protect_all(libc::PROT_READ);
    act();
    protect_all(libc::PROT_READ | libc::PROT_WRITE);
    let writers = WRITERS.iter().map(|writer| usize::from(writer.load(SeqCst))).enumerate();
    let written = writers.filter(|(_, writer)| *writer > 0);
    written.map(|(page, writer)| Written { page, writer: writer - 1 }).collect()
}

fn protect(page: usize, count: usize, protection: c_int) {
    let address = BASE.load(SeqCst) + page * PAGE_BYTES;
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: pages of the regions, where only what this test is about can fault.
    let protected = unsafe { libc::mprotect(address, count * PAGE_BYTES, protection) };
    assert_eq!(protected, 0, "mprotect");
}

/// Makes the regions, and has faults in them noted.
fn note_faults() {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (protection, bytes) = (libc::PROT_READ | libc::PROT_WRITE, PAGES * PAGE_BYTES);
    // SAFETY: a new mapping, at an address of the kernel's choice, touches no other memory.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    BASE.store(base.expose_provenance(), SeqCst);
    // SAFETY: plain numbers and an optional function, for all of which zero is a value.
    let mut action = unsafe { std::mem::zeroed::<libc::sigaction>() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_fault;
    (action.sa_sigaction, action.sa_flags) = (handler as usize, libc::SA_SIGINFO);
    // SAFETY: a handler that makes no call that a signal's handler may not make.
    let set = unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel's, and there during the call.
    let info = unsafe { &*info };
    // SAFETY: the signal is one that has an address.
    let address = unsafe { info.si_addr() }.addr();
    let Some(page) = page_of(address) else {
        // A fault like any other: it comes again, and then it ends the process.
        // SAFETY: the default is always valid.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    };
    let writer = REGION.with(Cell::get).min(NOWHERE);
    WRITERS[page].store(writer as u8 + 1, SeqCst);
    protect(page, 1, libc::PROT_READ | libc::PROT_WRITE);
}

thread_local! {
    static REGION: Cell<usize> = const { Cell::new(UNSEEN) };
}

static BASE: AtomicUsize = AtomicUsize::new(usize::MAX);
static USED: [AtomicUsize; REGIONS] = [const { AtomicUsize::new(0) }; REGIONS];
static STARTING: AtomicBool = AtomicBool::new(false);
static CORES_SEEN: AtomicUsize = AtomicUsize::new(0);
/// The region of each core of the server.
static REGION_OF: [AtomicUsize; CORES] = [const { AtomicUsize::new(0) }; CORES];
/// Whether the allocation that begins with a page fills cache lines, aligned to them.
static FILLS_LINES: [AtomicBool; PAGES] = [const { AtomicBool::new(false) }; PAGES];
/// The region of who has written to a page that was protected, plus one.
static WRITERS: [AtomicU8; PAGES] = [const { AtomicU8::new(0) }; PAGES];

const CORES: usize = 4;
const CONNECTIONS_EACH: usize = 8;
/// On each core.
const ECHOES: usize = 10_000;
/// For the thread that starts the server, one that tries out beforehand whether a ring can be had,
/// and the cores.
const REGIONS: usize = 2 + CORES;
const STARTER: usize = 0;
/// A thread that allocates from the system.
const NOWHERE: usize = REGIONS;
const UNSEEN: usize = usize::MAX;
const PAGE_BYTES: usize = 4096;
const REGION_PAGES: usize = 1 << 14;
const REGION_BYTES: usize = REGION_PAGES * PAGE_BYTES;
const PAGES: usize = REGIONS * REGION_PAGES;
/// Two of 64 bytes, which processors fetch in pairs.
const LINE_BYTES: usize = 128;
