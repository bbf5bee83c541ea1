//! What a core knows of its UDP sockets.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::task::Waker;

use crate::config::Settings;
use crate::driver::{Errno, Socket};
use crate::entry::Receive;
use crate::executor::{Tasks, Wake};
use crate::sys::datagram::Outgoing;
use crate::table::{Id, Table};
use crate::udp::datagram::Datagram;
use crate::wheel::TimerKey;

/// The UDP sockets of a core.
#[derive(Debug)]
pub(crate) struct UdpSockets {
    pub(crate) table: Table<Port>,
    /// Sends in flight, each with its socket.
    pub(super) sends: Table<Id>,
    /// Those that wait for receive buffers, first come first served.
    pub(super) parked: VecDeque<Id>,
    /// Boxes of sends that have ended, for the next ones.
    #[expect(clippy::vec_box, reason = "what is in flight must not move, so it lives in a box")]
    pub(super) spare: Vec<Box<Outgoing>>,
    /// How many nobody holds any more, and something is in flight on them.
    pub(crate) leaving: usize,
    /// The ring has come to its end, and nothing is begun any more.
    pub(crate) over: bool,
}

impl UdpSockets {
    pub(crate) fn new() -> UdpSockets {
        UdpSockets {
            table: Table::new(),
            sends: Table::new(),
            parked: VecDeque::new(),
            spare: Vec::new(),
            leaving: 0,
            over: false,
        }
    }
}

/// One UDP socket, from bind to close. It is closed when its last hold is dropped and nothing is in
/// flight on it.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) socket: Socket,
    pub(super) local: SocketAddr,
    /// Whom it is connected to.
    pub(super) peer: Option<SocketAddr>,
    pub(super) holds: u32,
    /// Operations that have not had their last completion.
    pub(crate) in_flight: usize,
    pub(super) receive: Receive,
    /// It has waited for buffers, and got nothing since.
    pub(super) rearmed: bool,
    /// What was received, and the errors in between.
    pub(super) input: VecDeque<Result<Datagram, Errno>>,
    pub(crate) input_bytes: usize,
    /// How many datagrams the kernel has lost for us, as far as we know.
    pub(super) lost: u32,
    /// How many datagrams are still served to who goes by the drain, once it has come.
    pub(super) last: Option<usize>,
    pub(super) readers: Waiters,
    /// Sends that have not ended, and their bytes.
    pub(crate) sends: usize,
    pub(crate) send_bytes: usize,
    /// Why a send has failed, and to whom it was.
    pub(super) failure: Option<(Errno, Option<SocketAddr>)>,
    pub(super) writers: Waiters,
    /// The kernel cuts sends into datagrams.
    pub(super) cuts: bool,
    /// Ends the sends that are in flight when nobody holds it any more.
    pub(super) timer: Option<TimerKey>,
}

impl Port {
    pub(super) fn new(socket: Socket, local: SocketAddr) -> Port {
        Port {
            socket,
            local,
            peer: None,
            holds: 1,
            in_flight: 0,
            receive: Receive::Off,
            rearmed: false,
            input: VecDeque::new(),
            input_bytes: 0,
            lost: 0,
            last: None,
            readers: Waiters::new(),
            sends: 0,
            send_bytes: 0,
            failure: None,
            writers: Waiters::new(),
            cuts: true,
            timer: None,
        }
    }

    /// Nobody holds it any more, and the time that its sends had since then is over.
    pub(super) fn is_given_up(&self) -> bool {
        self.holds == 0 && self.timer.is_none()
    }

    /// Whether a receive has to rest until some of what it has brought was taken. After an error,
    /// somebody has to hear of it first.
    pub(super) fn is_full(&self, settings: &Settings, memory_short: bool) -> bool {
        self.input_bytes > settings.receive_queue_bytes
            || self.input.len() >= DATAGRAMS_MAX
            || (memory_short && !self.input.is_empty())
            || matches!(self.input.back(), Some(Err(_)))
    }

    /// Whether enough was taken for it to go on.
    pub(super) fn has_room(&self, settings: &Settings, memory_short: bool) -> bool {
        let half = if memory_short { 0 } else { settings.receive_queue_bytes / 2 };
        let failed = matches!(self.input.back(), Some(Err(_)));
        self.input_bytes <= half && self.input.len() <= DATAGRAMS_MAX / 2 && !failed
    }
}

/// Tasks that wait for one thing. All are woken by it, and whoever comes first gets it.
#[derive(Debug)]
pub(super) struct Waiters(Table<Wake>);

impl Waiters {
    fn new() -> Waiters {
        Waiters(Table::new())
    }

    /// Remembers who polls, in a seat that it keeps until it leaves.
    pub(super) fn register(&mut self, seat: &mut Option<Id>, tasks: &mut Tasks, waker: &Waker) {
        let id = *seat.get_or_insert_with(|| self.0.insert(Wake::Nobody));
        if let Some(wake) = self.0.get_mut(id) {
            tasks.register(wake, waker);
        }
    }

    pub(super) fn leave(&mut self, seat: Id, tasks: &mut Tasks) {
        tasks.discard(self.0.remove(seat));
    }

    /// Drops all of them, when nobody has the core borrowed.
    pub(super) fn discard(&mut self, tasks: &mut Tasks) {
        self.0.iter_mut().for_each(|(_, wake)| tasks.discard(Some(std::mem::take(wake))));
    }

    pub(super) fn wake(&mut self, tasks: &mut Tasks) {
        self.0.iter_mut().for_each(|(_, wake)| tasks.wake(wake));
    }
}

/// However small they are, so many datagrams of one socket are enough in its queue.
pub(super) const DATAGRAMS_MAX: usize = 128;
