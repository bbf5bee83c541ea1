//! Receives that are asked for anew, as on a core in a crowd: what happens meanwhile is heard of.

use super::hands::{connect, finish, settle};
use super::peer::Peer;
use super::rig::Rig;
use crate::config::Config;
use crate::entry::Receive;
use crate::token::Kind;

/// Echoes for so many peers, each of which says a byte a round, until a connection rests.
fn crowd(peers: usize) -> Rig {
    let rig = Rig::by_hand(Config::default(), |mut conn| async move {
        while let Some(chunk) = conn.recv().await? {
            conn.send(chunk).await?;
        }
        Ok(())
    });
    for _ in 0..peers {
        connect(&rig);
    }
    for _ in 0..1_000 {
        rig.world.borrow_mut().peers().for_each(|peer| peer.say(b"x"));
        for kind in [Kind::Receive, Kind::Send, Kind::Cancel] {
            rig.world.borrow_mut().work_on_all(kind);
        }
        rig.turn();
        if resting_of(&rig) > 0 {
            return rig;
        }
    }
    panic!("they never rest");
}

fn resting_of(rig: &Rig) -> usize {
    let core = rig.core.borrow_mut();
    core.table.iter().filter(|(_, entry)| entry.receive == Receive::Resting).count()
}

fn all_in_flight(rig: &Rig, act: impl FnMut(&mut Peer)) {
    rig.world.borrow_mut().peers().for_each(act);
    for _ in 0..20 {
        for kind in [Kind::Receive, Kind::Send, Kind::Cancel] {
            rig.world.borrow_mut().work_on_all(kind);
        }
        settle(rig);
    }
}

#[test]
fn who_rests_is_armed_again_and_answered() {
    let rig = crowd(3);
    rig.turn();
    rig.turn();
    assert_eq!(resting_of(&rig), 0, "a turn later all are armed");
    all_in_flight(&rig, |_| {});
    let before = rig.stats().bytes_received;
    all_in_flight(&rig, |peer| peer.say(b"again"));
    assert_eq!(rig.stats().bytes_received, before + 15);
    assert_eq!(rig.stats().bytes_sent, rig.stats().bytes_received, "all of it came back");
    finish(&rig);
}

#[test]
fn the_end_of_the_stream_is_heard_of_by_who_rests() {
    let rig = crowd(3);
    all_in_flight(&rig, Peer::half_close);
    assert_eq!(rig.stats().live, 0, "all have ended");
    assert_eq!(rig.stats().bytes_sent, rig.stats().bytes_received);
    finish(&rig);
}

#[test]
fn a_reset_is_heard_of_by_who_rests() {
    let rig = crowd(3);
    all_in_flight(&rig, Peer::break_off);
    assert_eq!(rig.stats().live, 0, "all have ended");
    finish(&rig);
}

#[test]
fn a_drain_ends_who_rests() {
    let rig = crowd(3);
    finish(&rig);
    assert_eq!(rig.stats().live, 0);
    assert_eq!(rig.stats().bytes_sent, rig.stats().bytes_received);
}
