//! Strings that are kept where they are when they are short, as most keys and many values are: one
//! cache line less to wait for, and one allocation.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};

pub(crate) enum Bytes {
    Short { length: u8, bytes: [u8; SHORT_MAX] },
    Long(Box<[u8]>),
}

impl Bytes {
    /// What it takes besides its own place.
    pub(crate) fn heap_bytes(&self) -> usize {
        match self {
            Bytes::Short { .. } => 0,
            Bytes::Long(bytes) => bytes.len(),
        }
    }
}

impl From<&[u8]> for Bytes {
    fn from(text: &[u8]) -> Bytes {
        let mut bytes = [0; SHORT_MAX];
        match bytes.get_mut(..text.len()) {
            None => Bytes::Long(Box::from(text)),
            Some(place) => {
                place.copy_from_slice(text);
                Bytes::Short { length: text.len() as u8, bytes }
            }
        }
    }
}

impl Borrow<[u8]> for Bytes {
    fn borrow(&self) -> &[u8] {
        match self {
            Bytes::Short { length, bytes } => &bytes[..usize::from(*length)],
            Bytes::Long(bytes) => bytes,
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.borrow()
    }
}

impl Hash for Bytes {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Bytes) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

const SHORT_MAX: usize = 22;
