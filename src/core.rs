//! One core: what it owns, and one turn of its loop.
//!
//! ```text
//! post the mail, flush outputs, re-arm receives
//! -> enter the kernel once: submit, (spin,) wait, time-out
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

use crate::audience::Audiences;
use crate::audit::Audit;
use crate::balance::Pulse;
use crate::calls::Calls;
use crate::caps::Lease;
use crate::config::Settings;
use crate::connecting::Outbound;
use crate::connections::ConnectionInfo;
use crate::control::Control;
use crate::cores::States;
use crate::deadline::Limits;
use crate::drain::{Drain, Phase, Plan};
use crate::driver::{Completion, Driver, Outcome, Wait};
use crate::ending::Walks;
use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::executor::{Body, Tasks, Wake};
use crate::hooks::Hook;
use crate::input::Input;
use crate::inspect::Inspections;
use crate::leftover::Leftover;
use crate::listen::{Listener, NO_CONNECTION};
use crate::memory::Memory;
use crate::outbox::Outbox;
use crate::pause::Pauses;
use crate::post::{Message, Post};
use crate::pressure::Pressure;
use crate::server::CoreInfo;
use crate::spin::Spin;
use crate::stats::Counters;
use crate::stop::StopMethod;
use crate::sys::clock::coarse_ms;
use crate::sys::gather::Gather;
use crate::table::{Id, Table};
use crate::time::Sleeper;
use crate::token::Kind;
use crate::udp::sockets::UdpSockets;
use crate::wheel::{TimerKey, Wheel};

/// A core as its tasks share it.
pub(crate) type CoreRef = Rc<CoreCell>;

pub(crate) struct CoreCell {
    core: RefCell<Core>,
    serial: u64,
}

/// What the wheel of a core reminds it of, by its slot: whether the slot's tenant is still the one
/// that is meant, the timer's key tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    Connection(u32),
    Sleeper(u32),
    Listener(u32),
    Connect(u32),
    UdpSocket(u32),
    Audit,
    Pressure,
}

/// Everything that one thread owns.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) driver: Driver,
    pub(crate) settings: Settings,
    pub(crate) limits: Limits,
    pub(crate) now_ns: u64,
    pub(crate) now_ms: u64,
    /// Now, as what a deadline counts from: rounded up, so that none of them is early.
    pub(crate) stamp_ms: u64,
    /// What lies between its clock and the coarse one.
    watch_epoch_ms: u64,
    pub(crate) pauses: Pauses,
    pub(crate) table: Table<Entry>,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) outbound: Outbound,
    pub(crate) udp: UdpSockets,
    pub(crate) wheel: Wheel<Timer>,
    pub(crate) sleepers: Table<Sleeper>,
    pub(crate) tasks: Tasks,
    pub(crate) drain: Drain,
    pub(crate) walks: Walks,
    /// This core leaves a server that goes on.
    pub(crate) retired: bool,
    /// When it has to be gone then, on the clock of the driver; `u64::MAX` for never.
    pub(crate) retire_ns: u64,
    pub(crate) stop: Option<StopMethod>,
    /// Run when a drain begins.
    pub(crate) hooks: Vec<Hook>,
    pub(crate) hooks_run: u64,
    pub(crate) leftover: Leftover,
    pub(crate) oldest_survivor: Option<ConnectionInfo>,
    pub(crate) info: CoreInfo,
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
    pub(crate) spare_inputs: Vec<Box<Input>>,
    /// Futures to be dropped when nobody has the core borrowed.
    pub(crate) graveyard: Vec<Body>,
    /// Counts the turns.
    pub(crate) turn: u64,
    /// The listener that was the first to be emptied in this turn.
    pub(crate) next_listener: usize,
    /// What the connections have queued.
    pub(crate) memory: Memory,
    pub(crate) pressure: Pressure,
    /// Connections in the table that were accepted only to be closed.
    pub(crate) refused: usize,
    /// The places for connections that this core has.
    pub(crate) lease: Lease,
    pub(crate) pulse: Pulse,
    pub(crate) myself: Weak<CoreCell>,
    pub(crate) control: Arc<Control>,
    pub(crate) post: Post,
    pub(crate) inspections: Inspections,
    pub(crate) audit: Audit,
    /// The kernel has told of more than this turn has heard.
    pub(crate) more_completions: bool,
    /// How many completions the last turn has heard.
    pub(crate) heard: u32,
    /// How many more this turn may hear; the end of a connection uses up several.
    pub(crate) hears: u32,
    /// What has come from other threads and is still to be heard.
    pub(crate) mail: VecDeque<Message>,
    /// What is to leave for other cores at the end of the turn.
    pub(crate) outbox: Outbox,
    pub(crate) calls: Calls,
    pub(crate) audiences: Audiences,
    /// What the program has of its own here.
    pub(crate) states: States,
    fired: Vec<(TimerKey, Timer)>,
    enter_failures: u32,
    pub(crate) spin: Spin,
    /// How long it has spun in all.
    pub(crate) spun_ns: u64,
    #[cfg(feature = "tracing")]
    pub(crate) events: RefCell<crate::trace::CoreEvents>,
}

