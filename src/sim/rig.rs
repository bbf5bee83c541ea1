//! One core in a simulated world: what it is made of, one turn, and what must hold after each.

use std::cell::{Cell, RefCell};
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::peer::Peer;
use super::{Rng, SimDriver, World, WorldRef};
use crate::caps::{Lease, Places};
use crate::config::{Balance, Config, Settings};
use crate::conn::{self, Connection};
use crate::control::{Control, Seat};
use crate::core::{Core, CoreRef};
use crate::driver::{Driver, Socket};
use crate::entry::Entry;
use crate::error::Result;
use crate::listen::{Handler, Listener};
use crate::local::Entered;
use crate::net;
use crate::post::{CoreBell, PostBox};
use crate::stats::CoreStats;
use crate::sys::clock::Epoch;
use crate::time::{sleep, timeout};
use crate::token::Kind;

/// One core in one world.
pub(super) struct Rig {
    pub(super) world: WorldRef,
    pub(super) core: CoreRef,
    pub(super) control: Arc<Control>,
    accepts: Cell<bool>,
    /// The core is shut down, or broken beyond that.
    pub(super) over: Cell<bool>,
}

/// What the handlers of a run do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum House {
    /// All of them echo.
    Echo,
    /// Some are slow, leave early, fail, panic, keep their chunks, spawn, or sleep for good.
    Mixed,
    /// All of them connect.
    Outbound,
}

impl Rig {
    /// A core with a few peers of all manners.
    pub(super) fn new(seed: u64, house: House) -> Rig {
        let mut rng = Rng::new(seed ^ 0x5EED);
        let buffers = 1 << (2 + rng.below(4));
        let buffer_bytes = 64 << rng.below(4);
        let peers = (0..1 + rng.below(12)).map(|_| Peer::new(&mut rng)).collect();
        let world = World::new(seed, buffers, buffer_bytes, peers);
        let most = 1 + rng.below(10) as usize;
        Rig::cores(vec![world], rng, house, most).remove(0)
    }

    /// Cores of one server, each with a world of its own.
    pub(super) fn cores(
        worlds: Vec<WorldRef>,
        mut rng: Rng,
        house: House,
        most: usize,
    ) -> Vec<Rig> {
        let settings = settings(&mut rng);
        let rng = Rc::new(RefCell::new(rng));
        let handler = conn::handler(move |conn| {
            let manner = match house {
                House::Echo => 0,
                House::Mixed => rng.borrow_mut().below(12),
                House::Outbound => 9 + rng.borrow_mut().below(2),
            };
            serve(conn, manner)
        });
        Rig::start(worlds, settings, most, &handler)
    }

