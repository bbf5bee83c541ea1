//! The stop of accepting: new handshakes are held off as well as the privileges allow, those that
//! are under way complete and are accepted, and then the queues are emptied and closed.

use std::sync::Arc;

use crate::core::{Core, NS_PER_MS};
use crate::driver::Socket;
use crate::group::Group;

/// How new connections were kept away from listeners that were about to be closed. The kernel
/// resets what is in a listener's queue when it is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum StopMethod {
    /// Not at all: the queue was emptied and closed at once. Whoever came in between was reset.
    QueueEmptied,
    /// Other cores' listeners of the port got them.
    Steered,
    /// The kernel dropped them before a handshake began: who is held off tries again a second
    /// later, and finds a successor or is refused.
    SynFilter,
    /// Nor need they be: the sockets were passed in, and stay open with whoever keeps them.
    LeftOpen,
}

impl StopMethod {
    /// The name as it stands in the report: lower case, words joined by `_`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            StopMethod::QueueEmptied => "queue_emptied",
            StopMethod::Steered => "steered",
            StopMethod::SynFilter => "syn_filter",
            StopMethod::LeftOpen => "left_open",
        }
    }
}

/// A listener's place among those of its port.
#[derive(Clone, Debug)]
pub(crate) struct Membership {
    pub(crate) group: Arc<Group>,
    pub(crate) core: usize,
}

impl Core {
    /// Holds new connections off, for as long as handshakes that have begun may take.
    pub(crate) fn hold_off(&mut self) {
        let mut hold_ms = 0;
        for index in 0..self.listeners.len() {
            let Some(method) = self.hold_off_from(index) else { continue };
            hold_ms = hold_ms.max(match method {
                StopMethod::QueueEmptied | StopMethod::LeftOpen => 0,
                StopMethod::Steered => self.settings.syn_quiesce_ms.max(STEERED_MS_MIN),
                StopMethod::SynFilter => self.settings.syn_quiesce_ms,
            });
            // The report names the weakest.
            self.stop = Some(self.stop.map_or(method, |other| other.min(method)));
        }
        if !self.listeners.is_empty() {
            self.stop.get_or_insert(StopMethod::QueueEmptied);
        }
        self.drain.hold(self.now_ns, hold_ms * NS_PER_MS);
    }

    /// `None` for a Unix socket of ours: all cores share its one queue.
    fn hold_off_from(&self, index: usize) -> Option<StopMethod> {
        let listener = &self.listeners[index];
        if listener.is_kept() {
            return Some(StopMethod::LeftOpen);
        }
        let socket = listener.socket().filter(|socket| !socket.is_unix())?;
        if self.retired
            && let (Some(member), Some(fd)) = (listener.membership(), socket.as_fd())
            && member.group.leave(member.core, fd).is_ok()
        {
            return Some(StopMethod::Steered);
        }
        let filtered = self.settings.syn_quiesce_ms > 0 && socket.drop_syns().is_ok();
        Some(if filtered { StopMethod::SynFilter } else { StopMethod::QueueEmptied })
    }

    /// Closes a listener whose queue is empty, or somebody else's.
    pub(crate) fn close_listener(&mut self, index: u32) {
        let Some(listener) = self.listeners.get_mut(index as usize) else { return };
        self.counters.queue_left.add(listener.left_queued());
        match (listener.take_socket(), listener.membership()) {
            (Some(Socket::Os(fd)), Some(member)) => {
                member.group.close(member.core, fd);
                if self.retired {
                    self.control.put_steering_right();
                }
            }
            (socket, _) => drop(socket),
        }
    }

    /// A listener of another core has gone: those that stay make the kernel's choice fit.
    pub(crate) fn put_steering_right(&self) {
        for listener in &self.listeners {
            let fd = listener.socket().and_then(Socket::as_fd);
            if let (Some(member), Some(fd)) = (listener.membership(), fd) {
                member.group.put_right(fd);
            }
        }
    }
}

/// A handshake is under way for a moment even where no filter is wanted, and on a busy machine its
/// last packet waits for its turn longer than the filter's time. Nobody is held off meanwhile.
const STEERED_MS_MIN: u64 = 50;
