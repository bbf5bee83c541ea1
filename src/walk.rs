//! A walk over the slots of a table in pieces, so that no turn gets long by the table's length.
//! Pure: it knows numbers only.

use std::ops::Range;

/// Which slots a walk has still to come to. Those added behind its end are not met.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Walk {
    next: usize,
    end: usize,
}

impl Walk {
    /// A walk over the first `slots`.
    pub(crate) fn over(slots: usize) -> Walk {
        Walk { next: 0, end: slots }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.next >= self.end
    }

    /// The next slots, at most so many; none when the walk is done.
    pub(crate) fn piece(&mut self, most: usize) -> Range<usize> {
        let from = self.next;
        self.next = self.end.min(from.saturating_add(most));
        from..self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_met_once_in_pieces_of_the_length_asked_for() {
        for (slots, most) in [(0, 3), (1, 3), (3, 3), (10, 3), (10, usize::MAX), (7, 1)] {
            let mut walk = Walk::over(slots);
            let mut met = Vec::new();
            while !walk.is_done() {
                let piece = walk.piece(most);
                assert!(!piece.is_empty() && piece.len() <= most);
                met.extend(piece);
            }
            assert_eq!(met, (0..slots).collect::<Vec<_>>());
            assert!(walk.piece(most).is_empty());
        }
    }

    #[test]
    fn a_walk_that_was_never_begun_is_done() {
        assert!(Walk::default().is_done());
    }
}
