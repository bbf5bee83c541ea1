//! The load generator: closed-loop echo clients on one thread and one ring.
//!
//! It is written like the yardstick, so that it is about as cheap as the cheapest server; cheaper
//! it cannot be, as the network's work is the same on either side.
//!
//! Each connection keeps `pipeline` messages of `bytes` under way and compares every byte that
//! comes back. The stream of a connection repeats a random pattern of its own of `pipeline *
//! bytes`, so that lost, doubled, reordered and misdirected bytes all show. The clock is read once
//! per turn: a round trip counts from the turn that queued the message to the turn that saw its
//! last byte, the generator's own queueing included. As the loop is closed, a server that stalls is
//! asked less, so the percentiles compare servers under equal concurrency and promise nothing
//! beyond.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
    ptr,
    time::{Duration, Instant},
};

use io_uring::{
    CompletionQueue, SubmissionQueue, cqueue, opcode, squeue, types::Fd, types::Timespec,
};
use socket2::SockRef;

use super::ring::{self, Buffers, Door};

/// What to send, and for how long.
#[derive(Clone, Debug)]
pub struct Plan {
    pub address: SocketAddr,
    pub connections: usize,
    pub bytes: usize,
    pub pipeline: usize,
    pub congestion: Option<String>,
}

/// What ends a stretch of load; a count is bounded by [`RUN_S_MAX`] as well.
#[derive(Clone, Copy, Debug)]
#[expect(dead_code, reason = "pair.rs loads for a time")]
pub enum Until {
    Elapsed(Duration),
    RoundTrips(u64),
}

/// Connects the plan's clients, lets `body` drive them, and ends them.
///
/// # Errors
///
/// The plan is out of bounds or not on the loopback; what `body` returns; operations that do not
/// end.
pub fn with<T, E: From<io::Error>>(
    plan: &Plan,
    body: impl FnOnce(&mut Load<'_>) -> Result<T, E>,
) -> Result<T, E> {
    plan.check()?;
    let clients = (0..plan.connections).map(|index| Client::connect(plan, index));
    let clients = clients.collect::<io::Result<Vec<_>>>()?;
    // Per client at most one send and one receive are under way, so this queue is never full.
    let sq_entries = (2 * plan.connections + 2).next_power_of_two() as u32;
    let (mut ring, ring_fd) = ring::open_with_fd(sq_entries, sq_entries.max(4096))?;
    let (submitter, submission, completion) = ring.split();
    let door = Door::new(submitter, ring_fd);
    let buffer_bytes = if plan.bytes * plan.pipeline <= 4096 { 4096 } else { 32_768 };
    let buffers = Buffers::register(door.submitter(), BUFFERS, buffer_bytes)?;
    let mut load = Load {
        round_trips: 0,
        latency: Histogram::default(),
        submission,
        completion,
        door,
        buffers,
        clients,
        bytes: plan.bytes,
        in_flight: 0,
        paused: true,
        now: Instant::now(),
        tick: Timespec::new().nsec(TICK_MS * 1_000_000),
        ticking: false,
    };
    for index in 0..load.clients.len() {
        load.receive(index, 0);
    }
    let outcome = body(&mut load);
    load.end()?;
    outcome
}

/// Connected clients, which wait until they are asked to [`Load::run`].
pub struct Load<'r> {
    /// Round trips so far.
    pub round_trips: u64,
    pub latency: Histogram,
    submission: SubmissionQueue<'r>,
    completion: CompletionQueue<'r>,
    door: Door<'r>,
    buffers: Buffers,
    clients: Vec<Client>,
    bytes: usize,
    /// Operations that have a completion to come.
    in_flight: usize,
    /// Messages that come back are not sent again.
    paused: bool,
    now: Instant,
    /// The kernel reads this when a timeout is submitted.
    tick: Timespec,
    ticking: bool,
}

struct Client {
    socket: TcpStream,
    /// Twice the pattern, so that every window of it is contiguous.
    pattern: Box<[u8]>,
    /// Offsets into the pattern's first half.
    send_at: usize,
    recv_at: usize,
    /// Bytes that may be sent once the send under way is through.
    owed: usize,
    sending: usize,
    /// Bytes received of the message that is incomplete.
    partial: usize,
    /// When the messages under way were queued: a ring of `pipeline` entries, and its oldest.
    queued: Box<[Instant]>,
    oldest: usize,
}

