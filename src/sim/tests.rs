//! The core's rules over thousands of seeds of the simulated kernel.
//!
//! After every turn: every buffer is in one place, every descriptor has an owner and nothing in
//! flight when it is closed, every operation is counted once, every connection has a deadline, and
//! the books balance. `RING_TEST_SEED=n` replays one seed, `RING_TEST_LONG=n` runs n times as many.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::peer::{Fate, Manner, Peer};
use super::{Rng, SimDriver, World, WorldRef};
use crate::config::{Config, Settings};
use crate::conn::{self, Connection};
use crate::control::{Control, Seat};
use crate::core::{Core, CoreRef};
use crate::driver::{Driver, Socket};
use crate::error::Result;
use crate::listen::Listener;
use crate::local::Entered;
use crate::post::{CoreBell, PostBox};
use crate::report::CloseReason;
use crate::time::sleep;
use crate::token::Kind;

/// One core in one world.
struct Rig {
    world: WorldRef,
    core: CoreRef,
    control: Arc<Control>,
}

/// What the handlers of a run do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum House {
    /// All of them echo.
    Echo,
    /// Some are slow, leave early, fail, panic, keep their chunks, spawn, or sleep for good.
    Mixed,
}

impl Rig {
    /// A core with a few peers of all manners.
    fn new(seed: u64, house: House) -> Rig {
        let mut rng = Rng::new(seed ^ 0x5EED);
        let buffers = 1 << (2 + rng.below(4));
        let buffer_bytes = 64 << rng.below(4);
        let peers = (0..1 + rng.below(12)).map(|_| Peer::new(&mut rng)).collect();
        let world = World::new(seed, buffers, buffer_bytes, peers);
        let most = 1 + rng.below(10) as usize;
        Rig::cores(vec![world], rng, house, most).remove(0)
    }

    /// Cores of one server, each with a world of its own.
    fn cores(worlds: Vec<WorldRef>, mut rng: Rng, house: House, most: usize) -> Vec<Rig> {
        let settings = settings(&mut rng);
        let seats: Vec<Seat> = (0..worlds.len() as u16)
            .map(|cpu| Seat { cpu, post: PostBox::new(CoreBell::Silent), counters: Arc::default() })
            .collect();
        let control = Arc::new(Control::new(Instant::now(), seats));
        let rng = Rc::new(RefCell::new(rng));
        let start = |(world, seat): (WorldRef, &Seat)| {
            let driver = Driver::Sim(SimDriver::new(&world));
            let (counters, post) = (Arc::clone(&seat.counters), Arc::clone(&seat.post));
            let core = Core::start(driver, settings, most, Arc::clone(&control), counters, post);
            let rng = Rc::clone(&rng);
            let handler = conn::handler(move |conn| {
                let manner = if house == House::Mixed { rng.borrow_mut().below(12) } else { 0 };
                serve(conn, manner)
            });
            let listener = Listener::new(Socket::Sim(World::listen(&world)), handler, place());
            core.borrow_mut().listeners.push(listener);
            Rig { world, core, control: Arc::clone(&control) }
        };
        worlds.into_iter().zip(control.seats()).map(start).collect()
    }

    /// One turn, and then every invariant.
    fn turn(&self) -> bool {
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
        let (kernel, leased, returned) = core.driver.pool().census();
        assert_eq!(kernel, world.kernel_buffers(), "buffers with the kernel");
        let buffers = core.driver.pool().buffers() as usize;
        assert_eq!(kernel + leased + returned, buffers, "buffers in all");

        let mut operations = 0;
        for (id, entry) in core.table.iter() {
            let in_flight = world.operations_of(id.index, id.generation);
            assert_eq!(usize::from(entry.in_flight), in_flight, "in flight on {entry:?}");
            assert!(entry.timer.is_some(), "a connection without a deadline: {entry:?}");
            operations += in_flight;
        }
        let of_listeners = |kind| matches!(kind, Some(Kind::Accept));
        let accepts = world.tokens().filter(|token| of_listeners(token.kind())).count();
        let lone = world.tokens().filter(|t| t.slot() == crate::listen::NO_CONNECTION).count();
        assert_eq!(operations + accepts + lone, core.driver.in_flight(), "operations in all");

        let sockets = core.table.iter().filter(|(_, entry)| entry.socket.is_some()).count();
        let listeners = core.listeners.iter().filter(|listener| listener.is_open()).count();
        let unreaped = world.accepted_unreaped();
        assert_eq!(sockets + listeners + unreaped, world.open_sockets(), "descriptors");

        let stats = core.counters.snapshot();
        assert_eq!(stats.accepted, stats.closed.total() + core.table.len() as u64, "books");
        assert_eq!(stats.live, core.table.len() as u64, "gauge");
        let timed = core.table.len() + core.sleepers.len();
        let extra = core.wheel.len() - timed;
        assert!(extra <= core.listeners.len(), "{extra} timers of nobody");
        let full = core.drain.is_draining() || core.table.len() <= core.connections_max;
        assert!(full, "{} connections of {}", core.table.len(), core.connections_max);
    }

