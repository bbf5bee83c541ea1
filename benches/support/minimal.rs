//! The yardstick: an echo server that is nothing but an io_uring loop.
//!
//! It answers "what would this cost if somebody wrote only this?", and slipring is held to its
//! figure. One thread, one ring, multishot accept, multishot receive into provided buffers, one
//! send per received chunk straight out of the same buffer, one `io_uring_enter` per turn that
//! submits and waits. There is no executor, no timer, no limit and no orderly shutdown, and a peer
//! that never reads may hold all buffers: do not serve with it. Needs Linux 6.1.

use std::{
    collections::VecDeque,
    io,
    net::TcpListener,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use io_uring::{CompletionQueue, SubmissionQueue, cqueue, opcode, squeue, types::Fd};

use super::ring::{self, Buffers, Door};

/// Echoes on `listener` until `stop` says so, which is asked once per turn; returns the calls of
/// `io_uring_enter`.
///
/// A wait ends early only by a signal, so `stop` wants one (a handler without `SA_RESTART`).
pub fn serve(listener: TcpListener, stop: impl Fn() -> bool) -> io::Result<u64> {
    let (mut ring, ring_fd) = ring::open_with_fd(SQ_ENTRIES, CQ_ENTRIES)?;
    let (submitter, submission, completion) = ring.split();
    let door = Door::new(submitter, ring_fd);
    let buffers = Buffers::register(door.submitter(), BUFFERS, BUFFER_BYTES)?;
    let mut echo = Echo {
        submission,
        completion,
        door,
        buffers,
        chunks: [Chunk::default(); BUFFERS as usize],
        connections: Vec::new(),
        starved: VecDeque::new(),
        spilled: VecDeque::new(),
        free: usize::from(BUFFERS),
        listener: listener.as_raw_fd(),
        accepting: false,
    };
    echo.accept();
    while !stop() {
        echo.turn()?;
    }
    // The buffers are leaked with whatever is still in flight; the connections close with the ring.
    echo.door.cancel_all()?;
    Ok(echo.door.enters)
}

struct Echo<'r> {
    submission: SubmissionQueue<'r>,
    completion: CompletionQueue<'r>,
    door: Door<'r>,
    buffers: Buffers,
    /// Per buffer: what it holds and which one its connection sends after it.
    chunks: [Chunk; BUFFERS as usize],
    /// Indexed by fd, which the kernel keeps small.
    connections: Vec<Connection>,
    /// Connections whose receive ended because no buffer was free, in that order.
    starved: VecDeque<RawFd>,
    /// Entries that found the submission queue full.
    spilled: VecDeque<squeue::Entry>,
    /// Buffers that the kernel has.
    free: usize,
    listener: RawFd,
    accepting: bool,
}

#[derive(Clone, Copy, Default)]
struct Chunk {
    len: u32,
    next: u16,
}

struct Connection {
    /// None where this fd is not a connection now.
    socket: Option<OwnedFd>,
    /// The chunk being sent; the ones behind it are linked through `Echo::chunks`.
    first: u16,
    last: u16,
    receiving: bool,
    /// The peer has ended its stream; what is queued still goes out.
    ended: bool,
    /// Nothing goes out any more.
    broken: bool,
}