impl Load<'_> {
    /// Sends until then, and then until every message is back; how long both took.
    ///
    /// # Errors
    ///
    /// An echoed byte differs, the server closes or resets, or no message comes back for
    /// [`STALL_S_MAX`].
    pub fn run(&mut self, until: Until) -> io::Result<Duration> {
        let (begin, before) = (Instant::now(), self.round_trips);
        self.now = begin;
        self.paused = false;
        for index in 0..self.clients.len() {
            self.clients[index].queued.fill(begin);
            self.send(index);
        }
        self.turns(|load| match until {
            Until::Elapsed(time) => load.now - begin >= time,
            Until::RoundTrips(count) => load.round_trips - before >= count,
        })?;
        self.paused = true;
        self.turns(|load| load.clients.iter().all(Client::is_idle))?;
        Ok(begin.elapsed())
    }

    fn turns(&mut self, done: impl Fn(&Self) -> bool) -> io::Result<()> {
        let begin = Instant::now();
        let (mut seen, mut seen_at) = (self.round_trips, begin);
        while !done(self) {
            if !self.turn()? {
                continue;
            }
            if seen != self.round_trips {
                (seen, seen_at) = (self.round_trips, self.now);
            }
            let (stalled, running) = (self.now - seen_at, self.now - begin);
            if stalled.as_secs() >= STALL_S_MAX || running.as_secs() >= RUN_S_MAX {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the echo takes too long"));
            }
        }
        Ok(())
    }

    /// One turn; whether the tick that guards against a silent server has gone off in it.
    fn turn(&mut self) -> io::Result<bool> {
        if !self.ticking {
            self.ticking = true;
            let entry = opcode::Timeout::new(&raw const self.tick).build();
            self.push(entry.user_data(pack(TICK, 0)));
        }
        self.buffers.publish();
        self.submission.sync();
        self.door.enter(self.submission.len(), 1)?;
        self.submission.sync();
        self.completion.sync();
        self.now = Instant::now();
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
        Ok(!self.ticking)
    }

    #[inline]
    fn on_recv(&mut self, index: usize, result: i32, flags: u32) -> io::Result<()> {
        let Some(bid) = cqueue::buffer_select(flags) else {
            return match result {
                0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed")),
                // The buffers are given back within the turn that they came in.
                _ if result == -libc::ENOBUFS => {
                    self.receive(index, ring::POLL_FIRST);
                    Ok(())
                }
                _ => Err(io::Error::from_raw_os_error(-result)),
            };
        };
        // SAFETY: this completion handed out the buffer with `result` bytes; it is given back
        // below.
        let received = unsafe { self.buffers.filled(bid, result.max(0) as usize) };
        let finished = self.clients[index].check(received, self.bytes);
        self.buffers.give(bid);
        for _ in 0..finished? {
            let queued = self.clients[index].next_message(self.now);
            self.latency.record(self.now - queued);
            self.round_trips += 1;
            self.clients[index].owed += self.bytes;
        }
        if !self.paused && self.clients[index].sending == 0 && self.clients[index].owed > 0 {
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
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        if result as usize != client.sending {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "a send was cut short"));
        }
        client.sending = 0;
        if !self.paused && client.owed > 0 {
            self.send(index);
        }
        Ok(())
    }

    fn receive(&mut self, index: usize, ioprio: u16) {
        let fd = Fd(self.clients[index].socket.as_raw_fd());
        let entry = opcode::Recv::new(fd, ptr::null_mut(), 0)
            .ioprio(ring::RECV_MULTISHOT | ioprio)
            .buf_group(ring::GROUP)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(entry.user_data(pack(RECV, index)));
    }

    #[inline]
    fn send(&mut self, index: usize) {
        let client = &mut self.clients[index];
        let period = client.pattern.len() / 2;
        let len = std::mem::take(&mut client.owed);
        let bytes = &client.pattern[client.send_at..client.send_at + len];
        let entry = opcode::Send::new(Fd(client.socket.as_raw_fd()), bytes.as_ptr(), len as u32)
            .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
            .build();
        client.sending = len;
        client.send_at = (client.send_at + len) % period;
        self.push(entry.user_data(pack(SEND, index)));
    }

    #[inline]
    fn push(&mut self, entry: squeue::Entry) {
        self.in_flight += 1;
        // SAFETY: entries point to a client's pattern, to `tick` and to the provided buffers, none
        // of which is freed before `end` has seen the last completion.
        unsafe { self.submission.push(&entry) }.expect("sized for all that can be under way");
    }

    /// Ends everything that is in flight, and only then frees the memory; else the memory is
    /// leaked.
    fn end(mut self) -> io::Result<()> {
        self.submission.sync();
        self.door.enter(self.submission.len(), 0)?;
        self.door.cancel_all()?;
        let deadline = Instant::now() + Duration::from_secs(1);
        while self.in_flight > 0 && Instant::now() < deadline {
            self.door.enter(0, 0)?;
            self.completion.sync();
            for completion in self.completion.by_ref() {
                self.in_flight -= usize::from(!cqueue::more(completion.flags()));
            }
            self.completion.sync();
        }
        if self.in_flight > 0 {
            std::mem::forget(self);
            return Err(io::Error::other("operations of the load generator do not end"));
        }
        // SAFETY: nothing is in flight, and this value, which alone could start anything, ends
        // here.
        unsafe { self.buffers.release(self.door.submitter()) }
    }
}

