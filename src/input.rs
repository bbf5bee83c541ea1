//! What a connection has received and its handler has not taken yet.

use std::collections::VecDeque;

use crate::buf::Chunk;

/// Chunks in their order. Most of the time there is one at most, which is quickly in and out.
#[derive(Debug, Default)]
pub(crate) struct Input {
    first: Option<Chunk>,
    /// Empty while there is no first one.
    rest: VecDeque<Chunk>,
}

impl Input {
    #[inline]
    pub(crate) fn push(&mut self, chunk: Chunk) {
        if self.first.is_none() {
            self.first = Some(chunk);
        } else {
            self.rest.push_back(chunk);
        }
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Chunk> {
        let next = if self.rest.is_empty() { None } else { self.rest.pop_front() };
        std::mem::replace(&mut self.first, next)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// How many chunks there are.
    pub(crate) fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.rest.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::bufs::Lease;

    #[test]
    fn chunks_keep_their_order() {
        let mut input = Input::default();
        let (mut came, mut went) = (0, 0);
        for (pushes, pops) in [(1, 1), (3, 2), (0, 1), (0, 1), (2, 1), (5, 6), (1, 1)] {
            for _ in 0..pushes {
                came += 1;
                input.push(Chunk::new(Lease::copied(&[came])));
            }
            for _ in 0..pops {
                let chunk = input.pop();
                assert_eq!(
                    chunk.as_deref().map(|bytes| bytes[0]),
                    (went < came).then_some(went + 1)
                );
                went = came.min(went + 1);
            }
            assert_eq!((input.len(), input.is_empty()), (usize::from(came - went), came == went));
        }
    }
}
