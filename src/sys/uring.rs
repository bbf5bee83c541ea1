//! The io_uring driver: one ring, one thread, every operation accounted for.
//!
//! What the kernel may touch is owned here until the operation's final completion: the bytes of a
//! send by `sends`, the receive buffers by the pool. If the end of an operation can't be seen,
//! they are leaked. Descriptors belong to the core, which keeps them open for as long.

mod reap;

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, Timespec};
use io_uring::{opcode, squeue};

use super::bufs::{BufRing, Pool};
use super::clock::Epoch;
use super::connects::Connects;
use super::datagrams::Datagrams;
use super::files::{Files, Leaving, NO_FILE};
use super::gather::Gather;
use super::ring::{ACCEPT_POLL_FIRST, RECV_MULTISHOT, Ring, with_ioprio};
use super::sends::Sends;
use super::wake::EventFd;
use crate::driver::{Completion, DriverCounters, Group, Name, Op, Wait};
use crate::refusal::RingAsked;
use crate::token::{Kind, Token};

/// Sizes of a ring and its buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingSetup {
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    pub(crate) buffers: u16,
    pub(crate) buffer_bytes: u32,
    /// 0 for none.
    pub(crate) large_buffers: u16,
    pub(crate) large_buffer_bytes: u32,
    /// Places for direct descriptors; 0 for none.
    pub(crate) files: u32,
}

impl RingSetup {
    /// What the kernel is asked for at least, for the message when it refuses.
    pub(crate) fn asked(&self) -> RingAsked {
        use super::probe::setup::*;
        let flags = SINGLE_ISSUER | DEFER_TASKRUN | SUBMIT_ALL | TASKRUN_FLAG | CQSIZE | CLAMP;
        RingAsked { flags, sq_entries: self.sq_entries, cq_entries: self.cq_entries }
    }
}

/// A ring that belongs to the thread that made it.
#[derive(Debug)]
pub(crate) struct Uring {
    ring: ManuallyDrop<Box<Ring>>,
    /// The small receive buffers, and the large ones if there are any.
    bufs: ManuallyDrop<Vec<BufRing>>,
    datagrams: ManuallyDrop<Datagrams>,
    files: Files,
    /// Sends in flight. The kernel reads what they own.
    sends: Sends,
    /// Connects in flight. The kernel reads their addresses.
    connects: Connects,
    /// What found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    doorbell: Arc<EventFd>,
    epoch: Epoch,
    in_flight: usize,
    /// Receives in flight into large buffers.
    bulk_receives: usize,
    /// How long the standing timer was made to wait, where the kernel reads it.
    timer_spec: Box<Timespec>,
    /// When it fires; `u64::MAX` while there is none.
    timer_ns: u64,
    /// Everything was told to end, and nothing is begun any more.
    quiesced: bool,
    /// Some operations did not end when they were told to.
    given_up: bool,
    counters: DriverCounters,
}

impl Uring {
    /// Sets up a ring for the calling thread, with its buffers, and polls the doorbell.
    ///
    /// # Errors
    /// The kernel's refusal as it is; `refusal::explain_setup_failure` turns it into words.
    pub(crate) fn new(setup: RingSetup, doorbell: Arc<EventFd>, epoch: Epoch) -> io::Result<Uring> {
        // Before the ring, so that an error drops them after it: the kernel knows them until then.
        let mut bufs = Vec::with_capacity(2);
        let mut ring = Box::new(Ring::new(setup)?);
        let small = Pool::new(0, setup.buffers, setup.buffer_bytes)?;
        bufs.push(BufRing::register(&ring.uring, Group::Small as u16, small)?);
        bufs[0].publish(usize::MAX);
        if setup.large_buffers > 0 {
            let (buffers, bytes) = (setup.large_buffers, setup.large_buffer_bytes);
            let large = Pool::new(setup.buffers, buffers, bytes)?;
            bufs.push(BufRing::register(&ring.uring, Group::Large as u16, large)?);
        }
        ring.register_fd();
        let files = Files::register(&ring, setup.files);
        let mut driver = Uring {
            ring: ManuallyDrop::new(ring),
            bufs: ManuallyDrop::new(bufs),
            datagrams: ManuallyDrop::new(Datagrams::new()),
            files,
            sends: Sends::default(),
            connects: Connects::default(),
            backlog: VecDeque::new(),
            doorbell,
            epoch,
            in_flight: 0,
            bulk_receives: 0,
            timer_spec: Box::default(),
            timer_ns: u64::MAX,
            quiesced: false,
            given_up: false,
            counters: DriverCounters::default(),
        };
        driver.poll_doorbell();
        Ok(driver)
    }

