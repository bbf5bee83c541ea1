//! When a watchdog may be told that all is well: pure. Each core is asked for a turn, also one that
//! sleeps, and only when all have made one the watchdog is told.

use std::time::{Duration, Instant};

/// The beat of all cores together.
#[derive(Debug)]
pub(crate) struct Beat {
    every: Duration,
    due: Instant,
    /// The cores' turns when they were asked for another; `None` while nobody is asked.
    asked: Option<Vec<u64>>,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Ask every core for a turn.
    Ask,
    /// Tell the watchdog, as all have made one.
    Tell,
    /// Look again after so long.
    Wait(Duration),
}

impl Beat {
    /// With the time after which the watchdog loses its patience.
    pub(crate) fn new(patience: Duration, now: Instant) -> Beat {
        Beat { every: patience / 2, due: now, asked: None }
    }

    /// With the cores' turns so far; `None` for one that has ended.
    pub(crate) fn act(&mut self, now: Instant, turns: &[Option<u64>]) -> Act {
        if let Some(asked) = &self.asked {
            let turned = |(now, then): (&Option<u64>, &u64)| now.is_none_or(|now| now != *then);
            if turns.iter().zip(asked).all(turned) {
                self.asked = None;
                return Act::Tell;
            }
            return Act::Wait((self.every / LOOKS).clamp(STEP_MIN, STEP_MAX));
        }
        if now < self.due {
            return Act::Wait(self.due - now);
        }
        // From the asking on, so that no time is lost by the answers.
        self.due = now + self.every;
        self.asked = Some(turns.iter().map(|turns| turns.unwrap_or(0)).collect());
        Act::Ask
    }
}

/// In how many steps the answers are waited for.
const LOOKS: u32 = 10;
const STEP_MIN: Duration = Duration::from_millis(1);
const STEP_MAX: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_told_while_one_core_does_not_turn_and_at_once_when_it_does() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut beat = Beat::new(2 * second, start);
        let some = |turns: [u64; 2]| turns.map(Some);
        assert_eq!(beat.act(start, &some([5, 7])), Act::Ask);
        assert_eq!(beat.act(start, &some([6, 7])), Act::Wait(Duration::from_millis(100)));
        for n in 0..1_000 {
            let later = start + n * second;
            assert!(matches!(beat.act(later, &some([6 + u64::from(n), 7])), Act::Wait(_)));
        }
        let late = start + 1_000 * second;
        assert_eq!(beat.act(late, &some([2_000, 8])), Act::Tell);
        assert_eq!(beat.act(late, &some([2_000, 8])), Act::Ask, "it is due already");
    }

    #[test]
    fn the_watchdog_is_told_twice_within_its_patience() {
        let (start, ms) = (Instant::now(), Duration::from_millis(1));
        let mut beat = Beat::new(100 * ms, start);
        let (mut turns, mut told) = (0, Vec::new());
        for n in 0..1_000 {
            match beat.act(start + n * ms, &[Some(turns)]) {
                Act::Ask => turns += 1,
                Act::Tell => told.push(n),
                Act::Wait(_) => {}
            }
        }
        assert!(told.windows(2).all(|pair| pair[1] - pair[0] == 50), "{told:?}");
        assert_eq!(told.len(), 20);
    }

    #[test]
    fn a_core_that_has_ended_is_not_waited_for() {
        let start = Instant::now();
        let mut beat = Beat::new(Duration::from_secs(2), start);
        assert_eq!(beat.act(start, &[Some(1), Some(1)]), Act::Ask);
        assert_eq!(beat.act(start, &[Some(2), None]), Act::Tell);
    }
}