impl Echo<'_> {
    fn turn(&mut self) -> io::Result<()> {
        self.buffers.publish();
        if !self.spilled.is_empty() {
            self.push_spilled();
        }
        if !self.starved.is_empty() {
            self.feed_starved();
        }
        self.submission.sync();
        self.door.enter(self.submission.len(), 1)?;
        self.submission.sync();
        self.completion.sync();
        while let Some(completion) = self.completion.next() {
            let (op, bid, fd) = unpack(completion.user_data());
            match op {
                RECV => self.on_recv(fd, completion.result(), completion.flags()),
                SEND => self.on_send(fd, bid, completion.result()),
                _ => self.on_accept(completion.result(), completion.flags()),
            }
        }
        self.completion.sync();
        Ok(())
    }

    fn on_accept(&mut self, result: i32, flags: u32) {
        self.accepting = cqueue::more(flags);
        if result >= 0 {
            // SAFETY: this completion is the only owner of the new fd.
            let socket = unsafe { OwnedFd::from_raw_fd(result) };
            let index = result as usize;
            if self.connections.len() <= index {
                self.connections.resize_with(index + 1, Connection::none);
            }
            self.connections[index] = Connection { socket: Some(socket), ..Connection::none() };
            self.receive(result, 0);
        }
        // After an error (no fd left, say) the next close arms it again: at once would fail at
        // once.
        if !self.accepting && (result >= 0 || result == -libc::ECONNABORTED) {
            self.accept();
        }
    }

    #[inline]
    fn on_recv(&mut self, fd: RawFd, result: i32, flags: u32) {
        let connection = &mut self.connections[fd as usize];
        if let Some(bid) = cqueue::buffer_select(flags) {
            self.free -= 1;
            if result <= 0 || connection.broken {
                self.give(bid);
            } else {
                self.chunks[usize::from(bid)] = Chunk { len: result as u32, next: NONE };
                if connection.first == NONE {
                    (connection.first, connection.last) = (bid, bid);
                    self.send(fd, bid);
                } else {
                    self.chunks[usize::from(connection.last)].next = bid;
                    connection.last = bid;
                }
            }
        }
        if !cqueue::more(flags) {
            self.on_recv_end(fd, result);
        }
    }

    /// The receive is over: the stream has ended, or buffers or room for completions ran out.
    fn on_recv_end(&mut self, fd: RawFd, result: i32) {
        let connection = &mut self.connections[fd as usize];
        connection.receiving = false;
        if result == 0 || connection.broken {
            connection.ended = true;
        } else if result > 0 {
            return self.receive(fd, 0);
        } else if result == -libc::ENOBUFS {
            return self.starved.push_back(fd);
        } else {
            connection.ended = true;
            self.break_off(fd);
        }
        self.close_if_over(fd);
    }

    #[inline]
    fn on_send(&mut self, fd: RawFd, bid: u16, result: i32) {
        let Chunk { len, next } = self.chunks[usize::from(bid)];
        self.give(bid);
        let connection = &mut self.connections[fd as usize];
        connection.first = next;
        // MSG_WAITALL: a short send is an error that came after some bytes.
        if result != len as i32 || connection.broken {
            self.break_off(fd);
            self.drop_queue(fd);
        } else if next != NONE {
            self.send(fd, next);
        }
        let connection = &self.connections[fd as usize];
        if connection.ended && connection.first == NONE {
            self.close_if_over(fd);
        }
    }

    fn accept(&mut self) {
        self.accepting = true;
        let entry = opcode::AcceptMulti::new(Fd(self.listener)).flags(libc::SOCK_CLOEXEC).build();
        self.push(entry.user_data(pack(ACCEPT, 0, self.listener)));
    }

    fn receive(&mut self, fd: RawFd, ioprio: u16) {
        self.connections[fd as usize].receiving = true;
        let entry = opcode::Recv::new(Fd(fd), ptr::null_mut(), 0)
            .ioprio(ring::RECV_MULTISHOT | ioprio)
            .buf_group(ring::GROUP)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(entry.user_data(pack(RECV, 0, fd)));
    }

    #[inline]
    fn send(&mut self, fd: RawFd, bid: u16) {
        let len = self.chunks[usize::from(bid)].len;
        let entry = opcode::Send::new(Fd(fd), self.buffers.address(bid), len)
            .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
            .build();
        self.push(entry.user_data(pack(SEND, bid, fd)));
    }

    #[inline]
    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: a send reads a provided buffer that is given back only on its completion, and the
        // buffers are never unmapped; the other operations point to no memory.
        if unsafe { self.submission.push(&entry) }.is_err() {
            self.push_when_full(entry);
        }
    }

    #[cold]
    fn push_when_full(&mut self, entry: squeue::Entry) {
        self.submission.sync();
        // An error shows again, and is reported, in the turn's own enter.
        let _ = self.door.enter(self.submission.len(), 0);
        self.submission.sync();
        // SAFETY: as in `push`.
        if unsafe { self.submission.push(&entry) }.is_err() {
            self.spilled.push_back(entry);
        }
    }

    fn push_spilled(&mut self) {
        for _ in 0..self.spilled.len() {
            let entry = self.spilled.pop_front().expect("counted above");
            self.push(entry);
        }
    }

    /// Lets as many starved connections receive again as there are buffers, but not for a handful
    /// of buffers.
    fn feed_starved(&mut self) {
        if self.free < usize::from(BUFFERS) / 8 {
            return;
        }
        for _ in 0..self.starved.len().min(self.free) {
            let fd = self.starved.pop_front().expect("counted above");
            self.receive(fd, ring::POLL_FIRST);
        }
    }

    #[inline]
    fn give(&mut self, bid: u16) {
        self.buffers.give(bid);
        self.free += 1;
    }

    /// The connection failed: ends its receive too, and drops what it has not begun to send.
    fn break_off(&mut self, fd: RawFd) {
        let connection = &mut self.connections[fd as usize];
        connection.broken = true;
        if connection.receiving {
            // SAFETY: the table owns this fd; the call has no other argument that could be wrong.
            unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
        } else if !connection.ended {
            connection.ended = true;
            self.starved.retain(|&starved| starved != fd);
        }
    }

    /// Gives back the chunks that wait for a send which will not come.
    fn drop_queue(&mut self, fd: RawFd) {
        let connection = &mut self.connections[fd as usize];
        let mut bid = std::mem::replace(&mut connection.first, NONE);
        while bid != NONE {
            let next = self.chunks[usize::from(bid)].next;
            self.give(bid);
            bid = next;
        }
    }

    /// Closes a connection once neither a receive nor a send can still complete on its fd.
    fn close_if_over(&mut self, fd: RawFd) {
        let connection = &mut self.connections[fd as usize];
        if connection.receiving || !connection.ended || connection.first != NONE {
            return;
        }
        connection.socket = None;
        if !self.accepting {
            self.accept();
        }
    }
}

impl Connection {
    fn none() -> Self {
        Self {
            socket: None,
            first: NONE,
            last: NONE,
            receiving: false,
            ended: false,
            broken: false,
        }
    }
}

/// `op | bid | fd`: no generation is needed, since an fd is closed only when nothing is in flight
/// on it.
const fn pack(op: u64, bid: u16, fd: RawFd) -> u64 {
    op << 48 | (bid as u64) << 32 | fd as u32 as u64
}

const fn unpack(user_data: u64) -> (u64, u16, RawFd) {
    (user_data >> 48, (user_data >> 32) as u16, user_data as u32 as RawFd)
}

const ACCEPT: u64 = 0;
const RECV: u64 = 1;
const SEND: u64 = 2;

/// The end of a list of chunks.
const NONE: u16 = u16::MAX;

const SQ_ENTRIES: u32 = 512;
const CQ_ENTRIES: u32 = 4096;
const BUFFERS: u16 = 512;
const BUFFER_BYTES: u32 = 4096;
