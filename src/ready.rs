//! The tasks that wait to be polled, first come first served.

use crate::table::Id;

/// Ids in their order. Two lists that change places cost less than a ring, whose every step looks
/// whether it has come to the end.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    /// Those whose turn it is; the ones before `next` have had it.
    now: Vec<Id>,
    next: usize,
    /// Those that have come since.
    then: Vec<Id>,
}

impl Ready {
    #[inline]
    pub(crate) fn push(&mut self, id: Id) {
        self.then.push(id);
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Id> {
        if self.next == self.now.len() {
            self.now.clear();
            self.next = 0;
            std::mem::swap(&mut self.now, &mut self.then);
        }
        let id = self.now.get(self.next).copied()?;
        self.next += 1;
        Some(id)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.next == self.now.len() && self.then.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_come_is_first_served() {
        let mut ready = Ready::default();
        let (mut came, mut went) = (0, 0);
        for (pushes, pops) in [(1, 1), (5, 2), (3, 4), (0, 2), (0, 1), (2, 1), (4, 9)] {
            for _ in 0..pushes {
                ready.push(Id { index: came, generation: 0 });
                came += 1;
            }
            for _ in 0..pops {
                let next = (went < came).then_some(went);
                assert_eq!(ready.pop().map(|id| id.index), next);
                went += u32::from(next.is_some());
            }
            assert_eq!(ready.is_empty(), came == went);
        }
    }
}