    /// A core that handles as it is told, in a kernel without faults but those that are ordered.
    pub(super) fn with<H, F>(world: WorldRef, config: Config, handle: H) -> Rig
    where
        H: Fn(Connection) -> F + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        world.borrow_mut().fault_percent = 0;
        let settings = config.settings().expect("valid settings");
        let handler = conn::handler(handle);
        Rig::start(vec![world], settings, settings.connections_max, &handler).remove(0)
    }

    /// As [`Rig::with`], in a world in which nothing happens but what the test does.
    pub(super) fn by_hand<H, F>(config: Config, handle: H) -> Rig
    where
        H: Fn(Connection) -> F + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        let world = World::new(0, 8, 256, Vec::new());
        world.borrow_mut().orders.by_hand = true;
        let rig = Rig::with(world, config, handle);
        rig.run(0);
        // Until it waits for the first connection.
        for _ in 0..3 {
            rig.turn();
        }
        rig
    }

    /// As [`Rig::with`], for cores of one server.
    pub(super) fn several<H, F>(worlds: Vec<WorldRef>, config: Config, handle: H) -> Vec<Rig>
    where
        H: Fn(Connection) -> F + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        worlds.iter().for_each(|world| world.borrow_mut().fault_percent = 0);
        let settings = config.settings().expect("valid settings");
        let most = settings.connections_max / worlds.len();
        Rig::start(worlds, settings, most, &conn::handler(handle))
    }

    fn start(
        worlds: Vec<WorldRef>,
        settings: Settings,
        most: usize,
        handler: &Handler,
    ) -> Vec<Rig> {
        let seats: Vec<Seat> = (0..worlds.len() as u16)
            .map(|cpu| Seat { cpu, post: PostBox::new(CoreBell::Silent), counters: Arc::default() })
            .collect();
        let control = Arc::new(Control::new(Epoch::now(), seats));
        let places = Arc::new(Places::new(most * control.seats().len(), control.seats().len(), 0));
        let start = |(index, (world, seat)): (usize, (WorldRef, &Seat))| {
            let lease = Lease::new(Arc::clone(&places), index);
            let driver = Driver::Sim(SimDriver::new(&world));
            let (counters, post) = (Arc::clone(&seat.counters), Arc::clone(&seat.post));
            let core = Core::start(driver, settings, lease, Arc::clone(&control), counters, post);
            let socket = Socket::Sim(World::listen(&world));
            let listener = Listener::new(socket, Rc::clone(handler), place());
            core.borrow_mut().listeners.push(listener);
            let (accepts, over) = (Cell::new(false), Cell::new(false));
            Rig { world, core, control: Arc::clone(&control), accepts, over }
        };
        worlds.into_iter().zip(control.seats()).enumerate().map(start).collect()
    }

    /// One turn, and then every invariant.
    pub(super) fn turn(&self) -> bool {
        let up = {
            let _entered = Entered::new(&self.core);
            self.core.turn().expect("the simulator's errors are all of the transient kind")
        };
        self.check();
        up
    }

    fn check(&self) {
        let core = self.core.borrow_mut();
        let world = self.world.borrow();
        let pools = [core.driver.pool(), core.driver.datagram_pool().expect("there is one")];
        for (pool, with_kernel) in pools.into_iter().zip(world.kernel_buffers()) {
            let (kernel, leased, returned) = pool.census();
            assert_eq!(kernel, with_kernel, "buffers with the kernel");
            let buffers = pool.buffers() as usize;
            assert_eq!(kernel + leased + returned, buffers, "buffers in all");
        }

        let mut operations = 0;
        for (id, entry) in core.table.iter() {
            let in_flight = world.operations_of(id.index, id.generation);
            assert_eq!(usize::from(entry.in_flight), in_flight, "in flight on {entry:?}");
            assert!(entry.timer.is_some(), "a connection without a deadline: {entry:?}");
            operations += in_flight;
        }
        let of_sockets: usize = core.udp.table.iter().map(|(_, port)| port.in_flight).sum();
        assert_eq!(of_sockets, world.socket_operations(), "in flight on UDP sockets");
        operations += of_sockets;
        for (id, attempt) in core.outbound.attempts.iter() {
            let in_flight = world.operations_of_attempt(id);
            assert_eq!(usize::from(attempt.in_flight), in_flight, "in flight on {attempt:?}");
            let timed = core.wheel.deadline_ms(attempt.timer()).is_some();
            assert!(timed || !attempt.is_open(), "without a deadline: {attempt:?}");
            operations += in_flight;
        }
        let of_listeners = |kind| matches!(kind, Some(Kind::Accept));
        let accepts = world.tokens().filter(|token| of_listeners(token.kind())).count();
        let lone = world.tokens().filter(|t| t.slot() == crate::listen::NO_CONNECTION).count();
        assert_eq!(operations + accepts + lone, core.driver.in_flight(), "operations in all");

        let sockets = core.table.iter().filter(|(_, entry)| entry.socket.is_some()).count();
        let listeners = core.listeners.iter().filter(|listener| listener.is_open()).count();
        let unreaped = world.accepted_unreaped();
        let others = core.outbound.attempts.len() + core.udp.table.len();
        let open = sockets + listeners + unreaped + others;
        assert_eq!(open, world.open_sockets(), "descriptors");

        let queued = core.table.iter().map(|(_, entry)| entry.input_bytes + entry.queued_bytes());
        let ports = core.udp.table.iter().map(|(_, port)| port.input_bytes + port.send_bytes);
        assert_eq!(queued.chain(ports).sum::<usize>(), core.memory.used(), "memory");

        let stats = core.counters.snapshot();
        let begun = stats.accepted + stats.connected;
        assert_eq!(begun, stats.closed.total() + core.table.len() as u64, "books");
        let attempts = core.outbound.attempts.iter();
        let under_way = attempts.filter(|(_, attempt)| attempt.is_open()).count() as u64;
        let ended = stats.connected + stats.connects_failed_total();
        assert_eq!(stats.connects, ended + under_way, "attempts");
        assert_eq!(stats.connecting, under_way, "attempts under way");
        let held = |(_, entry): &(_, &Entry)| entry.is_outbound() && entry.handles > 0;
        assert_eq!(core.outbound.held, core.table.iter().filter(held).count(), "outbound ones");
        assert_eq!(stats.live, core.table.len() as u64, "gauge");
        let timed = core.table.len() + core.sleepers.len() + core.outbound.attempts.len();
        let extra = core.wheel.len().saturating_sub(timed);
        assert!(extra <= core.listeners.len() + core.udp.leaving + 2, "{extra} timers of nobody");
        assert_eq!(core.counters.findings(), [""; 0], "the self-check");
        let full = core.drain.is_draining()
            || core.settings.balance == Balance::Least
            || core.table.len() - core.refused <= core.lease.places().core_max();
        assert!(full, "{} connections of {}", core.table.len(), core.lease.places().core_max());
    }

    /// Turns until nothing happens any more, or `turns` are over.
    pub(super) fn run(&self, turns: usize) {
        if !self.accepts.replace(true) {
            let _entered = Entered::new(&self.core);
            self.core.borrow_mut().start_accept();
        }
        for _ in 0..turns {
            if self.world.borrow().is_quiet() {
                return;
            }
            self.turn();
        }
    }

    pub(super) fn stats(&self) -> CoreStats {
        self.core.borrow_mut().counters.snapshot()
    }

    /// Turns until it is so.
    pub(super) fn turn_until(&self, what: &str, mut is: impl FnMut(&Rig) -> bool) {
        for _ in 0..100_000 {
            if is(self) {
                return;
            }
            self.turn();
        }
        panic!("turned in vain until {what}");
    }

    /// Drains within `ms` of virtual time, and checks that it took no longer.
    pub(super) fn drain(&self, ms: u64) {
        let begun_ns = self.world.borrow().now_ns();
        let deadline_ns = begun_ns + ms * 1_000_000;
        self.control.begin_drain_at(deadline_ns);
        let mut turns = 0;
        while self.turn() {
            turns += 1;
            assert!(turns < 200_000, "the drain goes on for ever");
        }
        let late_ns = self.world.borrow().now_ns().saturating_sub(deadline_ns);
        assert!(late_ns < 50_000_000, "down {late_ns} ns after the deadline");
        self.shut_down();
        let core = self.core.borrow_mut();
        let world = self.world.borrow();
        let stats = core.counters.snapshot();
        assert_eq!(stats.accepted + stats.connected, stats.closed.total(), "books at the end");
        assert_eq!(stats.connects, stats.connected + stats.connects_failed_total(), "attempts");
        assert_eq!((stats.connecting, core.outbound.held), (0, 0), "left at the end");
        assert_eq!((stats.live, world.open_sockets()), (0, 0), "left at the end");
        assert_eq!((stats.tasks, stats.leaked_operations), (0, 0), "left at the end");
        for pool in [core.driver.pool(), core.driver.datagram_pool().expect("there is one")] {
            assert_eq!(pool.leased(), 0, "leases at the end");
        }
    }
}

