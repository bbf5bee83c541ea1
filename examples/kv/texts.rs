//! Strings, which may be numbers: reading them, SET and INCR.

use std::time::Duration;

use crate::bytes::Bytes;
use crate::resp::digits;
use crate::store::{Store, Value};

pub(crate) fn text(value: Option<&mut Value>) -> Result<Option<&mut Bytes>, &'static str> {
    match value {
        None => Ok(None),
        Some(Value::Text(text)) => Ok(Some(text)),
        Some(Value::List(_)) => Err(WRONG_TYPE),
    }
}

/// A number as Redis takes it: just as Redis would write it, with no zeros or plus before it.
pub(crate) fn integer(text: &[u8]) -> Result<i64, &'static str> {
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    let number = number.filter(|number| digits(*number, &mut [0; 20]) == text);
    number.ok_or("-ERR value is not an integer or out of range")
}

pub(crate) fn set(
    store: &mut Store,
    key: &[u8],
    value: &[u8],
    options: &[&[u8]],
    out: &mut Vec<u8>,
) -> Result<(), &'static str> {
    let expires = match options {
        [] => None,
        [unit, time] if unit.eq_ignore_ascii_case(b"ex") => {
            Some(integer(time)?.saturating_mul(1000))
        }
        [unit, time] if unit.eq_ignore_ascii_case(b"px") => Some(integer(time)?),
        _ => return Err("-ERR syntax error"),
    };
    if expires.is_some_and(|ms| !(1..=SECONDS_MAX as i64 * 1000).contains(&ms)) {
        return Err("-ERR invalid expire time in 'set' command");
    }
    store.check_room(key.len() + value.len(), 1)?;
    store.set(key, value);
    if let Some(ms) = expires {
        store.expire(key, Duration::from_millis(ms as u64));
    }
    out.extend_from_slice(b"+OK\r\n");
    Ok(())
}

pub(crate) fn increment(store: &mut Store, key: &[u8]) -> Result<i64, &'static str> {
    let Some(text) = text(store.get(key))? else {
        store.check_room(key.len() + 1, 1)?;
        store.set(key, b"1");
        return Ok(1);
    };
    let overflow = "-ERR increment or decrement would overflow";
    let next = integer(text)?.checked_add(1).ok_or(overflow)?;
    let before = text.heap_bytes();
    *text = digits(next, &mut [0; 20]).into();
    store.resized(0, before);
    Ok(next)
}

pub(crate) const WRONG_TYPE: &str =
    "-WRONGTYPE Operation against a key holding the wrong kind of value";
pub(crate) const SECONDS_MAX: u64 = 10 * 365 * 24 * 60 * 60;
