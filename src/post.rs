//! The address of a core: what other threads send it, and how it is woken.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::audience::Notice;
use crate::balance::Load;
use crate::calls::Answer;
use crate::cores::Errand;
use crate::executor::LocalFuture;
use crate::inspect::Question;
use crate::mailbox::{Bell, Mailbox};
use crate::moves::Moved;
use crate::stats::LINE_BYTES;
use crate::sys::place::Place;
use crate::sys::wake::EventFd;
use crate::waker::Remote;

/// What other threads send to a core.
pub(crate) enum Message {
    /// A task of the core was woken.
    Wake(Arc<Remote>),
    /// Run this on the core.
    Spawn(Place, Box<dyn FnOnce() -> LocalFuture + Send>),
    /// The control has news: the drain's deadline.
    Look,
    /// Somebody wants to know what the connections are at.
    Inspect(Question),
    /// Leave the server, which goes on, by this deadline on the clock of the driver.
    Retire(u64),
    /// A listener of another core has gone.
    Steer,
    /// A connection that another core has accepted is this one's.
    Moved(Moved),
    /// Run this, which another core has called for at that place.
    Run(Place, Errand),
    /// A call of this core has come to its end.
    Answer(Answer),
    /// A broadcast has something for this core.
    Heard(Arc<Notice>),
}

/// The address of a core for other threads.
pub(crate) type Post = Arc<PostBox>;

/// Apart from the load, on cache lines of its own: a core says here whenever it sleeps.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct PostBox {
    pub(crate) mailbox: Mailbox<Message, CoreBell>,
    /// What the others see of the core's load.
    pub(crate) load: Load,
    serial: u64,
}

/// What wakes a core: an eventfd, or nothing where a simulator drives it.
#[derive(Debug)]
pub(crate) enum CoreBell {
    EventFd(Arc<EventFd>),
    #[cfg(test)]
    Silent,
}

impl Bell for CoreBell {
    fn ring(&self) {
        match self {
            CoreBell::EventFd(eventfd) => eventfd.ring(),
            #[cfg(test)]
            CoreBell::Silent => {}
        }
    }
}

impl PostBox {
    pub(crate) fn new(bell: CoreBell) -> Post {
        static SERIALS: AtomicU64 = AtomicU64::new(0);
        let serial = SERIALS.fetch_add(1, Ordering::Relaxed);
        Arc::new(PostBox { mailbox: Mailbox::new(bell), load: Load::default(), serial })
    }

    /// Tells the cores of a process apart, those of several servers too.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    pub(crate) fn post(&self, message: Message) -> std::result::Result<(), Message> {
        self.mailbox.post(message)
    }
}

const _: () = assert!(align_of::<PostBox>() == LINE_BYTES);

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Message::Wake(_) => "Wake",
            Message::Spawn(..) => "Spawn",
            Message::Look => "Look",
            Message::Inspect(_) => "Inspect",
            Message::Retire(_) => "Retire",
            Message::Steer => "Steer",
            Message::Moved(_) => "Moved",
            Message::Run(..) => "Run",
            Message::Answer(_) => "Answer",
            Message::Heard(_) => "Heard",
        })
    }
}
