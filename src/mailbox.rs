//! How other threads reach a core: a queue, and a bell that is rung only when the core sleeps.
//!
//! The wake protocol, model-checked by loom below:
//!
//! ```text
//! sender                          core, before it blocks
//! 1. put the message              1. asleep = true
//! 2. pending = true               2. pending? then asleep = false, go on
//! 3. asleep swapped to false?     3. block until the bell or something else
//!    if it was true: ring         4. asleep = false
//! ```
//! Either the core sees `pending` after it has said that it sleeps, or the sender sees `asleep`
//! after it has said that something is pending. Both may be true; then one ring is wasted.

use std::fmt;

#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering::Release, Ordering::SeqCst},
};

#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering::Release, Ordering::SeqCst},
};

/// What wakes a core that is blocked in the kernel.
pub(crate) trait Bell {
    fn ring(&self);
}

/// The queue of one core.
pub(crate) struct Mailbox<M, B> {
    queue: Mutex<Queue<M>>,
    pending: AtomicBool,
    asleep: AtomicBool,
    bell: B,
}

/// A message that was not delivered: the queue is full, or the core is gone.
pub(crate) struct Refused<M> {
    pub(crate) message: M,
    pub(crate) full: bool,
}

struct Queue<M> {
    messages: Vec<M>,
    open: bool,
}

impl<M, B: Bell> Mailbox<M, B> {
    pub(crate) fn new(bell: B) -> Mailbox<M, B> {
        Mailbox {
            queue: Mutex::new(Queue { messages: Vec::new(), open: true }),
            pending: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            bell,
        }
    }

    /// Delivers a message and wakes the core if it sleeps. Any thread may.
    ///
    /// # Errors
    /// Gives the message back when the core is gone.
    pub(crate) fn post(&self, message: M) -> Result<(), M> {
        self.post_among(message, usize::MAX).map_err(|Refused { message, .. }| message)
    }

    /// As [`Mailbox::post`], unless so many messages are there already.
    pub(crate) fn post_among(&self, message: M, most: usize) -> Result<(), Refused<M>> {
        {
            let mut queue = self.queue.lock().unwrap_or_else(|poison| poison.into_inner());
            if !queue.open || queue.messages.len() >= most {
                return Err(Refused { message, full: queue.open });
            }
            queue.messages.push(message);
            self.pending.store(true, SeqCst);
        }
        if self.asleep.swap(false, SeqCst) {
            self.bell.ring();
        }
        Ok(())
    }

    /// Delivers several messages and rings at most once. Any thread may. False when the core is
    /// gone: then they stay where they are.
    pub(crate) fn post_all(&self, messages: &mut Vec<M>) -> bool {
        {
            let mut queue = self.queue.lock().unwrap_or_else(|poison| poison.into_inner());
            if !queue.open {
                return false;
            }
            queue.messages.append(messages);
            self.pending.store(true, SeqCst);
        }
        if self.asleep.swap(false, SeqCst) {
            self.bell.ring();
        }
        true
    }

    /// Takes everything that has come. Costs one load when nothing has.
    pub(crate) fn take(&self, into: &mut impl Extend<M>) {
        if self.has_mail() {
            let mut queue = self.queue.lock().unwrap_or_else(|poison| poison.into_inner());
            self.pending.store(false, SeqCst);
            into.extend(queue.messages.drain(..));
        }
    }

    /// Whether something has come. A core that goes on looking need not say that it sleeps, so that
    /// nobody rings.
    pub(crate) fn has_mail(&self) -> bool {
        self.pending.load(SeqCst)
    }

    /// Says that the core is about to block. False when it must not, as something has come.
    pub(crate) fn fall_asleep(&self) -> bool {
        // A swap, not a store: it is one instruction either way, and the model needs it.
        self.asleep.swap(true, SeqCst);
        if self.has_mail() {
            self.asleep.store(false, SeqCst);
            return false;
        }
        true
    }

    /// Says that the core is up again; senders need not ring.
    pub(crate) fn wake_up(&self) {
        // Who still sees it asleep rings in vain.
        self.asleep.store(false, Release);
    }

    /// Refuses all further messages and returns those that came too late.
    pub(crate) fn close(&self) -> Vec<M> {
        let mut queue = self.queue.lock().unwrap_or_else(|poison| poison.into_inner());
        queue.open = false;
        std::mem::take(&mut queue.messages)
    }
}

impl<M, B> fmt::Debug for Mailbox<M, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Bell for Count {
        fn ring(&self) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn the_bell_rings_once_for_a_sleeper_and_never_for_one_who_is_up() {
        let mailbox = Mailbox::new(Count::default());
        mailbox.post(1).unwrap();
        assert!(!mailbox.fall_asleep(), "something has come");
        let mut got = Vec::new();
        mailbox.take(&mut got);
        assert!(mailbox.fall_asleep());
        mailbox.post(2).unwrap();
        mailbox.post(3).unwrap();
        assert_eq!(mailbox.bell.0.load(SeqCst), 1);
        mailbox.wake_up();
        mailbox.take(&mut got);
        assert_eq!(got, [1, 2, 3]);
    }

