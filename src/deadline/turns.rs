//! What the handler turns to, and from when on which deadlines run: waiting for input, or else.

use super::Deadlines;

impl Deadlines {
    /// The handler begins to wait for input. True when it goes on with what it had given up, which
    /// brings its deadline nearer.
    pub(crate) fn waits(&mut self, now_ms: u64) -> bool {
        if self.ignores_bytes {
            return false;
        }
        if self.is_in_message() {
            let busy_ms = now_ms.saturating_sub(self.progress_ms.max(self.turned_ms));
            let busy_ms = busy_ms.try_into().unwrap_or(u16::MAX);
            self.unawaited_ms = self.unawaited_ms.saturating_add(busy_ms);
        }
        // Who waits again and again, and nothing moves, waits all in all.
        let waited_ms = std::mem::take(&mut self.waited_ms);
        let goes_on = waited_ms > 0 && self.progress_ms <= self.turned_ms;
        self.turned_ms = now_ms;
        if goes_on {
            self.turned_ms = now_ms.saturating_sub(waited_ms.into());
        }
        goes_on
    }

    /// The handler has given up to wait for input, and does something else.
    pub(crate) fn stops_waiting(&mut self, now_ms: u64) {
        let waited_ms = now_ms.saturating_sub(self.progress_ms.max(self.turned_ms));
        self.waited_ms = waited_ms.try_into().unwrap_or(u32::MAX);
        self.turned_ms = now_ms;
    }

    /// The handler is told of something else than input.
    pub(crate) fn told(&mut self, now_ms: u64) {
        self.turned_ms = now_ms;
    }

    /// From now on bytes that come or go while it is idle are no activity.
    #[cfg(feature = "hyper")]
    pub(crate) fn ignores_bytes_when_idle(&mut self) {
        self.ignores_bytes = true;
    }

    /// For how long the message that is being received has been, and how much had been received
    /// before it.
    #[cfg(feature = "hyper")]
    pub(crate) fn message(&self, now_ms: u64) -> Option<(u64, u64)> {
        let since_ms = self.is_in_message().then_some(self.message_ms)?;
        Some((now_ms.saturating_sub(since_ms), self.message_bytes))
    }

    /// The peer has ended its side.
    pub(crate) fn half_closed(&mut self, now_ms: u64) {
        self.half_closed = true;
        self.turned_ms = now_ms;
    }
}
