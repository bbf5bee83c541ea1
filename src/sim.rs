//! The simulated driver: a kernel made of a seed. It does whatever io_uring may do, at the worst
//! moment, and the same again for the same seed.
//!
//! Completions come late and out of order, but for those of one operation. Sends are cut short,
//! multishot operations end early with data, receives find no buffer, `enter` fails after it has
//! taken what was queued, cancellations miss or come late, descriptors are reused at once, and
//! peers reset, half-close, stop reading or vanish at any step.

mod books;
mod by_hand;
mod connect;
mod connects;
mod cores;
mod deadlines;
mod driver;
mod ends;
mod faults;
mod hands;
#[cfg(feature = "hyper")]
mod http;
mod moves;
mod orders;
mod overload;
mod peer;
mod places;
mod ports;
mod promises;
mod rig;
mod rng;
mod seams;
mod tests;
mod udp;
mod udp_ends;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::rc::Rc;

use crate::driver::{Completion, DriverCounters, Errno, Group, Name, Op, Outcome, Queue, Wait};
use crate::sys::bufs::{Lease, Pool};
use crate::sys::datagram::HEADER_BYTES;
use crate::sys::gather::Gather;
use crate::table::Id;
use crate::token::{Kind, Token};
pub(crate) use connect::Met;
use orders::Orders;
pub(crate) use peer::Peer;
use places::Places;
use ports::{Parcel, SimPort, is_of_a_socket};

pub(crate) use driver::{SimDriver, SimSocket};
pub(crate) use rng::Rng;
pub(crate) use tests::for_seeds;

pub(crate) type WorldRef = Rc<RefCell<World>>;

