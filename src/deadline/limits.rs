//! The kinds of deadlines, and how long each may take.

use crate::config::Settings;
use crate::pace::Rate;

/// The deadlines that a handler can set, extend and read for its connection; see
/// [`Connection::set_deadline`](crate::Connection::set_deadline).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeadlineKind {
    /// From accept to the first received byte (`SLIPRING_FIRST_BYTE_MS`).
    FirstByte,
    /// From a message's first byte to its end, however its bytes are spread
    /// (`SLIPRING_MESSAGE_MS`).
    Message,
    /// While the handler waits for input: since it began to, or since the last byte in either
    /// direction (`SLIPRING_IDLE_MS`).
    Idle,
    /// While the handler does not wait for input: since the last byte in either direction
    /// (`SLIPRING_HANDLER_MS`).
    Handler,
    /// Since the peer last took output, while there is some for it (`SLIPRING_WRITE_STALL_MS`).
    WriteStall,
    /// After the peer has ended its side: since then, or since the last byte that we sent
    /// (`SLIPRING_HALF_CLOSE_MS`).
    HalfClose,
    /// Since accept (`SLIPRING_LIFETIME_MS`).
    Lifetime,
}

impl DeadlineKind {
    /// Every kind.
    pub const ALL: [DeadlineKind; 7] = [
        DeadlineKind::FirstByte,
        DeadlineKind::Message,
        DeadlineKind::Idle,
        DeadlineKind::Handler,
        DeadlineKind::WriteStall,
        DeadlineKind::HalfClose,
        DeadlineKind::Lifetime,
    ];

    /// The name as it stands in lists: lower case, words joined by `_`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            DeadlineKind::FirstByte => "first_byte",
            DeadlineKind::Message => "message",
            DeadlineKind::Idle => "idle",
            DeadlineKind::Handler => "handler",
            DeadlineKind::WriteStall => "write_stall",
            DeadlineKind::HalfClose => "half_close",
            DeadlineKind::Lifetime => "lifetime",
        }
    }
}

/// How long each may take; shared by all connections of a core that have not set their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// In the order of [`DeadlineKind::ALL`].
    pub(crate) kinds_ms: [u64; DeadlineKind::ALL.len()],
    /// How long a retired connection may go on.
    pub(crate) retired_ms: u64,
    pub(crate) rate: Rate,
    pub(crate) heartbeat_ms: u64,
    pub(crate) heartbeat_timeout_ms: u64,
}

impl Limits {
    pub(crate) fn new(settings: &Settings) -> Limits {
        Limits {
            kinds_ms: [
                settings.first_byte_ms,
                settings.message_ms,
                settings.idle_ms,
                settings.handler_ms,
                settings.write_stall_ms,
                settings.half_close_ms,
                settings.lifetime_ms,
            ],
            retired_ms: settings.drain_ms,
            rate: Rate {
                bytes_per_s: settings.min_rate_bytes_per_s,
                grace_ms: settings.min_rate_grace_ms,
            },
            heartbeat_ms: settings.heartbeat_ms,
            heartbeat_timeout_ms: settings.heartbeat_timeout_ms,
        }
    }
}
