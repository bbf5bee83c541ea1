//! Whether the receive of a connection stands, or is asked for anew each time. Pure.
//!
//! A standing (multishot) receive is told when data has come, which takes the kernel a wake-up, a
//! list and a look at the socket for each. On a core that is so busy that the next request lies
//! there when it comes back to a connection, a receive that is submitted only then finds it at
//! once, and costs less; but one that finds nothing costs more than one that stands. So those who
//! have been busy on a busy core for a while try it, and go back when it was in vain.

/// How the receives of one connection are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asking {
    wants_once: bool,
    armed_once: bool,
    /// Receives in a row that came on a crowded core, or that were in vain when asked for once.
    streak: u8,
    /// How many of the former it takes to try it.
    once_after: u8,
    /// The turn in which the receive that is armed is submitted, as far as it fits.
    turn: u8,
}

impl Asking {
    pub(crate) fn new() -> Asking {
        let (wants_once, armed_once) = (false, false);
        Asking { wants_once, armed_once, streak: 0, once_after: ONCE_AFTER, turn: 0 }
    }

    /// A receive is armed that will be submitted in `turn`. True if it is to answer once.
    pub(crate) fn arm(&mut self, turn: u64) -> bool {
        if self.wants_once && !self.armed_once {
            self.streak = 0;
        }
        (self.armed_once, self.turn) = (self.wants_once, turn as u8);
        self.armed_once
    }

    /// A receive is armed that is none of these.
    pub(crate) fn arm_other(&mut self) {
        self.armed_once = false;
    }

    /// The armed receive stands, and should not.
    pub(crate) fn is_outgrown(self) -> bool {
        self.wants_once && !self.armed_once
    }

    /// The armed receive has answered or will answer once, and the next one has time for a turn.
    pub(crate) fn rests(self) -> bool {
        self.armed_once
    }

    /// A receive has brought something in `turn`, while the core was crowded or not.
    pub(crate) fn received(&mut self, turn: u64, crowded: bool) {
        if !self.armed_once {
            self.streak = if crowded && !self.wants_once { self.streak + 1 } else { 0 };
            self.wants_once |= self.streak >= self.once_after;
            return;
        }
        let in_vain = self.turn != turn as u8;
        self.streak = if in_vain { self.streak + 1 } else { 0 };
        let enough = self.streak >= IN_VAIN_MAX;
        if enough {
            self.once_after = self.once_after.saturating_mul(2);
        }
        if enough || !crowded {
            (self.wants_once, self.streak) = (false, 0);
        }
    }
}

/// Completions in one turn that make a crowd of a core; the simulator's are small.
pub(crate) const CROWD: u32 = if cfg!(test) { 2 } else { 16 };
/// Receives in a row on a crowded core after which it is tried.
const ONCE_AFTER: u8 = if cfg!(test) { 4 } else { 32 };
/// Of those asked for once, so many in a row that had to wait are enough.
const IN_VAIN_MAX: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// Hears so many receives that came so many turns after they were armed.
    fn hear(asking: &mut Asking, count: u32, turns: u64, crowded: bool) {
        for _ in 0..count {
            asking.received(u64::from(asking.turn) + turns, crowded);
            if asking.is_outgrown() || asking.rests() {
                asking.arm(7);
            }
        }
    }

    #[test]
    fn a_busy_connection_on_a_crowded_core_asks_anew_while_that_is_answered_at_once() {
        let mut asking = Asking::new();
        assert!(!asking.arm(7), "it stands at first");
        hear(&mut asking, 1_000, 5, false);
        assert!(!asking.rests(), "nobody else is there");
        hear(&mut asking, u32::from(ONCE_AFTER) - 1, 5, true);
        assert!(!asking.rests());
        hear(&mut asking, 1, 5, true);
        assert!(asking.rests());
        hear(&mut asking, 1_000, 0, true);
        assert!(asking.rests(), "each was there at once");
        hear(&mut asking, 1, 3, true);
        hear(&mut asking, 1, 0, true);
        hear(&mut asking, 1, 3, true);
        assert!(asking.rests(), "one that waited is no reason");
        hear(&mut asking, 1, 3, true);
        assert!(!asking.rests(), "two are");
        hear(&mut asking, 2 * u32::from(ONCE_AFTER) - 1, 3, true);
        assert!(!asking.rests(), "it is not tried so soon again");
        hear(&mut asking, 1, 3, true);
        assert!(asking.rests());
        hear(&mut asking, 1, 0, false);
        assert!(!asking.rests(), "the crowd has gone");
    }

    #[test]
    fn who_is_slow_is_tried_ever_less_often() {
        let mut asking = Asking::new();
        let mut tried = 0;
        for _ in 0..10_000 {
            hear(&mut asking, 1, 3, true);
            tried += u32::from(asking.rests());
        }
        assert!((20..200).contains(&tried), "{tried}");
    }

    #[test]
    fn another_receive_is_none_of_these() {
        let mut asking = Asking::new();
        hear(&mut asking, u32::from(ONCE_AFTER), 5, true);
        assert!(asking.rests());
        asking.arm_other();
        assert!(!asking.rests());
    }
}
