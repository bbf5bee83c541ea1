//! One core: what it owns, and one turn of its loop.
//!
//! ```text
//! flush outputs, re-arm receives -> enter the kernel once: submit, wait, time-out
//! -> take completions -> read the mail -> expire deadlines -> advance the drain -> poll tasks
//! ```
//! No code of a handler runs while the core is borrowed: futures and foreign wakers are taken
//! out, then polled, woken and dropped.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use crate::buf::Chunk;
use crate::config::Settings;
use crate::control::Control;
use crate::deadline::Limits;
use crate::drain::{Drain, Left, Phase, Plan};
use crate::driver::{Completion, Driver, Outcome, Wait};
use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::executor::{Body, Scope, Tasks, Wake, drop_guarded, guarded};
use crate::listen::{Listener, NO_CONNECTION};
use crate::post::{Message, Post};
use crate::report::{CloseReason, PhaseTimes};
use crate::stats::{CoreStats, Counters};
use crate::sys::gather::Gather;
use crate::table::{Id, Table};
use crate::task::spawn_task;
use crate::time::Sleeper;
use crate::wheel::{TimerKey, Wheel};

/// A core as its tasks share it.
pub(crate) type CoreRef = Rc<CoreCell>;

pub(crate) struct CoreCell {
    core: RefCell<Core>,
    serial: u64,
}

/// What the wheel of a core reminds it of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    Connection(Id),
    Sleeper(Id),
    Listener(u32),
}

/// Everything that one thread owns.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) driver: Driver,
    pub(crate) settings: Settings,
    pub(crate) limits: Limits,
    pub(crate) now_ns: u64,
    pub(crate) now_ms: u64,
    pub(crate) table: Table<Entry>,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) wheel: Wheel<Timer>,
    pub(crate) sleepers: Table<Sleeper>,
    pub(crate) tasks: Tasks,
    pub(crate) drain: Drain,
    pub(crate) drain_waiters: Table<Wake>,
    pub(crate) counters: Arc<Counters>,
    /// Connections with output to be sent at the end of the turn.
    pub(crate) dirty: Vec<Id>,
    /// Connections whose last hold was dropped in this turn.
    pub(crate) released: Vec<Id>,
    /// Connections that wait for receive buffers, first come first served.
    pub(crate) parked: VecDeque<Id>,
    /// Emptied output queues, for the next who sends.
    #[expect(clippy::vec_box, reason = "a gather in flight must not move, so it lives in a box")]
    pub(crate) spare: Vec<Box<Gather>>,
    /// Emptied input queues, for the next that receives.
    #[expect(clippy::vec_box, reason = "they move between here and the entries")]
    pub(crate) spare_inputs: Vec<Box<VecDeque<Chunk>>>,
    /// Futures to be dropped when nobody has the core borrowed.
    pub(crate) graveyard: Vec<Body>,
    /// The most connections this core may have.
    pub(crate) connections_max: usize,
    pub(crate) myself: Weak<CoreCell>,
    control: Arc<Control>,
    post: Post,
    completions: Vec<Completion>,
    more_completions: bool,
    mail: Vec<Message>,
    fired: Vec<(TimerKey, Timer)>,
    enter_failures: u32,
}