impl Core {
    pub(crate) fn start(
        driver: Driver,
        settings: Settings,
        lease: Lease,
        control: Arc<Control>,
        counters: Arc<Counters>,
        post: Post,
    ) -> CoreRef {
        let now_ns = driver.now_ns();
        let now_ms = now_ns / NS_PER_MS;
        let plan = Plan {
            lameduck_ns: settings.lameduck_ms * NS_PER_MS,
            force_grace_ns: settings.force_grace_ms * NS_PER_MS,
            close_spread_ns: settings.close_spread_ms * NS_PER_MS,
            idle_min_keep_ns: settings.idle_min_keep_ms * NS_PER_MS,
        };
        let serial = post.serial();
        counters.watch.set_limit(settings.stall_ms);
        Rc::new_cyclic(|myself| CoreCell {
            serial,
            core: RefCell::new(Core {
                driver,
                settings,
                limits: Limits::new(&settings),
                now_ns,
                now_ms,
                stamp_ms: now_ns.div_ceil(NS_PER_MS),
                watch_epoch_ms: coarse_ms().saturating_sub(now_ms),
                pauses: Pauses::new(settings.heartbeat_timeout_ms * NS_PER_MS / 4),
                table: Table::new(),
                listeners: Vec::new(),
                outbound: Outbound::new(),
                udp: UdpSockets::new(),
                wheel: Wheel::new(now_ms),
                sleepers: Table::new(),
                tasks: Tasks::new(Arc::clone(&post)),
                drain: Drain::new(plan),
                walks: Walks::default(),
                retired: false,
                retire_ns: u64::MAX,
                stop: None,
                hooks: Vec::new(),
                hooks_run: 0,
                leftover: Leftover::default(),
                oldest_survivor: None,
                info: CoreInfo { index: 0, cpu: 0, cores: 1 },
                drain_waiters: Table::new(),
                counters,
                dirty: Vec::new(),
                released: Vec::new(),
                parked: VecDeque::new(),
                spare: Vec::new(),
                spare_inputs: Vec::new(),
                graveyard: Vec::new(),
                turn: 0,
                next_listener: 0,
                memory: Memory::new(settings.memory_bytes_max),
                pressure: Pressure::new(&settings),
                refused: 0,
                lease,
                pulse: Pulse::default(),
                myself: Weak::clone(myself),
                control,
                post,
                inspections: Inspections::default(),
                audit: Audit::default(),
                more_completions: false,
                heard: 0,
                hears: 0,
                mail: VecDeque::new(),
                outbox: Outbox::default(),
                calls: Calls::default(),
                audiences: Audiences::default(),
                states: States::default(),
                fired: Vec::with_capacity(settings.expiry_budget as usize),
                enter_failures: 0,
                spin: Spin::new(u64::from(settings.spin_us) * 1_000, now_ns),
                spun_ns: 0,
                #[cfg(feature = "tracing")]
                events: Default::default(),
            }),
        })
    }

