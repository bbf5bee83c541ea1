//! The simulated kernel as the core sees it: a driver, and sockets.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::peer::{Fate, Peer};
use super::{Running, WorldRef};
use crate::driver::{Completion, DriverCounters, Errno, Name, Op, Outcome, Shut, Socket, Wait};
use crate::sys::bufs::Pool;
use crate::token::Token;

/// The driver's end of a world.
#[derive(Debug)]
pub(crate) struct SimDriver {
    world: WorldRef,
    pool: Rc<Pool>,
    datagram_pool: Rc<Pool>,
}

impl SimDriver {
    pub(crate) fn new(world: &WorldRef) -> SimDriver {
        let pool = Rc::clone(&world.borrow().pool);
        let datagram_pool = Rc::clone(&world.borrow().datagram_pool);
        SimDriver { world: Rc::clone(world), pool, datagram_pool }
    }

    pub(crate) fn push(&mut self, token: Token, op: Op) {
        let mut world = self.world.borrow_mut();
        if let Op::Send { socket, .. } = op {
            let twice = world.tokens().any(|other| other == token);
            assert!(!twice, "two sends in flight on one connection");
            world.places.send(token, socket);
        }
        world.queued.push_back(Running { token, op, sent: 0, cancelled: false });
    }

    pub(crate) fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let world = &mut *self.world.borrow_mut();
        world.counters.enters += 1;
        world.last_wait = wait;
        world.pool.give(usize::MAX, |buffer| world.buffers.push_back(buffer));
        let buffers = &mut world.datagram_buffers;
        world.datagram_pool.give(usize::MAX, |buffer| buffers.push_back(buffer));
        world.counters.submissions += world.queued.len() as u64;
        let queued = std::mem::take(&mut world.queued);
        world.running.extend(queued);
        world.update_places();
        world.step();
        let interrupted =
            world.counters.enters.checked_rem(world.orders.interrupt_every) == Some(0);
        let ordered = interrupted.then_some(libc::EINTR);
        if let Some(error) = world.orders.enter_errors.pop_front().or(ordered) {
            return Err(io::Error::from_raw_os_error(error));
        }
        if wait != Wait::No && world.rng.percent(world.fault_percent) {
            let errors = [libc::EINTR, libc::EBUSY, libc::EAGAIN];
            let error = errors[world.rng.below(3) as usize];
            return Err(io::Error::from_raw_os_error(error));
        }
        let until_ns = match wait {
            Wait::No => world.now_ns,
            Wait::Until(due_ns) => due_ns.max(world.now_ns),
            Wait::Forever => world.now_ns.saturating_add(FOREVER_NS),
        };
        for _ in 0..STEPS_MAX {
            if world.orders.by_hand || !world.ready.is_empty() || world.now_ns >= until_ns {
                return Ok(());
            }
            world.step();
        }
        world.now_ns = until_ns;
        Ok(())
    }

    /// Looking takes its time, and things happen meanwhile.
    pub(crate) fn has_news(&mut self) -> bool {
        let world = &mut *self.world.borrow_mut();
        // However much is done by hand: a core that spins would do so for ever.
        world.now_ns += LOOK_NS;
        if world.rng.percent(1) {
            world.step();
        }
        !world.ready.is_empty() || world.orders.cries_wolf
    }

    pub(crate) fn waited_ns(&self) -> Option<u64> {
        None
    }

    pub(crate) fn forget(&mut self, token: Token) {
        self.world.borrow_mut().leave_place(token);
    }

    pub(crate) fn is_ready(&mut self) -> bool {
        !self.world.borrow().ready.is_empty()
    }

    pub(crate) fn next(&mut self) -> Option<Completion> {
        let mut world = self.world.borrow_mut();
        world.tell_of_places();
        if world.ready.is_empty() {
            return None;
        }
        // Any operation's turn may come, but its completions keep their order.
        let pick = world.rng.next() as usize % world.ready.len();
        let token = world.ready[pick].token;
        let first = world.ready.iter().position(|done| done.token == token).unwrap_or(pick);
        let mut completion = world.ready.remove(first);
        world.counters.completions += 1;
        drop(world);
        if let Outcome::Accepted(Err(Errno(marker @ ..0)), queue) = completion.outcome {
            // The socket is made here, where the world's reference is.
            let socket = SimSocket { fd: -marker, world: Rc::clone(&self.world) };
            completion.outcome = Outcome::Accepted(Ok(Socket::Sim(socket)), queue);
        }
        Some(completion)
    }

    /// A connection comes from another world.
    pub(crate) fn unpack(&self, peer: Peer) -> SimSocket {
        let mut world = self.world.borrow_mut();
        let fd = world.free_fd();
        world.streams.insert(fd, peer);
        drop(world);
        SimSocket { fd, world: Rc::clone(&self.world) }
    }

    pub(crate) fn open(&self) -> SimSocket {
        let fd = self.world.borrow_mut().open();
        SimSocket { fd, world: Rc::clone(&self.world) }
    }

    pub(crate) fn pool(&self) -> &Rc<Pool> {
        &self.pool
    }

    pub(crate) fn open_datagrams(&mut self, _buffers: u16, _bytes: u32) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn datagram_pool(&self) -> Option<&Rc<Pool>> {
        Some(&self.datagram_pool)
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
        into.extend(std::iter::from_fn(|| self.next()));
        let world = &mut *self.world.borrow_mut();
        world.queued.clear();
        world.running.clear();
        world.drop_places();
        0
    }
}

/// A socket of the simulated kernel; dropping it closes it.
#[derive(Debug)]
pub(crate) struct SimSocket {
    pub(super) fd: i32,
    pub(super) world: WorldRef,
}

impl SimSocket {
    pub(crate) fn name(&self) -> Name {
        Name(self.fd)
    }

    pub(crate) fn accept_now(&self) -> io::Result<SimSocket> {
        let mut world = self.world.borrow_mut();
        let chance = world.fault_percent;
        if world.lacks_descriptor() || (world.rng.percent(chance) && world.rng.percent(20)) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let peer = world.backlog.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let fd = world.free_fd();
        world.streams.insert(fd, peer);
        drop(world);
        Ok(SimSocket { fd, world: Rc::clone(&self.world) })
    }

    pub(crate) fn connect_now(&self) -> io::Result<()> {
        self.world.borrow_mut().connect_now(self.fd)
    }

    /// Takes the connection out of this world.
    pub(crate) fn pack(self) -> Peer {
        self.world.borrow_mut().streams.remove(&self.fd).expect("it is open")
    }

    /// Peers that are still to come wait, and find the listener closed.
    pub(crate) fn drop_syns(&self) -> io::Result<()> {
        self.world.borrow_mut().drops_syns = true;
        Ok(())
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

    pub(crate) fn acknowledged_bytes(&self) -> u64 {
        self.world.borrow().streams.get(&self.fd).map_or(0, |peer| peer.received.len() as u64)
    }

    pub(crate) fn queued_connections(&self) -> u64 {
        self.world.borrow().backlog.len() as u64
    }

    pub(crate) fn discard(&self, most: usize) {
        if let Some(peer) = self.world.borrow_mut().streams.get_mut(&self.fd) {
            peer.read(most);
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.world.borrow().streams.get(&self.fd).is_none_or(Peer::is_reset)
    }

    pub(crate) fn lost_datagrams(&self) -> Option<u32> {
        self.world.borrow().ports.get(&self.fd).map(|port| port.lost)
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
/// How long a look for news takes.
const LOOK_NS: u64 = 100;
/// After so many steps without news a wait jumps to its end.
const STEPS_MAX: usize = 40;
