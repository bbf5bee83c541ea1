//! The last sends of UDP sockets over the simulated kernel: how long they are waited for.

use std::cell::RefCell;
use std::rc::Rc;

use super::World;
use super::hands::drain_for_a_second;
use super::tests::for_seeds;
use super::udp::{finish, peer, rig_in, run_task, settle};
use crate::task;
use crate::token::Kind;

/// What was sent right before the owner's end, or the core's, has left when the core is down.
#[test]
fn what_a_handler_has_sent_with_its_last_breath_leaves() {
    for_seeds("last breath", 200, |seed| {
        let world = World::new(seed, 8, 256, Vec::new());
        let rig = rig_in(&world, 0);
        run_task(&rig, |socket| async move {
            task::draining().await?;
            for n in 0..20u8 {
                socket.send_to(vec![n; 9], peer(0)).await?;
            }
            Ok(())
        });
        rig.turn();
        rig.drain(1_000);
        let world = world.borrow();
        let sent: Vec<u8> = world.past_ports[0].sent.iter().map(|(_, bytes)| bytes[0]).collect();
        let mut all = sent.clone();
        all.sort_unstable();
        assert_eq!(all, (0..20).collect::<Vec<u8>>());
    });
}

/// A send that the kernel never answers ends with its socket's owner, a second later.
#[test]
fn a_send_that_finds_no_room_is_cancelled_a_second_after_its_owner_has_gone() {
    let world = World::new(6, 8, 256, Vec::new());
    world.borrow_mut().orders.by_hand = true;
    let rig = rig_in(&world, 0);
    run_task(&rig, |socket| async move { socket.send_to("stuck", peer(0)).await });
    settle(&rig);
    world.borrow_mut().pass_ms(900);
    settle(&rig);
    assert_eq!((world.borrow().in_flight(Kind::CancelDatagrams), rig.stats().udp_sockets), (0, 1));
    world.borrow_mut().pass_ms(300);
    settle(&rig);
    for kind in [Kind::CancelDatagrams, Kind::SendDatagram] {
        world.borrow_mut().work_on(kind);
    }
    settle(&rig);
    assert_eq!((rig.stats().udp_sockets, rig.stats().datagrams_unsent), (0, 1));
    finish(&rig);
}

/// No piece of it follows what is sent, refused or interrupted when that second is over.
#[test]
fn a_send_of_several_pieces_does_not_go_on_when_its_time_is_over() {
    for errno in [None, Some(libc::EINTR), Some(libc::EIO)] {
        let world = World::new(8, 8, 256, Vec::new());
        world.borrow_mut().orders.by_hand = true;
        let rig = rig_in(&world, 0);
        let all = 100;
        run_task(&rig, |socket| async move {
            socket.send_segments(vec![7; 1_000 * all], 1_000, peer(0)).await
        });
        settle(&rig);
        world.borrow_mut().pass_ms(1_200);
        settle(&rig);
        // The cancellation finds nothing, as the send has just been answered.
        world.borrow_mut().orders.datagram_errors.extend(errno);
        for kind in [Kind::SendDatagram, Kind::CancelDatagrams] {
            world.borrow_mut().work_on(kind);
        }
        settle(&rig);
        let stats = rig.stats();
        assert_eq!(stats.udp_sockets, 0, "after {errno:?}");
        assert_eq!(stats.datagrams_sent + stats.datagrams_unsent, all as u64, "{stats:?}");
        finish(&rig);
    }
}

/// Who holds the socket, such as a core's state, may go only with the core.
#[test]
fn a_drain_waits_for_what_was_sent_by_a_socket_that_outlives_its_task() {
    let world = World::new(9, 8, 256, Vec::new());
    world.borrow_mut().orders.by_hand = true;
    let rig = rig_in(&world, 0);
    let held = Rc::new(RefCell::new(None));
    let holds = Rc::clone(&held);
    run_task(&rig, |socket| async move {
        socket.send_to("slow", peer(0)).await?;
        holds.replace(Some(socket));
        Ok(())
    });
    settle(&rig);
    drain_for_a_second(&rig);
    world.borrow_mut().work_on(Kind::SendDatagram);
    finish(&rig);
    assert_eq!((rig.stats().datagrams_sent, rig.stats().datagrams_unsent), (1, 0));
}
