//! One client: its requests in, the replies out in the same order.

use slipring::{Connection, Result, cores};

use crate::Shard;
use crate::commands::{Command, Keys};
use crate::perform::perform;
use crate::requests;
use crate::resp;
use crate::shards::Batch;

pub(crate) async fn serve(mut conn: Connection) -> Result<()> {
    let shard = cores::state::<Shard>()?;
    let mut batch = Batch::new(cores::current()?);
    // The beginning of a request that has not come whole, and replies to be sent.
    let (mut rest, mut out) = (Vec::new(), Vec::new());
    while let Some(chunk) = conn.recv().await? {
        let began = rest.is_empty();
        if !began {
            rest.extend_from_slice(&chunk);
        }
        let input = if began { &chunk[..] } else { &rest[..] };
        let mut at = 0;
        while at < input.len() {
            let Answered { bytes, end } = answer(&input[at..], &shard, &mut batch, &mut out);
            at += bytes;
            batch.run(&shard, &mut out).await;
            match end {
                Some(End::Fault(fault)) => resp::error(&mut out, &format!("-ERR {fault}")),
                Some(End::Quit) => out.extend_from_slice(b"+OK\r\n"),
                None => {}
            }
            if out.len() < COPIED_MAX {
                conn.write(&out).await?;
                out.clear();
            } else {
                conn.send(std::mem::take(&mut out)).await?;
            }
            if end.is_some() {
                return Ok(());
            }
            if bytes == 0 {
                break;
            }
        }
        if began && at < input.len() {
            // From here on the message's deadline runs, and a drain waits for its end.
            rest.extend_from_slice(&chunk[at..]);
            conn.begin_message();
        } else if !began {
            rest.drain(..at);
            if at > 0 {
                conn.end_message();
            }
            if at > 0 && !rest.is_empty() {
                conn.begin_message();
            }
        }
        if rest.is_empty() && conn.is_draining() {
            return Ok(());
        }
    }
    Ok(())
}

/// How many bytes of input were requests, and why the connection ends, if it does.
struct Answered {
    bytes: usize,
    end: Option<End>,
}

enum End {
    Fault(&'static str),
    Quit,
}

/// Answers what this core can, until there is something for others, which is put into the batch
/// with all that follows it.
fn answer(input: &[u8], shard: &Shard, batch: &mut Batch, out: &mut Vec<u8>) -> Answered {
    let store = &mut *shard.borrow_mut();
    let (mut words, mut at) = (Vec::with_capacity(8), 0);
    while at < input.len() && out.len() < REPLIES_MAX && !batch.is_full() {
        let bytes = match requests::parse(&input[at..], &mut words) {
            Ok(0) => break,
            Ok(bytes) => bytes,
            Err(fault) => return Answered { bytes: at, end: Some(End::Fault(fault)) },
        };
        let request = &input[at..at + bytes];
        at += bytes;
        let Some(name) = words.first() else { continue };
        let command = Command::of(name);
        if command == Command::Quit {
            return Answered { bytes: at, end: Some(End::Quit) };
        }
        let keys = match command.keys() {
            _ if !command.takes(words.len()) => &[],
            Keys::None => &[],
            Keys::First => &words[1..2],
            Keys::All => &words[1..],
        };
        if batch.is_empty() && batch.has_all(keys) {
            perform(command, &words, store, out);
        } else {
            batch.add(command, keys, &words, request);
        }
    }
    Answered { bytes: at, end: None }
}

/// Replies up to so many bytes are copied to the output, longer ones given away.
const COPIED_MAX: usize = 16 * 1024;
/// So many bytes of replies are sent before further requests are looked at.
const REPLIES_MAX: usize = 64 * 1024;
