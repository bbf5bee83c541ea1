//! Receiving datagrams: one multishot receive in flight per socket, which rests while its reader
//! falls behind. What comes meanwhile is kept by the kernel, as much as the socket's buffer holds,
//! and then dropped and counted.

use std::task::{Context, Poll};

use crate::core::Core;
use crate::driver::{Errno, Op};
use crate::entry::Receive;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::bufs::Lease;
use crate::table::Id;
use crate::token::{Kind, Token};
use crate::udp::datagram::Datagram;

impl Core {
    /// The next datagram. `None` only for who goes by the drain, once that has come and what was
    /// queued by then is taken.
    pub(super) fn poll_datagram(
        &mut self,
        id: Id,
        seat: &mut Option<Id>,
        until_drain: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Datagram>>> {
        let draining = until_drain && self.drain.is_draining();
        let Some(port) = self.udp.table.get_mut(id) else {
            return Poll::Ready(Err(core_gone("recv_from")));
        };
        if draining {
            let queued = port.input.len();
            let last = port.last.get_or_insert(queued);
            if *last == 0 || queued == 0 {
                return Poll::Ready(Ok(None));
            }
            *last -= 1;
        }
        let Some(next) = port.input.pop_front() else {
            port.readers.register(seat, &mut self.tasks, cx.waker());
            self.resume_datagrams(id);
            return Poll::Pending;
        };
        let local = port.local;
        let bytes = next.as_ref().map_or(0, |datagram| datagram.len());
        port.input_bytes -= bytes;
        self.memory.give_back(bytes);
        // The next receive is armed by whoever waits for it, unless one was and has rested.
        if next.is_ok() {
            self.resume_datagrams(id);
        }
        Poll::Ready(
            next.map(Some)
                .map_err(|errno| Error::os(format!("recv_from at {local}"), errno.to_io())),
        )
    }

    /// Arms a receive that is not, once half of what had piled up is taken.
    fn resume_datagrams(&mut self, id: Id) {
        let short = self.memory.is_short();
        if let Some(port) = self.udp.table.get_mut(id)
            && port.receive == Receive::Off
            && port.has_room(&self.settings, short)
        {
            self.arm_datagrams(id);
        }
    }

    fn arm_datagrams(&mut self, id: Id) {
        if let Some(port) = self.udp.table.get_mut(id)
            && !self.udp.over
        {
            port.receive = Receive::Armed;
            port.in_flight += 1;
            let op = Op::ReceiveDatagrams { socket: port.socket.name() };
            self.driver.push(Token::new(Kind::ReceiveDatagrams, id.index, id.generation), op);
        }
    }

    pub(super) fn cancel_datagrams(&mut self, id: Id) {
        if let Some(port) = self.udp.table.get_mut(id)
            && port.receive == Receive::Armed
            && !self.udp.over
        {
            port.receive = Receive::Cancelling;
            let target = Token::new(Kind::ReceiveDatagrams, id.index, id.generation);
            self.cancel_of_socket(id, target);
        }
    }

    pub(super) fn cancel_of_socket(&mut self, id: Id, target: Token) {
        if let Some(port) = self.udp.table.get_mut(id) {
            port.in_flight += 1;
            let token = Token::new(Kind::CancelDatagrams, id.index, id.generation);
            self.driver.push(token, Op::Cancel { target });
        }
    }

    /// A cancellation has ended. One that has missed its target is made again.
    pub(crate) fn on_datagrams_cancelled(&mut self, id: Id, result: Result<(), Errno>) {
        let Some(port) = self.udp.table.get_mut(id) else {
            self.counters.stale.add(1);
            return;
        };
        port.in_flight -= 1;
        if result.is_err() && port.receive == Receive::Cancelling {
            port.receive = Receive::Armed;
            self.cancel_datagrams(id);
        }
        self.advance_socket_close(id);
    }

    pub(crate) fn on_datagram(&mut self, id: Id, last: bool, result: Result<Lease, Errno>) {
        let Some(port) = self.udp.table.get_mut(id) else {
            self.counters.stale.add(1);
            return;
        };
        let cancelling = port.receive == Receive::Cancelling;
        if last {
            port.in_flight -= 1;
            port.receive = Receive::Off;
        }
        match result {
            Ok(lease) => self.take_in_datagram(id, lease),
            Err(Errno(libc::ECANCELED | libc::EINTR | libc::EAGAIN)) => {}
            // Kernels before 6.5 say ENOBUFS for a cancelled receive too.
            Err(Errno(libc::ENOBUFS)) if cancelling => {}
            Err(Errno(libc::ENOBUFS)) => {
                self.counters.buffers_missing.add(1);
                port.receive = Receive::Parked;
                // One that got nothing when its turn came does not lose its place.
                match port.rearmed {
                    true => self.udp.parked.push_front(id),
                    false => self.udp.parked.push_back(id),
                }
            }
            Err(errno) => {
                port.input.push_back(Err(errno));
                port.readers.wake(&mut self.tasks);
            }
        }
        self.after_datagram(id);
    }

    fn take_in_datagram(&mut self, id: Id, lease: Lease) {
        let Some(port) = self.udp.table.get_mut(id) else { return };
        port.rearmed = false;
        let Some((datagram, arrival)) = Datagram::new(lease) else {
            port.input.push_back(Err(Errno(libc::EIO)));
            port.readers.wake(&mut self.tasks);
            return;
        };
        let bytes = datagram.len();
        self.counters.bytes_received.add(bytes as u64);
        self.counters.datagrams_received.add(datagram.segments().count() as u64);
        self.counters.datagrams_truncated.add(datagram.is_truncated().into());
        if let Some(lost) = arrival.dropped {
            self.counters.datagrams_lost.add(port.note_lost(lost));
        }
        if port.holds > 0 {
            port.input_bytes += bytes;
            port.input.push_back(Ok(datagram));
            port.readers.wake(&mut self.tasks);
            self.take_memory(bytes);
        }
    }

    /// Decides what a receive that has answered, or ended, does next.
    fn after_datagram(&mut self, id: Id) {
        let short = self.memory.is_short();
        let Some(port) = self.udp.table.get_mut(id) else { return };
        if port.holds == 0 {
            self.advance_socket_close(id);
            return;
        }
        let full = port.is_full(&self.settings, short);
        match port.receive {
            Receive::Armed if full => self.cancel_datagrams(id),
            Receive::Off if full => self.counters.pauses.add(1),
            Receive::Off => self.arm_datagrams(id),
            _ => {}
        }
    }

    /// Gives those who wait for buffers another try, in their order, and no more of them than can
    /// all be served; as [`Core::rearm_parked`] does for connections.
    pub(crate) fn rearm_parked_sockets(&mut self) {
        if self.udp.parked.is_empty() {
            return;
        }
        let free = self.free_datagram_buffers();
        if free == 0 {
            return;
        }
        for _ in 0..(free / TAKEN_AT_ONCE_MAX).max(1) {
            let Some(id) = self.udp.parked.pop_front() else { return };
            if let Some(port) = self.udp.table.get_mut(id)
                && port.receive == Receive::Parked
            {
                port.rearmed = true;
                self.arm_datagrams(id);
            }
        }
    }

    /// Whether somebody waits for buffers that are there.
    pub(crate) fn has_parked_sockets(&self) -> bool {
        !self.udp.parked.is_empty() && self.free_datagram_buffers() > 0
    }

    fn free_datagram_buffers(&self) -> u32 {
        self.driver.datagram_pool().map_or(0, |pool| pool.buffers() - pool.leased())
    }

    /// A drain has begun: who goes by it looks again.
    pub(crate) fn tell_datagram_readers(&mut self) {
        self.udp.table.iter_mut().for_each(|(_, port)| port.readers.wake(&mut self.tasks));
    }
}

impl super::sockets::Port {
    /// How many more datagrams are lost than we knew of. The kernel's count wraps.
    pub(super) fn note_lost(&mut self, lost: u32) -> u64 {
        lost.wrapping_sub(std::mem::replace(&mut self.lost, lost)).into()
    }
}

pub(super) fn core_gone(operation: &'static str) -> Error {
    Error::new(ErrorKind::Closed, operation).because("the core has ended, and its sockets with it")
}

/// The most buffers that a multishot receive fills before others have their turn
/// (`MULTISHOT_MAX_RETRY` in the kernel's io_uring/net.c).
const TAKEN_AT_ONCE_MAX: u32 = 32;
