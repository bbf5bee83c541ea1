//! Sending datagrams: several sends of a socket may be in flight, up to a bound, as nobody counts
//! on their order. Each owns its bytes until the kernel has answered.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use crate::buf::SendBuf;
use crate::core::Core;
use crate::driver::{Errno, Op};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::datagram::{Outgoing, PAYLOAD_MAX_V4, PAYLOAD_MAX_V6};
use crate::table::Id;
use crate::token::{Kind, Token};
use crate::udp::receive::core_gone;
use crate::udp::sockets::Port;

/// What a caller wants to be sent.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) buf: SendBuf,
    /// The size of the datagrams that it is to be cut into.
    pub(super) segment: Option<usize>,
    /// `None` for the one that the socket is connected to.
    pub(super) peer: Option<SocketAddr>,
}

impl Wanted {
    /// What can be known before the kernel is asked.
    fn check(&self, port: &Port) -> Result<()> {
        let refuse = |kind, detail: String| {
            let to = self.peer.or(port.peer).map_or("nobody".to_owned(), |peer| peer.to_string());
            Err(Error::new(kind, format!("send_to {to}")).because(detail))
        };
        if self.peer.is_none() && port.peer.is_none() {
            let detail = "the socket is not connected; call connect, or name a peer with send_to";
            return refuse(ErrorKind::Misuse, detail.to_owned());
        }
        if self.peer.is_some_and(|peer| peer.is_ipv6()) && port.local.is_ipv4() {
            let detail = format!("the socket is bound to {}, which is IPv4", port.local);
            return refuse(ErrorKind::Misuse, detail);
        }
        if self.segment == Some(0) {
            return refuse(ErrorKind::Misuse, "a segment has at least one byte".to_owned());
        }
        let most = if port.local.is_ipv4() { PAYLOAD_MAX_V4 } else { PAYLOAD_MAX_V6 };
        let bytes = self.segment.unwrap_or(self.buf.len());
        if bytes > most {
            let detail = format!("a datagram has at most {most} bytes, and this one has {bytes}");
            return refuse(ErrorKind::TooLong, detail);
        }
        Ok(())
    }
}

impl Core {
    /// Takes over what is wanted as soon as there is room for it.
    pub(super) fn poll_send_datagram(
        &mut self,
        id: Id,
        seat: &mut Option<Id>,
        wanted: &mut Option<Wanted>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<()>> {
        let short = self.memory.is_short();
        let Some(port) = self.udp.table.get_mut(id) else {
            return Poll::Ready(Err(core_gone("send_to")));
        };
        let Some(next) = wanted.as_ref() else { return Poll::Ready(Ok(())) };
        next.check(port)?;
        let full = port.send_bytes + next.buf.len() > self.settings.send_queue_bytes
            || port.sends >= SENDS_MAX
            || short;
        // Whoever has nothing in flight may always send something: so all get on.
        if full && port.sends > 0 {
            port.writers.register(seat, &mut self.tasks, cx.waker());
            return Poll::Pending;
        }
        if let Some(Wanted { buf, segment, peer }) = wanted.take() {
            let bytes = buf.len();
            port.sends += 1;
            port.send_bytes += bytes;
            let mut outgoing = self.udp.spare.pop().unwrap_or_else(|| Box::new(Outgoing::new()));
            outgoing.fill(buf, segment, peer, segment.is_some() && port.cuts);
            let send = self.udp.sends.insert(id);
            self.take_memory(bytes);
            self.push_datagram(send, id, outgoing);
        }
        Poll::Ready(Ok(()))
    }

    /// Waits until no send is in flight, and tells of the first that has failed since this was last
    /// asked.
    pub(super) fn poll_flush_datagrams(
        &mut self,
        id: Id,
        seat: &mut Option<Id>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<()>> {
        let Some(port) = self.udp.table.get_mut(id) else {
            return Poll::Ready(Err(core_gone("flush")));
        };
        if port.sends > 0 {
            port.writers.register(seat, &mut self.tasks, cx.waker());
            return Poll::Pending;
        }
        let Some((errno, peer)) = port.failure.take() else { return Poll::Ready(Ok(())) };
        let to = peer.map_or("nobody".to_owned(), |peer| peer.to_string());
        Poll::Ready(Err(Error::os(format!("send_to {to}"), errno.to_io())))
    }

    fn push_datagram(&mut self, send: Id, id: Id, outgoing: Box<Outgoing>) {
        let Some(port) = self.udp.table.get_mut(id) else { return };
        port.in_flight += 1;
        let op = Op::SendDatagram { socket: port.socket.name(), outgoing };
        self.driver.push(send_token(send), op);
    }

    pub(crate) fn on_datagram_sent(
        &mut self,
        send: Id,
        result: Result<usize, Errno>,
        mut outgoing: Box<Outgoing>,
    ) {
        let id = self.udp.sends.get(send).copied();
        let Some((id, port)) = id.and_then(|id| Some((id, self.udp.table.get_mut(id)?))) else {
            self.counters.stale.add(1);
            return;
        };
        port.in_flight -= 1;
        let goes_on = match result {
            Ok(bytes) => {
                self.counters.bytes_sent.add(bytes as u64);
                self.counters.datagrams_sent.add(outgoing.next_datagrams());
                outgoing.advance()
            }
            Err(Errno(libc::EINTR)) => true,
            // The way to this peer can't be cut for: a device without checksums (EIO), datagrams
            // that are longer than its packets.
            Err(Errno(code @ (libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP)))
                if outgoing.is_cut() =>
            {
                port.cuts &= code != libc::EIO;
                outgoing.cut_here();
                true
            }
            Err(errno) => {
                port.fail(errno, outgoing.peer());
                port.readers.wake(&mut self.tasks);
                false
            }
        };
        if goes_on && !self.udp.over && !port.is_given_up() {
            self.push_datagram(send, id, outgoing);
            return;
        }
        if goes_on || result.is_err() {
            self.counters.datagrams_unsent.add(outgoing.unsent_datagrams());
        }
        let bytes = outgoing.bytes();
        port.sends -= 1;
        port.send_bytes -= bytes;
        port.writers.wake(&mut self.tasks);
        self.memory.give_back(bytes);
        self.udp.sends.remove(send);
        outgoing.clear();
        if self.udp.spare.len() < SPARE_MAX {
            self.udp.spare.push(outgoing);
        }
        self.advance_socket_close(id);
    }
}

impl Port {
    /// Remembers why a send has failed. Whoever waits for an answer of the peer that the socket is
    /// connected to would wait in vain, and hears of it too.
    fn fail(&mut self, errno: Errno, peer: Option<SocketAddr>) {
        self.failure.get_or_insert((errno, peer.or(self.peer)));
        let told = matches!(self.input.back(), Some(Err(_)));
        if errno == Errno(libc::ECONNREFUSED) && self.peer.is_some() && !told && self.holds > 0 {
            self.input.push_back(Err(errno));
        }
    }
}

pub(super) fn send_token(send: Id) -> Token {
    Token::new(Kind::SendDatagram, send.index, send.generation)
}

/// Sends of one socket that may be in flight. They end where they are submitted unless the socket's
/// buffer is full, so this is what may leave in a turn.
const SENDS_MAX: usize = 128;
/// More boxes than this are not kept.
const SPARE_MAX: usize = 256;
