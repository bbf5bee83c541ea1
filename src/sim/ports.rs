//! The simulated kernel's UDP sockets.

use std::collections::VecDeque;
use std::net::SocketAddr;

use super::{SimSocket, World, WorldRef};
use crate::driver::{Errno, Name, Op, Outcome};
use crate::sys::bufs::Lease;
use crate::sys::datagram::{Arrival, HEADER_BYTES, Outgoing};
use crate::token::Token;

/// A datagram on its way to us.
#[derive(Clone, Debug)]
pub(crate) struct Parcel {
    pub(crate) peer: SocketAddr,
    pub(crate) bytes: Vec<u8>,
    /// It is several of this size.
    pub(crate) segment: Option<usize>,
}

/// A UDP socket as the kernel sees it.
#[derive(Debug, Default)]
pub(crate) struct SimPort {
    queue: VecDeque<Parcel>,
    /// How many datagrams found no room.
    pub(crate) lost: u32,
    /// What the next receive answers.
    pub(crate) error: Option<i32>,
    /// The datagrams that have left, and to whom.
    pub(crate) sent: Vec<(Option<SocketAddr>, Vec<u8>)>,
}

impl SimPort {
    pub(crate) fn deliver(&mut self, parcel: Parcel) {
        if self.queue.len() < ROOM {
            self.queue.push_back(parcel);
        } else {
            let datagrams = parcel.segment.map_or(1, |size| parcel.bytes.len().div_ceil(size));
            self.lost += datagrams as u32;
        }
    }

    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }
}

impl World {
    /// Opens a UDP socket.
    pub(crate) fn bind_udp(world: &WorldRef) -> SimSocket {
        let fd = world.borrow().free_fd();
        world.borrow_mut().ports.insert(fd, SimPort::default());
        SimSocket { fd, world: WorldRef::clone(world) }
    }

    /// Takes some of the kernel's buffers for datagrams, as their readers do.
    pub(crate) fn take_datagram_buffers(&mut self, most: usize) -> Vec<Lease> {
        let some = self.datagram_buffers.len().min(most);
        let buffers = self.datagram_buffers.drain(..some);
        buffers.filter_map(|buffer| self.datagram_pool.lease(buffer, 0)).collect()
    }

    /// What is on its way comes to one of the sockets.
    pub(super) fn step_ports(&mut self) {
        if self.ports.is_empty() {
            return;
        }
        for _ in 0..self.rng.below(6) {
            let chosen = self.rng.below(self.ports.len() as u64) as usize;
            if let Some(port) = self.ports.values_mut().nth(chosen)
                && let Some(parcel) = self.parcels.pop_front()
            {
                port.deliver(parcel);
            }
        }
    }

    pub(super) fn work_receive_datagrams(
        &mut self,
        token: Token,
        socket: Name,
        first: bool,
        cancelled: bool,
        end: bool,
    ) {
        let hurried = self.rng.percent(50);
        let Some(port) = self.ports.get_mut(&socket.0) else {
            panic!("receive on descriptor {} that is closed", socket.0);
        };
        let answer = |errno| Outcome::Datagram(Err(Errno(errno)));
        if cancelled && (hurried || port.queue.is_empty() || self.datagram_buffers.is_empty()) {
            return self.complete(token, true, answer(libc::ECANCELED));
        }
        if let Some(errno) = port.error.take() {
            return self.complete(token, true, answer(errno));
        }
        if port.queue.is_empty() && !(first && self.datagram_buffers.is_empty()) {
            if end {
                return self.complete(token, true, answer(libc::EINTR));
            }
            return self.again(token, Op::ReceiveDatagrams { socket }, 1, cancelled);
        }
        let Some(buffer) = self.datagram_buffers.pop_front() else {
            return self.complete(token, true, answer(libc::ENOBUFS));
        };
        let Some(Parcel { peer, mut bytes, segment }) = port.queue.pop_front() else { return };
        let (sent_bytes, dropped) = (bytes.len(), (port.lost > 0).then_some(port.lost));
        bytes.truncate(self.datagram_pool.buffer_bytes() as usize - HEADER_BYTES);
        let mut written = Arrival { peer, segment, dropped, sent_bytes }.write();
        written.extend(bytes);
        self.datagram_pool.write_as_kernel(buffer, &written);
        let lease = self.datagram_pool.lease(buffer, written.len() as u32);
        let lease = lease.expect("the kernel's buffer");
        self.complete(token, end, Outcome::Datagram(Ok(lease)));
        if !end {
            self.again(token, Op::ReceiveDatagrams { socket }, 1, cancelled);
        }
    }

    pub(super) fn work_send_datagram(
        &mut self,
        token: Token,
        socket: Name,
        outgoing: Box<Outgoing>,
        cancelled: bool,
        fails: bool,
    ) {
        let waits = !self.orders.by_hand && self.rng.percent(30);
        let ordered = self.orders.datagram_errors.pop_front();
        let Some(port) = self.ports.get_mut(&socket.0) else {
            panic!("send on descriptor {} that is closed", socket.0);
        };
        let error = match (ordered, fails, outgoing.is_cut()) {
            _ if cancelled => Some(libc::ECANCELED),
            (Some(errno), ..) => Some(errno),
            (None, true, true) => Some(libc::EIO),
            (None, true, false) => Some(libc::EPERM),
            (None, false, _) => None,
        };
        if let Some(errno) = error {
            return self.complete(token, true, Outcome::DatagramSent(Err(Errno(errno)), outgoing));
        }
        if waits {
            return self.again(token, Op::SendDatagram { socket, outgoing }, 0, false);
        }
        let (peer, bytes) = (outgoing.peer(), outgoing.next().len());
        if bytes == 0 {
            port.sent.push((peer, Vec::new()));
        }
        port.sent.extend(outgoing.next().chunks(outgoing.segment()).map(|it| (peer, it.to_vec())));
        self.complete(token, true, Outcome::DatagramSent(Ok(bytes), outgoing));
    }

    /// How many operations of UDP sockets are on their way.
    pub(crate) fn socket_operations(&self) -> usize {
        self.tokens().filter(|token| is_of_a_socket(*token)).count()
    }
}

pub(super) fn is_of_a_socket(token: Token) -> bool {
    use crate::token::Kind::{CancelDatagrams, ReceiveDatagrams, SendDatagram};
    matches!(token.kind(), Some(ReceiveDatagrams | SendDatagram | CancelDatagrams))
}

/// How many datagrams the kernel keeps for a socket that takes none.
const ROOM: usize = 40;
