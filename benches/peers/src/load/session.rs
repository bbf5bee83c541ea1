//! Connected clients on a ring of their own, which wait until they are driven.

use std::{
    io,
    mem::ManuallyDrop,
    ptr,
    rc::Rc,
    time::{Duration, Instant},
};

use io_uring::{
    CompletionQueue, IoUring, SubmissionQueue, cqueue, opcode, squeue, types::Fd, types::Timespec,
};

use super::{Plan, STALL_S_MAX, Sample, Talk, client::Client, sample::record, script::Script};
use crate::ring::{self, Buffers, Door};

pub struct Session {
    // These borrow from `ring`, and `drop` ends them before it.
    submission: ManuallyDrop<SubmissionQueue<'static>>,
    completion: ManuallyDrop<CompletionQueue<'static>>,
    door: ManuallyDrop<Door<'static>>,
    buffers: Option<Buffers>,
    ring: *mut IoUring,
    clients: Vec<Client>,
    poll: bool,
    pipeline: usize,
    /// Requests are answered with the next one at once.
    closed: bool,
    sample: Sample,
    epoch: Instant,
    now_ns: u64,
    /// Operations that have a completion to come.
    in_flight: usize,
    /// The kernel reads this when a timeout is submitted.
    tick: Box<Timespec>,
    ticking: bool,
}

impl Session {
    /// # Errors
    ///
    /// The plan is out of bounds or not on the loopback; connecting fails; an HTTP server answers
    /// something else.
    pub fn connect(plan: &Plan) -> io::Result<Self> {
        plan.check()?;
        let http = match plan.talk {
            Talk::Http => Some(Rc::new(Script::http(plan.address, plan.pipeline)?)),
            Talk::Echo { .. } => None,
        };
        let script = |index: usize| match (&http, plan.talk) {
            (Some(script), _) => Rc::clone(script),
            (None, talk) => {
                Rc::new(Script::echo(talk.request_bytes(), plan.pipeline, index as u64))
            }
        };
        let clients = (0..plan.connections).map(|index| Client::connect(plan, script(index)));
        let clients = clients.collect::<io::Result<Vec<_>>>()?;
        // Per client at most one send and one receive are under way, so this queue is never full.
        let sq_entries = (2 * plan.connections + 2).next_power_of_two() as u32;
        let (ring, ring_fd) = ring::open_with_fd(sq_entries, sq_entries.max(4096))?;
        let ring = Box::into_raw(Box::new(ring));
        // SAFETY: `drop` frees the ring after all that borrows from it.
        let (submitter, submission, completion) = unsafe { &mut *ring }.split();
        let door = Door::new(submitter, ring_fd);
        let large = plan.talk.request_bytes() * plan.pipeline > 4096;
        let (count, bytes) = if large { (64, 65_536) } else { (512, 4096) };
        let buffers = Buffers::register(door.submitter(), count, bytes)?;
        let mut session = Self {
            submission: ManuallyDrop::new(submission),
            completion: ManuallyDrop::new(completion),
            door: ManuallyDrop::new(door),
            buffers: Some(buffers),
            ring,
            clients,
            poll: plan.poll,
            pipeline: plan.pipeline,
            closed: false,
            sample: Sample::new(),
            epoch: Instant::now(),
            now_ns: 0,
            in_flight: 0,
            tick: Box::new(Timespec::new().nsec(TICK_MS * 1_000_000)),
            ticking: false,
        };
        (0..session.clients.len()).for_each(|index| session.receive(index, 0));
        Ok(session)
    }

    /// Keeps the pipeline of each client full for a time, and then hears the last replies.
    ///
    /// # Errors
    ///
    /// A byte differs, the server closes or resets, or nothing comes back for [`STALL_S_MAX`].
    pub fn closed(&mut self, time: Duration) -> io::Result<Sample> {
        let begin = self.begin();
        self.closed = true;
        for index in 0..self.clients.len() {
            for _ in 0..self.pipeline {
                self.clients[index].ask(begin);
            }
            self.send(index);
        }
        let end = begin + time.as_nanos() as u64;
        self.turns(|session| session.now_ns >= end)?;
        self.closed = false;
        self.turns(|session| session.clients.iter().all(Client::is_idle))?;
        Ok(self.finish(begin))
    }

