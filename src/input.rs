//! What a connection has received and its handler has not yet taken: most of the time nothing,
//! then one chunk, and seldom more.

use std::collections::VecDeque;

use crate::buf::Chunk;

/// The chunks in their order. The first lies in the entry itself.
#[derive(Debug, Default)]
pub(crate) struct Input {
    first: Option<Chunk>,
    #[expect(clippy::box_collection, reason = "three words less in every idle connection")]
    rest: Option<Box<VecDeque<Chunk>>>,
}

/// Emptied queues, for the next connection that needs one.
#[derive(Debug, Default)]
pub(crate) struct SpareQueues(
    #[expect(clippy::vec_box, reason = "they move between here and the inputs")]
    Vec<Box<VecDeque<Chunk>>>,
);

impl Input {
    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    pub(crate) fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.rest.as_ref().map_or(0, |rest| rest.len())
    }

    pub(crate) fn push(&mut self, chunk: Chunk, spare: &mut SpareQueues) {
        if self.first.is_none() {
            self.first = Some(chunk);
        } else {
            let rest = self.rest.get_or_insert_with(|| spare.0.pop().unwrap_or_default());
            rest.push_back(chunk);
        }
    }

    pub(crate) fn pop(&mut self, spare: &mut SpareQueues) -> Option<Chunk> {
        let chunk = self.first.take()?;
        if let Some(rest) = &mut self.rest {
            self.first = rest.pop_front();
            if rest.is_empty() {
                spare.0.extend(self.rest.take());
            }
        }
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::bufs::Pool;

    #[test]
    fn chunks_come_in_their_order_and_the_queue_goes_with_the_last() {
        let pool = Pool::new(0, 8, 64).unwrap();
        pool.give(usize::MAX, |_| ());
        let (mut input, mut spare) = (Input::default(), SpareQueues::default());
        for round in 1..4 {
            for n in 0..round {
                input.push(Chunk::new(pool.lease(n, u32::from(n) + 1).unwrap()), &mut spare);
                assert_eq!(input.len(), usize::from(n) + 1);
            }
            for n in 0..round {
                assert_eq!(input.pop(&mut spare).unwrap().len(), usize::from(n) + 1);
            }
            assert!(input.is_empty() && input.rest.is_none() && input.pop(&mut spare).is_none());
            pool.give(usize::MAX, |_| ());
        }
        assert_eq!(spare.0.len(), 1, "one queue was enough");
    }
}