impl Core {
    pub(crate) fn start(
        driver: Driver,
        settings: Settings,
        connections_max: usize,
        control: Arc<Control>,
        counters: Arc<Counters>,
        post: Post,
    ) -> CoreRef {
        let now_ns = driver.now_ns();
        let now_ms = now_ns / NS_PER_MS;
        let plan = Plan {
            lameduck_ns: settings.lameduck_ms * NS_PER_MS,
            force_grace_ns: settings.force_grace_ms * NS_PER_MS,
        };
        let limits = Limits {
            first_byte_ms: settings.first_byte_ms,
            idle_ms: settings.idle_ms,
            write_stall_ms: settings.write_stall_ms,
            lifetime_ms: settings.lifetime_ms,
        };
        let serial = post.serial();
        Rc::new_cyclic(|myself| CoreCell {
            serial,
            core: RefCell::new(Core {
                driver,
                settings,
                limits,
                now_ns,
                now_ms,
                table: Table::new(),
                listeners: Vec::new(),
                wheel: Wheel::new(now_ms),
                sleepers: Table::new(),
                tasks: Tasks::new(Arc::clone(&post)),
                drain: Drain::new(plan),
                drain_waiters: Table::new(),
                counters,
                dirty: Vec::new(),
                released: Vec::new(),
                parked: VecDeque::new(),
                spare: Vec::new(),
                spare_inputs: Vec::new(),
                graveyard: Vec::new(),
                connections_max,
                myself: Weak::clone(myself),
                control,
                post,
                completions: Vec::new(),
                more_completions: false,
                mail: Vec::new(),
                fired: Vec::with_capacity(settings.expiry_budget as usize),
                enter_failures: 0,
            }),
        })
    }

    /// Sends what the last turn has queued, then waits for news and hears it.
    fn exchange(&mut self) -> Result<()> {
        self.close_released();
        self.flush_outputs();
        self.rearm_parked();
        let mut wait = self.wait();
        if wait != Wait::No && !self.post.mailbox.fall_asleep() {
            wait = Wait::No;
        }
        let entered = self.driver.enter(wait);
        if wait != Wait::No {
            self.post.mailbox.wake_up();
        }
        self.heed(entered)?;
        let budget = self.settings.completion_budget as usize;
        let mut completions = std::mem::take(&mut self.completions);
        self.more_completions = self.driver.reap(&mut completions, budget);
        self.now_ns = self.driver.now_ns();
        self.now_ms = self.now_ns / NS_PER_MS;
        self.wheel.advance(self.now_ms);
        for completion in completions.drain(..) {
            self.dispatch(completion);
        }
        self.completions = completions;
        Ok(())
    }

    /// Now, as what a deadline counts from: rounded up, so that none of them is early.
    pub(crate) fn stamp_ms(&self) -> u64 {
        self.now_ns.div_ceil(NS_PER_MS)
    }

    /// How long there is nothing to do.
    fn wait(&self) -> Wait {
        let busy = self.more_completions || self.tasks.has_ready() || !self.graveyard.is_empty();
        // The last task or connection may just have gone, which is what the drain waits for.
        if busy || self.has_parked() || self.drain.due(self.now_ns, self.left()).is_some() {
            return Wait::No;
        }
        let expiry_ns = self.wheel.next_expiry_ms().map(|ms| ms.saturating_mul(NS_PER_MS));
        match expiry_ns.into_iter().chain(self.drain.next_ns()).min() {
            None => Wait::Forever,
            Some(next_ns) => match next_ns.saturating_sub(self.driver.now_ns()) {
                0 => Wait::No,
                ns => Wait::AtMostNs(ns),
            },
        }
    }

