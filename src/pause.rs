//! Noticing that the core itself has been paused: stopped, swapped out, or kept busy by a task.
//! Pure: it is told the time.
//!
//! In a pause nobody is heard, and after it everybody seems to have been silent for long. What came
//! meanwhile is heard first, a piece each turn, and only then are deadlines judged; and peers that
//! were asked for a sign of life get more time for it.

/// The pauses of one core.
#[derive(Debug)]
pub(crate) struct Pauses {
    /// What is longer than this is a pause.
    longer_than_ns: u64,
    /// When the core meant to be back.
    due_ns: u64,
    resumed_ns: u64,
    /// Until then it only hears.
    hears_until_ns: u64,
}

impl Pauses {
    pub(crate) fn new(longer_than_ns: u64) -> Pauses {
        let longer_than_ns = longer_than_ns.max(LEAST_NS);
        Pauses { longer_than_ns, due_ns: u64::MAX, resumed_ns: 0, hears_until_ns: 0 }
    }

    /// The core goes to sleep, or round once more, and means to be back by then.
    pub(crate) fn back_by(&mut self, due_ns: u64) {
        self.due_ns = due_ns;
    }

    /// It is back, and has heard of something or not.
    pub(crate) fn back(&mut self, now_ns: u64, heard: bool) {
        if now_ns.saturating_sub(self.due_ns) > self.longer_than_ns {
            self.resumed_ns = now_ns;
            // A core that is slow all the time has to judge all the same.
            if now_ns >= self.hears_until_ns.saturating_add(JUDGES_NS) {
                self.hears_until_ns = now_ns.saturating_add(HEARS_NS);
            }
        }
        if !heard {
            self.hears_until_ns = self.hears_until_ns.min(now_ns);
        }
    }

    /// When the last pause was over; 0 if there was none.
    pub(crate) fn resumed_ns(&self) -> u64 {
        self.resumed_ns
    }

    /// Whether there may still be something to hear from the time of a pause.
    pub(crate) fn is_catching_up(&self, now_ns: u64) -> bool {
        now_ns < self.hears_until_ns
    }
}

/// Every scheduler makes a thread wait now and then, and that is no pause.
const LEAST_NS: u64 = 20_000_000;
const HEARS_NS: u64 = 250_000_000;
const JUDGES_NS: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn waking_up_in_time_or_early_is_no_pause() {
        let mut pauses = Pauses::new(S);
        pauses.back(50 * S, true);
        pauses.back_by(60 * S);
        pauses.back(55 * S, true);
        pauses.back_by(60 * S);
        pauses.back(61 * S, false);
        assert_eq!((pauses.resumed_ns(), pauses.is_catching_up(61 * S)), (0, false));
    }

    #[test]
    fn after_a_pause_it_hears_before_it_judges() {
        let mut pauses = Pauses::new(S);
        pauses.back_by(10 * S);
        pauses.back(50 * S, true);
        assert_eq!((pauses.resumed_ns(), pauses.is_catching_up(50 * S)), (50 * S, true));
        pauses.back_by(50 * S);
        pauses.back(50 * S + 1, true);
        assert!(pauses.is_catching_up(50 * S + 1));
        pauses.back_by(50 * S + 1);
        pauses.back(50 * S + 2, false);
        assert!(!pauses.is_catching_up(50 * S + 2), "all was heard");
    }

    #[test]
    fn a_core_that_is_always_late_judges_most_of_the_time() {
        let mut pauses = Pauses::new(S / 10);
        let (mut judged, mut now_ns) = (0, 10 * S);
        for _ in 0..100 {
            pauses.back_by(now_ns);
            now_ns += S / 5;
            pauses.back(now_ns, true);
            judged += u64::from(!pauses.is_catching_up(now_ns));
        }
        assert!(judged > 60, "{judged} turns of 100");
    }
}
