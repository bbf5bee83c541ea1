//! Accepting: one listener per address and core, from the first connection to the last one in
//! its queue.

use std::fmt;
use std::io;
use std::rc::Rc;

use crate::conn::Link;
use crate::core::{Core, Timer};
use crate::driver::{Errno, Op, Socket};
use crate::entry::Entry;
use crate::executor::{LocalFuture, Scope};
use crate::sys::place::Place;
use crate::token::{Kind, Token};
use crate::wheel::Precision;

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
    accept: Accept,
    back_off_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accept {
    Off,
    Armed,
    /// A cancellation is under way.
    Cancelling,
    /// An error made it pause; a timer will arm it again.
    BackingOff,
    /// The core has all the connections it may have; the next that ends arms it again.
    Full,
}

impl Listener {
    pub(crate) fn new(socket: Socket, handler: Handler, place: Place) -> Listener {
        Listener {
            receives_once: socket.receives_once(),
            socket: Some(socket),
            handler: Some(handler),
            place,
            accept: Accept::Off,
            back_off_ms: BACK_OFF_MS_MIN,
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.socket.is_some()
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
            self.arm_accept(index as u32);
        }
    }

    fn arm_accept(&mut self, index: u32) {
        let armed = self.listeners.iter().filter(|l| l.accept == Accept::Armed).count();
        let backlogs = self.settings.backlog as usize * self.listeners.len();
        let Some(listener) = self.listeners.get_mut(index as usize) else { return };
        let Some(socket) = &listener.socket else { return };
        if self.drain.is_draining() || listener.accept == Accept::Armed {
            return;
        }
        let room = self.connections_max.saturating_sub(self.table.len() + armed);
        if room == 0 {
            listener.accept = Accept::Full;
            self.counters.accept_pauses.add(1);
            return;
        }
        // A multishot accept takes all that is queued before it can be cancelled.
        let once = room <= backlogs;
        listener.accept = Accept::Armed;
        self.driver.push(accept_token(index), Op::Accept { listener: socket.name(), once });
    }

    /// The back-off is over.
    pub(crate) fn accept_again(&mut self, index: u32) {
        if self.listeners.get(index as usize).is_some_and(|l| l.accept == Accept::BackingOff) {
            self.arm_accept(index);
        }
    }

    /// A connection has ended: there is room for another.
    pub(crate) fn accept_if_full(&mut self) {
        for index in 0..self.listeners.len() {
            if self.listeners[index].accept == Accept::Full {
                self.arm_accept(index as u32);
            }
        }
    }

    pub(crate) fn on_accepted(&mut self, index: u32, last: bool, result: Result<Socket, Errno>) {
        let Some(listener) = self.listeners.get_mut(index as usize) else { return };
        if last {
            listener.accept = Accept::Off;
        }
        let back_off = match result {
            Ok(socket) => {
                listener.back_off_ms = BACK_OFF_MS_MIN;
                self.adopt(index, socket);
                false
            }
            Err(Errno(libc::ECANCELED)) => false,
            Err(Errno(errno)) => {
                self.counters.accept_errors.add(1);
                !PEERS_FAULT.contains(&errno)
            }
        };
        if last && self.drain.is_draining() {
            self.empty_and_close(index);
        } else if last && back_off {
            self.back_off(index);
        } else if last {
            self.arm_accept(index);
        } else if self.table.len() >= self.connections_max {
            self.cancel_accept(index);
        }
    }

    /// Waits before the next try, longer each time: what is short of descriptors or memory is not
    /// helped by trying at once. The connections wait in the kernel's queue meanwhile.
    fn back_off(&mut self, index: u32) {
        let listener = &mut self.listeners[index as usize];
        listener.accept = Accept::BackingOff;
        let at_ms = self.now_ms + listener.back_off_ms;
        listener.back_off_ms = (listener.back_off_ms * 2).min(BACK_OFF_MS_MAX);
        self.wheel.insert(at_ms, Precision::Coarse, Timer::Listener(index));
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

    /// Makes an accepted socket a connection with a table entry, a deadline and a handler, before
    /// anything else can happen to it.
    fn adopt(&mut self, index: u32, socket: Socket) {
        let Some(myself) = self.myself.upgrade() else { return };
        let listener = &self.listeners[index as usize];
        let Some(handler) = listener.handler.clone() else { return };
        let mut limits = self.limits;
        if self.drain.is_draining() {
            limits.first_byte_ms = limits.first_byte_ms.min(self.settings.new_grace_ms);
        }
        let id = self.table.insert(Entry::new(socket, self.stamp_ms(), limits));
        self.arm_deadline(id);
        self.counters.accepted.add(1);
        self.counters.live.set(self.table.len() as u64);
        let most = self.counters.live_max.get().max(self.table.len() as u64);
        self.counters.live_max.set(most);

        let listener = &self.listeners[index as usize];
        let place = listener.place;
        let future = handler(Link::first(myself, id));
        let task = self.tasks.insert(Scope::Handler(id), place, future);
        if let Some(entry) = self.table.get_mut(id) {
            entry.handler = Some(task);
            entry.receives_once = listener.receives_once;
        }
        self.arm_receive(id);
    }

    /// Stops accepting without losing anyone: a listener is closed when its accept has ended and
    /// its queue is empty.
    pub(crate) fn stop_accept(&mut self) {
        for index in 0..self.listeners.len() {
            match self.listeners[index].accept {
                Accept::Armed => self.cancel_accept(index as u32),
                Accept::Cancelling => {}
                Accept::Off | Accept::BackingOff | Accept::Full => {
                    self.empty_and_close(index as u32);
                }
            }
        }
    }

    /// Takes the handlers out, to be dropped when nobody has the core borrowed.
    pub(crate) fn take_handlers(&mut self) -> Vec<Handler> {
        self.listeners.iter_mut().filter_map(|listener| listener.handler.take()).collect()
    }

    fn empty_and_close(&mut self, index: u32) {
        let Some(socket) = self.listeners[index as usize].socket.take() else { return };
        loop {
            match socket.accept_now() {
                Ok(accepted) => self.adopt(index, accepted),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => match error.raw_os_error() {
                    Some(errno) if PEERS_FAULT.contains(&errno) => {}
                    _ => {
                        self.counters.accept_errors.add(1);
                        break;
                    }
                },
            }
        }
        self.listeners[index as usize].accept = Accept::Off;
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
const BACK_OFF_MS_MIN: u64 = 5;
const BACK_OFF_MS_MAX: u64 = 1000;