    /// Judges what `io_uring_enter(2)` answered.
    fn heed(&mut self, entered: io::Result<()>) -> Result<()> {
        let Err(error) = entered else {
            self.enter_failures = 0;
            return Ok(());
        };
        match error.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            // The kernel is short of memory or of room for completions: taking some helps, and
            // what was queued stays queued.
            Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => {
                self.enter_failures += 1;
                if self.enter_failures > ENTER_FAILURES_BEFORE_PAUSE {
                    std::thread::sleep(ENTER_PAUSE);
                }
                Ok(())
            }
            _ => Err(Error::os("io_uring_enter", error)),
        }
    }

    fn dispatch(&mut self, completion: Completion) {
        let Completion { token, last, outcome } = completion;
        let id = Id { index: token.slot(), generation: token.generation() };
        match outcome {
            Outcome::Accepted(result) => self.on_accepted(token.slot(), last, result),
            Outcome::Received(result) => self.on_received(id, last, result),
            Outcome::Sent(result, gather) => self.on_sent(id, result, gather),
            Outcome::Hangup(result) => self.on_hangup(id, result),
            Outcome::Cancelled(result) if id.index == NO_CONNECTION => {
                self.on_accept_cancelled(id.generation, result);
            }
            Outcome::Cancelled(result) => self.on_cancelled(id, result),
            Outcome::Doorbell => {}
        }
    }

    /// Fires what is due, up to the budget; the rest follows next turn.
    fn expire(&mut self) {
        let mut fired = std::mem::take(&mut self.fired);
        self.wheel.expire(self.now_ms, self.settings.expiry_budget as usize, &mut fired);
        for (_, timer) in fired.drain(..) {
            match timer {
                Timer::Connection(id) => self.on_deadline(id),
                Timer::Sleeper(id) => {
                    if let Some(mut sleeper) = self.sleepers.remove(id) {
                        self.tasks.wake(&mut sleeper.wake);
                    }
                }
                Timer::Listener(index) => self.accept_again(index),
            }
        }
        self.fired = fired;
    }

    /// Hears of the drain's deadline and goes through the phases that are due.
    fn advance_drain(&mut self) {
        let deadline_ns = self.control.deadline_ns();
        if deadline_ns < self.drain.deadline_ns() {
            self.drain.order(self.now_ns, deadline_ns);
        }
        if self.drain.phase() == Phase::Running {
            return;
        }
        loop {
            match self.drain.advance(self.now_ns, self.left()) {
                Some(Phase::StopAccept) => self.stop_accept(),
                Some(Phase::DrainConnections) => self.drain_connections(),
                Some(Phase::Force) => self.force_connections(),
                Some(_) => {}
                None => return,
            }
        }
    }

    fn left(&self) -> Left {
        let listeners = self.listeners.iter().filter(|listener| listener.is_open()).count();
        Left { listeners, connections: self.table.len(), tasks: self.tasks.len() }
    }

    fn drain_connections(&mut self) {
        for id in self.drain_waiters.ids().collect::<Vec<_>>() {
            if let Some(mut wake) = self.drain_waiters.remove(id) {
                self.tasks.wake(&mut wake);
            }
        }
        for id in self.table.ids().collect::<Vec<_>>() {
            self.drain_connection(id);
        }
    }

    fn force_connections(&mut self) {
        for id in self.table.ids().collect::<Vec<_>>() {
            self.end(id, CloseReason::Forced);
        }
    }

    /// Publishes what the driver counts.
    fn publish_counters(&self) {
        let driver = self.driver.counters();
        self.counters.enters.set(driver.enters);
        self.counters.submissions.set(driver.submissions);
        self.counters.completions.set(driver.completions);
        self.counters.overflows.set(driver.overflows);
        self.counters.unknown.set(driver.stale);
        self.counters.tasks.set(self.tasks.len() as u64);
        self.counters.timers.set(self.wheel.len() as u64);
    }

    /// Nanoseconds until the drain's deadline, if there is one.
    pub(crate) fn remaining_ns(&self) -> Option<u64> {
        (self.drain.phase() > Phase::Running)
            .then(|| self.drain.deadline_ns().saturating_sub(self.driver.now_ns()))
    }
}

