//! The yardstick of the comparison: an echo server that is nothing but an io_uring loop.
//!
//! One thread, one ring, multishot accept into direct descriptors, multishot receive into provided
//! buffers, one send per received chunk straight out of the same buffer, one `io_uring_enter` per
//! turn that submits and waits. There is no executor, no timer, no limit and no orderly shutdown,
//! and a peer that never reads may hold all buffers: do not serve with it. It is the loop of
//! `benches/support/minimal.rs` with direct descriptors, and with a buffer size to choose. Needs
//! Linux 6.1.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    ptr,
};

use io_uring::{
    CompletionQueue, SubmissionQueue, cqueue, opcode, squeue,
    types::{Fd, Fixed},
};
use slipring_peers::ring::{self, Buffers, Door};

use super::{Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    // The same memory whatever the size, but enough buffers to have some under way.
    let count = (BUFFERS_BYTES / order.buffer_bytes).clamp(64, 512).next_power_of_two() as u16;
    let (mut ring, ring_fd) = ring::open_with_fd(SQ_ENTRIES, CQ_ENTRIES)?;
    let (submitter, submission, completion) = ring.split();
    let door = Door::new(submitter, ring_fd);
    door.submitter().register_files_sparse(order.connections_max as u32)?;
    let buffers = Buffers::register(door.submitter(), count, order.buffer_bytes as u32)?;
    let listener = order.listen()?;
    let mut echo = Echo {
        submission,
        completion,
        door,
        buffers,
        count: usize::from(count),
        chunks: vec![Chunk::default(); usize::from(count)].into(),
        connections: Vec::new(),
        starved: VecDeque::new(),
        spilled: VecDeque::new(),
        free: usize::from(count),
        listener: listener.as_raw_fd(),
        accepting: false,
    };
    echo.accept();
    loop {
        echo.turn()?;
    }
}

struct Echo<'r> {
    submission: SubmissionQueue<'r>,
    completion: CompletionQueue<'r>,
    door: Door<'r>,
    buffers: Buffers,
    /// Per buffer: what it holds and which one its connection sends after it.
    chunks: Box<[Chunk]>,
    /// How many buffers there are.
    count: usize,
    /// Indexed by direct descriptor: the kernel takes the lowest that is free.
    connections: Vec<Connection>,
    /// Connections whose receive ended because no buffer was free, in that order.
    starved: VecDeque<u32>,
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

#[derive(Clone)]
struct Connection {
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
                CLOSE => self.on_close(),
                SHUTDOWN => {}
                _ => self.on_accept(completion.result(), completion.flags()),
            }
        }
        self.completion.sync();
        Ok(())
    }

    fn on_accept(&mut self, result: i32, flags: u32) {
        self.accepting = cqueue::more(flags);
        if result >= 0 {
            let index = result as usize;
            if self.connections.len() <= index {
                self.connections.resize(index + 1, Connection::NEW);
            }
            self.connections[index] = Connection::NEW;
            self.receive(result as u32, 0);
        }
        // After an error (no fd left, say) the next close arms it again: at once would fail at
        // once.
        if !self.accepting && (result >= 0 || result == -libc::ECONNABORTED) {
            self.accept();
        }
    }

    #[inline]
    fn on_recv(&mut self, fd: u32, result: i32, flags: u32) {
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
    fn on_recv_end(&mut self, fd: u32, result: i32) {
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
    fn on_send(&mut self, fd: u32, bid: u16, result: i32) {
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
        let entry = opcode::AcceptMulti::new(Fd(self.listener)).allocate_file_index(true).build();
        self.push(entry.user_data(pack(ACCEPT, 0, 0)));
    }

    fn receive(&mut self, fd: u32, ioprio: u16) {
        self.connections[fd as usize].receiving = true;
        let entry = opcode::Recv::new(Fixed(fd), ptr::null_mut(), 0)
            .ioprio(ring::RECV_MULTISHOT | ioprio)
            .buf_group(ring::GROUP)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT);
        self.push(entry.user_data(pack(RECV, 0, fd)));
    }

    #[inline]
    fn send(&mut self, fd: u32, bid: u16) {
        let len = self.chunks[usize::from(bid)].len;
        let entry = opcode::Send::new(Fixed(fd), self.buffers.address(bid), len)
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
        if self.free < self.count / 8 {
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
    fn break_off(&mut self, fd: u32) {
        let connection = &mut self.connections[fd as usize];
        connection.broken = true;
        if connection.receiving {
            let entry = opcode::Shutdown::new(Fixed(fd), libc::SHUT_RDWR).build();
            self.push(entry.user_data(pack(SHUTDOWN, 0, fd)));
        } else if !connection.ended {
            connection.ended = true;
            self.starved.retain(|&starved| starved != fd);
        }
    }

    /// Gives back the chunks that wait for a send which will not come.
    fn drop_queue(&mut self, fd: u32) {
        let connection = &mut self.connections[fd as usize];
        let mut bid = std::mem::replace(&mut connection.first, NONE);
        while bid != NONE {
            let next = self.chunks[usize::from(bid)].next;
            self.give(bid);
            bid = next;
        }
    }

    /// Closes a connection once neither a receive nor a send can still complete on its fd.
    fn close_if_over(&mut self, fd: u32) {
        let connection = &mut self.connections[fd as usize];
        if connection.receiving || !connection.ended || connection.first != NONE {
            return;
        }
        let entry = opcode::Close::new(Fixed(fd)).build();
        self.push(entry.user_data(pack(CLOSE, 0, fd)));
    }

    fn on_close(&mut self) {
        if !self.accepting {
            self.accept();
        }
    }
}

impl Connection {
    const NEW: Self =
        Self { first: NONE, last: NONE, receiving: false, ended: false, broken: false };
}

/// `op | bid | fd`: no generation is needed, since a descriptor is closed only when nothing is in
/// flight on it.
const fn pack(op: u64, bid: u16, fd: u32) -> u64 {
    op << 48 | (bid as u64) << 32 | fd as u64
}

const fn unpack(user_data: u64) -> (u64, u16, u32) {
    (user_data >> 48, (user_data >> 32) as u16, user_data as u32)
}

const ACCEPT: u64 = 0;
const RECV: u64 = 1;
const SEND: u64 = 2;
const CLOSE: u64 = 3;
const SHUTDOWN: u64 = 4;

/// The end of a list of chunks.
const NONE: u16 = u16::MAX;

const SQ_ENTRIES: u32 = 512;
const CQ_ENTRIES: u32 = 4096;
const BUFFERS_BYTES: usize = 512 * 4096;
