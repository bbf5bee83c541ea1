//! Which deadlines a connection has. Pure: it is told the time, in milliseconds.
//!
//! A connection has one entry in the wheel, for the earliest of its deadlines. Activity only
//! stores a timestamp; an entry that fires before its deadline is put back. So a request costs no
//! wheel operation, and yet every connection has a deadline at every moment: its idle time and
//! its lifetime can be set, but not taken away.

/// The deadlines that a handler can set for its connection; see
/// [`Connection::set_deadline`](crate::Connection::set_deadline).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeadlineKind {
    /// From accept to the first received byte (`SLIPRING_FIRST_BYTE_MS`).
    FirstByte,
    /// Since the last byte in either direction (`SLIPRING_IDLE_MS`).
    Idle,
    /// Since queued output last made progress (`SLIPRING_WRITE_STALL_MS`).
    WriteStall,
    /// Since accept (`SLIPRING_LIFETIME_MS`).
    Lifetime,
}

/// What has passed when a connection's earliest deadline has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expired {
    /// The connection is to be ended.
    Kind(DeadlineKind),
    /// It was ended, and its handler has had its time to notice.
    Grace,
    /// Unread input has been read and thrown away for long enough.
    Linger,
    /// It is time to look whether the peer takes the output: one send can be long, and the kernel
    /// answers only at its end.
    Look,
}

/// How long each may take; the defaults are shared by all connections of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) first_byte_ms: u64,
    pub(crate) idle_ms: u64,
    pub(crate) write_stall_ms: u64,
    pub(crate) lifetime_ms: u64,
}

/// The times of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadlines {
    limits: Limits,
    accepted_ms: u64,
    /// The last byte in either direction, or the accept.
    progress_ms: u64,
    /// The last time that output is known to have made progress, while some is queued.
    output_ms: Option<u64>,
    /// The last look at how far the peer has got with it.
    looked_ms: u64,
    first_byte_seen: bool,
    last_stage: Option<(Expired, u64)>,
}

impl Deadlines {
    pub(crate) fn new(now_ms: u64, limits: Limits) -> Deadlines {
        Deadlines {
            limits,
            accepted_ms: now_ms,
            progress_ms: now_ms,
            output_ms: None,
            looked_ms: 0,
            first_byte_seen: false,
            last_stage: None,
        }
    }

    pub(crate) fn set(&mut self, kind: DeadlineKind, limit_ms: u64) {
        match kind {
            DeadlineKind::FirstByte => self.limits.first_byte_ms = limit_ms,
            DeadlineKind::Idle => self.limits.idle_ms = limit_ms,
            DeadlineKind::WriteStall => self.limits.write_stall_ms = limit_ms,
            DeadlineKind::Lifetime => self.limits.lifetime_ms = limit_ms,
        }
    }

    pub(crate) fn limit_ms(&self, kind: DeadlineKind) -> u64 {
        match kind {
            DeadlineKind::FirstByte => self.limits.first_byte_ms,
            DeadlineKind::Idle => self.limits.idle_ms,
            DeadlineKind::WriteStall => self.limits.write_stall_ms,
            DeadlineKind::Lifetime => self.limits.lifetime_ms,
        }
    }

    pub(crate) fn received(&mut self, now_ms: u64) {
        self.first_byte_seen = true;
        self.progress_ms = now_ms;
    }

    /// Output is queued where none was.
    pub(crate) fn output_began(&mut self, now_ms: u64) {
        self.output_ms.get_or_insert(now_ms);
    }

    /// The kernel took some output; `more` is still queued.
    pub(crate) fn output_moved(&mut self, now_ms: u64, more: bool) {
        self.progress_ms = now_ms;
        self.output_ms = more.then_some(now_ms);
    }

    /// How far the peer has got was looked at: further than last time, or not. True when it has
    /// taken nothing for so long that the connection is to be ended.
    pub(crate) fn looked_at_output(&mut self, now_ms: u64, moved: bool) -> bool {
        self.looked_ms = now_ms;
        if moved {
            self.progress_ms = now_ms;
            self.output_ms = self.output_ms.map(|_| now_ms);
        }
        let since_ms = self.output_ms.unwrap_or(now_ms);
        now_ms.saturating_sub(since_ms) >= self.limits.write_stall_ms
    }

