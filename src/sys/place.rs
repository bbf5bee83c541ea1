//! Which task a core is running, readable from the thread that wonders why it does not answer.

use std::panic::Location;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Where in the source a task was spawned: its name.
pub(crate) type Place = &'static Location<'static>;

/// A place that one thread sets and others read.
#[derive(Debug, Default)]
pub(crate) struct PlaceCell(AtomicPtr<Location<'static>>);

impl PlaceCell {
    pub(crate) fn set(&self, place: Place) {
        self.0.store(ptr::from_ref(place).cast_mut(), Ordering::Relaxed);
    }

    pub(crate) fn clear(&self) {
        self.0.store(ptr::null_mut(), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> Option<Place> {
        // SAFETY: null, or made in `set` from a reference that lives for good.
        unsafe { self.0.load(Ordering::Relaxed).as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_read_from_another_thread() {
        let cell = PlaceCell::default();
        assert!(cell.get().is_none());
        let here = Location::caller();
        cell.set(here);
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(cell.get().map(Location::line), Some(here.line())));
        });
        cell.clear();
        assert!(cell.get().is_none());
    }
}
