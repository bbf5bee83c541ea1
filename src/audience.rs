//! Who of a core waits for the values of a broadcast, and the message that there are some.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::core::Core;
use crate::executor::Wake;
use crate::post::{Message, Post};
use crate::table::{Id, Table};

/// The audiences of one core: one for each channel that has receivers here.
#[derive(Debug, Default)]
pub(crate) struct Audiences {
    table: Table<Audience>,
    by_channel: HashMap<u64, Id>,
}

/// The receivers of one channel.
pub(crate) struct Audience {
    channel: u64,
    /// Where the channel puts its values.
    pub(crate) desk: Arc<dyn Any + Send + Sync>,
    pub(crate) wakes: Table<Wake>,
}

/// Says to a core that a channel has something for it; once until the core has heard.
pub(crate) struct Notice {
    to: Post,
    audience: Id,
    posted: AtomicBool,
}

impl Audiences {
    pub(crate) fn find(&self, channel: u64) -> Option<Id> {
        self.by_channel.get(&channel).copied()
    }

    /// The notice for the audience that is inserted next.
    pub(crate) fn next_notice(&self, to: &Post) -> Arc<Notice> {
        let audience = self.table.next_id();
        Arc::new(Notice { to: Arc::clone(to), audience, posted: AtomicBool::new(false) })
    }

    pub(crate) fn insert(&mut self, audience: Audience) -> Id {
        let channel = audience.channel;
        let id = self.table.insert(audience);
        self.by_channel.insert(channel, id);
        id
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Audience> {
        self.table.get_mut(id)
    }

    /// One receiver is gone, and with the last one the audience. Returns who has waited.
    pub(crate) fn leave(&mut self, id: Id, seat: Id, is_last: bool) -> Option<Wake> {
        let audience = self.get_mut(id)?;
        let wake = audience.wakes.remove(seat);
        if is_last {
            let channel = audience.channel;
            self.by_channel.remove(&channel);
            self.table.remove(id);
        }
        wake
    }
}

impl Audience {
    pub(crate) fn new(channel: u64, desk: Arc<dyn Any + Send + Sync>) -> Audience {
        Audience { channel, desk, wakes: Table::new() }
    }
}

impl Notice {
    /// Tells the core, unless it is being told already. At once, not at the end of the sender's
    /// turn: others rely on this one message, and that turn may be long.
    pub(crate) fn post(self: &Arc<Notice>) {
        if !self.posted.swap(true, Ordering::AcqRel) {
            // A core that is gone has nobody to wake.
            drop(self.to.post(Message::Heard(Arc::clone(self))));
        }
    }
}

impl Core {
    /// A channel has something: everyone who waits for it looks.
    pub(crate) fn wake_audience(&mut self, notice: &Notice) {
        // First, so that what comes from now on is news again.
        notice.posted.swap(false, Ordering::AcqRel);
        if let Some(audience) = self.audiences.get_mut(notice.audience) {
            for (_, wake) in audience.wakes.iter_mut() {
                self.tasks.wake(wake);
            }
        }
    }
}

impl fmt::Debug for Audience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audience").field("receivers", &self.wakes.len()).finish_non_exhaustive()
    }
}