    /// Sends what the last turn has queued, then waits for news and hears it.
    fn exchange(&mut self) -> Result<()> {
        self.close_released();
        self.flush_outputs();
        self.rearm_parked();
        self.rearm_parked_sockets();
        let now_ns = self.driver.now_ns();
        self.publish_pulse(now_ns);
        self.end_turn(now_ns);
        self.say_whether_quiet();
        self.feel_memory();
        let wait = self.wait(now_ns);
        self.pauses.back_by(match wait {
            Wait::No => self.now_ns,
            Wait::Until(due_ns) => due_ns,
            Wait::Forever => u64::MAX,
        });
        let entered = self.wait_for_news(wait);
        self.heed(entered)?;
        self.turn += 1;
        self.now_ns = self.driver.now_ns();
        self.now_ms = self.now_ns / NS_PER_MS;
        self.stamp_ms = self.now_ns.div_ceil(NS_PER_MS);
        self.counters.watch.turn_begins(self.watch_ms(self.now_ns));
        self.pauses.back(self.now_ns, self.driver.is_ready());
        self.wheel.advance(self.now_ms);
        let mut heard = 0;
        self.hears = self.settings.completion_budget;
        while self.hears > 0
            && let Some(completion) = self.driver.next()
        {
            self.hears -= 1;
            self.dispatch(completion);
            heard += 1;
        }
        self.heard = heard;
        self.more_completions = self.driver.is_ready();
        self.take_connections();
        self.relieve_pressure();
        self.wake_memory_waiters();
        Ok(())
    }

    /// Tells the cores of a process apart, those of several servers too.
    pub(crate) fn serial(&self) -> u64 {
        self.post.serial()
    }

    /// Takes down how long it was since the kernel's answer.
    fn end_turn(&self, now_ns: u64) {
        if !self.counters.watch.is_in_turn() {
            return;
        }
        let turn_us = now_ns.saturating_sub(self.now_ns) / 1_000;
        if turn_us > self.counters.turn_longest_us.get() {
            self.counters.turn_longest_us.set(turn_us);
        }
        if self.counters.watch.turn_ends(self.watch_ms(now_ns)) {
            self.counters.stalls.add(1);
        }
    }

    /// The driver's time as others may read it from the coarse clock, a tick earlier at most.
    fn watch_ms(&self, now_ns: u64) -> u64 {
        self.watch_epoch_ms + now_ns / NS_PER_MS
    }

