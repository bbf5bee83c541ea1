//! How much the connections of a core have queued, and when that is too much.

use crate::core::Core;
use crate::table::Id;

/// A budget with hysteresis: above the limit everyone waits, until an eighth of it is free again.
#[derive(Debug)]
pub(crate) struct Memory {
    max: usize,
    used: usize,
    short: bool,
    /// Connections whose handler would send, and waits for memory.
    waiters: Vec<Id>,
}

impl Memory {
    pub(crate) fn new(max: usize) -> Memory {
        Memory { max, used: 0, short: false, waiters: Vec::new() }
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Whether a connection that has something queued must not get more.
    pub(crate) fn is_short(&self) -> bool {
        self.short
    }

    /// True when this was too much.
    #[inline]
    pub(crate) fn take(&mut self, bytes: usize) -> bool {
        self.used += bytes;
        let news = !self.short && self.used > self.max;
        self.short |= news;
        news
    }

    pub(crate) fn give_back(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.used, "{bytes} given back of {}", self.used);
        self.used = self.used.saturating_sub(bytes);
        if self.short {
            self.short = self.used > Memory::enough(self.max);
        }
    }

    /// How much may be used when nobody waits any more.
    pub(crate) fn enough(max: usize) -> usize {
        max / 8 * 7
    }

    pub(crate) fn wait_for(&mut self, id: Id) {
        self.waiters.push(id);
    }

    /// Whether somebody has waited for what is there now.
    pub(crate) fn has_waiters(&self) -> bool {
        !self.short && !self.waiters.is_empty()
    }
}

impl Core {
    pub(crate) fn take_memory(&mut self, bytes: usize) {
        if self.memory.take(bytes) {
            self.counters.memory_pauses.add(1);
        }
    }

    /// Wakes those who wait for memory, some each turn.
    pub(crate) fn wake_memory_waiters(&mut self) {
        for _ in 0..WAKES_MAX {
            if !self.memory.has_waiters() {
                return;
            }
            let waiter = self.memory.waiters.pop().and_then(|id| self.table.get_mut(id));
            if let Some(entry) = waiter {
                entry.wants_memory = false;
                self.tasks.wake(&mut entry.writer);
            }
        }
    }
}

const WAKES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario 65: no flutter at the limit.
    #[test]
    fn what_was_too_much_has_to_fall_by_an_eighth() {
        let mut memory = Memory::new(800);
        assert!(!memory.take(800) && !memory.is_short());
        assert!(memory.take(1), "this is news");
        assert!(!memory.take(100) && memory.is_short());
        memory.give_back(200);
        assert!(memory.is_short(), "701 of 800");
        memory.give_back(1);
        assert!(!memory.is_short());
        assert!(!memory.take(100) && !memory.is_short());
        assert_eq!(memory.used(), 800);
    }
}
