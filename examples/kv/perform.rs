//! What each command does to a store, and its reply, word for word that of Redis.

use std::time::Duration;

use crate::commands::Command;
use crate::lists::{check_length, list, pop, push, range};
use crate::resp::{NIL, bulk, error, header};
use crate::store::{Store, Value};
use crate::texts::{SECONDS_MAX, increment, integer, set, text};

/// Does what a request says, and writes the reply.
pub(crate) fn perform(command: Command, words: &[&[u8]], store: &mut Store, out: &mut Vec<u8>) {
    if !command.takes(words.len()) {
        let name = String::from_utf8_lossy(words[0]).to_lowercase();
        return error(out, &format!("-ERR wrong number of arguments for '{name}' command"));
    }
    let start = out.len();
    if let Err(fault) = try_perform(command, words, store, out) {
        out.truncate(start);
        error(out, fault);
    }
}

fn try_perform(
    command: Command,
    words: &[&[u8]],
    store: &mut Store,
    out: &mut Vec<u8>,
) -> Result<(), &'static str> {
    match (command, &words[1..]) {
        (Command::Get, [key]) => match text(store.get(key))? {
            Some(text) => bulk(out, text),
            None => out.extend_from_slice(NIL),
        },
        (Command::Set, [key, value, options @ ..]) => set(store, key, value, options, out)?,
        (Command::Incr, [key]) => header(out, b':', increment(store, key)?),
        (Command::Mget, keys) => {
            let start = out.len();
            header(out, b'*', keys.len() as i64);
            for key in keys {
                match store.get(key) {
                    Some(Value::Text(text)) => bulk(out, text),
                    _ => out.extend_from_slice(NIL),
                }
                check_length(out.len() - start)?;
            }
        }
        (Command::Lpush, [key, items @ ..]) => header(out, b':', push(store, key, items)?),
        (Command::Lpop, [key, count @ ..]) => pop(store, key, count, out)?,
        (Command::Lrange, [key, first, last]) => {
            let (first, last) = (integer(first)?, integer(last)?);
            range(list(store.get(key))?.map(|list| &*list), first, last, out)?;
        }
        (Command::Del, keys) => {
            let gone = keys.iter().filter(|key| store.get(key).is_some() && store.remove(key));
            header(out, b':', gone.count() as i64);
        }
        (Command::Exists, keys) => {
            header(out, b':', keys.iter().filter(|key| store.get(key).is_some()).count() as i64);
        }
        (Command::Expire, [key, seconds]) => {
            let seconds = integer(seconds)?;
            let done = match u64::try_from(seconds).ok().filter(|seconds| *seconds > 0) {
                Some(seconds) if seconds > SECONDS_MAX => {
                    return Err("-ERR invalid expire time in 'expire' command");
                }
                Some(seconds) => store.expire(key, Duration::from_secs(seconds)),
                None => store.get(key).is_some() && store.remove(key),
            };
            header(out, b':', done.into());
        }
        (Command::Ttl, [key]) => header(
            out,
            b':',
            match store.ttl(key) {
                None => -2,
                Some(None) => -1,
                Some(Some(left)) => (left.as_millis() as i64 + 500) / 1000,
            },
        ),
        (Command::Ping, []) => out.extend_from_slice(b"+PONG\r\n"),
        (Command::Ping | Command::Echo, [text]) => bulk(out, text),
        (Command::Select, [b"0"]) | (Command::Quit, _) => out.extend_from_slice(b"+OK\r\n"),
        (Command::Select, _) => return Err("-ERR DB index is out of range"),
        (Command::Config | Command::Docs, _) => out.extend_from_slice(b"*0\r\n"),
        _ => unknown(words, out),
    }
    Ok(())
}

fn unknown(words: &[&[u8]], out: &mut Vec<u8>) {
    let text = |word: &[u8]| String::from_utf8_lossy(&word[..word.len().min(128)]).into_owned();
    let arguments = words[1..].iter().take(8).map(|word| format!("'{}' ", text(word)));
    let arguments = arguments.collect::<String>().replace(['\r', '\n'], " ");
    let name = text(words[0]).replace(['\r', '\n'], " ");
    error(out, &format!("-ERR unknown command '{name}', with args beginning with: {arguments}"));
}
