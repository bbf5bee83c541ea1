//! A future that its own first poll makes, in the room that it takes itself.
//!
//! An `async` block that makes a future and awaits it has room for both, what it is made of and
//! what comes of that, for as long as it lives. Here the one takes the other's place.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Makes a future when it is polled first, and has a function take what that comes to.
pub(crate) struct Lazy<M, F, T> {
    stage: Stage<M, F>,
    then: T,
}

enum Stage<M, F> {
    /// Nothing is left if making it has panicked.
    Unmade(Option<M>),
    Made(F),
}

impl<M, F, T> Lazy<M, F, T>
where
    M: FnOnce() -> F,
    F: Future,
    T: Fn(F::Output),
{
    pub(crate) fn new(make: M, then: T) -> Lazy<M, F, T> {
        Lazy { stage: Stage::Unmade(Some(make)), then }
    }
}

impl<M, F, T> Future for Lazy<M, F, T>
where
    M: FnOnce() -> F,
    F: Future,
    T: Fn(F::Output),
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // SAFETY: only what is not made yet is moved out of it, and that is never pinned.
        let this = unsafe { self.get_unchecked_mut() };
        if let Stage::Unmade(make) = &mut this.stage {
            let make = make.take().expect("not polled again after a panic");
            this.stage = Stage::Made(make());
        }
        let Stage::Made(future) = &mut this.stage else { unreachable!("it was just made") };
        // SAFETY: it is not moved from here until it is dropped, as `self` is pinned.
        let future = unsafe { Pin::new_unchecked(future) };
        (this.then)(ready!(future.poll(cx)));
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::pin::pin;
    use std::rc::Rc;
    use std::task::Waker;

    /// Ready at the second poll, and counts its drop.
    struct Second<'a> {
        polled: bool,
        dropped: &'a Cell<u32>,
        _room: [u64; 8],
    }

    impl Future for Second<'_> {
        type Output = &'static str;

        fn poll(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<&'static str> {
            if std::mem::replace(&mut self.polled, true) {
                return Poll::Ready("done");
            }
            Poll::Pending
        }
    }

    impl Drop for Second<'_> {
        fn drop(&mut self) {
            self.dropped.set(self.dropped.get() + 1);
        }
    }

    #[test]
    fn it_is_made_once_and_at_the_first_poll() {
        let (made, dropped, output) = (Cell::new(0), Cell::new(0), Cell::new(""));
        {
            let make = || {
                made.set(made.get() + 1);
                Second { polled: false, dropped: &dropped, _room: [0; 8] }
            };
            let mut lazy = pin!(Lazy::new(make, |text| output.set(text)));
            let mut cx = Context::from_waker(Waker::noop());
            assert_eq!(made.get(), 0);
            assert!(lazy.as_mut().poll(&mut cx).is_pending() && output.get().is_empty());
            assert!(lazy.as_mut().poll(&mut cx).is_ready());
            assert_eq!((made.get(), output.get(), dropped.get()), (1, "done", 0));
        }
        assert_eq!(dropped.get(), 1);
    }

    #[test]
    fn what_it_would_be_made_of_is_dropped_with_it() {
        let held = Rc::new(());
        let make = {
            let held = Rc::clone(&held);
            move || {
                drop(held);
                std::future::ready(())
            }
        };
        let lazy = Lazy::new(make, |()| ());
        assert_eq!(Rc::strong_count(&held), 2);
        drop(lazy);
        assert_eq!(Rc::strong_count(&held), 1);
    }

    #[test]
    fn it_takes_the_room_of_the_future_and_of_a_mark() {
        struct Words([u64; 9]);

        impl Future for Words {
            type Output = u64;

            fn poll(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<u64> {
                Poll::Ready(self.0[0])
            }
        }

        let words = [7; 9];
        let lazy = Lazy::new(move || Words(words), |_| ());
        assert_eq!(size_of_val(&lazy), size_of_val(&words) + 8);
    }
}
