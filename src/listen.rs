//! Accepting: one listener per address and core, from the first connection to the last one in
//! its queue.

use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use crate::adopt::Kept;
use crate::conn::Link;
use crate::core::{Core, Timer};
use crate::deadline::{DeadlineKind, Deadlines};
use crate::drain::Phase;
use crate::driver::{Errno, Op, Queue, Socket};
use crate::entry::Entry;
use crate::executor::{LocalFuture, Scope};
use crate::post::Message;
use crate::report::CloseReason;
use crate::stop::Membership;
use crate::sys::place::Place;
use crate::table::Id;
use crate::token::{Kind, Token};
use crate::wheel::{Precision, TimerKey};

/// Makes the task of a connection out of it.
pub(crate) type Handler = Rc<dyn Fn(Link) -> LocalFuture>;

/// One core's share of one address.
pub(crate) struct Listener {
    /// Open until its queue is empty and nothing is in flight on it.
    socket: Option<Socket>,
    /// There until the core is down.
    handler: Option<Handler>,
    place: Place,
    /// What the accepted connections take over from the socket.
    receives_once: bool,
    /// Its place among the listeners of its port, if other cores have some.
    membership: Option<Membership>,
    accept: Accept,
    back_off_ms: u64,
    /// The turn in which an accept brought the last connection.
    accepted_turn: u64,
    /// How many are still taken from its queue once a drain has no time left.
    last_call: u32,
    /// It was passed in: whoever keeps it open has what is in its queue at the end.
    pub(crate) kept: Option<Arc<Kept>>,
    /// What asks a silent peer for a sign of life.
    heartbeat: Option<Arc<[u8]>>,
}

/// One connection wakes the core, by an accept that is in flight. When they come turn after turn,
/// those that are queued are taken by system call, some each turn. So no burst makes a turn long,
/// none is accepted for which there is no place, and what waits does so in the kernel, where
/// another core, a successor or the drain finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accept {
    /// Not begun, or over.
    Off,
    /// In flight: it takes the next that comes, or one that is queued already.
    Armed,
    /// A cancellation is under way.
    Cancelling,
    /// The queue is being emptied, some of it each turn.
    Taking,
    /// An error made it pause; the timer will have it try again.
    BackingOff(TimerKey),
    /// There is no place; the next connection that ends here makes it go on, and so does another
    /// core that gives one. Where there is a timer, others may get time for more than this core may
    /// have, and nobody tells of that.
    Full(Option<TimerKey>),
}

impl Listener {
    pub(crate) fn new(socket: Socket, handler: Handler, place: Place) -> Listener {
        Listener {
            receives_once: socket.receives_once(),
            socket: Some(socket),
            handler: Some(handler),
            place,
            membership: None,
            accept: Accept::Off,
            back_off_ms: BACK_OFF_MS_MIN,
            accepted_turn: 0,
            last_call: 0,
            kept: None,
            heartbeat: None,
        }
    }

    pub(crate) fn in_group(mut self, membership: Option<Membership>) -> Listener {
        self.membership = membership;
        self
    }

    pub(crate) fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    pub(crate) fn socket(&self) -> Option<&Socket> {
        self.socket.as_ref()
    }

    /// With a frame that asks a silent peer for a sign of life.
    pub(crate) fn with_heartbeat(self, frame: Option<Arc<[u8]>>) -> Listener {
        Listener { heartbeat: frame.filter(|frame| !frame.is_empty()), ..self }
    }

    pub(crate) fn heartbeat(&self) -> Option<Arc<[u8]>> {
        self.heartbeat.clone()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.socket.is_some()
    }

    pub(crate) fn receives_once(&self) -> bool {
        self.receives_once
    }

    /// Whether there is more to take from its queue at once.
    pub(crate) fn is_taking(&self) -> bool {
        self.accept == Accept::Taking
    }

    /// Whether it waits for descriptors or memory.
    pub(crate) fn is_starved(&self) -> bool {
        matches!(self.accept, Accept::BackingOff(_))
    }

