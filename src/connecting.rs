//! Connecting: an outbound connection from its socket to its place in the table, or to the reason
//! why it gets none.
//!
//! ```text
//! begun -> under way -> established -> taken over by who waits: an entry in the table
//!              |             |
//!              +-------------+-------> failed, late, or given up: cancelled, then closed
//! ```
//! Each attempt has a deadline, takes one of the core's places, and ends in exactly one counter:
//! `connected`, or that of its [`Failure`]. Whoever waits may give up at any moment; the socket
//! stays open until the last completion of its operations.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use socket2::SockAddr;

use crate::caps::Room;
use crate::conn::{Connection, Link};
use crate::core::{Core, CoreRef, Timer};
use crate::drain::Phase;
use crate::driver::{Errno, Op, Socket};
use crate::entry::{Entry, OUTBOUND};
use crate::executor::Wake;
use crate::report::CloseReason;
use crate::route::Route;
use crate::stats::Counters;
use crate::table::{Id, Table};
use crate::token::{Kind, Token};
use crate::wheel::{Precision, TimerKey};

/// The outbound connections of a core.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) attempts: Table<Connecting>,
    /// Attempts of which it is not known yet what comes of them.
    open: u64,
    /// Established ones that somebody holds. A drain waits for their holders, not for them.
    pub(crate) held: usize,
}

impl Outbound {
    pub(crate) fn new() -> Outbound {
        Outbound { attempts: Table::new(), open: 0, held: 0 }
    }
}

/// One attempt.
#[derive(Debug)]
pub(crate) struct Connecting {
    pub(crate) socket: Socket,
    /// Operations that have not had their last completion.
    pub(crate) in_flight: u8,
    pub(crate) stage: Stage,
    waiter: Wake,
    timer: TimerKey,
    deadline_ms: u64,
    /// How a Unix socket is tried again, for whose peer there is no operation to wait.
    retry: Option<Retry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    UnderWay,
    /// Whoever waits has not heard yet.
    Established,
    Failed(Failure),
    /// Nobody waits any more.
    Forgotten,
}

#[derive(Debug)]
struct Retry {
    address: SockAddr,
    step_ms: u64,
}

/// Why an attempt has come to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The deadline came first.
    Late,
    /// The core has no place for another connection.
    NoPlace,
    /// The drain's deadline has come.
    Forced,
    /// Nobody listened, and the kernel has connected the socket to itself.
    MetItself,
    Os(Errno),
}

impl Connecting {
    /// Whether it is not known yet what comes of it.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.stage, Stage::UnderWay | Stage::Established)
    }

    #[cfg(test)]
    pub(crate) fn timer(&self) -> TimerKey {
        self.timer
    }
}

impl Failure {
    fn of(error: &io::Error) -> Failure {
        // An address that has no form is the only error without a number.
        Failure::Os(Errno(error.raw_os_error().unwrap_or(libc::EINVAL)))
    }

    fn count(self, counters: &Counters) {
        let class = match self {
            Failure::Late | Failure::Os(Errno(libc::ETIMEDOUT)) => &counters.connects_timed_out,
            Failure::MetItself | Failure::Os(Errno(libc::ECONNREFUSED | libc::ENOENT)) => {
                &counters.connects_refused
            }
            Failure::Os(Errno(libc::EHOSTUNREACH | libc::ENETUNREACH)) => {
                &counters.connects_unreachable
            }
            Failure::NoPlace | Failure::Forced | Failure::Os(_) => &counters.connects_failed,
        };
        class.add(1);
    }
}

impl Core {
    /// Begins to connect. Whatever comes of it is the result of [`Core::poll_connect`].
    pub(crate) fn begin_connect(&mut self, route: &Route, deadline_ms: u64) -> Result<Id, Failure> {
        self.counters.connects.add(1);
        let begun = self.try_to_begin(route, deadline_ms);
        begun.inspect_err(|failure| failure.count(&self.counters))
    }

    fn try_to_begin(&mut self, route: &Route, deadline_ms: u64) -> Result<Id, Failure> {
        if self.drain.phase() >= Phase::Force {
            return Err(Failure::Forced);
        }
        if !self.has_own_room() {
            return Err(Failure::NoPlace);
        }
        let address = route.address().map_err(|error| Failure::of(&error))?;
        let socket = self.driver.open(route, &self.settings);
        let socket = socket.map_err(|error| Failure::of(&error))?;
        // The timer names the attempt, so the attempt's place is taken first.
        let id = self.outbound.attempts.next_id();
        let timer = self.wheel.insert(deadline_ms, Precision::Exact, Timer::Connect(id.index));
        let mut attempt = Connecting {
            socket,
            in_flight: 0,
            stage: Stage::UnderWay,
            waiter: Wake::Nobody,
            timer,
            deadline_ms,
            retry: None,
        };
        if route.is_unix() {
            attempt.retry = Some(Retry { address, step_ms: RETRY_MS_MIN });
        } else {
            attempt.in_flight = 1;
            let (socket, to) = (attempt.socket.name(), Box::new(address));
            self.driver.push(token(Kind::Connect, id), Op::Connect { socket, to });
        }
        self.outbound.attempts.insert(attempt);
        self.outbound.open += 1;
        self.counters.connecting.set(self.outbound.open);
        self.try_again(id);
        Ok(id)
    }