impl Rig {
    /// Ends the core, and returns what failed in that.
    pub(super) fn shut_down(&self) -> Option<String> {
        self.over.set(true);
        let _entered = Entered::new(&self.core);
        self.core.shut_down()
    }
}

impl Drop for Rig {
    /// Tasks and core hold one another until it is shut down; a test may leave it half-way.
    fn drop(&mut self) {
        if !self.over.get() && !std::thread::panicking() {
            // What is worked on by hand would never end by itself.
            self.world.borrow_mut().orders.by_hand = false;
            self.shut_down();
        }
    }
}

pub(super) fn place() -> &'static Location<'static> {
    Location::caller()
}

fn settings(rng: &mut Rng) -> Settings {
    Config::default()
        .receive_queue_bytes(1024 + rng.below(4096) as usize)
        .send_queue_bytes(1024 + rng.below(4096) as usize)
        .buffer_bytes(256)
        .check_ms(10 + rng.below(1_000))
        .linger_ms(rng.below(2) * 1000)
        .close_spread_ms(rng.below(2) * 200)
        .idle_min_keep_ms(rng.below(2) * 50)
        .spin_us(rng.below(2) as u32 * 500)
        .task_budget(1 + rng.below(64) as u32)
        .expiry_budget(1 + rng.below(64) as u32)
        .completion_budget(16 + rng.below(64) as u32)
        .balance(if rng.below(2) == 0 { Balance::Hash } else { Balance::Least })
        .stall_ms(0)
        .settings()
        .expect("valid settings")
}

