//! Which core a thread is.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::core::CoreRef;
use crate::error::{Error, ErrorKind, Result};
use crate::waker::set_local_core;

thread_local! {
    static CURRENT: RefCell<Option<CoreRef>> = const { RefCell::new(None) };
    static ENTERED: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, this thread is that core's.
#[derive(Debug)]
pub(crate) struct Entered(CoreRef);

impl Entered {
    pub(crate) fn new(core: &CoreRef) -> Entered {
        assert!(!ENTERED.replace(true), "one core a thread");
        CURRENT.with(|current| *current.borrow_mut() = Some(Rc::clone(core)));
        set_local_core(Some(core.serial()));
        Entered(Rc::clone(core))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.borrow_mut().tasks.collect_local_wakes();
        set_local_core(None);
        CURRENT.with(|current| current.borrow_mut().take());
        ENTERED.set(false);
    }
}

/// The core of this thread.
pub(crate) fn current(operation: &'static str) -> Result<CoreRef> {
    let core = CURRENT.try_with(|current| current.borrow().clone());
    core.ok().flatten().ok_or_else(|| {
        Error::new(ErrorKind::Misuse, operation)
            .because("this thread is no core of a slipring server; call it from a handler or task")
    })
}

/// Whether this thread is a core.
pub(crate) fn is_core_thread() -> bool {
    ENTERED.get()
}
