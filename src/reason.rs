//! What a close reason means for the connection's end, and for the calls that hear of it.

use std::time::Duration;

use crate::deadline::{DeadlineKind, Deadlines, Limits};
use crate::driver::Errno;
use crate::error::{Error, ErrorKind};
use crate::report::CloseReason;

impl DeadlineKind {
    pub(crate) fn close_reason(self) -> CloseReason {
        match self {
            DeadlineKind::FirstByte => CloseReason::FirstByte,
            DeadlineKind::Message => CloseReason::Message,
            DeadlineKind::Idle => CloseReason::Idle,
            DeadlineKind::Handler => CloseReason::Handler,
            DeadlineKind::WriteStall => CloseReason::WriteStall,
            DeadlineKind::HalfClose => CloseReason::HalfClosed,
            DeadlineKind::Lifetime => CloseReason::Lifetime,
        }
    }
}

impl CloseReason {
    /// Whether the connection ends with a reset, which frees what the kernel holds for a peer that
    /// does not take it, and tells the peer that output was `cut_off`. All others end with a FIN.
    pub(crate) fn resets(self, cut_off: bool) -> bool {
        match self {
            CloseReason::WriteStall | CloseReason::MinRate | CloseReason::Aborted => true,
            CloseReason::Evicted => cut_off,
            _ => false,
        }
    }

    /// What a failed operation says of the peer. Who asks second hears only that the connection is
    /// over; then it is known from elsewhere whether the kernel has `given_up` on the peer.
    pub(crate) fn of_fault(Errno(errno): Errno, given_up: impl FnOnce() -> bool) -> CloseReason {
        let dead = match errno {
            libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH => true,
            libc::EPIPE | 0 => given_up(),
            _ => false,
        };
        if dead { CloseReason::PeerDead } else { CloseReason::PeerReset }
    }

    /// Whether it was the peer that ended the connection, or its end.
    pub(crate) fn is_peers(self) -> bool {
        matches!(self, CloseReason::PeerReset | CloseReason::PeerDead)
    }

    /// Whether it was ended here, by something else than a drain.
    pub(crate) fn is_own(self) -> bool {
        !self.is_peers() && !matches!(self, CloseReason::Forced | CloseReason::Drained)
    }

    /// The error that an operation on a connection that was ended for this reason gets.
    pub(crate) fn to_error(
        self,
        operation: &'static str,
        limits: Option<(&Deadlines, &Limits)>,
    ) -> Error {
        let late = |kind, words: &str, variable: &str| {
            let limit_ms = limits.map_or(0, |(own, shared)| own.limit_ms(shared, kind));
            Error::new(ErrorKind::TimedOut, operation)
                .because(format!("{words} for {:?} ({variable})", Duration::from_millis(limit_ms)))
        };
        match self {
            CloseReason::FirstByte => {
                late(DeadlineKind::FirstByte, "no first byte came", "SLIPRING_FIRST_BYTE_MS")
            }
            CloseReason::Message => {
                late(DeadlineKind::Message, "a message was incomplete", "SLIPRING_MESSAGE_MS")
            }
            CloseReason::Idle => {
                late(DeadlineKind::Idle, "no byte went either way", "SLIPRING_IDLE_MS")
            }
            CloseReason::Handler => {
                late(DeadlineKind::Handler, "the handler was busy", "SLIPRING_HANDLER_MS")
            }
            CloseReason::WriteStall => {
                late(DeadlineKind::WriteStall, "the peer took no output", "SLIPRING_WRITE_STALL_MS")
            }
            CloseReason::Lifetime => {
                late(DeadlineKind::Lifetime, "the connection has lived", "SLIPRING_LIFETIME_MS")
            }
            CloseReason::MinRate => Error::new(ErrorKind::TimedOut, operation)
                .because("the peer was too slow (SLIPRING_MIN_RATE_BYTES_PER_S)"),
            CloseReason::Heartbeat => Error::new(ErrorKind::TimedOut, operation)
                .because("the peer gave no sign of life (SLIPRING_HEARTBEAT_TIMEOUT_MS)"),
            CloseReason::HalfClosed => Error::new(ErrorKind::Closed, operation).because(
                "the peer had ended its side (SLIPRING_HALF_CLOSE, SLIPRING_HALF_CLOSE_MS)",
            ),
            CloseReason::Aborted => {
                Error::new(ErrorKind::Closed, operation).because("the connection was aborted")
            }
            CloseReason::Evicted => Error::new(ErrorKind::Resource, operation).because(
                "the server ran short, and this connection was idle (SLIPRING_EVICT_PERCENT)",
            ),
            CloseReason::Forced => {
                Error::new(ErrorKind::Forced, operation).because("the drain's deadline has come")
            }
            CloseReason::PeerDead => Error::new(ErrorKind::PeerDead, operation).because(
                "the peer no longer answers (SLIPRING_KEEPALIVE_IDLE_S, SLIPRING_USER_TIMEOUT_MS)",
            ),
            _ => {
                Error::new(ErrorKind::PeerReset, operation).because("the peer reset the connection")
            }
        }
    }
}
