//! What one core owns: keys, values, when they expire, and how much memory they take.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

pub(crate) struct Store {
    pub(crate) entries: HashMap<Box<[u8]>, Entry>,
    /// The keys that expire, the next one first.
    pub(crate) expiring: BTreeSet<(Instant, Box<[u8]>)>,
    /// A task removes them.
    pub(crate) sweeping: bool,
    bytes: usize,
    bytes_max: usize,
}

pub(crate) struct Entry {
    pub(crate) value: Value,
    pub(crate) expires: Option<Instant>,
}

pub(crate) enum Value {
    Text(Vec<u8>),
    List(VecDeque<Box<[u8]>>),
}

impl Store {
    pub(crate) fn new(bytes_max: usize) -> Store {
        let (entries, expiring) = (HashMap::new(), BTreeSet::new());
        Store { entries, expiring, sweeping: false, bytes: 0, bytes_max }
    }

    pub(crate) fn get(&mut self, key: &[u8]) -> Option<&mut Value> {
        let entry = self.entries.get(key)?;
        if entry.expires.is_some_and(|at| at <= Instant::now()) {
            self.remove(key);
        }
        self.entries.get_mut(key).map(|entry| &mut entry.value)
    }

    /// Puts a value in the place of what there is, which then does not expire.
    pub(crate) fn set(&mut self, key: &[u8], text: &[u8]) {
        if let Some(Entry { value: Value::Text(old), expires: None }) = self.entries.get_mut(key)
            && (old.capacity() / 4..=old.capacity()).contains(&text.len())
        {
            old.clear();
            old.extend_from_slice(text);
            return;
        }
        self.remove(key);
        self.insert(key, Value::Text(text.to_vec()));
    }

    /// Puts a value where there is none.
    pub(crate) fn insert(&mut self, key: &[u8], value: Value) -> &mut Value {
        self.bytes += key.len() + value.bytes() + ENTRY_BYTES;
        let entry = self.entries.entry(Box::from(key));
        &mut entry.or_insert(Entry { value, expires: None }).value
    }

    pub(crate) fn remove(&mut self, key: &[u8]) -> bool {
        let Some((key, Entry { value, expires })) = self.entries.remove_entry(key) else {
            return false;
        };
        self.bytes -= key.len() + value.bytes() + ENTRY_BYTES;
        if let Some(at) = expires {
            self.expiring.remove(&(at, key));
        }
        true
    }

    /// Whether so many bytes may be added, in so many pieces.
    ///
    /// # Errors
    /// What Redis says where it may evict nothing.
    pub(crate) fn check_room(&self, bytes: usize, pieces: usize) -> Result<(), &'static str> {
        let full = self.bytes + bytes + pieces * ENTRY_BYTES > self.bytes_max;
        if full { Err("-OOM command not allowed when used memory > 'maxmemory'.") } else { Ok(()) }
    }

    /// A value has changed its size by so much.
    pub(crate) fn resized(&mut self, before: usize, after: usize) {
        self.bytes = self.bytes + after - before;
    }
}

impl Value {
    fn bytes(&self) -> usize {
        match self {
            Value::Text(text) => text.capacity(),
            Value::List(list) => list.iter().map(|item| item.len() + ENTRY_BYTES).sum(),
        }
    }
}

/// About what a key or a list's element takes besides its bytes.
pub(crate) const ENTRY_BYTES: usize = 64;
