//! What the service manager is told (sd_notify(3)): ready, stopping, how long that may take, where
//! the server stands, and that its cores turn. By one thread, which only a server has that asks for
//! it, under a manager that wants to know.

use std::env;
use std::fmt::Write;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use super::beat::{Act, Beat};
use crate::control::Control;
use crate::drain::Phase;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::guarded;
use crate::post::Message;
use crate::report::CloseReason;
use crate::running::Running;
use crate::server::Server;

/// Who hears of what could not be told; see [`Server::notify_systemd`].
pub(crate) type NotifyHook = dyn Fn(&Error) + Send + Sync;

impl Server {
    /// Tells the service manager how the server fares, where `NOTIFY_SOCKET` names one that listens
    /// (sd_notify(3), `Type=notify` in a unit); elsewhere it does nothing. The variables are read
    /// when the server starts.
    ///
    /// * `READY=1` when every core accepts; [`Server::start`] returns after that.
    /// * `STOPPING=1` when a drain begins, and each second until its end `EXTEND_TIMEOUT_USEC=` of
    ///   what is left of the drain's time and 5 s more, so that a `TimeoutStopSec=` that is shorter
    ///   cuts no drain off.
    /// * `STATUS=` with the phase and the connections that are left.
    /// * `WATCHDOG=1` after each half of `WATCHDOG_USEC` (`WatchdogSec=` in a unit), but only when
    ///   every core has made a turn since the last one; a core that sleeps is woken for that. While
    ///   one is kept by a handler it is not sent, and the manager restarts the service in the end.
    ///
    /// It is done by a thread that waits for the manager no longer than a second at a time; no core
    /// does. What can't be sent after the start is told to `on_error`, once until it works again.
    ///
    /// # Errors
    /// [`Server::start`] fails with [`ErrorKind::Config`] when a variable is malformed, with
    /// [`ErrorKind::Unsupported`] for a socket that is not `AF_UNIX`, with
    /// [`ErrorKind::Panicked`] when a core fails before all of them accept, and with what the
    /// kernel answers when `READY=1` can't be sent.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(server: slipring::Server) {
    /// let server = server.notify_systemd(|error| eprintln!("{error}"));
    /// # }
    /// ```
    pub fn notify_systemd<F>(mut self, on_error: F) -> Server
    where
        F: Fn(&Error) + Send + Sync + 'static,
    {
        self.on_notify_error = Some(Arc::new(on_error));
        self
    }
}

/// The way to the service manager.
#[derive(Debug)]
pub(crate) struct Notifier {
    socket: UnixDatagram,
    manager: SocketAddr,
    /// After how long without a word the manager takes the service for dead.
    patience: Option<Duration>,
}

impl Notifier {
    /// `None` where there is no manager that wants to know.
    ///
    /// # Errors
    /// When the variables make no sense, or nobody listens there.
    pub(crate) fn from_env() -> Result<Option<Notifier>> {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let operation = || format!("reach NOTIFY_SOCKET {name:?}");
        let failed = |error| {
            Error::os(operation(), error)
                .because("the service manager has to listen there; unset it to run without one")
        };
        let manager = match name.as_bytes() {
            [b'/', ..] => SocketAddr::from_pathname(Path::new(&name)).map_err(failed)?,
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name).map_err(failed)?,
            _ => {
                return Err(Error::new(ErrorKind::Unsupported, operation())
                    .because("expected a path, or @ and an abstract name (sd_notify(3))"));
            }
        };
        let probe = UnixDatagram::unbound().map_err(failed)?;
        probe.connect_addr(&manager).map_err(failed)?;
        let socket = UnixDatagram::unbound().map_err(failed)?;
        socket.set_write_timeout(Some(SEND_TIME_MAX)).map_err(failed)?;
        Ok(Some(Notifier { socket, manager, patience: patience()? }))
    }

    fn tell(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        let mut message = String::new();
        for state in states {
            // A string takes whatever is written.
            let _ = writeln!(message, "{state}");
        }
        self.socket.send_to_addr(message.as_bytes(), &self.manager).map(drop)
    }
}

/// What `WATCHDOG_USEC` says, if it is meant for this process (sd_watchdog_enabled(3)).
fn patience() -> Result<Option<Duration>> {
    let read = |name: &str| {
        let Some(text) = env::var_os(name) else { return Ok(None) };
        let number = text.to_str().and_then(|text| text.parse::<u64>().ok());
        number.filter(|number| *number > 0).map(Some).ok_or_else(|| {
            Error::new(ErrorKind::Config, format!("read {name}={text:?}"))
                .because("expected a number above 0, as a service manager sets it")
        })
    };
    let (usec, pid) = (read("WATCHDOG_USEC")?, read("WATCHDOG_PID")?);
    let ours = pid.is_none_or(|pid| pid == u64::from(std::process::id()));
    Ok(usec.filter(|_| ours).map(Duration::from_micros))
}