    /// Turns until nothing happens any more, or `turns` are over.
    fn run(&self, turns: usize) {
        {
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

    /// Drains within `ms` of virtual time, and checks that it took no longer.
    fn drain(&self, ms: u64) {
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
        let _entered = Entered::new(&self.core);
        self.core.shut_down();
        drop(_entered);
        let core = self.core.borrow_mut();
        let world = self.world.borrow();
        let stats = core.counters.snapshot();
        assert_eq!(stats.accepted, stats.closed.total(), "books at the end");
        assert_eq!((stats.live, world.open_sockets()), (0, 0), "left at the end");
        assert_eq!((stats.tasks, stats.leaked_operations), (0, 0), "left at the end");
        let (_, leased, _) = core.driver.pool().census();
        assert_eq!(leased, 0, "leases at the end");
    }
}

fn place() -> &'static Location<'static> {
    Location::caller()
}

fn settings(rng: &mut Rng) -> Settings {
    Config::default()
        .receive_queue_bytes(1024 + rng.below(4096) as usize)
        .send_queue_bytes(1024 + rng.below(4096) as usize)
        .buffer_bytes(256)
        .linger_ms(rng.below(2) * 1000)
        .task_budget(1 + rng.below(64) as u32)
        .expiry_budget(1 + rng.below(64) as u32)
        .completion_budget(16 + rng.below(64) as u32)
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

/// Runs many seeds and prints the one that fails.
fn for_seeds(name: &str, count: u64, run: impl Fn(u64)) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let count = if cfg!(miri) { 3 } else { count * number("RING_TEST_LONG").unwrap_or(1) };
    let seeds = number("RING_TEST_SEED").map_or(0..count, |seed| seed..seed + 1);
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("{name}: seed {seed} failed; replay with RING_TEST_SEED={seed}");
            resume_unwind(panic);
        }
    }
}

fn assert_prefix(peer: &Peer) {
    assert!(peer.plan.starts_with(&peer.received), "not what {:?} had sent", peer.manner);
}

#[test]
fn every_good_peer_gets_all_its_bytes_back_over_any_kernel() {
    for_seeds("echo", 2_000, |seed| {
        let rig = Rig::new(seed, House::Echo);
        rig.run(100_000);
        assert!(rig.world.borrow().is_quiet(), "peers are left after 100 000 turns");
        rig.drain(1_000);
        for peer in rig.world.borrow().past() {
            assert_prefix(peer);
            if peer.manner == Manner::Good {
                assert!(peer.is_answered(), "{} of {}", peer.received.len(), peer.plan.len());
                assert_eq!(peer.fate, Fate::Fin);
            }
        }
        let closed = rig.core.borrow_mut().counters.snapshot().closed;
        assert_eq!(closed.get(CloseReason::Forced), 0);
        let world = rig.world.borrow();
        let count =
            |is: &dyn Fn(&Peer) -> bool| world.past().iter().filter(|peer| is(peer)).count() as u64;
        let mute = count(&|peer| !matches!(peer.manner, Manner::Good | Manner::Deaf));
        let late = closed.get(CloseReason::Idle) + closed.get(CloseReason::FirstByte);
        assert!(late <= mute, "{late} timed out of {mute} that may: {closed:?}");
        let stalled = count(&|peer| peer.manner == Manner::Deaf && peer.plan.len() > 8_000);
        assert!(closed.get(CloseReason::WriteStall) >= stalled, "stalled {stalled}: {closed:?}");
        let reset = count(&|peer| peer.fate == Fate::Reset);
        assert!(reset >= closed.get(CloseReason::WriteStall), "reset {reset}: {closed:?}");
    });
}

