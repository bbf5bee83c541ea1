//! UDP sockets over the simulated kernel: what is received and sent, who waits, and how they end.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use super::ports::Parcel;
use super::rig::{Rig, place};
use super::rng::Rng;
use super::tests::for_seeds;
use super::{World, WorldRef};
use crate::config::Config;
use crate::driver::Socket;
use crate::error::Result;
use crate::executor::Scope;
use crate::local::Entered;
use crate::net::{Datagram, UdpSocket};
use crate::task::{self, spawn_task};
use crate::time::{sleep, timeout};
use crate::token::Kind;

/// Whatever the kernel does, each datagram is answered once, whole and to its sender, or it is
/// counted; and no reader that gives up to wait loses one.
#[test]
fn each_datagram_is_answered_once_or_counted_over_any_kernel() {
    let seen = RefCell::new(HashMap::new());
    for_seeds("datagrams", 1_000, |seed| {
        let mut rng = Rng::new(seed);
        let world = World::new(seed, 8, 256, Vec::new());
        let parcels: Vec<Parcel> = (0..rng.below(300)).map(|n| parcel(n, &mut rng)).collect();
        let rig = rig_in(&world, seed % 14);
        world.borrow_mut().parcels.extend(parcels.iter().cloned());
        let manners = Rng::new(seed ^ 1);
        run_task(&rig, |socket| echo(socket, manners));
        // Somebody keeps the buffers for a while.
        rig.turn();
        let kept = world.borrow_mut().take_datagram_buffers(rng.below(9) as usize);
        for _ in 0..rng.below(60) {
            rig.turn();
        }
        drop(kept);
        rig.turn_until("all are answered", |rig| {
            let world = rig.world.borrow();
            let quiet = world.ports.values().all(|port| port.queued() == 0);
            let stats = rig.core.borrow_mut().counters.snapshot();
            let answered = stats.datagrams_sent + stats.datagrams_unsent;
            quiet && world.parcels.is_empty() && answered == stats.datagrams_received
        });
        rig.drain(1_000);
        let stats = rig.stats();
        let mut owed: HashMap<(SocketAddr, Vec<u8>), u32> = HashMap::new();
        for (peer, bytes) in parcels.iter().flat_map(datagrams) {
            *owed.entry((peer, bytes)).or_default() += 1;
        }
        let all: u64 = owed.values().map(|count| u64::from(*count)).sum();
        for (peer, bytes) in world.borrow().past_ports.iter().flat_map(|port| &port.sent) {
            let key = (peer.expect("it was sent to somebody"), bytes.clone());
            let owing = owed.get_mut(&key).unwrap_or_else(|| panic!("nobody has sent {key:?}"));
            *owing = owing.checked_sub(1).expect("answered once");
        }
        let unanswered: u64 = owed.values().map(|count| u64::from(*count)).sum();
        assert_eq!(unanswered, stats.datagrams_lost + stats.datagrams_unsent, "{stats:?}");
        assert_eq!(all, stats.datagrams_received + stats.datagrams_lost, "{stats:?}");
        assert_eq!((stats.udp_sockets, stats.tasks_forced, stats.datagrams_truncated), (0, 0, 0));
        for (what, count) in [
            ("lost", stats.datagrams_lost),
            ("unsent", stats.datagrams_unsent),
            ("buffers missing", stats.buffers_missing),
            ("pauses", stats.pauses),
        ] {
            *seen.borrow_mut().entry(what).or_insert(0) += count;
        }
    });
    let seen = seen.into_inner();
    assert!(cfg!(miri) || seen.values().all(|count| *count > 0), "not met: {seen:?}");
}

/// Sockets come and go while everything is in flight on them; the rig checks after each turn that
/// none is closed before its last completion and that no buffer is in two places.
#[test]
fn sockets_dropped_with_everything_in_flight_leave_nothing_and_lose_no_send() {
    for_seeds("drops", 500, |seed| {
        let mut rng = Rng::new(seed);
        let world = World::new(seed, 8, 256, Vec::new());
        let rig = rig_in(&world, seed % 14);
        let accepted = Rc::new(Cell::new(0));
        for round in 0..20 {
            world.borrow_mut().parcels.extend((0..20).map(|n| parcel(n, &mut rng)));
            let (accepted, chances) = (Rc::clone(&accepted), Rng::new(seed ^ (round << 8)));
            run_task(&rig, |socket| meddle(socket, chances, accepted));
            for _ in 0..rng.below(20) {
                rig.turn();
            }
        }
        rig.turn_until("all are gone", |rig| {
            rig.stats().tasks == 0 && rig.stats().udp_sockets == 0
        });
        let stats = rig.stats();
        assert_eq!(stats.datagrams_sent + stats.datagrams_unsent, accepted.get(), "{stats:?}");
        let left: usize = world.borrow().past_ports.iter().map(|port| port.sent.len()).sum();
        assert_eq!(left as u64, stats.datagrams_sent);
        let leased = rig.core.borrow_mut().driver.datagram_pool().map(|pool| pool.leased());
        assert_eq!((leased, rig.core.borrow_mut().memory.used()), (Some(0), 0));
        rig.drain(0);
    });
}

