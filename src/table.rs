//! A slab with generations: the owner of everything that a core counts.

use slab::Slab;

use crate::token::GENERATION_MASK;

/// Names one tenant of a slot; a later tenant of the same slot has another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Id {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl Id {
    /// What tells those apart that were inserted in one go, evenly spread.
    pub(crate) fn jitter(self, now_ns: u64) -> u16 {
        let lot = u64::from(self.index).wrapping_add(now_ns).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (lot >> 48) as u16
    }
}

/// A slab whose keys go stale when their entry is removed.
///
/// Freed slots are reused last in, first out, so that the hot ones stay in cache.
#[derive(Debug)]
pub(crate) struct Table<T> {
    slab: Slab<Tenant<T>>,
    /// Of each slot's next tenant; of the one that is there, if one is.
    generations: Vec<u32>,
}

/// Who is looked up most of the time is there, so its generation lies beside it.
#[derive(Debug)]
struct Tenant<T> {
    generation: u32,
    value: T,
}

impl<T> Table<T> {
    pub(crate) fn new() -> Table<T> {
        Table { slab: Slab::new(), generations: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(crate) fn insert(&mut self, value: T) -> Id {
        let id = self.next_id();
        if id.index as usize == self.generations.len() {
            self.generations.push(id.generation);
        }
        self.slab.insert(Tenant { generation: id.generation, value });
        id
    }

    /// The id that the next insert will give.
    pub(crate) fn next_id(&self) -> Id {
        let index = self.slab.vacant_key();
        let generation = self.generations.get(index).copied().unwrap_or(0);
        Id { index: index as u32, generation }
    }

    pub(crate) fn contains(&self, id: Id) -> bool {
        self.get(id).is_some()
    }

    pub(crate) fn get(&self, id: Id) -> Option<&T> {
        let tenant = self.slab.get(id.index as usize)?;
        (tenant.generation == id.generation).then_some(&tenant.value)
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let tenant = self.slab.get_mut(id.index as usize)?;
        (tenant.generation == id.generation).then_some(&mut tenant.value)
    }

    /// Removes the entry and makes every copy of its id stale.
    pub(crate) fn remove(&mut self, id: Id) -> Option<T> {
        self.get(id)?;
        let index = id.index as usize;
        self.generations[index] = (id.generation + 1) & GENERATION_MASK;
        Some(self.slab.remove(index).value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.slab.iter().map(|(index, Tenant { generation, value })| {
            (Id { index: index as u32, generation: *generation }, value)
        })
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Id, &mut T)> {
        self.slab.iter_mut().map(|(index, Tenant { generation, value })| {
            (Id { index: index as u32, generation: *generation }, value)
        })
    }

    /// How many slots there are or have been, for a walk over them.
    pub(crate) fn slots(&self) -> usize {
        self.generations.len()
    }

    /// Who has a slot now.
    pub(crate) fn id_at(&self, index: usize) -> Option<Id> {
        let generation = *self.generations.get(index)?;
        self.slab.contains(index).then_some(Id { index: index as u32, generation })
    }

    /// Moves all slots on to a generation, as if they had been reused so often.
    #[cfg(test)]
    pub(crate) fn age(&mut self, generation: u32) {
        assert_eq!(self.len(), 0, "whoever is there would lose its id");
        self.generations.fill(generation);
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = Id> {
        self.iter().map(|(id, _)| id)
    }
}

impl<T> Default for Table<T> {
    fn default() -> Table<T> {
        Table::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Case 25.
    #[test]
    fn a_removed_id_never_reaches_the_next_tenant() {
        let mut table = Table::new();
        let first = table.insert('a');
        assert_eq!(table.remove(first), Some('a'));
        let second = table.insert('b');
        assert_eq!(second.index, first.index);
        assert_ne!(second, first);
        assert_eq!(table.get(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get(second), Some(&'b'));
    }

    /// Case 26.
    #[test]
    fn the_generation_wraps_without_panic() {
        let mut table = Table::new();
        let id = table.insert(0);
        table.remove(id);
        table.age(GENERATION_MASK);
        let last = table.insert(0);
        assert_eq!((last.index, last.generation), (id.index, GENERATION_MASK));
        assert_eq!(table.remove(last), Some(0));
        assert_eq!(table.insert(1).generation, 0);
    }

    #[test]
    fn ids_lists_the_living() {
        let mut table = Table::new();
        let ids: Vec<Id> = (0..10).map(|n| table.insert(n)).collect();
        for id in &ids[..5] {
            table.remove(*id);
        }
        assert_eq!(table.ids().collect::<Vec<_>>(), ids[5..]);
        assert_eq!(table.len(), 5);
    }
}
