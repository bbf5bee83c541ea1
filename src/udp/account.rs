//! What became of the datagrams, for the report.

use std::fmt;

use crate::json::JsonObject;
use crate::stats::CoreStats;

/// The part of the counters that is about datagrams.
pub(crate) struct Datagrams<'a>(pub(crate) &'a CoreStats);

impl Datagrams<'_> {
    /// Whether there is anything to tell.
    pub(crate) fn is_any(&self) -> bool {
        let stats = self.0;
        stats.datagrams_received + stats.datagrams_lost + stats.datagrams_sent > 0
            || stats.datagrams_unsent > 0
    }

    pub(crate) fn to_json(&self) -> String {
        let stats = self.0;
        JsonObject::new()
            .number("received", stats.datagrams_received)
            .number("truncated", stats.datagrams_truncated)
            .number("lost", stats.datagrams_lost)
            .number("sent", stats.datagrams_sent)
            .number("unsent", stats.datagrams_unsent)
            .finish()
    }
}

impl fmt::Display for Datagrams<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = self.0;
        write!(
            f,
            "datagrams: {} received ({} truncated), {} lost, {} sent, {} not taken for sending",
            stats.datagrams_received,
            stats.datagrams_truncated,
            stats.datagrams_lost,
            stats.datagrams_sent,
            stats.datagrams_unsent,
        )
    }
}
