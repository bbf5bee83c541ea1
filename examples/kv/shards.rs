//! Which core owns a key, and handing requests over to the cores that own theirs.

use slipring::{CoreInfo, Result, cores};

use crate::Shard;
use crate::commands::{Command, Keys};
use crate::replies::{Replies, Reply, answer_all};
use crate::resp;

/// Requests of one client, by the core that is to answer them, and how the replies are put
/// together.
pub(crate) struct Batch {
    core: CoreInfo,
    parts: Vec<Vec<u8>>,
    plan: Vec<Reply>,
    bytes: usize,
}

impl Batch {
    pub(crate) fn new(core: CoreInfo) -> Batch {
        let parts = (0..core.cores).map(|_| Vec::new()).collect();
        Batch { core, parts, plan: Vec::new(), bytes: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.plan.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.plan.len() >= REQUESTS_MAX || self.bytes >= BYTES_MAX
    }

    /// Whether this core owns all of the keys.
    pub(crate) fn has_all(&self, keys: &[&[u8]]) -> bool {
        self.core.cores == 1 || keys.iter().all(|key| self.owner(key) == self.core.index)
    }

    /// FNV-1a; clients choose keys, but not what a key costs at its core.
    fn owner(&self, key: &[u8]) -> usize {
        let mix = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(16_777_619);
        let hash = key.iter().fold(2_166_136_261, mix);
        (hash >> 8) as usize % self.core.cores
    }

    pub(crate) fn add(
        &mut self,
        command: Command,
        keys: &[&[u8]],
        words: &[&[u8]],
        request: &[u8],
    ) {
        self.bytes += request.len();
        if let (Keys::All, [_, _, ..]) = (command.keys(), keys) {
            let owners: Vec<usize> = keys.iter().map(|key| self.owner(key)).collect();
            for (owner, key) in owners.iter().zip(keys) {
                resp::request(&mut self.parts[*owner], &[words[0], *key]);
            }
            let elements = command == Command::Mget;
            self.plan.push(if elements { Reply::Elements(owners) } else { Reply::Sum(owners) });
            return;
        }
        let owner = keys.first().map_or(self.core.index, |key| self.owner(key));
        self.parts[owner].extend_from_slice(request);
        self.plan.push(Reply::Of(owner));
    }

    /// Has all requests answered by their cores at the same time, and writes the replies.
    pub(crate) async fn run(&mut self, shard: &Shard, out: &mut Vec<u8>) {
        if self.plan.is_empty() {
            return;
        }
        let mut calls = Vec::new();
        for (core, part) in self.parts.iter_mut().enumerate() {
            let requests = std::mem::take(part);
            let here = core == self.core.index || requests.is_empty();
            calls.push(if here {
                Err(answer_all(shard, &requests))
            } else {
                Ok(cores::call(core, move || -> Result<Replies> {
                    Ok(answer_all(&*cores::state::<Shard>()?, &requests))
                }))
            });
        }
        let mut replies = Vec::with_capacity(calls.len());
        for call in calls {
            replies.push(match call {
                Ok(call) => call.await.and_then(|replies| replies).unwrap_or_default(),
                Err(replies) => replies,
            });
        }
        for reply in self.plan.drain(..) {
            reply.write(&mut replies, out);
        }
        self.bytes = 0;
    }
}

/// So many requests, or bytes of them, are handed over before further ones are looked at.
const REQUESTS_MAX: usize = 1024;
const BYTES_MAX: usize = 4 * 1024 * 1024;