/// A drain at any moment, under load: owners that go by it end at once, those that do not are
/// dropped at the deadline and named, and all sockets are closed when the core is down.
#[test]
fn a_drain_ends_all_sockets_whatever_their_owners_do() {
    for_seeds("drained", 500, |seed| {
        let mut rng = Rng::new(seed);
        let world = World::new(seed, 8, 256, Vec::new());
        let rig = rig_in(&world, seed % 14);
        let deaf = rng.below(3);
        for _ in 0..deaf {
            run_task(&rig, |socket| async move {
                loop {
                    let datagram = socket.recv_from().await?;
                    let peer = datagram.peer();
                    socket.send_to(datagram, peer).await?;
                }
            });
        }
        for n in 0..rng.below(3) {
            run_task(&rig, |socket| echo(socket, Rng::new(seed + n)));
        }
        world.borrow_mut().parcels.extend((0..2_000).map(|n| parcel(n % 256, &mut rng)));
        for _ in 0..rng.below(50) {
            rig.turn();
        }
        let begun_ns = world.borrow().now_ns();
        rig.drain(200);
        let took_ms = (world.borrow().now_ns() - begun_ns) / 1_000_000;
        let stats = rig.stats();
        // The listener has its faults as well.
        let swift = deaf == 0 && stats.accept_errors == 0;
        assert!(!swift || took_ms < 100, "{took_ms} ms though everyone goes by the drain");
        assert_eq!((stats.tasks_forced, stats.udp_sockets), (deaf, 0));
        let named = rig.core.borrow_mut().account().forced_tasks;
        assert_eq!(named.iter().map(|task| task.count).sum::<u64>(), deaf, "{named:?}");
        assert_eq!(rig.core.borrow_mut().memory.used(), 0);
    });
}

#[test]
fn a_datagram_that_is_longer_than_its_buffer_says_so_and_is_counted() {
    let (rig, kept) = by_hand_reader();
    let long: Vec<u8> = (0..300u16).map(|n| n as u8).collect();
    for bytes in [long.clone(), long[..256].to_vec()] {
        deliver(&rig, Parcel { peer: peer(7), bytes, segment: None });
    }
    hear(&rig, 2);
    let heard = kept.borrow();
    assert!(heard[0].is_truncated() && !heard[1].is_truncated());
    assert_eq!((heard[0].sent_bytes(), &heard[0][..]), (300, &long[..256]));
    assert_eq!((heard[1].sent_bytes(), heard[1].peer()), (256, peer(7)));
    assert_eq!(rig.stats().datagrams_truncated, 1);
    drop(heard);
    kept.borrow_mut().clear();
    finish(&rig);
}

/// A reader that stops costs so many datagrams in the queue, then the kernel's room; what it drops
/// is counted to the last one.
#[test]
fn a_reader_that_stops_leaves_the_rest_to_the_kernel_and_every_loss_is_counted() {
    let world = World::new(3, 8, 256, Vec::new());
    world.borrow_mut().orders.by_hand = true;
    let rig = rig_in(&world, 0);
    run_task(&rig, |socket| async move {
        socket.recv_from().await?;
        task::draining().await?;
        Ok(())
    });
    settle(&rig);
    for n in 0..400 {
        deliver(&rig, Parcel { peer: peer(0), bytes: vec![n as u8; 20], segment: None });
        if world.borrow().in_flight(Kind::ReceiveDatagrams) > 0 {
            world.borrow_mut().work_on(Kind::ReceiveDatagrams);
        }
        settle(&rig);
        if world.borrow().in_flight(Kind::CancelDatagrams) > 0 {
            world.borrow_mut().work_on(Kind::CancelDatagrams);
            world.borrow_mut().work_on(Kind::ReceiveDatagrams);
        }
    }
    settle(&rig);
    let stats = rig.stats();
    let kept = stats.datagrams_received - 1;
    assert!((128..=130).contains(&kept), "{kept} in the queue");
    assert_eq!(stats.pauses, 1);
    finish(&rig);
    // The one that was taken, the queue, and what the kernel had room for.
    assert_eq!(rig.stats().datagrams_lost, 400 - 1 - kept - 40);
}

