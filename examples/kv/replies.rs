//! Replies of several cores, and putting them together in the order of the requests.

use crate::Shard;
use crate::commands::Command;
use crate::perform::perform;
use crate::requests;
use crate::resp;

/// How the reply of one request comes about.
pub(crate) enum Reply {
    /// That of a core.
    Of(usize),
    /// One element of an array from each of these.
    Elements(Vec<usize>),
    /// The sum of their numbers.
    Sum(Vec<usize>),
}

/// What one core has answered. Empty when it has not.
#[derive(Default)]
pub(crate) struct Replies {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    read: usize,
}

/// Answers requests for keys of this core.
pub(crate) fn answer_all(shard: &Shard, requests: &[u8]) -> Replies {
    let store = &mut *shard.borrow_mut();
    let (mut replies, mut words, mut at) = (Replies::default(), Vec::new(), 0);
    while let Ok(bytes @ 1..) = requests::parse(&requests[at..], &mut words) {
        at += bytes;
        let Some(name) = words.first() else { continue };
        if replies.bytes.len() < REPLIES_MAX {
            perform(Command::of(name), &words, store, &mut replies.bytes);
        } else {
            resp::error(&mut replies.bytes, "-ERR the replies would be too long");
        }
        replies.ends.push(replies.bytes.len());
    }
    replies
}

impl Replies {
    fn next(&mut self) -> Option<&[u8]> {
        let start = self.read.checked_sub(1).map_or(0, |last| self.ends[last]);
        let end = *self.ends.get(self.read)?;
        self.read += 1;
        Some(&self.bytes[start..end])
    }
}

impl Reply {
    pub(crate) fn write(self, replies: &mut [Replies], out: &mut Vec<u8>) {
        let start = out.len();
        if self.try_write(replies, out).is_none() {
            out.truncate(start);
            resp::error(out, "-ERR the core of a key has ended, or its replies are too long");
        }
    }

    fn try_write(&self, replies: &mut [Replies], out: &mut Vec<u8>) -> Option<()> {
        match self {
            Reply::Of(core) => out.extend_from_slice(replies[*core].next()?),
            Reply::Elements(cores) => {
                resp::header(out, b'*', cores.len() as i64);
                for core in cores {
                    // Each is an array of one.
                    out.extend_from_slice(replies[*core].next()?.strip_prefix(b"*1\r\n")?);
                }
            }
            Reply::Sum(cores) => {
                let mut sum = 0;
                for core in cores {
                    sum += i64::from(replies[*core].next()? == b":1\r\n");
                }
                resp::header(out, b':', sum);
            }
        }
        Some(())
    }
}

/// Of one core for one batch; further requests of it get an error.
const REPLIES_MAX: usize = 16 * 1024 * 1024;