/// A handler; which one, the seed says.
async fn serve(mut conn: Connection, manner: u64) -> Result<()> {
    match manner {
        1 => {
            conn.recv().await?;
            conn.write(b"bye").await?;
            return Ok(());
        }
        2 => return Err(std::io::Error::other("a handler that fails").into()),
        3 => {
            conn.recv().await?;
            panic!("a handler that panics");
        }
        4 => {
            let mut kept = Vec::new();
            while let Some(chunk) = conn.recv().await? {
                kept.push(chunk);
            }
            for chunk in kept {
                conn.send(chunk).await?;
            }
            return Ok(());
        }
        5 => sleep(Duration::from_secs(1_000_000)).await,
        6 => {
            let child = conn.spawn(sleep(Duration::from_millis(3)))?;
            crate::task::spawn(async { crate::task::yield_now().await })?;
            child.await?;
        }
        7 => {
            let (mut read, mut write) = conn.into_split();
            while let Some(chunk) = read.recv().await? {
                write.write(&chunk).await?;
                write.flush().await?;
            }
            return Ok(());
        }
        9 => {
            let mut upstream = net::connect("192.0.2.1:80").await?;
            return net::proxy(&mut conn, &mut upstream).await.map(drop);
        }
        10 => {
            let (tcp, unix) = (net::connect("192.0.2.1:80"), net::connect("unix:@x"));
            let at_once = timeout(Duration::ZERO, tcp.clone().into_future()).await;
            debug_assert!(at_once.is_err(), "it is given up while it is under way");
            let tcp = timeout(Duration::from_millis(1), tcp.into_future()).await;
            let kept = unix.timeout(Duration::from_millis(5)).await;
            let mut one = conn.recv().await?.is_some();
            for mut upstream in [tcp.and_then(|tcp| tcp), kept].into_iter().flatten() {
                one = upstream.write(b"hello").await.is_ok() && one;
            }
            return if one { Ok(()) } else { Err(std::io::Error::other("nobody").into()) };
        }
        _ => {}
    }
    while let Some(chunk) = conn.recv().await? {
        if manner == 8 {
            sleep(Duration::from_millis(1)).await;
        }
        conn.send(chunk).await?;
    }
    Ok(())
}