/// Everything outside of the core: the kernel's side of the ring, the sockets, and the peers.
pub(crate) struct World {
    rng: Rng,
    now_ns: u64,
    pool: Rc<Pool>,
    /// The same for datagrams.
    datagram_pool: Rc<Pool>,
    datagram_buffers: VecDeque<u16>,
    /// The UDP sockets, open or not.
    pub(crate) ports: BTreeMap<i32, SimPort>,
    pub(crate) past_ports: Vec<SimPort>,
    /// Datagrams that are still to come.
    pub(crate) parcels: VecDeque<Parcel>,
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
    /// Sockets that are to be connected.
    unconnected: BTreeSet<i32>,
    /// Direct descriptors.
    pub(crate) places: Places,
    /// Those whose descriptor is closed.
    past: Vec<Peer>,
    listener: Option<i32>,
    backlog: VecDeque<Peer>,
    /// Nobody gets into the backlog any more.
    drops_syns: bool,
    /// Peers that are still to come.
    coming: Vec<Peer>,
    /// Chances of a fault, in percent.
    pub(crate) fault_percent: u64,
    /// What a test wants of it, beside what the seed says.
    pub(crate) orders: Orders,
    /// A digest of everything that has happened, to compare two runs of a seed.
    pub(crate) trace: u64,
    counters: DriverCounters,
    last_wait: Wait,
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
            orders: Orders::default(),
            rng,
            now_ns: 1_000_000_000,
            pool: Pool::new(0, buffers, buffer_bytes).expect("memory for the pool"),
            datagram_pool: Pool::new(0, DATAGRAM_BUFFERS, DATAGRAM_BYTES).expect("memory"),
            datagram_buffers: VecDeque::new(),
            ports: BTreeMap::new(),
            past_ports: Vec::new(),
            parcels: VecDeque::new(),
            buffers: VecDeque::new(),
            queued: VecDeque::new(),
            running: Vec::new(),
            ready: Vec::new(),
            streams: BTreeMap::new(),
            unconnected: BTreeSet::new(),
            places: Places::new(),
            past: Vec::new(),
            listener: None,
            backlog: VecDeque::new(),
            drops_syns: false,
            coming,
            trace: seed,
            counters: DriverCounters::default(),
            last_wait: Wait::No,
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
            let others = [Kind::Accept, Kind::Connect, Kind::CancelConnect];
            let of_a_connection =
                !others.iter().any(|kind| token.kind() == Some(*kind)) && !is_of_a_socket(token);
            of_a_connection && token.slot() == slot && token.generation() == generation
        };
        self.tokens().filter(|token| names(*token)).count()
    }

    /// How many operations are of this attempt to connect.
    pub(crate) fn operations_of_attempt(&self, id: Id) -> usize {
        let names = |token: Token| {
            let of_one = matches!(token.kind(), Some(Kind::Connect | Kind::CancelConnect));
            of_one && (token.slot(), token.generation()) == (id.index, id.generation)
        };
        self.tokens().filter(|token| names(*token)).count()
    }

    /// The tokens of all operations whose last completion has not been reaped.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = Token> {
        let pending = self.queued.iter().chain(&self.running).map(|running| running.token);
        pending.chain(self.ready.iter().filter(|done| done.last).map(|done| done.token))
    }

    pub(crate) fn open_sockets(&self) -> usize {
        let sockets = self.streams.len() + self.unconnected.len() + self.ports.len();
        sockets + usize::from(self.listener.is_some()) - self.places.kept()
    }

    /// Accepted connections of which the core has not heard yet.
    pub(crate) fn accepted_unreaped(&self) -> usize {
        let marker =
            |done: &&Completion| matches!(done.outcome, Outcome::Accepted(Err(Errno(..0)), _));
        self.ready.iter().filter(marker).count()
    }

    /// How many buffers the kernel has for streams, and for datagrams.
    pub(crate) fn kernel_buffers(&self) -> [usize; 2] {
        [self.buffers.len(), self.datagram_buffers.len()]
    }

    pub(crate) fn past(&self) -> &[Peer] {
        &self.past
    }

    fn free_fd(&self) -> i32 {
        let taken = |fd: &i32| {
            let connecting = self.unconnected.contains(fd);
            self.streams.contains_key(fd) || connecting || self.ports.contains_key(fd)
        };
        (3..).find(|fd| !taken(fd) && self.listener != Some(*fd)).unwrap_or(3)
    }

    /// Lets time pass.
    pub(crate) fn pass_ms(&mut self, ms: u64) {
        self.now_ns += ms * 1_000_000;
    }

    /// A peer connects.
    pub(crate) fn arrive(&mut self, peer: Peer) {
        self.backlog.push_back(peer);
    }

    /// Those that are connected, in the order of their descriptors.
    pub(crate) fn peers(&mut self) -> impl Iterator<Item = &mut Peer> {
        self.streams.values_mut()
    }

    /// Turns once to the operation of a kind that is in flight, the latest if there are several.
    pub(crate) fn work_on(&mut self, kind: Kind) {
        let index = self.running.iter().rposition(|r| r.token.kind() == Some(kind));
        self.work(index.unwrap_or_else(|| panic!("no {kind:?} is in flight")));
    }

    /// As `work_on`, and then the operation has ended, however much it could go on.
    pub(crate) fn work_last_on(&mut self, kind: Kind) {
        self.fault_percent = 100;
        self.work_on(kind);
        self.fault_percent = 0;
    }

    /// Turns once to every operation of a kind that is in flight.
    pub(crate) fn work_on_all(&mut self, kind: Kind) {
        let of_the_kind = self.running.iter().filter(|r| r.token.kind() == Some(kind));
        for token in of_the_kind.map(|running| running.token).collect::<Vec<_>>() {
            if let Some(index) = self.running.iter().position(|r| r.token == token) {
                self.work(index);
            }
        }
    }

    /// How many operations of a kind are in flight.
    pub(crate) fn in_flight(&self, kind: Kind) -> usize {
        let pending = self.queued.iter().chain(&self.running);
        pending.filter(|running| running.token.kind() == Some(kind)).count()
    }

    /// Completes an operation that nobody has asked for, or asked for long ago.
    pub(crate) fn inject(&mut self, token: Token, outcome: Outcome) {
        self.complete(token, true, outcome);
    }

    /// How long the core was ready to wait when it last came.
    pub(crate) fn last_wait(&self) -> Wait {
        self.last_wait
    }

    /// Takes one of the kernel's buffers, if there is one.
    pub(crate) fn take_buffer(&mut self) -> Option<Lease> {
        let buffer = self.buffers.pop_front()?;
        self.pool.lease(buffer, 1)
    }

    /// Takes all buffers from the kernel, as handlers do that never give theirs back.
    pub(crate) fn take_buffers(&mut self) -> Vec<Lease> {
        let buffers = std::mem::take(&mut self.buffers);
        buffers.into_iter().filter_map(|buffer| self.pool.lease(buffer, 0)).collect()
    }

    /// Lets the peers act and the kernel work.
    fn step(&mut self) {
        if self.orders.by_hand {
            return;
        }
        self.now_ns += 1 + self.rng.below(200_000);
        for _ in 0..self.rng.below(3) {
            let held_off = self.drops_syns && self.listener.is_some();
            if !held_off && let Some(peer) = self.coming.pop() {
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
        self.step_ports();
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
            Running { token, op: Op::Receive { socket, once, .. }, cancelled, sent: tries } => {
                self.work_receive(token, (socket, once), tries == 0, cancelled, early_end);
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
            Running { token, op: Op::ReceiveDatagrams { socket }, cancelled, sent: tries } => {
                self.work_receive_datagrams(token, socket, tries == 0, cancelled, early_end);
            }
            Running { token, op: Op::SendDatagram { socket, outgoing }, cancelled, .. } => {
                self.work_send_datagram(token, socket, outgoing, cancelled, early_end);
            }
            Running { token, op: Op::Connect { socket, to }, cancelled, .. } => {
                self.work_connect(token, socket, to, cancelled);
            }
            Running { token, op: Op::Cancel { target }, .. } => {
                let ordered = self.orders.cancels_missed > 0;
                self.orders.cancels_missed -= u32::from(ordered);
                let missed = ordered || (early_end && self.rng.percent(50));
                let victim = self.running.iter_mut().find(|r| r.token == target && !missed);
                let found = victim.map(|victim| victim.cancelled = true);
                let result = found.ok_or(Errno(if missed { libc::EALREADY } else { libc::ENOENT }));
                let outcome = match token.kind() {
                    Some(Kind::CancelDatagrams) => Outcome::DatagramsCancelled(result),
                    _ => Outcome::Cancelled(result),
                };
                self.complete(token, true, outcome);
            }
        }
    }

    fn work_accept(&mut self, token: Token, op: Op, cancelled: bool, early_end: bool) {
        if cancelled && self.rng.percent(50) {
            let error = Outcome::Accepted(Err(Errno(libc::ECANCELED)), Queue::Unknown);
            return self.complete(token, true, error);
        }
        if self.lacks_descriptor() || early_end && self.rng.percent(20) {
            let error = Outcome::Accepted(Err(Errno(libc::EMFILE)), Queue::Unknown);
            return self.complete(token, true, error);
        }
        match self.backlog.pop_front() {
            Some(peer) => {
                let fd = self.free_fd();
                self.streams.insert(fd, peer);
                // The socket is made by `next`, which has the world's reference.
                let queue = match self.backlog.is_empty() {
                    // Some kernels do not say.
                    _ if self.rng.percent(30) => Queue::Unknown,
                    true => Queue::Empty,
                    false => Queue::More,
                };
                self.complete(token, true, Outcome::Accepted(Err(Errno(-fd)), queue));
            }
            None => self.again(token, op, 0, cancelled),
        }
    }

    /// Whether a connection that is queued finds no descriptor.
    fn lacks_descriptor(&self) -> bool {
        let ordered = self.now_ns < self.orders.no_descriptor_until_ns;
        !self.backlog.is_empty() && (ordered || self.streams.len() >= self.orders.streams_max)
    }

    fn work_receive(
        &mut self,
        token: Token,
        (socket, once): (Name, bool),
        first: bool,
        cancelled: bool,
        early_end: bool,
    ) {
        let end = once || early_end;
        let Some(peer) = self.streams.get_mut(&socket.0) else {
            panic!("receive on descriptor {} that is closed", socket.0);
        };
        if cancelled {
            return self.complete(token, true, Outcome::Received(Err(Errno(libc::ECANCELED))));
        }
        let op = Op::Receive { socket, once, group: Group::Small };
        if peer.is_reset() {
            self.complete(token, true, Outcome::Received(Err(Errno(libc::ECONNRESET))));
        } else if peer.unread() > 0 || (first && self.buffers.is_empty()) {
            let Some(buffer) = self.buffers.pop_front() else {
                return self.complete(token, true, Outcome::Received(Err(Errno(libc::ENOBUFS))));
            };
            let whole = self.pool.buffer_bytes() as usize;
            let some = self.rng.below(whole as u64) as usize + 1;
            let most = if self.orders.by_hand { whole } else { some };
            let bytes = peer.read(most);
            let left_some = peer.unread() > 0;
            self.pool.write_as_kernel(buffer, &bytes);
            let lease = self.pool.lease(buffer, bytes.len() as u32).expect("the kernel's buffer");
            let lease = lease.leaving_some(left_some);
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
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World(at {} ns, trace {:x})", self.now_ns, self.trace)
    }
}

/// Few and short, so that they run out and don't suffice.
const DATAGRAM_BUFFERS: u16 = 8;
const DATAGRAM_BYTES: u32 = 256 + HEADER_BYTES as u32;
