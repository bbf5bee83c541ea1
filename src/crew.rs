//! The cores' threads: how they start together, and the whole life of each.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::caps::{Lease, Places};
use crate::config::Settings;
use crate::control::Control;
use crate::core::{Core, CoreRef};
use crate::cores::{StateMaker, States};
use crate::driver::{Driver, Socket};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{guarded, panic_text};
use crate::hooks::Hook;
use crate::listen::Listener;
use crate::local::Entered;
use crate::machine::Facts;
use crate::refusal;
use crate::report::CoreReport;
use crate::server::{CoreInfo, Maker};
use crate::share::Share;
use crate::sys::affinity;
use crate::sys::uring::{RingSetup, Uring};
use crate::sys::wake::EventFd;
use crate::udp::{bind::UdpShare, serve::UdpEndpoint};

/// What a core's thread is started with.
pub(crate) struct Seed {
    pub(crate) info: CoreInfo,
    pub(crate) settings: Settings,
    pub(crate) pin: bool,
    pub(crate) bell: Arc<EventFd>,
    pub(crate) control: Arc<Control>,
    pub(crate) places: Arc<Places>,
    pub(crate) makers: Vec<Maker>,
    pub(crate) drain_within: Duration,
    pub(crate) hooks: Vec<Hook>,
    pub(crate) states: Vec<StateMaker>,
    /// What its thread is called, if the server is a part of another one.
    pub(crate) part: Option<&'static str>,
    pub(crate) udp: Vec<UdpEndpoint>,
}

/// One core's listeners, and its UDP sockets.
pub(crate) type Sockets = (Vec<Share>, Vec<UdpShare>);

impl Seed {
    /// The whole life of a core.
    fn live(mut self, ready: &Sender<Result<()>>, go: &Receiver<Sockets>) {
        let core = match self.make_core() {
            Ok(core) => core,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let states = States::make(&self.states, &self.info);
        let handlers: Vec<_> =
            self.makers.iter().map(|it| ((it.make)(&self.info), it.clone())).collect();
        let services: Vec<_> = self.udp.iter().map(|it| it.make(&self.info)).collect();
        let _ = ready.send(Ok(()));
        // No word means that another core could not be started.
        let Ok((shares, udp)) = go.recv() else { return };
        {
            let mut core = core.borrow_mut();
            (core.info, core.hooks) = (self.info, std::mem::take(&mut self.hooks));
            core.states = states;
            for share in shares {
                let (handler, maker) = &handlers[share.endpoint];
                let socket = Socket::Os(share.socket);
                let listener = Listener::new(socket, Rc::clone(handler), maker.place)
                    .with_heartbeat(maker.heartbeat.clone())
                    .in_group(share.membership)
                    .left_to(share.kept);
                core.listeners.push(listener);
            }
            // The listeners have them, until the core is down.
            drop(handlers);
        }
        let failure = self.serve(&core, || {
            let mut services = services.into_iter().zip(udp);
            services.try_for_each(|(service, share)| service.start(&core, share))
        });
        let account = core.borrow_mut().account();
        drop(core);
        // What the handlers' makers hold is anyone's, and may take its time to go.
        let states = std::mem::take(&mut self.states);
        let makers = (std::mem::take(&mut self.makers), std::mem::take(&mut self.udp), states);
        guarded(move || drop(makers));
        let cpu = self.info.cpu;
        let report = CoreReport { cpu, failure, ..account };
        self.control.report(self.info.index, report);
    }

    fn make_core(&self) -> Result<CoreRef> {
        if self.pin {
            affinity::pin(self.info.cpu).map_err(|error| {
                Error::os(format!("pin a core to CPU {}", self.info.cpu), error)
                    .because("SLIPRING_PIN=0 runs the cores unpinned")
            })?;
        }
        let setup = RingSetup {
            sq_entries: self.settings.sq_entries,
            cq_entries: self.settings.cq_entries,
            buffers: self.settings.buffers as u16,
            buffer_bytes: self.settings.buffer_bytes,
            large_buffers: self.settings.large_buffers_made() as u16,
            large_buffer_bytes: self.settings.large_buffer_bytes,
            files: (self.settings.connections_max as u32).min(FILES_MAX),
        };
        let epoch = self.control.epoch();
        let uring =
            refusal::retry_without_memory(|| Uring::new(setup, Arc::clone(&self.bell), epoch));
        let uring =
            uring.map_err(|error| refusal::explain(error, setup.asked(), &Facts::read()))?;
        let seat = &self.control.seats()[self.info.index];
        let lease = Lease::new(Arc::clone(&self.places), self.info.index);
        let (counters, post) = (Arc::clone(&seat.counters), Arc::clone(&seat.post));
        let driver = Driver::Uring(Box::new(uring));
        let control = Arc::clone(&self.control);
        let core = Core::start(driver, self.settings, lease, control, counters, post);
        if !self.udp.is_empty() {
            core.borrow_mut().open_datagrams()?;
        }
        Ok(core)
    }

    /// Turns until the core is down, and closes it. Returns what went wrong, if anything did.
    fn serve(&self, core: &CoreRef, begin: impl FnOnce() -> Result<()>) -> Option<String> {
        let _entered = Entered::new(core);
        core.borrow_mut().start_accept();
        let turned = catch_unwind(AssertUnwindSafe(|| {
            begin()?;
            while core.turn()? {}
            Ok(())
        }));
        let failure = match turned {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Error::to_string(&error)),
            Err(panic) => Some(panic_text(&*panic)),
        };
        if failure.is_some() {
            // A server with a core missing would serve a part of its clients only.
            self.control.begin_drain(self.drain_within);
        }
        let closed = catch_unwind(AssertUnwindSafe(|| core.shut_down()));
        failure.or_else(|| closed.unwrap_or_else(|panic| Some(panic_text(&*panic))))
    }
}

/// The cores' threads while the server starts. Unless all is well they are sent home again.
#[derive(Default)]
pub(crate) struct Crew {
    threads: Vec<JoinHandle<()>>,
    starts: Vec<Sender<Sockets>>,
    ready: Vec<Receiver<Result<()>>>,
}

impl Crew {
    pub(crate) fn hire(&mut self, seed: Seed) -> Result<()> {
        let (ready_sender, ready) = channel();
        let (start, go) = channel();
        let name = seed.part.map_or_else(|| format!("slipring-{}", seed.info.cpu), str::to_owned);
        let thread = thread::Builder::new().name(name);
        let thread = thread.spawn(move || seed.live(&ready_sender, &go));
        self.threads.push(thread.map_err(|error| {
            Error::os("start a core's thread", error).with_kind(ErrorKind::Resource)
        })?);
        self.starts.push(start);
        self.ready.push(ready);
        Ok(())
    }

    pub(crate) fn all_ready(&self) -> Result<()> {
        for ready in &self.ready {
            ready.recv().unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Panicked, "make a core's handlers"))
            })?;
        }
        Ok(())
    }

    pub(crate) fn go(mut self, shares: Vec<Sockets>) -> Vec<JoinHandle<()>> {
        for (start, share) in self.starts.iter().zip(shares) {
            // A core that is gone already is found by `join`.
            let _ = start.send(share);
        }
        std::mem::take(&mut self.threads)
    }
}

/// More places for direct descriptors are not asked for; each takes the kernel eight bytes.
const FILES_MAX: u32 = 16_384;

impl Drop for Crew {
    fn drop(&mut self) {
        self.starts.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
