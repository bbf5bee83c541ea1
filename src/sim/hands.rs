//! What the tests that drive a simulated world by hand have in common.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

use super::peer::Peer;
use super::rig::Rig;
use crate::conn::Connection;
use crate::drain::Phase;
use crate::entry::Entry;
use crate::error::{Error, ErrorKind, Result};
use crate::table::Id;
use crate::token::Kind;

/// What the handlers of a test have seen.
#[derive(Clone, Default)]
pub(super) struct Heard {
    texts: Rc<RefCell<Vec<Vec<u8>>>>,
    errors: Rc<RefCell<Vec<ErrorKind>>>,
}

impl Heard {
    pub(super) fn hear(&self, text: &[u8]) {
        self.texts.borrow_mut().push(text.to_vec());
    }

    pub(super) fn fail(&self, error: &Error) {
        self.errors.borrow_mut().push(error.kind());
    }

    /// What was received since this was last asked, piece by piece.
    pub(super) fn take(&self) -> Vec<Vec<u8>> {
        self.texts.take()
    }

    pub(super) fn errors(&self) -> Vec<ErrorKind> {
        self.errors.take()
    }

    pub(super) async fn read_all(&self, mut conn: Connection) -> Result<()> {
        while let Some(chunk) = conn.recv().await.inspect_err(|error| self.fail(error))? {
            self.hear(&chunk);
        }
        Ok(())
    }

    pub(super) fn reads_all(&self) -> impl Fn(Connection) -> LocalBoxed + 'static {
        let heard = self.clone();
        move |conn| {
            let heard = heard.clone();
            Box::pin(async move { heard.read_all(conn).await })
        }
    }
}

type LocalBoxed = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Keeps handlers waiting until it is opened.
#[derive(Clone, Default)]
pub(super) struct Gate {
    is_open: Rc<Cell<bool>>,
    waiting: Rc<RefCell<Vec<Waker>>>,
}

impl Gate {
    pub(super) fn open(&self) {
        self.is_open.set(true);
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    pub(super) async fn passed(&self) {
        poll_fn(|cx| {
            if self.is_open.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Turns until nothing more follows from what has happened.
pub(super) fn settle(rig: &Rig) {
    for _ in 0..5 {
        rig.turn();
    }
}

/// A peer connects, and is accepted.
pub(super) fn connect(rig: &Rig) -> Id {
    let before: Vec<Id> = rig.core.borrow_mut().table.ids().collect();
    rig.world.borrow_mut().arrive(Peer::by_hand());
    rig.world.borrow_mut().work_on(Kind::Accept);
    settle(rig);
    let core = rig.core.borrow_mut();
    let id = core.table.ids().find(|id| !before.contains(id));
    id.expect("it is in the table")
}

/// Every peer sends, and the latest receive hears it.
pub(super) fn say(rig: &Rig, text: &[u8]) {
    rig.world.borrow_mut().peers().for_each(|peer| peer.say(text));
    rig.world.borrow_mut().work_on(Kind::Receive);
    settle(rig);
}

/// The only peer ends its side, and its handler follows.
pub(super) fn hang_up(rig: &Rig) {
    rig.world.borrow_mut().peers().for_each(Peer::half_close);
    rig.world.borrow_mut().work_on(Kind::Receive);
    settle(rig);
    assert_eq!(rig.stats().live, 0, "the connection has ended");
}

/// Lets time pass, 10 ms a turn, until it is so.
pub(super) fn pass_until(rig: &Rig, is: &dyn Fn() -> bool) {
    for _ in 0..10_000 {
        if is() {
            return;
        }
        rig.world.borrow_mut().pass_ms(10);
        rig.turn();
    }
    panic!("it never came");
}

/// Lets time pass, 10 ms a turn, until the wheel is about to remind the core of something, at
/// `from_ms` or later. The core has not heard of that moment yet.
pub(super) fn pass_until_reminded(rig: &Rig, from_ms: u64) {
    loop {
        let next_ms = rig.core.borrow_mut().wheel.next_expiry_ms().expect("there is something");
        let left_ms = next_ms.saturating_sub(rig.world.borrow().now_ns() / 1_000_000);
        rig.world.borrow_mut().pass_ms(left_ms.min(10));
        if left_ms <= 10 && next_ms >= from_ms {
            return;
        }
        rig.turn();
    }
}

/// Everything that is in flight on connections comes to its end.
pub(super) fn end_operations(rig: &Rig) {
    for _ in 0..10 {
        for kind in [Kind::Send, Kind::Cancel, Kind::Receive, Kind::Hangup] {
            if rig.world.borrow().in_flight(kind) > 0 {
                rig.world.borrow_mut().work_on(kind);
                settle(rig);
            }
        }
    }
}

/// Looks at a connection that is still there.
pub(super) fn entry(rig: &Rig, id: Id, look: impl FnOnce(&Entry)) {
    look(rig.core.borrow_mut().table.get(id).expect("it is still there"));
}

/// A second of a drain passes, and its listener is closed; what else is in flight stays so.
pub(super) fn drain_for_a_second(rig: &Rig) {
    rig.control.begin_drain_at(rig.world.borrow().now_ns() + 10_000_000_000);
    for _ in 0..100 {
        rig.world.borrow_mut().pass_ms(10);
        assert!(rig.turn(), "it is down already");
        for kind in [Kind::Cancel, Kind::Accept] {
            rig.world.borrow_mut().work_on_all(kind);
        }
    }
    assert_eq!(rig.core.borrow_mut().drain.phase(), Phase::DrainConnections);
}

/// The kernel works by itself again, and the core drains.
pub(super) fn finish(rig: &Rig) {
    rig.world.borrow_mut().orders.by_hand = false;
    rig.drain(1_000);
}
