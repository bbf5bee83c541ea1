//! Moving connections that were just accepted to a core that has less to do.
//!
//! The place goes along, so that there is one wherever the connection ends up, and whoever gets it
//! counts it as accepted. A connection is moved once, and by nobody who drains.

use crate::balance::{BUSY_MS, LONG_TURN_MS, choose};
use crate::config::Balance;
use crate::core::{Core, NS_PER_MS};
use crate::drain::Phase;
use crate::driver::{Parcel, Socket};
use crate::post::Message;
use crate::sys::clock::coarse_ms;

/// A connection on its way to the core that is to serve it.
#[derive(Debug)]
pub(crate) struct Moved {
    /// The address's number, which is the same on all cores of a server.
    listener: u32,
    parcel: Parcel,
}

impl Core {
    /// Whether this core moves connections, as things are.
    pub(crate) fn moves(&self) -> bool {
        let least = self.settings.balance == Balance::Least;
        least && self.drain.phase() == Phase::Running && self.control.seats().len() > 1
    }

    /// The core that a connection accepted now is better served by, if there is one.
    pub(crate) fn better_core(&self) -> Option<usize> {
        if !self.moves() {
            return None;
        }
        let (seats, now_ms) = (self.control.seats(), self.now_ms);
        let own = self.post.load.burden(now_ms);
        let core_max = self.lease.places().core_max();
        // No more wait for a core than it would accept in a turn.
        let coming_max = self.settings.accept_budget as usize;
        let lot = self.now_ns.wrapping_add(own.connections as u64 + self.counters.moved_out.get());
        choose(self.lease.core(), own, seats.len(), spread(lot), |core| {
            let load = &seats[core].post.load;
            let burden = load.burden(now_ms);
            let takes = load.is_open() && load.coming() < coming_max;
            // Its counters are looked at only where it would be chosen, since it writes beside them
            // all the time.
            let better = takes && burden < own && burden.connections < core_max;
            let free = better && !seats[core].counters.watch.turn_lasts(coarse_ms(), LONG_TURN_MS);
            free.then_some(burden)
        })
    }

    /// Moves a connection to a core that has less to do, or gives it back to be served here.
    pub(crate) fn move_on(&mut self, listener: u32, socket: Socket) -> Result<(), Socket> {
        let Some(core) = self.better_core() else { return Err(socket) };
        if !self.lease.lend(self.places_used()) {
            return Err(socket);
        }
        let post = &self.control.seats()[core].post;
        if !post.load.announce() {
            let _ = post.post(Message::Look);
            self.lease.take_over();
            return Err(socket);
        }
        let moved = Moved { listener, parcel: socket.pack() };
        let Err(Message::Moved(moved)) = post.post(Message::Moved(moved)) else {
            self.counters.moved_out.add(1);
            return Ok(());
        };
        post.load.arrived();
        self.lease.take_over();
        Err(self.driver.unpack(moved.parcel))
    }

    /// A connection has come that another core has accepted.
    pub(crate) fn take_over(&mut self, moved: Moved) {
        let socket = self.unpack(moved.parcel);
        self.admit_here(moved.listener, socket);
    }

    /// As [`Core::take_over`], when nobody is left to serve it.
    pub(crate) fn turn_away_moved(&mut self, moved: Moved) {
        let socket = self.unpack(moved.parcel);
        self.turn_away(socket);
    }

    fn unpack(&mut self, parcel: Parcel) -> Socket {
        self.post.load.arrived();
        self.counters.moved_in.add(1);
        if self.lease.take_over() {
            self.feel_pressure();
        }
        self.driver.unpack(parcel)
    }

    /// Lets the others see how many connections there are.
    pub(crate) fn publish_live(&self) {
        self.counters.live.set(self.table.len() as u64);
        self.post.load.set_connections(self.table.len() - self.refused);
    }

    /// Lets the others see when there is no time left for more.
    pub(crate) fn publish_pulse(&mut self, now_ns: u64) {
        let least = self.settings.balance == Balance::Least;
        let turned = least && self.counters.watch.is_in_turn();
        if turned && self.pulse.turn(self.now_ns, now_ns) {
            self.post.load.be_busy_until(now_ns / NS_PER_MS + BUSY_MS);
        }
    }
}

/// Spreads numbers that are close to one another over all bits.
fn spread(number: u64) -> u64 {
    let number = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    number ^ (number >> 32)
}
