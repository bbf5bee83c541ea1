//! Who was still there when a core's time was up, by name.

use std::fmt;

use crate::executor::Scope;
use crate::json::{self, JsonObject};
use crate::sys::place::Place;

/// How many tasks of one name a drain has dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaskCount {
    /// Where they were spawned, or how they were called when they were detached.
    pub name: String,
    /// How many there were.
    pub count: u64,
}

/// The tasks that were still there.
#[derive(Debug, Default)]
pub(crate) struct Leftover {
    forced: Vec<TaskCount>,
    detached: Vec<TaskCount>,
    hooks: u64,
}

impl Leftover {
    /// `detached` is how it was called when it was detached.
    pub(crate) fn note(&mut self, scope: Scope, place: Place, detached: Option<&str>) {
        if let Some(name) = detached {
            add(&mut self.detached, name.to_owned());
            return;
        }
        self.hooks += u64::from(scope == Scope::Hook);
        add(&mut self.forced, place.to_string());
    }

    /// Those that the drain has waited for, the most frequent first.
    pub(crate) fn forced(&self) -> Vec<TaskCount> {
        sorted(&self.forced)
    }

    /// Those that it has not waited for.
    pub(crate) fn detached(&self) -> Vec<TaskCount> {
        sorted(&self.detached)
    }

    pub(crate) fn hooks(&self) -> u64 {
        self.hooks
    }
}

fn add(counts: &mut Vec<TaskCount>, name: String) {
    let known = counts.iter().position(|known| known.name == name);
    let index = known.unwrap_or_else(|| {
        // A name may be made up for each task, and a report is to be read.
        let name = if counts.len() < NAMES_MAX { name } else { "others".to_owned() };
        let same = counts.iter().position(|known| known.name == name);
        same.unwrap_or_else(|| {
            counts.push(TaskCount { name, count: 0 });
            counts.len() - 1
        })
    });
    counts[index].count += 1;
}

fn sorted(counts: &[TaskCount]) -> Vec<TaskCount> {
    let mut counts = counts.to_vec();
    counts.sort_by_key(|count| std::cmp::Reverse(count.count));
    counts
}

impl fmt::Display for TaskCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.count, self.name)
    }
}

/// An object with the names as keys.
pub(crate) fn counts_json(counts: &[TaskCount]) -> String {
    let numbers = counts.iter().map(|count| {
        JsonObject::new().string("name", &count.name).number("count", count.count).finish()
    });
    json::array(numbers)
}

const NAMES_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use std::panic::Location;

    use super::*;

    #[test]
    fn tasks_are_counted_by_name_and_hooks_by_place_too() {
        let place = Location::caller();
        let mut leftover = Leftover::default();
        leftover.note(Scope::Hook, place, None);
        leftover.note(Scope::Core, place, None);
        leftover.note(Scope::Core, place, Some("metrics"));
        assert_eq!(leftover.forced(), [TaskCount { name: place.to_string(), count: 2 }]);
        assert_eq!(leftover.detached(), [TaskCount { name: "metrics".to_owned(), count: 1 }]);
        assert_eq!(leftover.hooks(), 1);
        assert_eq!(counts_json(&leftover.detached()), r#"[{"name":"metrics","count":1}]"#);
    }

    #[test]
    fn a_report_names_so_many_and_counts_the_others_together() {
        let mut counts = Vec::new();
        for n in 0..100 {
            add(&mut counts, format!("name {n}"));
        }
        assert_eq!(counts.len(), NAMES_MAX + 1);
        let most = sorted(&counts).swap_remove(0);
        assert_eq!(most, TaskCount { name: "others".to_owned(), count: 100 - NAMES_MAX as u64 });
    }
}
