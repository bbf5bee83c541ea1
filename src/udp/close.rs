//! The end of a UDP socket: once nobody holds it, what was sent leaves, and when nothing is in
//! flight it is closed.

use std::net::SocketAddr;

use crate::core::{Core, Timer};
use crate::driver::Socket;
use crate::entry::Receive;
use crate::error::{Error, Result};
use crate::table::Id;
use crate::udp::send::send_token;
use crate::udp::sockets::Port;
use crate::wheel::{Precision, TimerKey};

impl Core {
    /// Takes a socket over that somebody holds once.
    pub(super) fn add_socket(&mut self, socket: Socket, local: SocketAddr) -> Result<Id> {
        self.open_datagrams()?;
        let id = self.udp.table.insert(Port::new(socket, local));
        self.counters.udp_sockets.set(self.udp.table.len() as u64);
        Ok(id)
    }

    /// Makes the buffers that datagrams are received into, unless they are there.
    pub(crate) fn open_datagrams(&mut self) -> Result<()> {
        let (buffers, bytes) = (self.settings.large_buffers, self.settings.datagram_buffer_bytes());
        self.driver.open_datagrams(buffers as u16, bytes).map_err(|error| {
            Error::os(format!("make {buffers} buffers of {bytes} bytes for datagrams"), error)
        })
    }

    /// A hold is dropped.
    pub(super) fn release_socket(&mut self, id: Id) {
        let Some(port) = self.udp.table.get_mut(id) else { return };
        port.holds -= 1;
        if port.holds > 0 {
            return;
        }
        port.input.clear();
        self.memory.give_back(std::mem::take(&mut port.input_bytes));
        if port.receive == Receive::Parked {
            port.receive = Receive::Off;
            self.udp.parked.retain(|parked| *parked != id);
        }
        if port.sends > 0 {
            let at_ms = self.now_ms + SENDS_MS_MAX;
            port.timer =
                Some(self.wheel.insert(at_ms, Precision::Coarse, Timer::UdpSocket(id.index)));
        }
        self.udp.leaving += 1;
        self.advance_socket_close(id);
    }

    /// Takes the next step towards the close, if it is time for one. Called whenever an operation
    /// of a socket has ended.
    pub(super) fn advance_socket_close(&mut self, id: Id) {
        if self.udp.table.get(id).is_none_or(|port| port.holds > 0) {
            return;
        }
        self.cancel_datagrams(id);
        if self.udp.table.get(id).is_some_and(|port| port.in_flight == 0) {
            self.close_socket(id);
            self.udp.leaving -= 1;
        }
    }

    /// Cancels the sends of a socket that nobody holds and that the kernel does not take.
    pub(crate) fn on_socket_deadline(&mut self, slot: u32, timer: TimerKey) {
        let Some(id) = self.udp.table.id_if(slot, |port| port.timer == Some(timer)) else { return };
        let Some(port) = self.udp.table.get_mut(id) else { return };
        port.timer = None;
        let sends = self.udp.sends.iter().filter(|(_, of)| **of == id);
        for send in sends.map(|(send, _)| send).collect::<Vec<_>>() {
            self.cancel_of_socket(id, send_token(send));
        }
    }

    fn close_socket(&mut self, id: Id) -> Option<Socket> {
        let mut port = self.udp.table.remove(id)?;
        if let Some(timer) = port.timer.take() {
            self.wheel.cancel(timer);
        }
        if let Some(lost) = port.socket.lost_datagrams() {
            self.counters.datagrams_lost.add(port.note_lost(lost));
        }
        self.memory.give_back(port.input_bytes + port.send_bytes);
        for mut waiters in [port.readers, port.writers] {
            waiters.discard(&mut self.tasks);
        }
        self.counters.udp_sockets.set(self.udp.table.len() as u64);
        Some(port.socket)
    }

    /// Closes what is left when the ring has ended; not if the kernel may still use it.
    pub(crate) fn close_sockets(&mut self, leaked: bool) {
        for id in self.udp.table.ids().collect::<Vec<_>>() {
            let socket = self.close_socket(id);
            if leaked {
                std::mem::forget(socket);
            }
        }
        self.udp.leaving = 0;
    }
}

/// How long sends of a socket that nobody holds may wait for room in the kernel. A device that
/// works makes some in much less.
const SENDS_MS_MAX: u64 = 1_000;