impl Plan {
    fn check(&self) -> io::Result<()> {
        let Self { address, connections, bytes, pipeline, .. } = self;
        let outstanding = bytes.saturating_mul(*pipeline);
        let wrong = if !(1..=CONNECTIONS_MAX).contains(connections) {
            format!("connections: 1 to {CONNECTIONS_MAX}")
        } else if !(1..=OUTSTANDING_BYTES_MAX).contains(&outstanding) {
            format!("bytes times pipeline: 1 to {OUTSTANDING_BYTES_MAX}")
        } else if !address.ip().is_loopback() {
            format!("{address} is not on the loopback")
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, wrong))
    }
}

impl Client {
    fn connect(plan: &Plan, index: usize) -> io::Result<Self> {
        let socket = TcpStream::connect(plan.address)?;
        socket.set_nodelay(true)?;
        if let Some(congestion) = &plan.congestion {
            SockRef::from(&socket).set_tcp_congestion(congestion.as_bytes())?;
        }
        let mut random = Random(index as u64);
        let mut pattern: Vec<u8> = (0..plan.bytes * plan.pipeline).map(|_| random.byte()).collect();
        pattern.extend_from_within(..);
        Ok(Self {
            socket,
            pattern: pattern.into(),
            send_at: 0,
            recv_at: 0,
            owed: plan.bytes * plan.pipeline,
            sending: 0,
            partial: 0,
            queued: vec![Instant::now(); plan.pipeline].into(),
            oldest: 0,
        })
    }

    /// Every message is back.
    fn is_idle(&self) -> bool {
        self.sending == 0 && self.owed == self.pattern.len() / 2
    }

    /// Compares what came back; how many messages it completes.
    #[inline]
    fn check(&mut self, received: &[u8], message_bytes: usize) -> io::Result<usize> {
        let period = self.pattern.len() / 2;
        if received.len() > period
            || received != &self.pattern[self.recv_at..self.recv_at + received.len()]
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the echo differs"));
        }
        self.recv_at += received.len();
        if self.recv_at >= period {
            self.recv_at -= period;
        }
        self.partial += received.len();
        let finished = self.partial / message_bytes;
        self.partial %= message_bytes;
        Ok(finished)
    }

    /// Trades the oldest message for a new one; when the old one was queued.
    #[inline]
    fn next_message(&mut self, now: Instant) -> Instant {
        let queued = std::mem::replace(&mut self.queued[self.oldest], now);
        self.oldest = if self.oldest + 1 == self.queued.len() { 0 } else { self.oldest + 1 };
        queued
    }
}

/// Durations by powers of two of nanoseconds, each in 16 parts: a figure is at most 6.25 % too
/// high.
pub struct Histogram {
    buckets: Box<[u64; BUCKETS]>,
    count: u64,
}

impl Histogram {
    #[inline]
    fn record(&mut self, duration: Duration) {
        let ns = (duration.as_nanos() as u64).max(PARTS);
        let power = ns.ilog2();
        let part = (ns >> (power - PARTS.ilog2())) - PARTS;
        self.buckets[(u64::from(power) * PARTS + part) as usize] += 1;
        self.count += 1;
    }

    /// The upper end, in us, of the bucket below which `quantile` of the durations lie.
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        let wanted = (self.count as f64 * quantile).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted.max(1) {
                let (power, part) = (index as u64 / PARTS, index as u64 % PARTS);
                return (power as f64).exp2() * (1.0 + (part + 1) as f64 / PARTS as f64) / 1e3;
            }
        }
        0.0
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([0; BUCKETS]), count: 0 }
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) as u8
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

pub const CONNECTIONS_MAX: usize = 4096;
const OUTSTANDING_BYTES_MAX: usize = 1 << 20;
const STALL_S_MAX: u64 = 5;
const RUN_S_MAX: u64 = 120;
const TICK_MS: u32 = 100;
const BUFFERS: u16 = 512;
const PARTS: u64 = 16;
const BUCKETS: usize = 64 * PARTS as usize;