/// Reads where the service manager listens, if the server is to notify one.
///
/// # Errors
/// As [`Notifier::from_env`].
pub(crate) fn prepare(on_error: Option<Arc<NotifyHook>>) -> Result<Option<Prepared>> {
    let Some(on_error) = on_error else { return Ok(None) };
    Ok(Notifier::from_env()?.map(|notifier| Prepared { notifier, on_error }))
}

/// Starts to notify, and returns when the manager knows that the server is ready. A server of which
/// it can't be told is ended again.
///
/// # Errors
/// When it can't be told, or a core does not get to accept.
pub(crate) fn accompany(mut running: Running, prepared: Option<Prepared>) -> Result<Running> {
    let Some(prepared) = prepared else { return Ok(running) };
    match start(&running.handle.control, prepared) {
        Ok(thread) => {
            running.beside.push(thread);
            Ok(running)
        }
        Err(error) => {
            running.handle.close();
            // The cause is the error that is on its way already.
            let _ = running.join();
            Err(error)
        }
    }
}

/// What it takes to notify.
pub(crate) struct Prepared {
    notifier: Notifier,
    on_error: Arc<NotifyHook>,
}

fn start(control: &Arc<Control>, prepared: Prepared) -> Result<JoinHandle<()>> {
    let Prepared { notifier, on_error } = prepared;
    let (sender, ready) = channel();
    let herald = Herald { control: Arc::clone(control), notifier, on_error, failing: false };
    let thread = thread::Builder::new().name("slipring-notify".to_owned());
    let thread = thread.spawn(move || herald.live(&sender)).map_err(|error| {
        Error::os("start the notifier's thread", error).with_kind(ErrorKind::Resource)
    })?;
    match ready.recv() {
        Ok(Err(error)) => {
            // It has nothing left to do.
            let _ = thread.join();
            Err(error)
        }
        // Where the thread has no word to say, the server has ended already.
        Ok(Ok(())) | Err(_) => Ok(thread),
    }
}

/// Who tells.
struct Herald {
    control: Arc<Control>,
    notifier: Notifier,
    on_error: Arc<NotifyHook>,
    /// The last message could not be sent.
    failing: bool,
}

impl Herald {
    fn live(mut self, ready: &Sender<Result<()>>) {
        let told = self.cores_are_up().and_then(|up| {
            if !up {
                return Ok(());
            }
            let cores = self.control.seats().len();
            let status = format!("serving on {cores} cores");
            self.notifier
                .tell(&[NotifyState::Ready, NotifyState::Status(&status)])
                .map_err(|error| Error::os("tell the service manager READY=1", error))
        });
        let failed = told.is_err();
        let _ = ready.send(told);
        if failed {
            return;
        }
        let mut beat = self.notifier.patience.map(|patience| Beat::new(patience, Instant::now()));
        let mut drain = u64::MAX;
        let mut next_status = Instant::now();
        loop {
            let deadline_ns = self.control.deadline_ns();
            if deadline_ns != u64::MAX && (deadline_ns != drain || Instant::now() >= next_status) {
                self.tell_of_drain(deadline_ns, drain == u64::MAX);
                (drain, next_status) = (deadline_ns, Instant::now() + STATUS_EVERY);
            }
            let mut wait = if drain == u64::MAX { Duration::MAX } else { STATUS_EVERY };
            if let Some(beat) = &mut beat {
                wait = wait.min(self.beat(beat));
            }
            if self.control.has_ended_or_is_ordered(drain, wait) {
                break;
            }
        }
        self.tell_of_end();
    }

    /// Every core has made a turn, so it accepts. False when one has ended before, by a drain.
    fn cores_are_up(&self) -> Result<bool> {
        let give_up = Instant::now() + UP_TIME_MAX;
        while self.control.turns().contains(&Some(0)) {
            if Instant::now() >= give_up {
                return Err(Error::new(ErrorKind::Resource, "wait until every core accepts")
                    .because(format!("one did not within {} s", UP_TIME_MAX.as_secs())));
            }
            self.control.has_ended_within(UP_STEP);
        }
        match self.control.failure() {
            Some(failure) => Err(Error::new(ErrorKind::Panicked, "start a core").because(failure)),
            None => Ok(self.control.turns().iter().all(Option::is_some)),
        }
    }

