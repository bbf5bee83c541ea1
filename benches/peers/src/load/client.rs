//! The books of one client: what it still has to say, and what it waits for.

use std::{collections::VecDeque, io, net::TcpStream, os::fd::AsRawFd, rc::Rc};

use super::{Plan, script::Script};

pub(super) struct Client {
    socket: TcpStream,
    script: Rc<Script>,
    /// Offsets into the script's periods.
    send_at: usize,
    recv_at: usize,
    /// Bytes to be sent once the send under way is through.
    pub owed: usize,
    /// Bytes of the send under way.
    pub sending: usize,
    /// Bytes received of the reply that is incomplete.
    partial: usize,
    /// When the requests that are not answered were due, in nanoseconds of the session's clock.
    pub due_ns: VecDeque<u64>,
}

impl Client {
    pub fn connect(plan: &Plan, script: Rc<Script>) -> io::Result<Self> {
        let socket = TcpStream::connect(plan.address)?;
        socket.set_nodelay(true)?;
        let due_ns = VecDeque::with_capacity(plan.pipeline);
        Ok(Self { socket, script, send_at: 0, recv_at: 0, owed: 0, sending: 0, partial: 0, due_ns })
    }

    pub fn fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }

    /// One more request, to be counted from then.
    #[inline]
    pub fn ask(&mut self, due_ns: u64) {
        self.owed += self.script.request_bytes;
        self.due_ns.push_back(due_ns);
    }

    /// The bytes to send now, as many as are contiguous.
    #[inline]
    pub fn next_send(&mut self) -> (*const u8, u32) {
        let period = self.script.requests_period();
        let len = self.owed.min(period);
        let bytes = self.script.requests(self.send_at, len);
        self.owed -= len;
        self.sending = len;
        self.send_at = (self.send_at + len) % period;
        (bytes.as_ptr(), len as u32)
    }

    /// The send under way has sent nothing, and is to be done again.
    pub fn unsend(&mut self) {
        let period = self.script.requests_period();
        self.owed += self.sending;
        self.send_at = (self.send_at + period - self.sending) % period;
        self.sending = 0;
    }

    /// Compares what came in; how many replies it completes.
    #[inline]
    pub fn hear(&mut self, mut received: &[u8]) -> io::Result<usize> {
        let period = self.script.replies_period();
        while !received.is_empty() {
            let len = received.len().min(period - self.recv_at);
            if !self.script.matches(self.recv_at, &received[..len]) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the reply differs"));
            }
            self.recv_at = if self.recv_at + len == period { 0 } else { self.recv_at + len };
            self.partial += len;
            received = &received[len..];
        }
        let finished = self.partial / self.script.reply_bytes;
        self.partial %= self.script.reply_bytes;
        Ok(finished)
    }

    /// Every request is answered.
    pub fn is_idle(&self) -> bool {
        self.sending == 0 && self.owed == 0 && self.due_ns.is_empty()
    }
}
