//! The next thing that may have to be done about a connection.

use super::DeadlineKind;

/// What may have to be done when a connection's earliest deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expired {
    /// The connection is to be ended, or retired at the end of its lifetime.
    Kind(DeadlineKind),
    /// It was retired, and its handler has had its time to finish.
    Retired,
    /// It was ended, and its handler has had its time to notice.
    Grace,
    /// Unread input has been read and thrown away for long enough.
    Linger,
    /// It is time to look whether the peer takes the output: the kernel does not say.
    Output,
    /// It is time to look whether a message comes fast enough.
    Input,
    /// The drain's time has come for a connection that is idle.
    Farewell,
    /// Nothing came for so long that the peer is to be asked for a sign of life.
    Beat,
    /// It was asked, and has given none.
    Heartbeat,
}

impl Expired {
    /// Whether a byte from the peer, had it been heard in time, would have put it off.
    pub(crate) fn is_put_off_by_input(self) -> bool {
        let Expired::Kind(kind) = self else { return self == Expired::Heartbeat };
        matches!(kind, DeadlineKind::FirstByte | DeadlineKind::Idle | DeadlineKind::Handler)
    }
}

/// The moment at which a connection is looked at, and what is not known from its own times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) now_ms: u64,
    /// Whether it waits for input; one without a handler does nothing else.
    pub(crate) waits: bool,
    /// When the core last came back from a pause of its own, in which it heard of nobody.
    pub(crate) resumed_ms: u64,
}

/// What may have to be done next about a connection, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    pub(crate) at_ms: u64,
    /// By then it has to be looked at: each deadline may be late by an eighth of its length, as
    /// the wheel is that coarse.
    pub(crate) latest_ms: u64,
    pub(crate) expired: Expired,
}

impl Next {
    pub(super) fn new(at_ms: u64, of_ms: u64, expired: Expired) -> Next {
        Next { at_ms, latest_ms: at_ms.saturating_add(of_ms / 8), expired }
    }

    /// Takes something else into account that passes at `at_ms`, `of_ms` after it began.
    pub(super) fn consider(&mut self, at_ms: u64, of_ms: u64, expired: Expired) {
        let other = Next::new(at_ms, of_ms, expired);
        if other.at_ms < self.at_ms {
            (self.at_ms, self.expired) = (other.at_ms, other.expired);
        }
        self.latest_ms = self.latest_ms.min(other.latest_ms);
    }
}