/// So many sends are in flight, and not one more before one of them has ended.
#[test]
fn a_send_waits_while_as_many_are_in_flight_as_may_be() {
    let world = World::new(4, 8, 256, Vec::new());
    world.borrow_mut().orders.by_hand = true;
    let rig = rig_in(&world, 0);
    let accepted = Rc::new(Cell::new(0u64));
    let count = Rc::clone(&accepted);
    run_task(&rig, |socket| async move {
        for _ in 0..200 {
            socket.send_to("a datagram", peer(0)).await?;
            count.set(count.get() + 1);
        }
        Ok(())
    });
    settle(&rig);
    assert_eq!(accepted.get(), 128);
    for n in 1..=5 {
        world.borrow_mut().work_on(Kind::SendDatagram);
        settle(&rig);
        assert_eq!((accepted.get(), rig.stats().datagrams_sent), (128 + n, n));
    }
    finish(&rig);
    assert_eq!((accepted.get(), rig.stats().datagrams_sent), (200, 200));
}

/// Where the kernel can't cut, we do; and once it is known that a device can't, at once.
#[test]
fn what_the_kernel_does_not_cut_is_sent_one_by_one() {
    for errno in [libc::EIO, libc::EINVAL, libc::EMSGSIZE] {
        let world = World::new(5, 8, 256, Vec::new());
        world.borrow_mut().orders.by_hand = true;
        let rig = rig_in(&world, 0);
        run_task(&rig, |socket| async move {
            for _ in 0..2 {
                socket.send_segments(vec![7; 95], 10, peer(0)).await?;
                socket.flush().await?;
            }
            Ok(())
        });
        settle(&rig);
        world.borrow_mut().orders.datagram_errors.push_back(errno);
        let mut works = 0;
        while rig.stats().udp_sockets > 0 {
            world.borrow_mut().work_on(Kind::SendDatagram);
            settle(&rig);
            works += 1;
        }
        // The second time the kernel is asked again, but for the device that can't.
        assert_eq!(works, if errno == libc::EIO { 1 + 10 + 10 } else { 1 + 10 + 1 });
        let stats = rig.stats();
        assert_eq!((stats.datagrams_sent, stats.datagrams_unsent), (20, 0));
        let lens: Vec<usize> =
            world.borrow().past_ports[0].sent.iter().map(|(_, bytes)| bytes.len()).collect();
        assert_eq!(lens, [10, 10, 10, 10, 10, 10, 10, 10, 10, 5].repeat(2));
        finish(&rig);
    }
}

/// An error is told once, in its place among the datagrams, and the receive goes on behind it.
#[test]
fn an_error_is_told_once_and_the_socket_goes_on() {
    let world = World::new(7, 8, 256, Vec::new());
    world.borrow_mut().orders.by_hand = true;
    let rig = rig_in(&world, 0);
    let heard = Rc::new(RefCell::new(Vec::new()));
    let hear = Rc::clone(&heard);
    run_task(&rig, |socket| async move {
        for _ in 0..3 {
            let got = socket.recv_from().await;
            hear.borrow_mut().push(got.map_err(|error| error.raw_os_error()).map(|it| it.len()));
        }
        Ok(())
    });
    settle(&rig);
    for step in 0..3 {
        match step {
            1 => world.borrow_mut().ports.values_mut().for_each(|port| {
                port.error = Some(libc::ECONNREFUSED);
            }),
            _ => deliver(&rig, Parcel { peer: peer(0), bytes: vec![1; 5], segment: None }),
        }
        world.borrow_mut().work_on(Kind::ReceiveDatagrams);
        settle(&rig);
    }
    assert_eq!(*heard.borrow(), [Ok(5), Err(Some(libc::ECONNREFUSED)), Ok(5)]);
    finish(&rig);
}

/// Answers until the drain, in one of several manners.
async fn echo(socket: UdpSocket, mut rng: Rng) -> Result<()> {
    loop {
        let datagram = if rng.percent(30) {
            // Who gives up to wait has lost nothing.
            let patience = Duration::from_millis(rng.below(2));
            match timeout(patience, socket.recv_until_drain()).await {
                Ok(datagram) => datagram?,
                Err(_) => continue,
            }
        } else {
            socket.recv_until_drain().await?
        };
        let Some(datagram) = datagram else { return Ok(()) };
        if rng.percent(10) {
            sleep(Duration::from_millis(rng.below(9))).await;
        }
        let peer = datagram.peer();
        match datagram.segment_size() {
            Some(bytes) => socket.send_segments(datagram, bytes, peer).await?,
            None if rng.percent(50) => socket.send_to(datagram.to_vec(), peer).await?,
            None => socket.send_to(datagram, peer).await?,
        }
    }
}

