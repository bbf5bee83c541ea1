//! The simulated driver: a kernel made of a seed. It does whatever io_uring may do, at the worst
//! moment, and the same again for the same seed.
//!
//! Completions come late and out of order, but for those of one operation. Sends are cut short,
//! multishot operations end early with data, receives find no buffer, `enter` fails after it has
//! taken what was queued, cancellations miss or come late, descriptors are reused at once, and
//! peers reset, half-close, stop reading or vanish at any step.

mod peer;
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use crate::driver::{Completion, DriverCounters, Errno, Name, Op, Outcome, Shut, Socket, Wait};
use crate::sys::bufs::Pool;
use crate::sys::gather::Gather;
use crate::token::{Kind, Token};
use peer::{Fate, Peer};

/// The numbers of a seed (SplitMix64).
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to `end`, without `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

pub(crate) type WorldRef = Rc<RefCell<World>>;

/// Everything outside of the core: the kernel's side of the ring, the sockets, and the peers.
pub(crate) struct World {
    rng: Rng,
    now_ns: u64,
    pool: Rc<Pool>,
    /// The kernel's buffers, in the order in which it was given them.
    buffers: VecDeque<u16>,
    /// Pushed and not yet submitted.
    queued: VecDeque<Running>,
    /// In flight.
    running: Vec<Running>,
    /// Completed and not yet reaped.
    ready: Vec<Completion>,
    /// The connections to the server, open or not, by descriptor.
    streams: BTreeMap<i32, Peer>,
    /// Those whose descriptor is closed.
    past: Vec<Peer>,
    listener: Option<i32>,
    backlog: VecDeque<Peer>,
    /// Peers that are still to come.
    coming: Vec<Peer>,
    /// Chances of a fault, in percent.
    pub(crate) fault_percent: u64,
    /// A digest of everything that has happened, to compare two runs of a seed.
    pub(crate) trace: u64,
    counters: DriverCounters,
}

#[derive(Debug)]
struct Running {
    token: Token,
    op: Op,
    /// How much of a send is done; 1 for a receive that was tried before.
    sent: usize,
    cancelled: bool,
}

impl World {
    pub(crate) fn new(seed: u64, buffers: u16, buffer_bytes: u32, coming: Vec<Peer>) -> WorldRef {
        let mut rng = Rng::new(seed);
        Rc::new(RefCell::new(World {
            fault_percent: rng.below(12),
            rng,
            now_ns: 1_000_000_000,
            pool: Pool::new(buffers, buffer_bytes).expect("memory for the pool"),
            buffers: VecDeque::new(),
            queued: VecDeque::new(),
            running: Vec::new(),
            ready: Vec::new(),
            streams: BTreeMap::new(),
            past: Vec::new(),
            listener: None,
            backlog: VecDeque::new(),
            coming,
            trace: seed,
            counters: DriverCounters::default(),
        }))
    }

    /// Opens the one listener.
    pub(crate) fn listen(world: &WorldRef) -> SimSocket {
        let fd = world.borrow().free_fd();
        world.borrow_mut().listener = Some(fd);
        SimSocket { fd, world: Rc::clone(world) }
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Whether no peer will do anything any more.
    pub(crate) fn is_quiet(&self) -> bool {
        self.coming.is_empty() && self.backlog.is_empty() && self.streams.is_empty()
    }

    /// How many operations name this slot and generation, wherever they are on their way.
    pub(crate) fn operations_of(&self, slot: u32, generation: u32) -> usize {
        let names = |token: Token| {
            let of_a_connection = !matches!(token.kind(), Some(Kind::Accept));
            of_a_connection && token.slot() == slot && token.generation() == generation
        };
        self.tokens().filter(|token| names(*token)).count()
    }

    /// The tokens of all operations whose last completion has not been reaped.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = Token> {
        let pending = self.queued.iter().chain(&self.running).map(|running| running.token);
        pending.chain(self.ready.iter().filter(|done| done.last).map(|done| done.token))
    }

    pub(crate) fn open_sockets(&self) -> usize {
        self.streams.len() + usize::from(self.listener.is_some())
    }

    /// Accepted connections of which the core has not heard yet.
    pub(crate) fn accepted_unreaped(&self) -> usize {
        let marker =
            |done: &&Completion| matches!(done.outcome, Outcome::Accepted(Err(Errno(..0))));
        self.ready.iter().filter(marker).count()
    }

    pub(crate) fn kernel_buffers(&self) -> usize {
        self.buffers.len()
    }

    pub(crate) fn past(&self) -> &[Peer] {
        &self.past
    }

    fn free_fd(&self) -> i32 {
        (3..).find(|fd| !self.streams.contains_key(fd) && self.listener != Some(*fd)).unwrap_or(3)
    }

    /// Lets the peers act and the kernel work.
    fn step(&mut self) {
        self.now_ns += 1 + self.rng.below(200_000);
        for _ in 0..self.rng.below(3) {
            if let Some(peer) = self.coming.pop() {
                match self.listener {
                    Some(_) => self.backlog.push_back(peer),
                    None => self.past.push(peer.refused()),
                }
            }
        }
        for peer in self.streams.values_mut() {
            if self.rng.percent(60) {
                peer.act(&mut self.rng);
            }
        }
        for _ in 0..self.running.len() {
            if !self.running.is_empty() && self.rng.percent(70) {
                let index = self.rng.below(self.running.len() as u64) as usize;
                self.work(index);
            }
        }
    }

    fn work(&mut self, index: usize) {
        let running = self.running.swap_remove(index);
        let early_end = self.rng.percent(self.fault_percent);
        match running {
            Running { token, op: Op::Accept { .. }, cancelled, .. } => {
                self.work_accept(token, running.op, cancelled, early_end);
            }
            Running { token, op: Op::Receive { socket, .. }, cancelled, sent: tries } => {
                self.work_receive(token, socket, tries == 0, cancelled, early_end);
            }
            Running { token, op: Op::Send { socket, gather }, sent, cancelled } => {
                self.work_send(token, socket, gather, sent, cancelled || early_end);
            }
            Running { token, op: Op::Hangup { socket }, cancelled, .. } => {
                let events = self.streams.get(&socket.0).map_or(0, Peer::poll_events);
                if events != 0 {
                    self.complete(token, true, Outcome::Hangup(Ok(events)));
                } else if cancelled {
                    self.complete(token, true, Outcome::Hangup(Err(Errno(libc::ECANCELED))));
                } else {
                    self.again(token, Op::Hangup { socket }, 0, cancelled);
                }
            }
            Running { token, op: Op::Cancel { target }, .. } => {
                let missed = early_end && self.rng.percent(50);
                let victim = self.running.iter_mut().find(|r| r.token == target && !missed);
                let found = victim.map(|victim| victim.cancelled = true);
                let result = found.ok_or(Errno(if missed { libc::EALREADY } else { libc::ENOENT }));
                self.complete(token, true, Outcome::Cancelled(result));
            }
        }
    }

    fn work_accept(&mut self, token: Token, op: Op, cancelled: bool, early_end: bool) {
        if cancelled && self.rng.percent(50) {
            let error = Outcome::Accepted(Err(Errno(libc::ECANCELED)));
            return self.complete(token, true, error);
        }
        if early_end && self.rng.percent(20) {
            return self.complete(token, true, Outcome::Accepted(Err(Errno(libc::EMFILE))));
        }
        let early_end = early_end || matches!(op, Op::Accept { once: true, .. });
        match self.backlog.pop_front() {
            Some(peer) => {
                let fd = self.free_fd();
                self.streams.insert(fd, peer);
                // The socket is made by `reap`, which has the world's reference.
                let marker = Outcome::Accepted(Err(Errno(-fd)));
                self.complete(token, early_end, marker);
                if !early_end {
                    self.again(token, op, 0, cancelled);
                }
            }
            None => self.again(token, op, 0, cancelled),
        }
    }

    fn work_receive(
        &mut self,
        token: Token,
        socket: Name,
        first: bool,
        cancelled: bool,
        end: bool,
    ) {
        let Some(peer) = self.streams.get_mut(&socket.0) else {
            panic!("receive on descriptor {} that is closed", socket.0);
        };
        if cancelled {
            return self.complete(token, true, Outcome::Received(Err(Errno(libc::ECANCELED))));
        }
        let op = Op::Receive { socket, once: false };
        if peer.is_reset() {
            self.complete(token, true, Outcome::Received(Err(Errno(libc::ECONNRESET))));
        } else if peer.unread() > 0 || (first && self.buffers.is_empty()) {
            let Some(buffer) = self.buffers.pop_front() else {
                return self.complete(token, true, Outcome::Received(Err(Errno(libc::ENOBUFS))));
            };
            let most = self.rng.below(u64::from(self.pool.buffer_bytes())) as usize + 1;
            let bytes = peer.read(most);
            self.pool.write_as_kernel(buffer, &bytes);
            let lease = self.pool.lease(buffer, bytes.len() as u32).expect("the kernel's buffer");
            self.complete(token, end, Outcome::Received(Ok(Some(lease))));
            if !end {
                self.again(token, op, 1, false);
            }
        } else if peer.is_at_end() {
            self.complete(token, true, Outcome::Received(Ok(None)));
        } else {
            self.again(token, op, 1, false);
        }
    }

    fn work_send(
        &mut self,
        token: Token,
        socket: Name,
        gather: Box<Gather>,
        mut sent: usize,
        cut_short: bool,
    ) {
        let Some(peer) = self.streams.get_mut(&socket.0) else {
            panic!("send on descriptor {} that is closed", socket.0);
        };
        let result = if let Err(errno) = peer.writable() {
            if sent > 0 { Some(Ok(sent)) } else { Some(Err(errno)) }
        } else {
            let all: Vec<u8> = gather.pieces().flatten().copied().collect();
            sent += peer.write(&all[sent..]);
            let short = cut_short && sent > 0;
            (sent == all.len() || short).then_some(Ok(sent))
        };
        match result {
            Some(result) => self.complete(token, true, Outcome::Sent(result, gather)),
            None => self.again(token, Op::Send { socket, gather }, sent, false),
        }
    }

    fn again(&mut self, token: Token, op: Op, sent: usize, cancelled: bool) {
        self.running.push(Running { token, op, sent, cancelled });
    }

    fn complete(&mut self, token: Token, last: bool, outcome: Outcome) {
        self.trace ^= token.bits() ^ u64::from(last);
        self.trace = self.trace.wrapping_mul(0x0000_0100_0000_01B3);
        self.ready.push(Completion { token, last, outcome });
    }

    fn close(&mut self, fd: i32) {
        let uses = |running: &Running| match running.op {
            Op::Accept { listener, .. } => listener.0 == fd,
            Op::Receive { socket, .. } | Op::Send { socket, .. } | Op::Hangup { socket } => {
                socket.0 == fd
            }
            Op::Cancel { .. } => false,
        };
        let in_use = self.queued.iter().chain(&self.running).any(uses);
        // A seed that has failed drops everything, and must still be printed.
        assert!(
            std::thread::panicking() || !in_use,
            "descriptor {fd} closed with an operation in flight"
        );
        if self.listener == Some(fd) {
            self.listener = None;
            // What is in its queue is reset: tcp(7) does the same.
            let lost = self.backlog.drain(..).map(Peer::reset_by_close);
            self.past.extend(lost);
        } else if let Some(peer) = self.streams.remove(&fd) {
            self.past.push(peer.closed());
        }
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World(at {} ns, trace {:x})", self.now_ns, self.trace)
    }
}

/// The driver's end of a world.
#[derive(Debug)]
pub(crate) struct SimDriver {
    world: WorldRef,
    pool: Rc<Pool>,
}

impl SimDriver {
    pub(crate) fn new(world: &WorldRef) -> SimDriver {
        let pool = Rc::clone(&world.borrow().pool);
        SimDriver { world: Rc::clone(world), pool }
    }

    pub(crate) fn push(&mut self, token: Token, op: Op) {
        let mut world = self.world.borrow_mut();
        if let Op::Send { .. } = op {
            let twice = world.tokens().any(|other| other == token);
            assert!(!twice, "two sends in flight on one connection");
        }
        world.queued.push_back(Running { token, op, sent: 0, cancelled: false });
    }

    pub(crate) fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let world = &mut *self.world.borrow_mut();
        world.counters.enters += 1;
        world.pool.give_all(|buffer| world.buffers.push_back(buffer));
        world.counters.submissions += world.queued.len() as u64;
        let queued = std::mem::take(&mut world.queued);
        world.running.extend(queued);
        world.step();
        if wait != Wait::No && world.rng.percent(world.fault_percent) {
            let errors = [libc::EINTR, libc::EBUSY, libc::EAGAIN];
            let error = errors[world.rng.below(3) as usize];
            return Err(io::Error::from_raw_os_error(error));
        }
        let limit_ns = match wait {
            Wait::No => 0,
            Wait::AtMostNs(ns) => ns,
            Wait::Forever => FOREVER_NS,
        };
        let until_ns = world.now_ns.saturating_add(limit_ns);
        for _ in 0..STEPS_MAX {
            if !world.ready.is_empty() || world.now_ns >= until_ns {
                return Ok(());
            }
            world.step();
        }
        world.now_ns = until_ns;
        Ok(())
    }

    pub(crate) fn reap(&mut self, into: &mut Vec<Completion>, budget: usize) -> bool {
        loop {
            let mut world = self.world.borrow_mut();
            if world.ready.is_empty() || into.len() >= budget {
                return !world.ready.is_empty();
            }
            // Any operation's turn may come, but its completions keep their order.
            let pick = world.rng.next() as usize % world.ready.len();
            let token = world.ready[pick].token;
            let first = world.ready.iter().position(|done| done.token == token).unwrap_or(pick);
            let mut completion = world.ready.remove(first);
            world.counters.completions += 1;
            drop(world);
            if let Outcome::Accepted(Err(Errno(marker @ ..0))) = completion.outcome {
                let socket = SimSocket { fd: -marker, world: Rc::clone(&self.world) };
                completion.outcome = Outcome::Accepted(Ok(Socket::Sim(socket)));
            }
            into.push(completion);
        }
    }

    pub(crate) fn pool(&self) -> &Rc<Pool> {
        &self.pool
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.world.borrow().now_ns
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.world.borrow().tokens().count()
    }

    pub(crate) fn counters(&self) -> DriverCounters {
        self.world.borrow().counters
    }

    pub(crate) fn quiesce(&mut self, _limit: Duration, into: &mut Vec<Completion>) -> usize {
        self.reap(into, usize::MAX);
        let world = &mut *self.world.borrow_mut();
        world.queued.clear();
        world.running.clear();
        0
    }
}

/// A socket of the simulated kernel; dropping it closes it.
#[derive(Debug)]
pub(crate) struct SimSocket {
    fd: i32,
    world: WorldRef,
}

impl SimSocket {
    pub(crate) fn name(&self) -> Name {
        Name(self.fd)
    }

    pub(crate) fn accept_now(&self) -> io::Result<SimSocket> {
        let mut world = self.world.borrow_mut();
        let peer = world.backlog.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let fd = world.free_fd();
        world.streams.insert(fd, peer);
        drop(world);
        Ok(SimSocket { fd, world: Rc::clone(&self.world) })
    }

    pub(crate) fn shut(&self, shut: Shut) {
        if let Some(peer) = self.world.borrow_mut().streams.get_mut(&self.fd) {
            peer.shut(shut);
        }
    }

    pub(crate) fn abort_on_close(&self) {
        if let Some(peer) = self.world.borrow_mut().streams.get_mut(&self.fd) {
            peer.fate = Fate::Reset;
        }
    }

    pub(crate) fn output_mark(&self) -> u64 {
        self.world.borrow().streams.get(&self.fd).map_or(0, |peer| peer.received.len() as u64)
    }

    pub(crate) fn unread_bytes(&self) -> usize {
        self.world.borrow().streams.get(&self.fd).map_or(0, Peer::unread)
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        self.world.borrow_mut().close(self.fd);
    }
}

/// How long, in virtual time, a wait without a limit may last before it returns for nothing.
const FOREVER_NS: u64 = 1_000_000_000;
/// After so many steps without news a wait jumps to its end.
const STEPS_MAX: usize = 40;
