//! SIGTERM and SIGINT as orders to drain, for a server that asks for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::control::Control;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::signal::SignalBell;

/// Turns signals into orders, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Signals {
    bell: Arc<SignalBell>,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    pub(crate) fn install(control: &Arc<Control>, drain_within: Duration) -> Result<Signals> {
        let bell = SignalBell::install(&[libc::SIGTERM, libc::SIGINT]).map_err(|error| {
            Error::os("handle SIGTERM and SIGINT", error)
                .with_kind(ErrorKind::Misuse)
                .because("signals belong to the process; one server at a time may ask for them")
        })?;
        let (bell, done) = (Arc::new(bell), Arc::new(AtomicBool::new(false)));
        let (control, shared, ended) = (Arc::clone(control), Arc::clone(&bell), Arc::clone(&done));
        let listen = move || {
            let mut signals = 0;
            while let Ok(count) = shared.bell().wait() {
                if ended.load(Ordering::Acquire) {
                    return;
                }
                if count == 0 {
                    continue;
                }
                signals += count;
                control.begin_drain(if signals == 1 { drain_within } else { Duration::ZERO });
            }
        };
        let thread = thread::Builder::new().name("slipring-signals".to_owned()).spawn(listen);
        let thread = thread.map_err(|error| Error::os("start the signals' thread", error))?;
        Ok(Signals { bell, done, thread: Some(thread) })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        self.bell.bell().ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