/// Uses a socket for a while, with tasks of its own, and drops everything at any moment.
async fn meddle(socket: UdpSocket, mut rng: Rng, accepted: Rc<Cell<u64>>) -> Result<()> {
    let socket = Rc::new(socket);
    let other = Rc::clone(&socket);
    let reading = task::spawn(async move {
        let mut kept = Vec::new();
        while let Ok(datagram) = other.recv_from().await {
            kept.push(datagram);
            kept.truncate(3);
        }
    })?;
    for n in 0..rng.below(40) {
        match rng.below(4) {
            0 => sleep(Duration::from_micros(rng.below(500))).await,
            1 => drop(timeout(Duration::ZERO, socket.recv_from()).await),
            2 => {
                socket.send_segments(vec![n as u8; 100], 30, peer(1)).await?;
                accepted.set(accepted.get() + 4);
            }
            _ => {
                socket.send_to(vec![n as u8; 50], peer(2)).await?;
                accepted.set(accepted.get() + 1);
            }
        }
    }
    reading.abort();
    Ok(())
}

/// A core without peers over TCP, in a kernel with so many faults in a hundred.
pub(super) fn rig_in(world: &WorldRef, fault_percent: u64) -> Rig {
    let queue_bytes = if fault_percent == 0 { 10_000 } else { 1_000 };
    let config = Config::default().stall_ms(0).buffer_bytes(256).receive_queue_bytes(queue_bytes);
    let rig = Rig::with(WorldRef::clone(world), config, |_| async { Ok(()) });
    world.borrow_mut().fault_percent = fault_percent;
    rig.run(0);
    rig
}

/// A task with a socket of its own.
pub(super) fn run_task<F>(rig: &Rig, make: impl FnOnce(UdpSocket) -> F)
where
    F: Future<Output = Result<()>> + 'static,
{
    let _entered = Entered::new(&rig.core);
    let socket = Socket::Sim(World::bind_udp(&rig.world));
    let socket = UdpSocket::adopt(&rig.core, socket, peer(0)).expect("a socket");
    let future = make(socket);
    let task = Box::pin(async move { future.await.expect("no error is due") });
    spawn_task(&rig.core, Scope::Core, place(), task).expect("a task");
}

/// A task that keeps what it receives, over a kernel that does what the test says.
fn by_hand_reader() -> (Rig, Rc<RefCell<Vec<Datagram>>>) {
    let world = World::new(2, 8, 256, Vec::new());
    world.borrow_mut().orders.by_hand = true;
    let rig = rig_in(&world, 0);
    let heard = Rc::new(RefCell::new(Vec::new()));
    let hear = Rc::clone(&heard);
    run_task(&rig, |socket| async move {
        while let Some(datagram) = socket.recv_until_drain().await? {
            hear.borrow_mut().push(datagram);
        }
        Ok(())
    });
    settle(&rig);
    (rig, heard)
}

fn deliver(rig: &Rig, parcel: Parcel) {
    rig.world.borrow_mut().ports.values_mut().for_each(|port| port.deliver(parcel.clone()));
}

fn hear(rig: &Rig, datagrams: usize) {
    for _ in 0..datagrams {
        rig.world.borrow_mut().work_on(Kind::ReceiveDatagrams);
        settle(rig);
    }
}

pub(super) fn settle(rig: &Rig) {
    super::hands::settle(rig);
}

pub(super) fn finish(rig: &Rig) {
    super::hands::finish(rig);
}

pub(super) fn peer(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 1_000 + u16::from(n)))
}

/// One that says which it is, or several together.
fn parcel(n: u64, rng: &mut Rng) -> Parcel {
    let bytes: Vec<u8> = (0..rng.below(250)).map(|at| (n + at) as u8).collect();
    let several = rng.percent(20) && bytes.len() > 1;
    let segment = several.then(|| 1 + rng.below(bytes.len() as u64 - 1) as usize);
    Parcel { peer: peer(rng.below(5) as u8), bytes, segment }
}

/// The datagrams in a parcel.
fn datagrams(parcel: &Parcel) -> Vec<(SocketAddr, Vec<u8>)> {
    if parcel.bytes.is_empty() {
        return vec![(parcel.peer, Vec::new())];
    }
    let size = parcel.segment.unwrap_or(parcel.bytes.len());
    parcel.bytes.chunks(size).map(|bytes| (parcel.peer, bytes.to_vec())).collect()
}
