//! A slab with generations: the owner of everything that a core counts.

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
    slots: Vec<Slot<T>>,
    /// The slot that was freed last, if one is free; each names the one freed before it.
    free: u32,
    len: usize,
}

#[derive(Debug)]
struct Slot<T> {
    tenant: Option<T>,
    /// That of the tenant; of the next one where there is none.
    generation: u32,
    /// While there is no tenant.
    next_free: u32,
}

impl<T> Table<T> {
    pub(crate) fn new() -> Table<T> {
        Table { slots: Vec::new(), free: NONE, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// # Panics
    /// With 2³² - 1 entries.
    pub(crate) fn insert(&mut self, value: T) -> Id {
        let id = self.next_id();
        match self.slots.get_mut(id.index as usize) {
            Some(slot) => {
                self.free = slot.next_free;
                slot.tenant = Some(value);
            }
            None => {
                assert!(id.index < NONE, "too many entries");
                let generation = id.generation;
                self.slots.push(Slot { tenant: Some(value), generation, next_free: NONE });
            }
        }
        self.len += 1;
        id
    }

    /// The id that the next insert will give.
    pub(crate) fn next_id(&self) -> Id {
        match self.slots.get(self.free as usize) {
            Some(slot) => Id { index: self.free, generation: slot.generation },
            None => Id { index: self.slots.len() as u32, generation: 0 },
        }
    }

    pub(crate) fn contains(&self, id: Id) -> bool {
        self.get(id).is_some()
    }

    pub(crate) fn get(&self, id: Id) -> Option<&T> {
        let slot = self.slots.get(id.index as usize)?;
        slot.tenant.as_ref().filter(|_| slot.generation == id.generation)
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let slot = self.slots.get_mut(id.index as usize)?;
        slot.tenant.as_mut().filter(|_| slot.generation == id.generation)
    }

    /// Removes the entry and makes every copy of its id stale.
    pub(crate) fn remove(&mut self, id: Id) -> Option<T> {
        let slot = self.slots.get_mut(id.index as usize)?;
        let value = slot.tenant.take_if(|_| slot.generation == id.generation)?;
        slot.generation = (id.generation + 1) & GENERATION_MASK;
        slot.next_free = std::mem::replace(&mut self.free, id.index);
        self.len -= 1;
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(index, slot)| Some((slot.id(index), slot.tenant.as_ref()?)))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Id, &mut T)> {
        let slots = self.slots.iter_mut().enumerate();
        slots.filter_map(|(index, slot)| Some((slot.id(index), slot.tenant.as_mut()?)))
    }

    /// How many slots there are or have been, for a walk over them.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Who has a slot now.
    pub(crate) fn id_at(&self, index: usize) -> Option<Id> {
        let slot = self.slots.get(index)?;
        slot.tenant.as_ref().map(|_| slot.id(index))
    }

    /// Who has a slot now, if that is who is meant.
    pub(crate) fn id_if(&self, index: u32, is_meant: impl FnOnce(&T) -> bool) -> Option<Id> {
        let slot = self.slots.get(index as usize)?;
        slot.tenant.as_ref().filter(|tenant| is_meant(tenant)).map(|_| slot.id(index as usize))
    }

    /// Moves all slots on to a generation, as if they had been reused so often.
    #[cfg(test)]
    pub(crate) fn age(&mut self, generation: u32) {
        assert_eq!(self.len(), 0, "whoever is there would lose its id");
        self.slots.iter_mut().for_each(|slot| slot.generation = generation);
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = Id> {
        self.iter().map(|(id, _)| id)
    }
}

impl<T> Slot<T> {
    fn id(&self, index: usize) -> Id {
        Id { index: index as u32, generation: self.generation }
    }
}

/// The end of the list of free slots.
const NONE: u32 = u32::MAX;

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
