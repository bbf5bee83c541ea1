//! Direct descriptors: the ring's own table of open files, with a place for each slot of the core's
//! table, in which an operation finds its socket at once. To look up a descriptor and count the
//! reference to it costs a send some 60 ns in a process of several threads.
//!
//! A connection gets its place once it has sent so often that the two updates are worth it, and has
//! to leave it when its socket is closed: until then the kernel keeps the socket open. See
//! `io_uring_prep_files_update(3)`.

use io_uring::{opcode, squeue};

use super::limits;
use super::ring::Ring;
use crate::token::{Kind, Token};

/// The places of a ring; none where the kernel gives none.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// What an update reads when it is submitted, by slot; it never moves.
    descriptors: Box<[i32]>,
    places: Vec<Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    /// Whose it is.
    generation: u32,
    /// How often that one has sent, up to [`SENDS`].
    sends: u8,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// The update is under way.
    Asked,
    Taken,
    Refused,
}

/// How a connection leaves its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// By a call, so that the socket is closed when its descriptor is.
    AtOnce,
    /// By an update behind the one that is under way.
    BehindUpdate,
}

impl Files {
    /// Asks for so many places. Not to get them is no error.
    ///
    /// Before 6.13 the kernel closed a file that had left its place only after every operation
    /// that was under way then, of whatever connection; a feature that came soon after stands for
    /// that release.
    pub(super) fn register(ring: &Ring, places: u32) -> Files {
        let apart = ring.uring.params().is_feature_no_iowait();
        let most = limits::nofile().map_or(places, |(soft, _)| soft.min(places.into()) as u32);
        let places = places.min(most);
        if !apart || ring.uring.submitter().register_files_sparse(places).is_err() {
            return Files::default();
        }
        Files { descriptors: vec![0; places as usize].into(), places: Vec::new() }
    }

    /// As if it had got so many.
    #[cfg(test)]
    pub(crate) fn of(places: u32) -> Files {
        Files { descriptors: vec![0; places as usize].into(), places: Vec::new() }
    }

    /// Whether the next send of a connection finds its socket in its place.
    #[inline]
    pub(crate) fn is_direct(&mut self, token: Token) -> bool {
        let place = self.places.get(token.slot() as usize);
        let taken = |it: &Place| it.state == State::Taken && it.generation == token.generation();
        place.is_some_and(taken) || self.count_send(token)
    }

    /// Counts it to who has no place yet. False, for a caller who asks whether it has one.
    fn count_send(&mut self, token: Token) -> bool {
        let slot = token.slot() as usize;
        if slot >= self.descriptors.len() {
            return false;
        }
        let fresh = Place { generation: token.generation(), sends: 0, state: State::Free };
        if slot >= self.places.len() {
            self.places.resize(slot + 1, fresh);
        }
        let place = &mut self.places[slot];
        if place.generation != token.generation() {
            debug_assert!(matches!(place.state, State::Free | State::Refused));
            *place = fresh;
        }
        place.sends = place.sends.saturating_add(1);
        false
    }

    /// The update that gives a connection its place, when it is time for that.
    pub(crate) fn settle(&mut self, token: Token, fd: i32) -> Option<squeue::Entry> {
        let place = self.places.get_mut(token.slot() as usize)?;
        if place.state != State::Free || place.sends < SENDS {
            return None;
        }
        place.state = State::Asked;
        Some(self.update(token, fd))
    }

    /// An update has ended.
    pub(crate) fn settled(&mut self, token: Token, result: i32) {
        if let Some(place) = self.place(token)
            && place.state == State::Asked
        {
            place.state = if result == 1 { State::Taken } else { State::Refused };
        }
    }

    /// A connection gives up its place, if it has one: how that is done.
    pub(crate) fn leave(&mut self, token: Token) -> Option<Leaving> {
        let place = self.place(token)?;
        place.sends = 0;
        match std::mem::replace(&mut place.state, State::Free) {
            State::Free | State::Refused => None,
            State::Asked => Some(Leaving::BehindUpdate),
            State::Taken => Some(Leaving::AtOnce),
        }
    }

    /// The update that empties a place.
    pub(super) fn vacate(&mut self, token: Token) -> squeue::Entry {
        self.update(token, NO_FILE)
    }

    fn place(&mut self, token: Token) -> Option<&mut Place> {
        let place = self.places.get_mut(token.slot() as usize)?;
        (place.generation == token.generation()).then_some(place)
    }

    fn update(&mut self, token: Token, fd: i32) -> squeue::Entry {
        let slot = token.slot();
        let descriptor = &mut self.descriptors[slot as usize];
        *descriptor = fd;
        let entry = opcode::FilesUpdate::new(&raw const *descriptor, 1).offset(slot as i32).build();
        entry.user_data(Token::new(Kind::File, slot, token.generation()).bits())
    }
}

/// After so many sends a place is worth its two updates.
const SENDS: u8 = 16;
/// In an update: nothing is to be there.
pub(super) const NO_FILE: i32 = -1;

#[cfg(test)]
mod tests {
    use super::*;

    fn token(slot: u32, generation: u32) -> Token {
        Token::new(Kind::Send, slot, generation)
    }

    /// Sends until the place is asked for, and says how often that was.
    fn ask(files: &mut Files, token: Token) -> u32 {
        (1..)
            .find(|_| !files.is_direct(token) && files.settle(token, 9).is_some())
            .expect("endless")
    }

    #[test]
    fn who_sends_often_gets_a_place_and_leaves_it_once() {
        let mut files = Files::of(4);
        let first = token(3, 0);
        assert_eq!(ask(&mut files, first), u32::from(SENDS));
        assert!(!files.is_direct(first) && files.settle(first, 9).is_none(), "under way");
        files.settled(first, 1);
        assert!(files.is_direct(first));
        assert_eq!((files.leave(first), files.leave(first)), (Some(Leaving::AtOnce), None));
        assert!(!files.is_direct(token(3, 1)), "that is somebody else");
    }

    #[test]
    fn who_is_refused_goes_on_without() {
        let mut files = Files::of(4);
        ask(&mut files, token(0, 0));
        files.settled(token(0, 0), -libc::ENOMEM);
        assert!(!files.is_direct(token(0, 0)) && files.settle(token(0, 0), 9).is_none());
        assert!(files.leave(token(0, 0)).is_none());
        for _ in 0..100 {
            assert!(!files.is_direct(token(4, 0)), "there is no such place");
            assert!(files.settle(token(4, 0), 9).is_none());
        }
    }

    #[test]
    fn what_ends_late_gives_nobody_anothers_place() {
        let mut files = Files::of(4);
        ask(&mut files, token(0, 0));
        assert_eq!(files.leave(token(0, 0)), Some(Leaving::BehindUpdate), "it may get it yet");
        assert!(!files.is_direct(token(0, 1)));
        files.settled(token(0, 0), 1);
        assert!(!files.is_direct(token(0, 1)));
    }
}
