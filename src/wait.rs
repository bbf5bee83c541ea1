//! How long a core may wait for news. Pure: it knows numbers only.

/// How long [`Driver::enter`](crate::driver::Driver::enter) may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Submit, run what the kernel has deferred, come back.
    No,
    /// Until something completes.
    Forever,
    /// Until something completes, or so many nanoseconds have passed.
    AtMostNs(u64),
}

impl Wait {
    /// What is left of it after so long.
    pub(crate) fn shortened(self, by_ns: u64) -> Wait {
        match self {
            Wait::AtMostNs(ns) if ns <= by_ns => Wait::No,
            Wait::AtMostNs(ns) => Wait::AtMostNs(ns - by_ns),
            whole => whole,
        }
    }

    /// So many nanoseconds, or as many as there are.
    pub(crate) fn at_most(self, most_ns: u64) -> u64 {
        match self {
            Wait::No => 0,
            Wait::Forever => most_ns,
            Wait::AtMostNs(ns) => ns.min(most_ns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_has_been_spun_away_is_over() {
        assert_eq!(Wait::AtMostNs(50).shortened(20), Wait::AtMostNs(30));
        assert_eq!([50, 60].map(|ns| Wait::AtMostNs(50).shortened(ns)), [Wait::No; 2]);
        assert_eq!(Wait::Forever.shortened(u64::MAX), Wait::Forever);
        assert_eq!([40, 60].map(|ns| Wait::AtMostNs(50).at_most(ns)), [40, 50]);
        assert_eq!((Wait::Forever.at_most(40), Wait::No.at_most(40)), (40, 0));
    }
}