impl CoreCell {
    pub(crate) fn borrow_mut(&self) -> RefMut<'_, Core> {
        self.core.borrow_mut()
    }

    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    /// One turn of the loop. False when the core is down.
    pub(crate) fn turn(self: &Rc<CoreCell>) -> Result<bool> {
        {
            let mut core = self.borrow_mut();
            core.exchange()?;
            core.expire();
        }
        self.read_mail();
        self.borrow_mut().advance_drain();
        self.run_tasks();
        let core = self.borrow_mut();
        core.publish_counters();
        Ok(core.drain.phase() != Phase::Down)
    }

    /// Ends whatever the drain has left, sees every operation's end, and closes the books.
    pub(crate) fn shut_down(self: &Rc<CoreCell>) {
        let leftover = self.borrow_mut().take_all_tasks();
        drop_guarded(leftover);
        // Handlers are anyone's code, and may own connections of the core.
        let handlers = self.borrow_mut().take_handlers();
        guarded(move || drop(handlers));
        self.borrow_mut().force_connections();
        let give_up_ns = self.borrow_mut().driver.now_ns() + SHUT_DOWN_LIMIT_NS;
        loop {
            // Handles that were dropped with their futures let their connections go now.
            self.bury();
            let mut core = self.borrow_mut();
            // One whose socket is closed is only held by somebody who never lets it go.
            let closed = core.table.iter().all(|(_, entry)| entry.socket.is_none());
            if closed || core.driver.now_ns() >= give_up_ns {
                break;
            }
            core.close_released();
            core.flush_outputs();
            let _ = core.driver.enter(Wait::AtMostNs(NS_PER_MS));
            let mut completions = Vec::new();
            core.driver.reap(&mut completions, usize::MAX);
            for completion in completions {
                core.dispatch(completion);
            }
        }
        let late_mail = {
            let mut core = self.borrow_mut();
            let (limit, mut last) = (Duration::from_nanos(SHUT_DOWN_LIMIT_NS), Vec::new());
            let leaked = core.driver.quiesce(limit, &mut last);
            for completion in last {
                core.dispatch(completion);
            }
            core.counters.leaked_operations.add(leaked as u64);
            for id in core.table.ids().collect::<Vec<_>>() {
                core.remove_forced(id, leaked > 0);
            }
            let listeners = std::mem::take(&mut core.listeners);
            if leaked > 0 {
                // The kernel may still use their descriptors.
                std::mem::forget(listeners);
            }
            core.publish_counters();
            core.post.mailbox.close()
        };
        guarded(move || drop(late_mail));
        self.bury();
    }

    fn read_mail(self: &Rc<CoreCell>) {
        let mut mail = {
            let mut core = self.borrow_mut();
            let mut mail = std::mem::take(&mut core.mail);
            core.post.mailbox.take(&mut mail);
            mail
        };
        for message in mail.drain(..) {
            self.borrow_mut().counters.messages.add(1);
            match message {
                Message::Wake(id) => self.borrow_mut().tasks.make_ready(id),
                Message::Look => {}
                Message::Spawn(place, make) => {
                    // The maker is anyone's code; a panic in it is its own.
                    let spawn = || drop(spawn_task(self, Scope::Core, place, make()));
                    if !guarded(spawn) {
                        self.borrow_mut().counters.panics.add(1);
                    }
                }
            }
        }
        self.borrow_mut().mail = mail;
    }
}

impl Core {
    /// The books and the phases' times, for the report.
    pub(crate) fn account(&self) -> (CoreStats, PhaseTimes) {
        let phases = self.drain.durations_ns(self.driver.now_ns());
        (self.counters.snapshot(), PhaseTimes(phases))
    }

    /// Closes the books on a connection whose operations did not all end.
    fn remove_forced(&mut self, id: Id, leak: bool) {
        if let Some(mut entry) = self.table.remove(id) {
            self.tasks.discard(Some(std::mem::take(&mut entry.reader)));
            self.tasks.discard(Some(std::mem::take(&mut entry.writer)));
            if leak {
                // The kernel may still use the descriptor: never close it.
                std::mem::forget(entry.socket.take());
            }
            self.counters.close(entry.reason());
            self.counters.live.set(self.table.len() as u64);
        }
    }
}

impl fmt::Debug for CoreCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Core({})", self.serial)
    }
}

pub(crate) const NS_PER_MS: u64 = 1_000_000;
/// How long a core that is down waits for the last completions before it leaks; twice at most.
const SHUT_DOWN_LIMIT_NS: u64 = 30 * NS_PER_MS;
const ENTER_FAILURES_BEFORE_PAUSE: u32 = 8;
const ENTER_PAUSE: Duration = Duration::from_millis(1);