    /// The table's id of the connection, once it is established.
    fn poll_connect(&mut self, id: Id, cx: &mut Context<'_>) -> Poll<Result<Id, Failure>> {
        let Some(attempt) = self.outbound.attempts.get_mut(id) else {
            return Poll::Ready(Err(Failure::Forced));
        };
        match attempt.stage {
            Stage::UnderWay => {
                self.tasks.register(&mut attempt.waiter, cx.waker());
                Poll::Pending
            }
            Stage::Established => Poll::Ready(self.take_over_connected(id)),
            Stage::Failed(failure) => {
                attempt.stage = Stage::Forgotten;
                self.close_attempt(id);
                Poll::Ready(Err(failure))
            }
            Stage::Forgotten => Poll::Ready(Err(Failure::Forced)),
        }
    }

    /// Makes an established attempt a connection with a table entry and deadlines.
    fn take_over_connected(&mut self, id: Id) -> Result<Id, Failure> {
        let attempt = self.outbound.attempts.remove(id);
        let attempt = attempt.expect("invariant: the caller has seen the attempt");
        self.wheel.cancel(attempt.timer);
        self.note_outcome();
        if attempt.retry.is_none() && attempt.socket.has_met_itself() {
            self.give_back_places();
            self.accept_if_held_up();
            Failure::MetItself.count(&self.counters);
            return Err(Failure::MetItself);
        }
        let mut deadlines = self.fresh_deadlines(false);
        deadlines.excuse_first_byte();
        let mut entry = Entry::new(attempt.socket, deadlines);
        entry.listener = OUTBOUND;
        entry.receives_once = attempt.retry.is_some();
        let id = self.enter_table(entry);
        self.counters.connected.add(1);
        self.outbound.held += 1;
        self.arm_receive(id);
        if self.drain.phase() >= Phase::Force {
            self.end(id, CloseReason::Forced);
        }
        Ok(id)
    }

    pub(crate) fn on_connected(&mut self, id: Id, result: Result<(), Errno>) {
        let Some(attempt) = self.outbound.attempts.get_mut(id) else {
            self.counters.stale.add(1);
            return;
        };
        attempt.in_flight -= 1;
        match result {
            Ok(()) => self.establish(id),
            Err(errno) => self.fail_connect(id, Failure::Os(errno)),
        }
        self.close_attempt(id);
    }

    /// One that came while its target was being worked on has missed it: it is cancelled again.
    pub(crate) fn on_connect_cancelled(&mut self, id: Id, result: Result<(), Errno>) {
        let Some(attempt) = self.outbound.attempts.get_mut(id) else { return };
        attempt.in_flight -= 1;
        if result.is_err() && attempt.in_flight > 0 {
            self.cancel_connect(id);
        }
        self.close_attempt(id);
    }

    /// Its deadline has come, or the time to try again.
    pub(crate) fn on_connect_timer(&mut self, slot: u32, timer: TimerKey) {
        let attempts = &self.outbound.attempts;
        let Some(id) = attempts.id_if(slot, |attempt| attempt.timer == timer) else { return };
        let Some(attempt) = self.outbound.attempts.get_mut(id) else { return };
        if self.now_ms < attempt.deadline_ms {
            self.try_again(id);
            return;
        }
        if attempt.is_open() {
            self.fail_connect(id, Failure::Late);
            self.cancel_connect(id);
        }
    }

    /// Nobody waits for it any more.
    fn forget_connect(&mut self, id: Id) {
        let Some(attempt) = self.outbound.attempts.get_mut(id) else { return };
        let open = attempt.is_open();
        attempt.stage = Stage::Forgotten;
        self.tasks.discard(Some(std::mem::take(&mut attempt.waiter)));
        if open {
            self.counters.connects_cancelled.add(1);
            self.note_outcome();
            self.cancel_connect(id);
        }
        self.close_attempt(id);
    }

    fn establish(&mut self, id: Id) {
        if let Some(attempt) = self.outbound.attempts.get_mut(id)
            && attempt.stage == Stage::UnderWay
        {
            attempt.stage = Stage::Established;
            // It was in time, however long it takes to hear of that.
            attempt.deadline_ms = self.now_ms + TAKEN_WITHIN_MS;
            self.tasks.wake(&mut attempt.waiter);
            self.arm_connect(id, self.now_ms + TAKEN_WITHIN_MS);
        }
    }