    /// Whether it waits for a place.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self.accept, Accept::Full(_))
    }

    /// The socket, to be closed by whoever takes it.
    pub(crate) fn take_socket(&mut self) -> Option<Socket> {
        self.socket.take()
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("socket", &self.socket)
            .field("accept", &self.accept)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// Starts to accept on every listener.
    pub(crate) fn start_accept(&mut self) {
        for index in 0..self.listeners.len() {
            self.take_from(index as u32);
        }
    }

    /// Takes what is queued at the listeners, within the turn's budget.
    pub(crate) fn take_connections(&mut self) {
        if !self.listeners.iter().any(Listener::is_taking) {
            return;
        }
        let listeners = self.listeners.len();
        let mut budget = self.settings.accept_budget;
        // The one that comes first this turn comes last in the next one.
        self.next_listener = (self.next_listener + 1) % listeners;
        for n in 0..listeners {
            budget = self.take_some(((self.next_listener + n) % listeners) as u32, budget);
        }
    }

    /// Takes connections of one listener, and returns what is left of the budget.
    fn take_some(&mut self, index: u32, mut budget: u32) -> u32 {
        let mut queued = None;
        while budget > 0 && self.listeners[index as usize].is_taking() {
            let draining = !self.drain.accepts();
            let late = draining && self.drain.is_late(self.now_ns);
            let Listener { receives_once, last_call, .. } = self.listeners[index as usize];
            let shared = draining && self.is_shared(index);
            if shared && (late || last_call == 0) {
                // The queue is shared: somebody else serves the rest of it.
                self.queue_is_empty(index);
                break;
            }
            if late && last_call == 0 {
                self.abandon_queue(index);
                break;
            }
            if !draining && !self.may_take() {
                self.counters.accept_pauses.add(1);
                self.wait_for_room(index);
                break;
            }
            let listener = &mut self.listeners[index as usize];
            let Some(socket) = &listener.socket else { break };
            // To ask costs less than a try in vain. A drain tries: it has to be sure.
            let left = match queued {
                None if draining || receives_once => u64::MAX,
                None => socket.queued_connections(),
                Some(left) => left,
            };
            queued = Some(left.saturating_sub(1));
            if left == 0 && !draining {
                self.queue_is_empty(index);
                break;
            }
            match socket.accept_now() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.queue_is_empty(index);
                    break;
                }
                result => {
                    budget -= 1;
                    listener.last_call -= u32::from(late || shared);
                    self.counters.queue_taken.add(u64::from(draining && result.is_ok()));
                    match result {
                        // A handler would only be dropped again.
                        Ok(socket) if late => self.turn_away(socket),
                        result => {
                            self.take_in_connection(index, result.map_err(|e| Errno::of(&e)));
                        }
                    }
                }
            }
        }
        budget
    }

    /// Waits for a connection to end here, or for a place; or for another core to have time for
    /// more than this one may have, of which nobody tells.
    fn wait_for_room(&mut self, index: u32) {
        let full = self.places_used() >= self.lease.places().core_max();
        let timer = (full && self.moves()).then(|| {
            let at_ms = self.now_ms + LOOK_AGAIN_MS;
            self.wheel.insert(at_ms, Precision::Coarse, Timer::Listener(index))
        });
        self.listeners[index as usize].accept = Accept::Full(timer);
    }

    /// One that was accepted, or why none was.
    fn take_in_connection(&mut self, index: u32, result: Result<Socket, Errno>) {
        match result {
            Ok(socket) => {
                self.listeners[index as usize].back_off_ms = BACK_OFF_MS_MIN;
                self.admit(index, socket);
            }
            Err(Errno(libc::EINTR | libc::EAGAIN | libc::ECANCELED)) => {}
            Err(Errno(errno)) => {
                self.counters.accept_errors.add(1);
                traced!(self.events.get_mut().accept_failed = (index, errno));
                if !PEERS_FAULT.contains(&errno) {
                    self.back_off(index);
                }
            }
        }
    }

    /// Waits for the next connection, or closes the listener if the core takes no more.
    fn queue_is_empty(&mut self, index: u32) {
        if self.drain.accepts() {
            self.arm_accept(index);
        } else {
            self.listeners[index as usize].accept = Accept::Off;
            self.close_listener(index);
        }
    }

    fn arm_accept(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        if let Some(socket) = &listener.socket {
            listener.accept = Accept::Armed;
            self.driver.push(accept_token(index), Op::Accept { listener: socket.name() });
        }
    }

    /// Has the other cores look whether they hold more than they use.
    pub(crate) fn call_all_cores(&self) {
        for seat in self.control.seats() {
            let _ = seat.post.post(Message::Look);
        }
    }

    /// The places in use, and those kept for the connections that accepts in flight will bring.
    pub(crate) fn places_used(&self) -> usize {
        let armed =
            |listener: &&Listener| matches!(listener.accept, Accept::Armed | Accept::Cancelling);
        let armed = self.listeners.iter().filter(armed).count();
        // One that may be rejected needs no place to be accepted.
        let used = self.table.len() - self.refused + self.outbound.attempts.len();
        used + if self.rejects() { 0 } else { armed }
    }

    /// There may be a place where there was none, or another core may need one.
    pub(crate) fn hear_of_places(&mut self) {
        let full = |listener: &&Listener| listener.is_full();
        let wanted = self.places_used() + self.listeners.iter().filter(full).count();
        let seats = self.control.seats();
        self.lease.hear(wanted, |core| seats[core].post.post(Message::Look).is_ok());
        self.feel_pressure();
        for index in 0..self.listeners.len() {
            if self.listeners[index].is_full() {
                self.take_from(index as u32);
            }
        }
    }

    /// Lets the other cores have what this one does not need.
    pub(crate) fn give_back_places(&mut self) {
        let used = self.places_used();
        let seats = self.control.seats();
        self.lease.give_back(used, |core| seats[core].post.post(Message::Look).is_ok());
    }

    fn take_from(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        if let Accept::BackingOff(timer) | Accept::Full(Some(timer)) = listener.accept {
            self.wheel.cancel(timer);
        }
        listener.accept = if listener.is_open() { Accept::Taking } else { Accept::Off };
    }

    /// The back-off is over, or it is time to look for a place again.
    pub(crate) fn accept_again(&mut self, index: u32) {
        let waits = |listener: &Listener| listener.is_starved() || listener.is_full();
        if self.listeners.get(index as usize).is_some_and(waits) {
            self.take_from(index);
        }
    }

    /// A connection has ended: there is room for another, and a descriptor.
    pub(crate) fn accept_if_held_up(&mut self) {
        for index in 0..self.listeners.len() {
            if matches!(self.listeners[index].accept, Accept::Full(_) | Accept::BackingOff(_)) {
                self.take_from(index as u32);
            }
        }
    }

    pub(crate) fn on_accepted(&mut self, index: u32, result: Result<Socket, Errno>, queue: Queue) {
        let Some(listener) = self.listeners.get_mut(index as usize) else { return };
        listener.accept = Accept::Taking;
        // Of the queues of Unix sockets the kernel says nothing, which looks like an empty one.
        let queue = if listener.receives_once { Queue::Unknown } else { queue };
        // Trying in vain costs the kernel nearly as much as accepting. So after a lone connection
        // it is left to the next accept to find out whether there are more.
        let burst = match queue {
            Queue::Empty => false,
            Queue::More => true,
            Queue::Unknown => self.turn <= listener.accepted_turn + 1,
        };
        listener.accepted_turn = self.turn;
        self.take_in_connection(index, result);
        let lone = !burst && self.listeners[index as usize].is_taking();
        if lone && self.drain.accepts() && self.may_take() {
            self.arm_accept(index);
        }
    }

    /// Waits before the next try, longer each time: what is short of descriptors or memory is not
    /// helped by trying at once. The connections wait in the kernel's queue meanwhile.
    fn back_off(&mut self, index: u32) {
        let left = self.listeners[index as usize].is_kept() && !self.drain.accepts();
        if left || self.drain.is_late(self.now_ns) {
            self.abandon_queue(index);
            return;
        }
        let listener = &mut self.listeners[index as usize];
        let at_ms = self.now_ms + listener.back_off_ms;
        listener.back_off_ms = (listener.back_off_ms * 2).min(BACK_OFF_MS_MAX);
        let timer = self.wheel.insert(at_ms, Precision::Coarse, Timer::Listener(index));
        listener.accept = Accept::BackingOff(timer);
    }

    fn cancel_accept(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        if listener.accept == Accept::Armed {
            listener.accept = Accept::Cancelling;
            let target = accept_token(index);
            self.driver.push(Token::new(Kind::Cancel, NO_CONNECTION, index), Op::Cancel { target });
        }
    }

    /// A cancellation that came while its target was being worked on has missed it, and the target
    /// may go on for good: it is cancelled again.
    pub(crate) fn on_accept_cancelled(&mut self, index: u32, result: Result<(), Errno>) {
        if let Some(listener) = self.listeners.get_mut(index as usize)
            && result.is_err()
            && listener.accept == Accept::Cancelling
        {
            listener.accept = Accept::Armed;
            self.cancel_accept(index);
        }
    }

    /// The times of a connection that a listener has just accepted.
    pub(crate) fn first_deadlines(&self, index: u32) -> Deadlines {
        let listener = &self.listeners[index as usize];
        self.fresh_deadlines(self.settings.heartbeat_ms > 0 && listener.heartbeat.is_some())
    }

    /// The times of a connection that begins now.
    pub(crate) fn fresh_deadlines(&self, with_heartbeat: bool) -> Deadlines {
        let jitter = self.table.next_id().jitter(self.now_ns);
        Deadlines::new(self.stamp_ms, jitter, with_heartbeat)
    }

    /// Makes an accepted socket a connection with a table entry, a deadline and a handler, before
    /// anything else can happen to it.
    pub(crate) fn adopt(&mut self, index: u32, socket: Socket) -> Option<Id> {
        let myself = self.myself.upgrade()?;
        let listener = &self.listeners[index as usize];
        let place = listener.place;
        let Some(handler) = listener.handler.clone() else {
            self.turn_away(socket);
            return None;
        };
        let mut deadlines = self.first_deadlines(index);
        if self.drain.is_draining() {
            let limit_ms = self.settings.first_byte_ms.min(self.settings.new_grace_ms);
            deadlines.set(&self.limits, DeadlineKind::FirstByte, limit_ms);
        }
        let id = self.enter_books(index, Entry::new(socket, deadlines));
        let future = handler(Link::first(myself, id));
        let task = self.tasks.insert(Scope::Handler(id), place, future);
        if let Some(entry) = self.table.get_mut(id) {
            entry.handler = Some(task);
        }
        self.arm_receive(id);
        if self.drain.phase() >= Phase::Force {
            self.end(id, CloseReason::Forced);
        }
        Some(id)
    }

    /// Stops accepting without losing anyone: a listener is closed when its accept has ended and
    /// its queue is empty.
    pub(crate) fn stop_accept(&mut self) {
        for index in 0..self.listeners.len() {
            let listener = &mut self.listeners[index];
            listener.last_call = listener.last_call_of(self.settings.backlog, self.retired);
            match self.listeners[index].accept {
                Accept::Armed => self.cancel_accept(index as u32),
                Accept::Cancelling => {}
                _ => self.take_from(index as u32),
            }
        }
    }

    /// Time is up for the listeners that still wait for descriptors: what is queued is reset by
    /// the close, and counted.
    pub(crate) fn abandon_starved_queues(&mut self) {
        for index in 0..self.listeners.len() {
            if self.listeners[index].is_starved() {
                self.take_from(index as u32);
                self.abandon_queue(index as u32);
            }
        }
    }

    fn abandon_queue(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        listener.accept = Accept::Off;
        if !listener.is_kept() {
            let queued = listener.socket.as_ref().map_or(0, Socket::queued_connections);
            self.counters.queue_abandoned.add(queued);
        }
        self.close_listener(index);
    }

    /// Takes the handlers out, to be dropped when nobody has the core borrowed.
    pub(crate) fn take_handlers(&mut self) -> Vec<Handler> {
        self.listeners.iter_mut().filter_map(|listener| listener.handler.take()).collect()
    }
}

fn accept_token(index: u32) -> Token {
    Token::new(Kind::Accept, index, 0)
}

/// The slot of a cancellation of an accept; its generation is the listener's index.
pub(crate) const NO_CONNECTION: u32 = u32::MAX;

/// Errors of accept that concern one connection only, or nobody (accept(2)).
const PEERS_FAULT: [i32; 9] = [
    libc::ECONNABORTED,
    libc::EINTR,
    libc::EAGAIN,
    libc::EPROTO,
    libc::ENETDOWN,
    libc::EHOSTDOWN,
    libc::ENONET,
    libc::EHOSTUNREACH,
    libc::ENETUNREACH,
];
const LOOK_AGAIN_MS: u64 = 50;
const BACK_OFF_MS_MIN: u64 = 5;
const BACK_OFF_MS_MAX: u64 = 1000;
