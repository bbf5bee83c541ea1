//! What a core sends to other cores: it leaves at the end of the turn, for each of them in one
//! piece, so that one that sleeps is woken once.

use std::sync::Arc;

use crate::post::{Message, Post};

/// What is to leave, by addressee.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    batches: Vec<Batch>,
    /// Messages in all batches.
    waiting: usize,
}

#[derive(Debug)]
struct Batch {
    to: Post,
    messages: Vec<Message>,
}

impl Outbox {
    pub(crate) fn push(&mut self, to: &Post, message: Message) {
        self.waiting += 1;
        match self.batches.iter_mut().find(|batch| batch.to.serial() == to.serial()) {
            Some(batch) => batch.messages.push(message),
            None => self.batches.push(Batch { to: Arc::clone(to), messages: vec![message] }),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Delivers everything. Returns what was for cores that are gone, to be dropped where nobody
    /// has the core borrowed: it is anyone's.
    pub(crate) fn deliver(&mut self) -> Vec<Message> {
        self.waiting = 0;
        let mut refused = Vec::new();
        self.batches.retain_mut(|Batch { to, messages }| {
            if messages.is_empty() {
                return true;
            }
            let delivered = to.mailbox.post_all(messages);
            refused.append(messages);
            delivered
        });
        refused
    }
}

/// Whoever waits for an answer gets it, though its core has failed.
impl Drop for Outbox {
    fn drop(&mut self) {
        drop(self.deliver());
    }
}
