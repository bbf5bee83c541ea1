//! Turning connections away that were accepted only to be told so: with a FIN, and never a reset
//! while there is room to listen on for a moment.

use std::net::SocketAddr;

use crate::caps::Room;
use crate::config::Overload;
use crate::core::Core;
use crate::driver::Socket;
use crate::entry::{Entry, Linger};
use crate::per_ip::Source;
use crate::report::CloseReason;
use crate::table::Id;

impl Core {
    /// Whether what waits at a listener may be taken from there.
    pub(crate) fn may_take(&mut self) -> bool {
        self.rejects() || self.has_room()
    }

    /// Whether those for whom there is no place are accepted and closed.
    pub(crate) fn rejects(&self) -> bool {
        self.settings.overload == Overload::Reject
    }

    /// Makes an accepted socket a connection, or turns it away.
    pub(crate) fn admit(&mut self, index: u32, socket: Socket) {
        // A drain serves or closes whatever is queued.
        if self.drain.accepts() && self.rejects() && !self.has_room() {
            self.refuse(index, socket, CloseReason::Rejected);
            return;
        }
        if let Err(socket) = self.move_on(index, socket) {
            self.admit_here(index, socket);
        }
    }

    /// As [`Core::admit`], for one that has a place and is not moved.
    pub(crate) fn admit_here(&mut self, index: u32, socket: Socket) {
        let places = self.lease.places();
        let source = places.sources().and_then(|_| socket.peer_addr()).map(source_of);
        if let (Some(sources), Some(source)) = (places.sources(), source)
            && !sources.enter(source)
        {
            self.refuse(index, socket, CloseReason::PerIp);
            return;
        }
        let id = self.adopt(index, socket);
        if let Some(source) = source {
            match id.and_then(|id| self.table.get_mut(id)) {
                Some(entry) => entry.company().source = Some(source),
                None => self.forget_source(source),
            }
        }
    }

    /// Whether there is a place for another connection.
    fn has_room(&mut self) -> bool {
        let held = self.lease.held();
        let used = self.places_used();
        let mut room = self.lease.room(used);
        if room == Room::CoreFull && self.better_core().is_some() {
            // The next one will be moved there.
            room = self.lease.room_beyond(used);
        }
        if room == Room::ServerFull(true) {
            // Others may hold more than they use.
            self.call_all_cores();
        }
        if room != Room::Yes || held != self.lease.held() {
            self.feel_pressure();
        }
        room == Room::Yes
    }

    /// Closes a connection that nobody will serve. What its peer has sent, or is about to, is read
    /// and thrown away as after any last answer, so that it sees the end and no reset; but not for
    /// any number of them.
    fn refuse(&mut self, index: u32, socket: Socket, reason: CloseReason) {
        let mut entry = Entry::new(socket, self.first_deadlines(index));
        entry.handles = 0;
        entry.failed = Some(reason);
        entry.unread_seen = true;
        if self.refused >= REFUSED_MAX {
            entry.linger = Linger::Done;
        }
        self.refused += 1;
        let id = self.enter_books(index, entry);
        self.advance_close(id);
    }

    pub(crate) fn forget_source(&self, source: Source) {
        if let Some(sources) = self.lease.places().sources() {
            sources.leave(source);
        }
    }

    /// What is shared and was a connection's is free again.
    pub(crate) fn forget(&mut self, entry: &mut Entry) {
        self.refused -= usize::from(entry.is_refused());
        self.note_gone(entry);
        self.memory.give_back(entry.input_bytes() + entry.queued_bytes());
        if let Some(source) = entry.company.as_mut().and_then(|company| company.source.take()) {
            self.forget_source(source);
        }
    }

    /// Gives a connection its entry in the table.
    pub(crate) fn enter_books(&mut self, index: u32, mut entry: Entry) -> Id {
        entry.listener = index as u16;
        entry.receives_once = self.listeners[index as usize].receives_once();
        let id = self.enter_table(entry);
        self.counters.accepted.add(1);
        id
    }

    /// As [`Core::enter_books`], for one that the caller counts.
    pub(crate) fn enter_table(&mut self, entry: Entry) -> Id {
        let id = self.table.insert(entry);
        self.arm_first_deadline(id);
        self.arm_audit();
        self.publish_live();
        let most = self.counters.live_max.get().max(self.table.len() as u64);
        self.counters.live_max.set(most);
        id
    }
}

impl Entry {
    /// Whether it was accepted only to be closed, and takes no place.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self.failed, Some(CloseReason::Rejected | CloseReason::PerIp))
    }
}

fn source_of(addr: SocketAddr) -> Source {
    Source::of(addr.ip())
}

/// So many refused connections of a core are listened to at a time; each takes a descriptor.
pub(crate) const REFUSED_MAX: usize = 64;