    #[test]
    fn several_messages_at_once_ring_once_or_stay_where_they_are() {
        let mailbox = Mailbox::new(Count::default());
        assert!(mailbox.fall_asleep());
        let mut messages = vec![1, 2, 3];
        assert!(mailbox.post_all(&mut messages) && messages.is_empty());
        assert_eq!(mailbox.bell.0.load(SeqCst), 1);
        assert_eq!(mailbox.close(), [1, 2, 3]);
        messages.push(4);
        assert!(!mailbox.post_all(&mut messages));
        assert_eq!(messages, [4]);
    }

    #[test]
    fn the_bell_does_not_ring_for_one_who_spins() {
        let mailbox = Mailbox::new(Count::default());
        assert!(!mailbox.has_mail());
        mailbox.post(1).unwrap();
        assert!(mailbox.has_mail() && mailbox.bell.0.load(SeqCst) == 0);
        mailbox.take(&mut Vec::new());
        assert!(!mailbox.has_mail() && mailbox.fall_asleep());
    }

    #[test]
    fn a_closed_mailbox_gives_the_message_back() {
        let mailbox = Mailbox::new(Count::default());
        mailbox.post(1).unwrap();
        assert_eq!(mailbox.close(), [1]);
        assert_eq!(mailbox.post(2), Err(2));
    }
}

/// Every interleaving of two senders and a core that sleeps when it finds nothing: run with
/// `RUSTFLAGS="--cfg loom" cargo test --release --lib mailbox`.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::{Arc, Condvar};

    /// The eventfd: a count that a sleeper waits for. A lost ring shows as a deadlock.
    #[derive(Default)]
    struct Eventfd {
        count: Mutex<usize>,
        rung: Condvar,
    }

    impl Eventfd {
        fn wait(&self) {
            let mut count = self.count.lock().unwrap();
            while *count == 0 {
                count = self.rung.wait(count).unwrap();
            }
            *count = 0;
        }
    }

    impl Bell for Arc<Eventfd> {
        fn ring(&self) {
            *self.count.lock().unwrap() += 1;
            self.rung.notify_one();
        }
    }

    fn run_core(mailbox: &Mailbox<u32, Arc<Eventfd>>, bell: &Eventfd, expected: usize) {
        let mut got = Vec::new();
        while got.len() < expected {
            mailbox.take(&mut got);
            if got.len() < expected && mailbox.fall_asleep() {
                bell.wait();
                mailbox.wake_up();
            }
        }
        got.sort_unstable();
        assert_eq!(got, (0..expected as u32).collect::<Vec<_>>());
    }

    #[test]
    fn no_message_is_lost_and_no_sleeper_forgotten() {
        loom::model(|| {
            let bell = Arc::new(Eventfd::default());
            let mailbox = Arc::new(Mailbox::new(Arc::clone(&bell)));
            let senders: Vec<_> = (0..2)
                .map(|n| {
                    let mailbox = Arc::clone(&mailbox);
                    loom::thread::spawn(move || mailbox.post(n).unwrap())
                })
                .collect();
            run_core(&mailbox, &bell, 2);
            for sender in senders {
                sender.join().unwrap();
            }
        });
    }

    #[test]
    fn a_sender_of_two_wakes_a_core_that_slept_between_them() {
        loom::model(|| {
            let bell = Arc::new(Eventfd::default());
            let mailbox = Arc::new(Mailbox::new(Arc::clone(&bell)));
            let sender = {
                let mailbox = Arc::clone(&mailbox);
                loom::thread::spawn(move || {
                    mailbox.post(0).unwrap();
                    mailbox.post(1).unwrap();
                })
            };
            run_core(&mailbox, &bell, 2);
            sender.join().unwrap();
        });
    }

    #[test]
    fn a_core_wakes_for_several_messages_at_once() {
        loom::model(|| {
            let bell = Arc::new(Eventfd::default());
            let mailbox = Arc::new(Mailbox::new(Arc::clone(&bell)));
            let senders: Vec<_> = [vec![0, 1], vec![2]]
                .into_iter()
                .map(|mut messages| {
                    let mailbox = Arc::clone(&mailbox);
                    loom::thread::spawn(move || assert!(mailbox.post_all(&mut messages)))
                })
                .collect();
            run_core(&mailbox, &bell, 3);
            for sender in senders {
                sender.join().unwrap();
            }
        });
    }

    #[test]
    fn a_core_that_spins_before_it_sleeps_hears_of_the_message() {
        loom::model(|| {
            let bell = Arc::new(Eventfd::default());
            let mailbox = Arc::new(Mailbox::new(Arc::clone(&bell)));
            let sender = {
                let mailbox = Arc::clone(&mailbox);
                loom::thread::spawn(move || mailbox.post(0).unwrap())
            };
            let spun = (0..2).any(|_| mailbox.has_mail());
            if spun {
                assert_eq!(*bell.count.lock().unwrap(), 0, "nobody rings for one who is up");
            }
            run_core(&mailbox, &bell, 1);
            sender.join().unwrap();
        });
    }

    #[test]
    fn a_message_is_either_delivered_or_given_back_at_the_close() {
        loom::model(|| {
            let mailbox = Arc::new(Mailbox::new(Arc::new(Eventfd::default())));
            let sender = {
                let mailbox = Arc::clone(&mailbox);
                loom::thread::spawn(move || mailbox.post(7).is_ok())
            };
            let mut got = Vec::new();
            mailbox.take(&mut got);
            got.extend(mailbox.close());
            assert_eq!(sender.join().unwrap(), got == [7]);
        });
    }
}