    /// Asks the cores for a turn and tells the watchdog, as it is due. Returns when to look again.
    fn beat(&mut self, beat: &mut Beat) -> Duration {
        loop {
            match beat.act(Instant::now(), &self.control.turns()) {
                Act::Ask => {
                    for seat in self.control.seats() {
                        // One that has ended needs no asking.
                        let _ = seat.post.post(Message::Look);
                    }
                }
                Act::Tell => self.tell(&[NotifyState::Watchdog]),
                Act::Wait(time) => return time,
            }
        }
    }

    fn tell_of_drain(&mut self, deadline_ns: u64, first: bool) {
        let now_ns = self.control.epoch().elapsed().as_nanos();
        let left = Duration::from_nanos(deadline_ns.saturating_sub(now_ns as u64));
        let live = self.control.stats().total().live;
        let phase = match self.control.phase() {
            Phase::Running | Phase::LameDuck => "still accepting",
            Phase::StopAccept => "stops accepting",
            Phase::DrainConnections => "connections finish",
            Phase::Force | Phase::Down => "ends what is left",
        };
        let seconds = left.as_secs_f64();
        let status = format!("draining, {phase}: {live} connections left, {seconds:.1} s at most");
        let usec = u32::try_from((left + AFTERWARDS).as_micros()).unwrap_or(u32::MAX);
        let extend = NotifyState::ExtendTimeoutUsec(usec);
        let all = [NotifyState::Stopping, extend, NotifyState::Status(&status)];
        self.tell(if first { &all } else { &all[1..] });
    }

    fn tell_of_end(&mut self) {
        let total = self.control.stats().total();
        let (served, forced) = (total.closed.total(), total.closed.get(CloseReason::Forced));
        let stuck = self.control.turns().iter().flatten().count();
        let status = if stuck > 0 {
            format!("{stuck} cores did not end in time; their connections are cut off")
        } else {
            format!("drained: {served} connections closed, {forced} of them forced")
        };
        self.tell(&[NotifyState::Status(&status)]);
    }

    fn tell(&mut self, states: &[NotifyState<'_>]) {
        match self.notifier.tell(states) {
            Ok(()) => self.failing = false,
            Err(error) => {
                let error = Error::os("notify the service manager", error);
                if !std::mem::replace(&mut self.failing, true) {
                    // It is anyone's code; what it throws is its own.
                    guarded(|| (self.on_error)(&error));
                }
            }
        }
    }
}

/// How long the manager may take no message before it counts as failed.
const SEND_TIME_MAX: Duration = Duration::from_secs(1);
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// For what the program does after the drain.
const AFTERWARDS: Duration = Duration::from_secs(5);
const UP_TIME_MAX: Duration = Duration::from_secs(10);
const UP_STEP: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Seat;
    use crate::post::{CoreBell, PostBox};
    use crate::report::CoreReport;

    /// A server of one core, that manager's word of it, and whether it counts as started.
    fn start_with(name: &str, end: CoreReport) -> (Result<()>, String) {
        let name = format!("slipring-notify-{}-{name}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let hears = UnixDatagram::bind_addr(&address).expect("bind");
        let seat = Seat { cpu: 0, post: PostBox::new(CoreBell::Silent), counters: Arc::default() };
        let control = Arc::new(Control::new(crate::sys::clock::Epoch::now(), vec![seat]));
        control.begin_drain(Duration::from_secs(5));
        control.report(0, end);
        let socket = UnixDatagram::unbound().expect("a socket");
        let notifier = Notifier { socket, manager: address, patience: None };
        let on_error: Arc<NotifyHook> = Arc::new(|error| panic!("{error}"));
        let started = start(&control, Prepared { notifier, on_error });
        let started = started.map(|thread| thread.join().expect("no panic"));
        hears.set_nonblocking(true).expect("set it");
        let (mut heard, mut message) = (String::new(), [0; 1_000]);
        while let Ok(bytes) = hears.recv(&mut message) {
            heard += &String::from_utf8_lossy(&message[..bytes]);
        }
        (started, heard)
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no such sockets")]
    fn a_core_that_ends_before_its_first_turn_is_not_ready() {
        let failure = Some("no buffers".to_owned());
        let (started, heard) = start_with("failed", CoreReport { failure, ..<_>::default() });
        let error = started.expect_err("a core has failed");
        assert_eq!(error.kind(), ErrorKind::Panicked);
        assert!(error.to_string().contains("no buffers"), "{error}");
        assert_eq!(heard, "");

        let (started, heard) = start_with("drained", CoreReport::default());
        started.expect("a drain is no failure");
        assert!(!heard.contains("READY=1") && heard.contains("drained"), "{heard}");
    }
}