    /// How long there is nothing to do.
    fn wait(&self, now_ns: u64) -> Wait {
        let busy = self.more_completions
            || self.tasks.has_ready()
            || !self.graveyard.is_empty()
            || !self.outbox.is_empty()
            || self.listeners.iter().any(Listener::is_taking)
            || !self.mail.is_empty()
            || self.post.mailbox.has_mail()
            || self.pressure.is_on()
            || self.memory.has_waiters()
            || !self.inspections.is_empty()
            || self.audit.is_under_way()
            || !self.walks.is_done();
        // The last task or connection may just have gone, which is what the drain waits for.
        let parked = self.has_parked() || self.has_parked_sockets();
        let drains =
            || self.drain.is_ordered() && self.drain.due(self.now_ns, self.left()).is_some();
        if busy || parked || drains() {
            return Wait::No;
        }
        let expiry_ns = self.wheel.next_expiry_ms().map(|ms| ms.saturating_mul(NS_PER_MS));
        match expiry_ns.into_iter().chain(self.drain.next_ns()).min() {
            None => Wait::Forever,
            Some(next_ns) if next_ns <= now_ns => Wait::No,
            // Added to its clock, the longest times would overflow in the kernel.
            Some(next_ns) => Wait::Until(next_ns.min(now_ns.saturating_add(WAIT_NS_MAX))),
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

    #[inline(always)]
    pub(crate) fn dispatch(&mut self, completion: Completion) {
        let Completion { token, last, outcome } = completion;
        let id = Id { index: token.slot(), generation: token.generation() };
        match outcome {
            Outcome::Accepted(result, queue) => self.on_accepted(token.slot(), result, queue),
            Outcome::Received(result) => self.on_received(id, last, result),
            Outcome::Sent(result, gather) => self.on_sent(id, result, gather),
            Outcome::Hangup(result) => self.on_hangup(id, result),
            Outcome::Connected(result) => self.on_connected(id, result),
            Outcome::Cancelled(result) if token.kind() == Some(Kind::CancelConnect) => {
                self.on_connect_cancelled(id, result);
            }
            Outcome::Cancelled(result) if id.index == NO_CONNECTION => {
                self.on_accept_cancelled(id.generation, result);
            }
            Outcome::Cancelled(result) => self.on_cancelled(id, result),
            Outcome::Datagram(result) => self.on_datagram(id, last, result),
            Outcome::DatagramSent(result, outgoing) => self.on_datagram_sent(id, result, outgoing),
            Outcome::DatagramsCancelled(result) => self.on_datagrams_cancelled(id, result),
            Outcome::Doorbell => {}
        }
    }

    /// Fires what is due, up to the budget; the rest follows next turn. Most of it costs next to
    /// nothing, but the end of a connection takes several system calls, so few of those are enough.
    fn expire(&mut self) {
        if self.pauses.is_catching_up(self.now_ns) {
            return;
        }
        let (mut left, mut ended) = (self.settings.expiry_budget as usize, 0);
        while left > 0 && ended < ENDED_MAX {
            let piece = left.min(ENDED_MAX - ended);
            left -= piece;
            let more = self.expire_some(piece, &mut ended);
            if !more {
                break;
            }
        }
    }

    /// Fires no more than `most`, and counts the connections that this ends. True if more is due.
    fn expire_some(&mut self, most: usize, ended: &mut usize) -> bool {
        let mut fired = std::mem::take(&mut self.fired);
        let more = self.wheel.expire(self.now_ms, most, &mut fired);
        for (key, timer) in fired.drain(..) {
            match timer {
                Timer::Connection(slot) => *ended += usize::from(self.on_deadline(slot, key)),
                Timer::Sleeper(slot) => self.wake_sleeper(slot, key),
                Timer::Listener(index) => self.accept_again(index),
                Timer::Connect(slot) => self.on_connect_timer(slot, key),
                Timer::UdpSocket(slot) => self.on_socket_deadline(slot, key),
                Timer::Audit => self.begin_audit(),
                Timer::Pressure => self.end_rest(),
            }
        }
        self.fired = fired;
        more
    }

    /// Publishes what the driver counts.
    pub(crate) fn publish_counters(&self) {
        self.counters.turns.set(self.turn);
        let driver = self.driver.counters();
        self.counters.enters.set(driver.enters);
        self.counters.submissions.set(driver.submissions);
        self.counters.completions.set(driver.completions);
        self.counters.overflows.set(driver.overflows);
        self.counters.unknown.set(driver.stale);
        self.counters.tasks.set(self.tasks.len() as u64);
        self.counters.memory_bytes.set(self.memory.used() as u64);
        self.counters.timers.set(self.wheel.len() as u64);
        self.counters.phase.set(self.drain.phase() as u64);
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
        self.post_mail();
        {
            let mut core = self.borrow_mut();
            core.exchange()?;
            core.expire();
            core.audit_piece();
        }
        self.read_mail();
        self.inspect();
        self.advance_drain();
        self.run_tasks();
        let is_up = {
            let core = self.borrow_mut();
            core.publish_counters();
            core.drain.phase() != Phase::Down
        };
        traced!(self.tell());
        Ok(is_up)
    }
}

impl fmt::Debug for CoreCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Core({})", self.serial)
    }
}

pub(crate) const NS_PER_MS: u64 = 1_000_000;
const _: () = assert!(size_of::<Timer>() == 8);
const WAIT_NS_MAX: u64 = 3_600_000_000_000;
/// Connections that deadlines end in one turn.
const ENDED_MAX: usize = 16;
const ENTER_FAILURES_BEFORE_PAUSE: u32 = 8;
const ENTER_PAUSE: Duration = Duration::from_millis(1);
