//! What one core owns: keys, values, when they expire, and how much memory they take.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use crate::bytes::Bytes;

pub(crate) struct Store {
    values: HashMap<Bytes, Value>,
    /// When keys expire; most never do.
    pub(crate) deadlines: HashMap<Box<[u8]>, Instant>,
    /// The same, the next one first.
    pub(crate) expiring: BTreeSet<(Instant, Box<[u8]>)>,
    /// A task removes them.
    pub(crate) sweeping: bool,
    bytes: usize,
    bytes_max: usize,
}

pub(crate) enum Value {
    Text(Bytes),
    List(Box<List>),
}

pub(crate) type List = VecDeque<Bytes>;

impl Store {
    pub(crate) fn new(bytes_max: usize) -> Store {
        let (values, deadlines, expiring) = (HashMap::new(), HashMap::new(), BTreeSet::new());
        Store { values, deadlines, expiring, sweeping: false, bytes: 0, bytes_max }
    }

    pub(crate) fn get(&mut self, key: &[u8]) -> Option<&mut Value> {
        self.remove_expired(key);
        self.values.get_mut(key)
    }

    /// Puts a text in the place of whatever is there, which then does not expire.
    pub(crate) fn set(&mut self, key: &[u8], text: &[u8]) {
        self.forget_deadline(key);
        let new = Value::Text(text.into());
        match self.values.get_mut(key) {
            Some(old) => {
                self.bytes = self.bytes + new.heap_bytes() - old.heap_bytes();
                *old = new;
            }
            None => drop(self.insert(key, new)),
        }
    }

    /// Puts a value where there is none.
    pub(crate) fn insert(&mut self, key: &[u8], value: Value) -> &mut Value {
        let key = Bytes::from(key);
        self.bytes += key.heap_bytes() + value.heap_bytes() + ENTRY_BYTES;
        self.values.entry(key).or_insert(value)
    }

    pub(crate) fn remove(&mut self, key: &[u8]) -> bool {
        self.forget_deadline(key);
        let Some((key, value)) = self.values.remove_entry(key) else { return false };
        self.bytes -= key.heap_bytes() + value.heap_bytes() + ENTRY_BYTES;
        true
    }

    /// Whether so many bytes may be added, in so many pieces. What has expired makes room.
    ///
    /// # Errors
    /// What Redis says where it may evict nothing.
    pub(crate) fn check_room(&mut self, bytes: usize, pieces: usize) -> Result<(), &'static str> {
        let more = bytes + pieces * ENTRY_BYTES;
        if self.bytes + more > self.bytes_max {
            self.sweep();
        }
        let full = self.bytes + more > self.bytes_max;
        if full { Err("-OOM command not allowed when used memory > 'maxmemory'.") } else { Ok(()) }
    }

    /// A list has been changed by others.
    pub(crate) fn resized(&mut self, more: usize, less: usize) {
        self.bytes = self.bytes + more - less;
    }
}

impl Value {
    fn heap_bytes(&self) -> usize {
        match self {
            Value::Text(text) => text.heap_bytes(),
            Value::List(list) => list.iter().map(item_bytes).sum(),
        }
    }
}

/// What an element of a list takes.
pub(crate) fn item_bytes(item: &Bytes) -> usize {
    item.heap_bytes() + ENTRY_BYTES
}

/// About what a key with a short value, or a list's element, takes.
pub(crate) const ENTRY_BYTES: usize = 64;
