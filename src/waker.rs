//! The wakers of a core's tasks, which any thread may hold and use.
//!
//! Most tasks wait for their core alone, which knows them by their ids, and keep no waker. So one
//! is lent to whichever is polled; once a task has kept a clone of it, it is that task's own.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Wake, Waker};

use crate::post::{Message, Post};
use crate::table::Id;

/// The part of a task that other threads may hold: it outlives the task, and knows only its id.
pub(crate) struct Remote {
    /// The two halves of the [`Id`], which changes only while nobody but a [`Lent`] has this.
    id: AtomicU64,
    /// Whether a wake-up is on its way to the core already.
    posted: AtomicBool,
    post: Post,
}

impl Remote {
    fn id(&self) -> Id {
        let bits = self.id.load(Ordering::Relaxed);
        Id { index: bits as u32, generation: (bits >> 32) as u32 }
    }

    /// The core has heard of a wake-up of this task. From here on the next one is news again: the
    /// poll that this one is about is still to come.
    pub(crate) fn hear(&self) -> Id {
        self.posted.swap(false, Ordering::AcqRel);
        self.id()
    }
}

impl Wake for Remote {
    fn wake(self: Arc<Remote>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Remote>) {
        // A thread that is ending may have lost its own list before it uses its last wakers.
        let here = LOCAL.try_with(|local| {
            let here = local.core.get() == Some(self.post.serial());
            if here {
                let (mut woken, id) = (local.woken.borrow_mut(), self.id());
                if woken.last() != Some(&id) {
                    woken.push(id);
                }
            }
            here
        });
        if here != Ok(true) && !self.posted.swap(true, Ordering::AcqRel) {
            // A core that is gone has no tasks to wake.
            let _ = self.post.post(Message::Wake(Arc::clone(self)));
        }
    }
}

/// The waker for tasks that have none of their own.
pub(crate) struct Lent {
    remote: Arc<Remote>,
    waker: Waker,
}

impl Lent {
    pub(crate) fn new(post: &Post) -> Lent {
        let (id, posted) = (AtomicU64::new(0), AtomicBool::new(false));
        let remote = Arc::new(Remote { id, posted, post: Arc::clone(post) });
        Lent { waker: Waker::from(Arc::clone(&remote)), remote }
    }

    /// Lends it to a task that is about to be polled.
    #[inline]
    pub(crate) fn lend(&self, id: Id) -> &Waker {
        let bits = u64::from(id.generation) << 32 | u64::from(id.index);
        self.remote.id.store(bits, Ordering::Relaxed);
        &self.waker
    }

    #[inline]
    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Lets the task have it that was polled, if there are clones, and is another one from then on.
    #[inline]
    pub(crate) fn leave_if_kept(&mut self) -> Option<Waker> {
        if Arc::strong_count(&self.remote) == OURS {
            return None;
        }
        let next = Lent::new(&self.remote.post);
        Some(std::mem::replace(self, next).waker)
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").finish_non_exhaustive()
    }
}

/// How often a [`Remote`] is held by its [`Lent`].
const OURS: usize = 2;

thread_local! {
    static LOCAL: Local =
        const { Local { core: Cell::new(None), woken: RefCell::new(Vec::new()) } };
}

/// What wakers find when they are used on a core's own thread.
struct Local {
    core: Cell<Option<u64>>,
    woken: RefCell<Vec<Id>>,
}

/// Says which core this thread is, for as long as wakers may be used here.
pub(crate) fn set_local_core(serial: Option<u64>) {
    LOCAL.with(|local| local.core.set(serial));
}

/// Takes the tasks that wakers of this thread have woken, if it is that core.
pub(crate) fn take_local_wakes(serial: u64, mut take: impl FnMut(Id)) {
    LOCAL.with(|local| {
        if local.core.get() == Some(serial) {
            let mut woken = local.woken.borrow_mut();
            if !woken.is_empty() {
                woken.drain(..).for_each(&mut take);
            }
        }
    });
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::post::{CoreBell, PostBox};

    const FIRST: Id = Id { index: 3, generation: 0x00FF_FFFF };
    const SECOND: Id = Id { index: u32::MAX, generation: 1 };

    fn heard(post: &Post) -> Vec<Id> {
        let mut mail = Vec::new();
        post.mailbox.take(&mut mail);
        mail.iter()
            .map(|message| match message {
                Message::Wake(remote) => remote.hear(),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn who_keeps_a_clone_has_it_for_good_and_the_next_gets_another() {
        let post = PostBox::new(CoreBell::Silent);
        let mut lent = Lent::new(&post);
        let kept = lent.lend(FIRST).clone();
        let own = lent.leave_if_kept().expect("there is a clone");
        assert!(own.will_wake(&kept));
        assert!(!lent.lend(SECOND).will_wake(&kept));
        assert!(lent.leave_if_kept().is_none());
        kept.wake_by_ref();
        own.wake_by_ref();
        assert_eq!(heard(&post), [FIRST], "once until it is heard");
        kept.wake();
        assert_eq!(heard(&post), [FIRST]);
    }

    #[test]
    fn who_keeps_none_leaves_it_to_the_next() {
        let post = PostBox::new(CoreBell::Silent);
        let mut lent = Lent::new(&post);
        drop(lent.lend(FIRST).clone());
        assert!(lent.leave_if_kept().is_none(), "the clone is gone");
        lent.lend(SECOND).wake_by_ref();
        assert!(lent.leave_if_kept().is_some(), "the wake-up on its way is a clone");
        assert_eq!(heard(&post), [SECOND]);
    }
}