    /// Asks at a fixed rate, the clients in turn, whether or not replies have come; each request
    /// counts from its due time. It polls, so that no request is late for the client's own sleep.
    ///
    /// # Errors
    ///
    /// As [`Session::closed`].
    pub fn open(&mut self, per_second: f64, time: Duration) -> io::Result<Sample> {
        let begin = self.begin();
        let polled = std::mem::replace(&mut self.poll, true);
        let count = (per_second * time.as_secs_f64()) as u64;
        let (mut asked, mut last_ns, mut heard) = (0, begin, 0);
        while asked < count || self.sample.requests < count {
            self.now_ns = self.clock();
            while asked < count {
                let due_ns = begin + (asked as f64 * 1e9 / per_second) as u64;
                if due_ns > self.now_ns {
                    break;
                }
                let index = asked as usize % self.clients.len();
                record(&mut self.sample.late, self.now_ns - due_ns);
                self.clients[index].ask(due_ns);
                if self.clients[index].sending == 0 {
                    self.send(index);
                }
                asked += 1;
            }
            self.turn()?;
            if heard != self.sample.requests {
                (heard, last_ns) = (self.sample.requests, self.now_ns);
            }
            let owed = asked > heard;
            if !owed {
                last_ns = self.now_ns;
            }
            self.check_stall(last_ns)?;
        }
        self.poll = polled;
        Ok(self.finish(begin))
    }

    fn begin(&mut self) -> u64 {
        self.sample = Sample::new();
        self.now_ns = self.clock();
        self.now_ns
    }

    fn finish(&mut self, begin: u64) -> Sample {
        self.sample.elapsed = Duration::from_nanos(self.clock() - begin);
        std::mem::take(&mut self.sample)
    }