    /// From now on only this deadline counts.
    pub(crate) fn enter_last_stage(&mut self, stage: Expired, until_ms: u64) {
        self.last_stage = Some((stage, until_ms));
    }

    pub(crate) fn has_first_byte(&self) -> bool {
        self.first_byte_seen
    }

    /// When the connection reaches its greatest age.
    pub(crate) fn lifetime_end_ms(&self) -> u64 {
        self.accepted_ms.saturating_add(self.limits.lifetime_ms)
    }

    /// The earliest deadline and what it means. There always is one.
    pub(crate) fn next(&self) -> (u64, Expired) {
        if let Some((stage, until_ms)) = self.last_stage {
            return (until_ms, stage);
        }
        let limits = &self.limits;
        let mut next = (self.lifetime_end_ms(), Expired::Kind(DeadlineKind::Lifetime));
        let mut consider = |since_ms: u64, limit_ms: u64, expired| {
            let at_ms = since_ms.saturating_add(limit_ms);
            if at_ms < next.0 {
                next = (at_ms, expired);
            }
        };
        consider(self.progress_ms, limits.idle_ms, Expired::Kind(DeadlineKind::Idle));
        if !self.first_byte_seen {
            let first_byte = Expired::Kind(DeadlineKind::FirstByte);
            consider(self.accepted_ms, limits.first_byte_ms, first_byte);
        }
        if let Some(since_ms) = self.output_ms {
            let step_ms = (limits.write_stall_ms / LOOKS).max(1);
            consider(since_ms.max(self.looked_ms), step_ms, Expired::Look);
        }
        next
    }
}

/// How often a write stall's time is divided by looks; it ends at most two of them late.
const LOOKS: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { first_byte_ms: 10, idle_ms: 75, write_stall_ms: 30, lifetime_ms: 1000 };

    #[test]
    fn the_first_byte_is_due_until_it_comes() {
        let mut deadlines = Deadlines::new(100, LIMITS);
        assert_eq!(deadlines.next(), (110, Expired::Kind(DeadlineKind::FirstByte)));
        deadlines.received(105);
        assert_eq!(deadlines.next(), (180, Expired::Kind(DeadlineKind::Idle)));
    }

    #[test]
    fn a_stall_counts_from_the_last_progress_of_the_output_alone() {
        let mut deadlines = Deadlines::new(0, LIMITS);
        deadlines.received(1);
        deadlines.output_began(10);
        deadlines.output_began(12);
        let look = |deadlines: &mut Deadlines, moved| {
            let (at_ms, expired) = deadlines.next();
            assert_eq!(expired, Expired::Look);
            (at_ms, deadlines.looked_at_output(at_ms, moved))
        };
        assert_eq!(look(&mut deadlines, false), (13, false));
        assert_eq!(look(&mut deadlines, true), (16, false));
        // What is received has nothing to do with it.
        deadlines.received(20);
        let mut end_ms = 0;
        for _ in 0..20 {
            let (at_ms, stalled) = look(&mut deadlines, false);
            assert!(at_ms > end_ms);
            end_ms = at_ms;
            if stalled {
                break;
            }
        }
        assert_eq!(end_ms, 46, "30 ms after the last progress");
        deadlines.output_moved(50, false);
        assert_eq!(deadlines.next(), (125, Expired::Kind(DeadlineKind::Idle)));
    }

    #[test]
    fn output_that_a_slow_peer_takes_keeps_the_connection_from_being_idle() {
        let mut deadlines = Deadlines::new(0, LIMITS);
        deadlines.received(0);
        deadlines.output_began(0);
        for _ in 0..100 {
            let (at_ms, expired) = deadlines.next();
            assert_eq!(expired, Expired::Look);
            assert!(!deadlines.looked_at_output(at_ms, true));
        }
    }

    #[test]
    fn nothing_outlives_the_lifetime() {
        let mut deadlines = Deadlines::new(0, LIMITS);
        for now_ms in (0..2000).step_by(5) {
            deadlines.received(now_ms);
            assert!(deadlines.next().0 <= 1000);
        }
    }

    #[test]
    fn the_last_stage_overrides_all_and_the_extremes_do_not_overflow() {
        let mut deadlines = Deadlines::new(u64::MAX - 1, LIMITS);
        assert_eq!(deadlines.next().0, u64::MAX);
        deadlines.enter_last_stage(Expired::Grace, 7);
        assert_eq!(deadlines.next(), (7, Expired::Grace));
    }
}
