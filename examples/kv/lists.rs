//! Lists: LPUSH, LPOP and LRANGE.

use crate::resp::{NIL, bulk, header};
use crate::store::{List, Store, Value, item_bytes};
use crate::texts::{WRONG_TYPE, integer};

pub(crate) fn list(value: Option<&mut Value>) -> Result<Option<&mut List>, &'static str> {
    match value {
        None => Ok(None),
        Some(Value::List(list)) => Ok(Some(list)),
        Some(Value::Text(_)) => Err(WRONG_TYPE),
    }
}

pub(crate) fn push(store: &mut Store, key: &[u8], items: &[&[u8]]) -> Result<i64, &'static str> {
    let bytes = items.iter().map(|item| item.len()).sum::<usize>();
    store.check_room(key.len() + bytes, items.len() + 1)?;
    let list = match list(store.get(key))? {
        Some(list) => list,
        None => match store.insert(key, Value::List(Box::default())) {
            Value::List(list) => list,
            Value::Text(_) => return Err(WRONG_TYPE),
        },
    };
    let mut added = 0;
    for item in items {
        list.push_front((*item).into());
        added += list.front().map_or(0, item_bytes);
    }
    let length = list.len() as i64;
    store.resized(added, 0);
    Ok(length)
}

/// Takes one from the front, or as many as asked for, which are an array.
pub(crate) fn pop(
    store: &mut Store,
    key: &[u8],
    count: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<(), &'static str> {
    let count = match count {
        [] => None,
        [count, ..] => Some(integer(count)?),
    };
    if count.is_some_and(|count| count < 0) {
        return Err("-ERR value is out of range, must be positive");
    }
    let Some(list) = list(store.get(key))? else {
        out.extend_from_slice(if count.is_some() { b"*-1\r\n" } else { NIL });
        return Ok(());
    };
    let taken = count.map_or(1, |count| count.min(list.len() as i64));
    check_length(list.range(..taken as usize).map(|item| item.len()).sum())?;
    if count.is_some() {
        header(out, b'*', taken);
    }
    let mut freed = 0;
    for item in list.drain(..taken as usize) {
        bulk(out, &item);
        freed += item_bytes(&item);
    }
    let is_empty = list.is_empty();
    store.resized(0, freed);
    if is_empty {
        store.remove(key);
    }
    Ok(())
}

pub(crate) fn range(
    list: Option<&List>,
    first: i64,
    last: i64,
    out: &mut Vec<u8>,
) -> Result<(), &'static str> {
    let length = list.map_or(0, |list| list.len() as i64);
    // From the end, if negative.
    let index = |at: i64| if at < 0 { at.saturating_add(length) } else { at };
    let (first, last) = (index(first).max(0), index(last).min(length - 1));
    let (start, count) = (out.len(), (last.saturating_add(1) - first).max(0));
    header(out, b'*', count);
    let Some(list) = list.filter(|_| count > 0) else { return Ok(()) };
    for item in list.range(first as usize..=last as usize) {
        bulk(out, item);
        check_length(out.len() - start)?;
    }
    Ok(())
}

/// Whether a reply may be so long: it is held in memory until the client has taken it.
pub(crate) fn check_length(bytes: usize) -> Result<(), &'static str> {
    if bytes > REPLY_BYTES_MAX { Err("-ERR the reply would be too long") } else { Ok(()) }
}

const REPLY_BYTES_MAX: usize = 16 * 1024 * 1024;