    /// Inlined, since each caller knows which operation it is.
    #[inline(always)]
    pub(crate) fn push(&mut self, token: Token, op: Op) {
        if self.quiesced {
            // Its descriptor may be closed, and the number another's, before it reaches the kernel.
            return;
        }
        let entry = match op {
            Op::Accept { listener: Name(fd) } => {
                let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
                let accept = opcode::Accept::new(Fd(fd), address, length);
                let accept = accept.flags(libc::SOCK_CLOEXEC).build();
                // A try in vain costs nearly as much as an accept.
                if self.ring.accepts_well { with_ioprio(accept, ACCEPT_POLL_FIRST) } else { accept }
            }
            Op::Receive { socket: Name(fd), once, group } => {
                self.bulk_receives += usize::from(token.kind() == Some(Kind::BulkReceive));
                let ioprio = if once { 0 } else { RECV_MULTISHOT };
                opcode::Recv::new(Fd(fd), std::ptr::null_mut(), 0)
                    .buf_group(group as u16)
                    .ioprio(ioprio)
                    .build()
                    .flags(squeue::Flags::BUFFER_SELECT)
            }
            Op::Send { socket, gather } => {
                let entry = self.send_entry(token, socket, gather);
                self.queue(entry);
                return;
            }
            Op::Hangup { socket: Name(fd) } => {
                // No event is asked for: errors and hang-ups of either side are always reported.
                opcode::PollAdd::new(Fd(fd), 0).build()
            }
            Op::Connect { socket, to } => self.connects.begin(token, socket, to),
            Op::ReceiveDatagrams { socket } => self.datagrams.receive_entry(socket),
            Op::SendDatagram { socket, outgoing } => {
                self.datagrams.send_entry(token, socket, outgoing)
            }
            Op::Cancel { target } => opcode::AsyncCancel::new(target.bits()).build(),
        };
        self.queue(entry.user_data(token.bits()));
    }

    /// A connection's socket is about to be closed.
    pub(crate) fn forget(&mut self, token: Token) {
        let Some(leaving) = self.files.leave(token) else { return };
        let vacate = || {
            let submitter = self.ring.uring.submitter();
            submitter.register_files_update(token.slot(), &[NO_FILE]).is_ok()
        };
        let gone = leaving == Leaving::AtOnce && vacate();
        if !gone && !self.quiesced {
            let entry = self.files.vacate(token);
            self.queue(entry);
        }
    }