    fn fail_connect(&mut self, id: Id, failure: Failure) {
        if let Some(attempt) = self.outbound.attempts.get_mut(id)
            && attempt.is_open()
        {
            attempt.stage = Stage::Failed(failure);
            self.tasks.wake(&mut attempt.waiter);
            self.note_outcome();
            failure.count(&self.counters);
        }
    }

    /// Tries to connect a Unix socket. Where the listener's queue is full, nothing but another try
    /// tells when it is not.
    fn try_again(&mut self, id: Id) {
        let Some(attempt) = self.outbound.attempts.get_mut(id) else { return };
        let Some(retry) = attempt.retry.as_mut().filter(|_| attempt.stage == Stage::UnderWay)
        else {
            return;
        };
        match attempt.socket.connect_now(&retry.address) {
            Ok(()) => self.establish(id),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let at_ms = (self.now_ms + retry.step_ms).min(attempt.deadline_ms);
                retry.step_ms = (retry.step_ms * 2).min(RETRY_MS_MAX);
                self.arm_connect(id, at_ms);
            }
            Err(error) => self.fail_connect(id, Failure::of(&error)),
        }
    }

    fn arm_connect(&mut self, id: Id, at_ms: u64) {
        if let Some(attempt) = self.outbound.attempts.get_mut(id)
            && !self.wheel.rearm(attempt.timer, at_ms)
        {
            attempt.timer = self.wheel.insert(at_ms, Precision::Exact, Timer::Connect(id.index));
        }
    }

    fn cancel_connect(&mut self, id: Id) {
        if let Some(attempt) = self.outbound.attempts.get_mut(id)
            && attempt.in_flight > 0
        {
            attempt.in_flight += 1;
            let target = token(Kind::Connect, id);
            self.driver.push(token(Kind::CancelConnect, id), Op::Cancel { target });
        }
    }

    /// Closes the socket of an attempt that nobody wants, when nothing is in flight on it.
    fn close_attempt(&mut self, id: Id) {
        if let Some(attempt) = self.outbound.attempts.get(id)
            && attempt.stage == Stage::Forgotten
            && attempt.in_flight == 0
            && let Some(attempt) = self.outbound.attempts.remove(id)
        {
            self.wheel.cancel(attempt.timer);
            self.give_back_places();
            self.accept_if_held_up();
        }
    }

    /// The core is down: what is left of attempts goes with it, or is leaked.
    pub(crate) fn drop_attempts(&mut self, leak: bool) {
        for id in self.outbound.attempts.ids().collect::<Vec<_>>() {
            self.forget_connect(id);
            let left = self.outbound.attempts.remove(id);
            if leak {
                // The kernel may still use its descriptor.
                std::mem::forget(left);
            }
        }
    }

    /// It is known what has come of one.
    fn note_outcome(&mut self) {
        self.outbound.open -= 1;
        self.counters.connecting.set(self.outbound.open);
    }

    /// Whether there is a place on this very core.
    fn has_own_room(&mut self) -> bool {
        let (held, used) = (self.lease.held(), self.places_used());
        let room = self.lease.room(used);
        if room == Room::ServerFull(true) {
            // Others may hold more than they use.
            self.call_all_cores();
        }
        if room != Room::Yes || held != self.lease.held() {
            self.feel_pressure();
        }
        room == Room::Yes
    }
}

/// Resolves when an attempt has come to its end; dropped before, it ends it.
#[derive(Debug)]
pub(crate) struct Attempt {
    core: CoreRef,
    id: Option<Id>,
}

impl Attempt {
    pub(crate) fn begin(
        core: &CoreRef,
        route: &Route,
        deadline_ms: u64,
    ) -> Result<Attempt, Failure> {
        let id = core.borrow_mut().begin_connect(route, deadline_ms)?;
        Ok(Attempt { core: Rc::clone(core), id: Some(id) })
    }
}

impl Future for Attempt {
    type Output = Result<Connection, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let id = self.id.expect("invariant: no future is polled after it is ready");
        let polled = self.core.borrow_mut().poll_connect(id, cx);
        if polled.is_ready() {
            self.id = None;
        }
        polled.map_ok(|id| Connection::new(Link::first(Rc::clone(&self.core), id)))
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.core.borrow_mut().forget_connect(id);
        }
    }
}

fn token(kind: Kind, id: Id) -> Token {
    Token::new(kind, id.index, id.generation)
}

/// An established connection that whoever has asked for it does not take is closed.
const TAKEN_WITHIN_MS: u64 = 1_000;
/// Between two tries at a Unix socket whose listener's queue is full.
const RETRY_MS_MIN: u64 = 1;
const RETRY_MS_MAX: u64 = 50;
