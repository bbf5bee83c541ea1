//! How long a core may wait for news. Pure: it knows numbers only.

/// How long [`Driver::enter`](crate::driver::Driver::enter) may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Submit, run what the kernel has deferred, come back.
    No,
    /// Until something completes.
    Forever,
    /// Until something completes, or a time has come on the driver's clock, in nanoseconds.
    Until(u64),
}

impl Wait {
    /// How long it is from a time on, but no longer than so many nanoseconds.
    pub(crate) fn at_most(self, most_ns: u64, now_ns: u64) -> u64 {
        match self {
            Wait::No => 0,
            Wait::Forever => most_ns,
            Wait::Until(due_ns) => most_ns.min(due_ns.saturating_sub(now_ns)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_as_long_as_the_time_that_is_left() {
        assert_eq!([40, 60].map(|most_ns| Wait::Until(80).at_most(most_ns, 30)), [40, 50]);
        assert_eq!(Wait::Until(80).at_most(40, 90), 0);
        assert_eq!((Wait::Forever.at_most(40, 7), Wait::No.at_most(40, 7)), (40, 0));
    }
}