    pub(crate) fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.publish();
        let wait = match wait {
            Wait::Until(due_ns) if !self.quiesced => self.lean_on_timer(due_ns),
            wait => wait,
        };
        if !self.backlog.is_empty() {
            self.move_backlog();
        }
        let (queued, overflown, deferred) = {
            let queue = self.ring.uring.submission();
            (queue.len(), queue.cq_overflow(), queue.taskrun())
        };
        self.counters.overflows += u64::from(overflown);
        let deferred = deferred || overflown;
        if wait == Wait::No && queued == 0 && !deferred {
            return Ok(());
        }
        let wait = if self.backlog.is_empty() { wait } else { Wait::No };
        self.counters.enters += 1;
        let limit = match wait {
            Wait::Until(due_ns) => Some(Duration::from_nanos(due_ns.saturating_sub(self.now_ns()))),
            Wait::No | Wait::Forever => None,
        };
        match self.ring.enter(queued as u32, wait != Wait::No, limit) {
            Ok(submitted) => {
                self.counters.submissions += u64::from(submitted);
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gives returned buffers to the kernel, as whatever is submitted may want some at once.
    fn publish(&mut self) {
        if let [small, large @ ..] = self.bufs.as_mut_slice() {
            small.publish(usize::MAX);
            // No more than can be filled at once: these stay in the cache, all of them would not.
            large.iter_mut().for_each(|large| large.publish(self.bulk_receives));
        }
        self.datagrams.publish();
    }

    /// Makes of a wait with an end one that the standing timer ends, be it early. To start a timer
    /// with each wait costs about a microsecond on a virtual machine.
    fn lean_on_timer(&mut self, due_ns: u64) -> Wait {
        if self.timer_ns == u64::MAX {
            let ns = due_ns.saturating_sub(self.now_ns());
            if ns >= TIMER_NS_MIN {
                *self.timer_spec = Timespec::from(Duration::from_nanos(ns));
                self.timer_ns = due_ns;
                let entry = opcode::Timeout::new(&raw const *self.timer_spec).build();
                self.queue(entry.user_data(Token::new(Kind::Timer, 0, 0).bits()));
            }
        }
        if self.timer_ns <= due_ns { Wait::Forever } else { Wait::Until(due_ns) }
    }

    pub(crate) fn has_news(&mut self) -> bool {
        let queue = self.ring.uring.submission();
        let told = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        told || !self.backlog.is_empty() || !self.ring.uring.completion().is_empty()
    }

    pub(crate) fn waited_ns(&self) -> Option<u64> {
        super::thread::waited_ns()
    }

    pub(crate) fn is_ready(&mut self) -> bool {
        !self.ring.uring.completion().is_empty()
    }

    pub(crate) fn pool(&self) -> &Rc<Pool> {
        self.bufs[0].pool()
    }

    /// Makes the buffers that datagrams are received into, unless they are there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn open_datagrams(&mut self, buffers: u16, buffer_bytes: u32) -> io::Result<()> {
        self.datagrams.open(&self.ring.uring, buffers, buffer_bytes)
    }

    pub(crate) fn datagram_pool(&self) -> Option<&Rc<Pool>> {
        self.datagrams.pool()
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.epoch.elapsed_ns()
    }

    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn counters(&self) -> DriverCounters {
        self.counters
    }

    pub(crate) fn quiesce(&mut self, limit: Duration, into: &mut Vec<Completion>) -> usize {
        let give_up = Instant::now() + limit;
        self.quiesced = true;
        while self.in_flight > 0 {
            // What is queued must reach the kernel before it can be cancelled there.
            let _ = self.enter(Wait::No);
            let everything = CancelBuilder::any().all();
            let _ = self.ring.uring.submitter().register_sync_cancel(Some(CANCEL_WAIT), everything);
            let _ = self.enter(Wait::Until(self.now_ns() + 1_000_000));
            into.extend(std::iter::from_fn(|| self.next()));
            if Instant::now() >= give_up {
                break;
            }
        }
        // It fails where there are no direct descriptors. Those that there are would keep their
        // sockets open for as long as there is a ring.
        let _ = self.ring.uring.submitter().unregister_files();
        self.given_up = self.in_flight > 0;
        self.in_flight
    }

    fn poll_doorbell(&mut self) {
        // Multishot, and never read: every ring of the bell is an edge of its own.
        let entry = opcode::PollAdd::new(Fd(self.doorbell.as_raw_fd()), libc::POLLIN as u32)
            .multi(true)
            .build();
        self.queue(entry.user_data(Token::new(Kind::Doorbell, 0, 0).bits()));
    }

    #[inline(always)]
    fn send_entry(&mut self, token: Token, Name(fd): Name, gather: Box<Gather>) -> squeue::Entry {
        let direct = self.files.is_direct(token);
        if !direct && let Some(entry) = self.files.settle(token, fd) {
            self.queue(entry);
        }
        let (fd, place) = match direct {
            true => (Fd(token.slot() as i32), squeue::Flags::FIXED_FILE),
            false => (Fd(fd), squeue::Flags::empty()),
        };
        self.sends.begin(token, fd, gather).flags(place)
    }

    #[inline]
    fn queue(&mut self, entry: squeue::Entry) {
        self.in_flight += 1;
        if !self.backlog.is_empty() {
            self.move_backlog();
        }
        if !self.backlog.is_empty() || !self.ring.push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    /// Moves what found the queue full into it, submitting to make room.
    #[cold]
    fn move_backlog(&mut self) {
        while let Some(entry) = self.backlog.front().cloned() {
            if !self.ring.push(&entry) {
                self.publish();
                let queued = self.ring.uring.submission().len() as u32;
                self.counters.enters += 1;
                // On an error the entries stay where they are; `enter` will meet it again.
                match self.ring.enter(queued, false, None) {
                    Ok(submitted) => self.counters.submissions += u64::from(submitted),
                    Err(_) => return,
                }
                if !self.ring.push(&entry) {
                    return;
                }
            }
            self.backlog.pop_front();
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let ended = !self.given_up && self.quiesce(QUIESCE_LIMIT, &mut Vec::new()) == 0;
        if !ended {
            // The kernel may still write to the buffers and read what is being sent. Nothing of
            // it is freed: the ring, its buffers (`ManuallyDrop`), and the bytes in flight.
            std::mem::forget(std::mem::take(&mut self.sends));
            std::mem::forget(std::mem::take(&mut self.connects));
            std::mem::forget(std::mem::take(&mut self.files));
            return;
        }
        self.ring.unregister_fd();
        let groups = 0..self.bufs.len() as u16;
        let submitter = self.ring.uring.submitter();
        let unregistered = groups.map(|group| submitter.unregister_buf_ring(group));
        let unregistered = unregistered.collect::<io::Result<()>>();
        let unregistered = unregistered.and(self.datagrams.close(&self.ring.uring));
        // SAFETY: dropped nowhere else. Nothing is in flight.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
        if unregistered.is_ok() {
            // SAFETY: dropped nowhere else. The kernel no longer knows the rings of buffers.
            unsafe { ManuallyDrop::drop(&mut self.bufs) };
            // SAFETY: as above; and nothing that it owns is in flight.
            unsafe { ManuallyDrop::drop(&mut self.datagrams) };
        }
    }
}

/// A wait that is shorter than this has a timer of its own.
const TIMER_NS_MIN: u64 = 1_000_000;
/// How long one call may wait for what it has cancelled.
const CANCEL_WAIT: Timespec = Timespec::new().nsec(1_000_000);
/// How long dropping a ring waits for the last completions before it leaks.
const QUIESCE_LIMIT: Duration = Duration::from_millis(100);
