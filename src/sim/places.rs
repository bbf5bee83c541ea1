//! Direct descriptors of the simulated kernel: its table of open files, and the driver's own books
//! of it, which are the real ones. A socket that the core closes while it has a place stays open.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Peer, Running, World};
use crate::driver::{Name, Op};
use crate::sys::files::{Files, Leaving};
use crate::token::Token;

/// The places of a world.
#[derive(Debug)]
pub(crate) struct Places {
    files: Files,
    /// What is to reach the kernel with the next `enter`, in this order.
    queued: VecDeque<Step>,
    table: BTreeMap<u32, i32>,
    /// Updates that are done, and of which the driver has not heard.
    done: VecDeque<(Token, i32)>,
    /// Closed by the core, and still open.
    kept: BTreeSet<i32>,
    pub(crate) tally: Tally,
}

/// What has happened, for a test to see that anything has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) direct_sends: u64,
    pub(crate) refused: u64,
    pub(crate) left_at_once: u64,
    pub(crate) left_behind_an_update: u64,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Fill(Token, i32),
    Empty(Token),
    /// A send finds its socket in this place.
    Send(u32, i32),
}

impl Places {
    pub(super) fn new() -> Places {
        Places {
            files: Files::of(PLACES),
            queued: VecDeque::new(),
            table: BTreeMap::new(),
            done: VecDeque::new(),
            kept: BTreeSet::new(),
            tally: Tally::default(),
        }
    }

    /// A send is queued, and an update before it if it is time for that.
    pub(super) fn send(&mut self, token: Token, Name(fd): Name) {
        if self.files.is_direct(token) {
            self.tally.direct_sends += 1;
            self.queued.push_back(Step::Send(token.slot(), fd));
        } else if self.files.settle(token, fd).is_some() {
            self.queued.push_back(Step::Fill(token, fd));
        }
    }

    /// How many sockets are open only as they have a place.
    pub(super) fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Whether a socket that is being closed stays open.
    fn keeps_open(&mut self, fd: i32) -> bool {
        let keeps = self.table.values().any(|other| *other == fd);
        keeps && self.kept.insert(fd)
    }
}

impl World {
    /// A connection is about to be closed, and leaves its place: by a call, which may fail, or by
    /// an update behind the one that is under way.
    pub(super) fn leave_place(&mut self, token: Token) {
        let Some(leaving) = self.places.files.leave(token) else { return };
        let fails = self.rng.percent(self.fault_percent);
        if leaving == Leaving::AtOnce && !fails {
            self.places.tally.left_at_once += 1;
            self.places.table.remove(&token.slot());
        } else {
            self.places.tally.left_behind_an_update += 1;
            self.places.queued.push_back(Step::Empty(token));
        }
    }

    /// What is queued is submitted: the kernel updates its table at once.
    pub(super) fn update_places(&mut self) {
        while let Some(step) = self.places.queued.pop_front() {
            match step {
                Step::Send(slot, fd) => {
                    let found = self.places.table.get(&slot);
                    assert_eq!(found, Some(&fd), "a send by place {slot} finds another socket");
                }
                Step::Fill(token, _) if self.rng.percent(self.fault_percent) => {
                    self.places.tally.refused += 1;
                    self.places.done.push_back((token, -libc::ENOMEM));
                }
                Step::Fill(token, fd) => {
                    assert!(self.streams.contains_key(&fd), "descriptor {fd} is closed already");
                    let before = self.places.table.insert(token.slot(), fd);
                    assert_eq!(before, None, "place {} is another's", token.slot());
                    self.places.done.push_back((token, 1));
                }
                Step::Empty(token) => {
                    let fd = self.places.table.remove(&token.slot());
                    if let Some(fd) = fd.filter(|fd| self.places.kept.remove(fd)) {
                        self.close(fd);
                    }
                    self.places.done.push_back((token, 1));
                }
            }
        }
        let kept = &self.places.kept;
        assert!(kept.is_empty(), "closed, and kept open by their places: {kept:?}");
    }

    /// The driver may hear of an update that is done.
    pub(super) fn tell_of_places(&mut self) {
        while !self.places.done.is_empty() && self.rng.percent(50) {
            if let Some((token, result)) = self.places.done.pop_front() {
                self.places.files.settled(token, result);
            }
        }
    }

    /// All places are given up.
    pub(super) fn drop_places(&mut self) {
        let Places { tally, kept, .. } = std::mem::replace(&mut self.places, Places::new());
        self.places.tally = tally;
        kept.into_iter().for_each(|fd| self.close(fd));
    }

    pub(super) fn close(&mut self, fd: i32) {
        let uses = |running: &Running| match running.op {
            Op::Accept { listener, .. } => listener.0 == fd,
            Op::Receive { socket, .. }
            | Op::Send { socket, .. }
            | Op::Hangup { socket }
            | Op::ReceiveDatagrams { socket }
            | Op::SendDatagram { socket, .. }
            | Op::Connect { socket, .. } => socket.0 == fd,
            Op::Cancel { .. } => false,
        };
        let in_use = self.queued.iter().chain(&self.running).any(uses);
        // A seed that has failed drops everything, and must still be printed.
        assert!(
            std::thread::panicking() || !in_use,
            "descriptor {fd} closed with an operation in flight"
        );
        if self.places.keeps_open(fd) {
            return;
        }
        if self.listener == Some(fd) {
            self.listener = None;
            // What is in its queue is reset: tcp(7) does the same.
            let lost = self.backlog.drain(..).map(Peer::reset_by_close);
            self.past.extend(lost);
        } else if self.unconnected.remove(&fd) {
            // Nobody has heard of it.
        } else if let Some(peer) = self.streams.remove(&fd) {
            self.past.push(peer.closed());
        } else {
            self.past_ports.extend(self.ports.remove(&fd));
        }
    }
}

/// So few that some connections have none.
const PLACES: u32 = 8;

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::rig::{House, Rig};
    use super::super::tests::for_seeds;
    use super::Tally;

    /// The model itself says what is wrong: a send that finds another's socket, a place that keeps
    /// a socket open after its connection has ended, one that is given away twice.
    #[test]
    fn a_place_is_one_connections_and_is_left_before_its_socket_is_closed() {
        let all = Cell::new(Tally::default());
        for_seeds("places", 500, |seed| {
            let house = if seed % 2 == 0 { House::Echo } else { House::Mixed };
            let rig = Rig::new(seed, house);
            rig.run(if seed % 4 < 2 { 100_000 } else { seed as usize % 500 });
            rig.drain(seed % 5 * 300);
            let world = rig.world.borrow();
            assert!(world.places.table.is_empty(), "seed {seed}: {:?}", world.places);
            let (sum, more) = (all.get(), world.places.tally);
            all.set(Tally {
                direct_sends: sum.direct_sends + more.direct_sends,
                refused: sum.refused + more.refused,
                left_at_once: sum.left_at_once + more.left_at_once,
                left_behind_an_update: sum.left_behind_an_update + more.left_behind_an_update,
            });
        });
        let Tally { direct_sends, refused, left_at_once, left_behind_an_update } = all.get();
        let counts = [direct_sends, refused, left_at_once, left_behind_an_update];
        let few = cfg!(miri) || std::env::var("RING_TEST_SEED").is_ok();
        assert!(few || counts.iter().all(|count| *count > 0), "{:?}", all.get());
    }
}