    #[inline]
    fn clock(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn turns(&mut self, done: impl Fn(&Self) -> bool) -> io::Result<()> {
        let (mut heard, mut last_ns) = (self.sample.requests, self.now_ns);
        while !done(self) {
            if !self.poll && !self.ticking {
                self.ticking = true;
                let entry = opcode::Timeout::new(&raw const *self.tick).build();
                self.push(entry.user_data(pack(TICK, 0)));
            }
            self.turn()?;
            if heard != self.sample.requests {
                (heard, last_ns) = (self.sample.requests, self.now_ns);
            }
            self.check_stall(last_ns)?;
        }
        Ok(())
    }

    fn check_stall(&self, last_ns: u64) -> io::Result<()> {
        match Duration::from_nanos(self.now_ns.saturating_sub(last_ns)).as_secs() {
            STALL_S_MAX.. => Err(io::Error::new(io::ErrorKind::TimedOut, "the server is silent")),
            _ => Ok(()),
        }
    }

    #[inline]
    fn turn(&mut self) -> io::Result<()> {
        self.buffers.as_mut().expect("until it is dropped").publish();
        self.submission.sync();
        let submit = self.submission.len();
        // When polling, completions are made by an enter, and one is due only when the kernel says
        // so or there is something to say.
        if !self.poll || submit > 0 || self.submission.taskrun() {
            self.door.enter(submit, u32::from(!self.poll))?;
            self.submission.sync();
        }
        self.completion.sync();
        self.now_ns = self.clock();
        while let Some(completion) = self.completion.next() {
            let (result, flags) = (completion.result(), completion.flags());
            self.in_flight -= usize::from(!cqueue::more(flags));
            match unpack(completion.user_data()) {
                (RECV, index) => self.on_recv(index, result, flags)?,
                (SEND, index) => self.on_send(index, result)?,
                _ => self.ticking = false,
            }
        }
        self.completion.sync();
        Ok(())
    }

    #[inline]
    fn on_recv(&mut self, index: usize, result: i32, flags: u32) -> io::Result<()> {
        let Some(bid) = cqueue::buffer_select(flags) else {
            return match result {
                0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed")),
                // The buffers are given back within the turn that they came in.
                _ if result == -libc::ENOBUFS || result == -libc::EINTR => {
                    self.receive(index, ring::POLL_FIRST);
                    Ok(())
                }
                _ => Err(io::Error::from_raw_os_error(-result)),
            };
        };
        let buffers = self.buffers.as_mut().expect("until it is dropped");
        // SAFETY: this completion handed out the buffer with `result` bytes; it is given back
        // below.
        let received = unsafe { buffers.filled(bid, result.max(0) as usize) };
        let client = &mut self.clients[index];
        let finished = client.hear(received);
        buffers.give(bid);
        for _ in 0..finished? {
            let due_ns = client.due_ns.pop_front();
            let due_ns = due_ns.ok_or_else(|| io::Error::other("a reply to no request"))?;
            record(&mut self.sample.latency, self.now_ns.saturating_sub(due_ns));
            self.sample.requests += 1;
            if self.closed {
                client.ask(self.now_ns);
            }
        }
        if client.sending == 0 && client.owed > 0 {
            self.send(index);
        }
        if !cqueue::more(flags) {
            self.receive(index, 0);
        }
        Ok(())
    }

    #[inline]
    fn on_send(&mut self, index: usize, result: i32) -> io::Result<()> {
        let client = &mut self.clients[index];
        if result == -libc::EINTR {
            client.unsend();
            self.send(index);
            return Ok(());
        }
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        if result as usize != client.sending {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "a send was cut short"));
        }
        client.sending = 0;
        if client.owed > 0 {
            self.send(index);
        }
        Ok(())
    }

    fn receive(&mut self, index: usize, ioprio: u16) {
        let entry = opcode::Recv::new(Fd(self.clients[index].fd()), ptr::null_mut(), 0)
            .ioprio(ring::RECV_MULTISHOT | ioprio)
            .buf_group(ring::GROUP)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(entry.user_data(pack(RECV, index)));
    }

    #[inline]
    fn send(&mut self, index: usize) {
        let (bytes, len) = self.clients[index].next_send();
        let entry = opcode::Send::new(Fd(self.clients[index].fd()), bytes, len)
            .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
            .build();
        self.push(entry.user_data(pack(SEND, index)));
    }

    #[inline]
    fn push(&mut self, entry: squeue::Entry) {
        self.in_flight += 1;
        // SAFETY: entries point to a client's script, to `tick` and to the provided buffers, none
        // of which is freed before `drop` has seen the last completion.
        unsafe { self.submission.push(&entry) }.expect("sized for all that can be under way");
    }

    /// Ends everything that is in flight; whether it did.
    fn settle(&mut self) -> bool {
        self.submission.sync();
        let submitted = self.door.enter(self.submission.len(), 0);
        if submitted.and_then(|()| self.door.cancel_all()).is_err() {
            return false;
        }
        let deadline = Instant::now() + Duration::from_secs(1);
        while self.in_flight > 0 && Instant::now() < deadline {
            if self.door.enter(0, 0).is_err() {
                return false;
            }
            self.completion.sync();
            for completion in self.completion.by_ref() {
                self.in_flight -= usize::from(!cqueue::more(completion.flags()));
            }
            self.completion.sync();
        }
        self.in_flight == 0
    }
}

/// Memory that the kernel may still use is leaked.
impl Drop for Session {
    fn drop(&mut self) {
        let settled = self.settle();
        if settled {
            let buffers = self.buffers.take().expect("this is the drop");
            // SAFETY: nothing is in flight, and this value, which alone could start anything, ends
            // here.
            let _ = unsafe { buffers.release(self.door.submitter()) };
        } else {
            std::mem::forget(std::mem::take(&mut self.clients));
            std::mem::forget(std::mem::take(&mut self.tick));
        }
        // SAFETY: each is dropped here and nowhere else, and not used again.
        unsafe {
            ManuallyDrop::drop(&mut self.door);
            ManuallyDrop::drop(&mut self.completion);
            ManuallyDrop::drop(&mut self.submission);
            drop(Box::from_raw(self.ring));
        }
    }
}

const fn pack(op: u64, index: usize) -> u64 {
    op << 48 | index as u64
}

const fn unpack(user_data: u64) -> (u64, usize) {
    (user_data >> 48, user_data as u32 as usize)
}

const RECV: u64 = 0;
const SEND: u64 = 1;
const TICK: u64 = 2;
const TICK_MS: u32 = 100;