#[test]
fn a_drain_at_any_moment_ends_by_its_deadline_and_resets_nobody() {
    for_seeds("drain", 2_000, |seed| {
        let rig = Rig::new(seed, House::Echo);
        rig.run(seed as usize % 200);
        rig.drain(seed % 7 * 300);
        for peer in rig.world.borrow().past() {
            assert_prefix(peer);
            // Only the deadline cuts a peer off that has still something to say, or a configuration
            // that reads nothing out.
            let lingers = rig.core.borrow_mut().settings.linger_ms > 0;
            let forced = seed % 7 < 5;
            let good = matches!(peer.manner, Manner::Good | Manner::Silent);
            let served = forced || !lingers || !good || peer.fate != Fate::Reset;
            let story =
                (peer.manner, peer.sent(), peer.plan.len(), peer.received.len(), peer.unread());
            let closed = rig.core.borrow_mut().counters.snapshot().closed;
            assert!(served, "reset: {story:?}, {closed:?}");
        }
    });
}

#[test]
fn no_handler_upsets_the_books() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<&str>();
        if text != Some(&"a handler that panics") {
            hook(info);
        }
    }));
    for_seeds("mixed", 2_000, |seed| {
        let rig = Rig::new(seed, House::Mixed);
        rig.run(300 + seed as usize % 2_000);
        if seed % 8 == 0 {
            // Whatever the handlers do, the deadlines end every connection.
            let left = || rig.core.borrow_mut().table.len() > 0;
            for _ in 0..20_000 {
                if rig.world.borrow().is_quiet() && !left() {
                    break;
                }
                rig.turn();
            }
            assert!(!left(), "a handler outlives its deadlines");
        }
        rig.drain(seed % 5 * 200);
    });
}

#[test]
fn a_seed_replays_exactly() {
    let trace = |seed| {
        let rig = Rig::new(seed, House::Mixed);
        rig.run(500);
        rig.drain(100);
        let world = rig.world.borrow();
        (world.trace, world.now_ns())
    };
    for seed in [1, 77, 4242] {
        assert_eq!(trace(seed), trace(seed), "seed {seed}");
    }
    assert_ne!(trace(1), trace(2));
}

/// Two cores whose turns alternate, each with its half of the peers; all get their bytes back.
fn serve_on_two_cores(seed: u64, mut peer: impl FnMut(&mut Rng) -> Peer, peers: usize) {
    let mut rng = Rng::new(seed);
    let worlds = (0..2).map(|core| {
        let coming = (0..peers / 2).map(|_| peer(&mut rng)).collect();
        World::new(seed + core, 64, 1024, coming)
    });
    let rigs = Rig::cores(worlds.collect(), Rng::new(seed), House::Echo, peers);
    for rig in &rigs {
        rig.run(0);
    }
    while rigs.iter().any(|rig| !rig.world.borrow().is_quiet()) {
        for rig in &rigs {
            rig.turn();
        }
    }
    let mut ended = 0;
    for rig in &rigs {
        rig.drain(1_000);
        for peer in rig.world.borrow().past() {
            assert_prefix(peer);
            assert!(peer.manner != Manner::Good || peer.is_answered());
            ended += 1;
        }
    }
    assert_eq!(ended, peers);
}

#[test]
fn five_megabytes_each_way_through_200_connections_on_2_simulated_cores() {
    for_seeds("5 MB", 1, |seed| {
        serve_on_two_cores(seed, |rng| Peer::with(rng, Manner::Good, 25_000, 4_000), 200);
    });
}

#[test]
fn one_byte_writes_are_answered_over_the_simulator() {
    for_seeds("bytes", 4, |seed| {
        serve_on_two_cores(seed, |rng| Peer::with(rng, Manner::Good, 300, 1), 20);
    });
}

#[test]
fn ten_thousand_connects_that_reset_leave_nothing_in_the_simulator() {
    for_seeds("resets", 1, |seed| {
        let peers = if cfg!(miri) { 20 } else { 10_000 };
        serve_on_two_cores(seed, |rng| Peer::with(rng, Manner::Resets, 8, 8), peers);
    });
}
