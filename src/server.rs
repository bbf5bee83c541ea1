//! The control plane: bind all or nothing, start a thread for each core, wait for their end.
//!
//! The order of a start: settings, descriptors' limit, sockets bound, rings made on their
//! threads, handlers made, and only when all of that has worked on every core: listen, accept.
//! The order of an end, on each core: stop accepting, empty the queues, close the listeners, let
//! connections finish, force the rest, see every operation's end, close the ring, report.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "admin")]
use crate::admin::Admin;
use crate::adopt::adopt;
use crate::bind::{Bound, Hook, ListenAddr, bind};
use crate::caps::Places;
use crate::config::{Balance, Config, Settings};
use crate::conn::{self, Connection};
use crate::control::{Belongings, Control, Seat};
use crate::cores::StateMaker;
use crate::crew::{Crew, Seed};
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::hooks::Hook as DrainHook;
use crate::listen::Handler;
use crate::machine::{self, Facts};
use crate::post::{CoreBell, PostBox};
use crate::preflight;
use crate::refuse::REFUSED_MAX;
use crate::report::DrainReport;
use crate::running::Running;
use crate::share::Shares;
use crate::signals::Signals;
use crate::spin::SpinState;
use crate::stats::Counters;
use crate::sys::affinity;
use crate::sys::clock::Epoch;
use crate::sys::limits;
use crate::sys::place::Place;
use crate::sys::wake::EventFd;
use crate::udp::{bind::DealtUdp, serve::UdpEndpoint};
use crate::watchdog::{self, StallHook};

/// A server to be: addresses, their handlers, and how it is to run.
///
/// # Examples
///
/// ```no_run
/// use slipring::{Config, Connection, Server};
///
/// async fn echo(mut conn: Connection) -> slipring::Result<()> {
///     while let Some(chunk) = conn.recv().await? {
///         conn.send(chunk).await?;
///     }
///     Ok(())
/// }
///
/// fn main() -> slipring::Result<()> {
///     let report = Server::new(Config::from_env()?)
///         .listen("127.0.0.1:7000", echo)
///         .drain_on_signals()
///         .run()?;
///     println!("{report}");
///     Ok(())
/// }
/// ```
#[must_use = "a server does nothing until it is run or started"]
pub struct Server {
    config: Config,
    endpoints: Vec<Endpoint>,
    before_bind: Option<Arc<Hook>>,
    signals: bool,
    pub(crate) hooks: Vec<DrainHook>,
    pub(crate) states: Vec<StateMaker>,
    pub(crate) on_stall: Option<Arc<StallHook>>,
    pub(crate) udp: Vec<UdpEndpoint>,
    /// What its threads are called, if it is a part of another server.
    pub(crate) part: Option<&'static str>,
    #[cfg(feature = "admin")]
    pub(crate) admin: Option<Admin>,
    #[cfg(feature = "systemd")]
    pub(crate) on_notify_error: Option<Arc<crate::systemd::NotifyHook>>,
}

struct Endpoint {
    at: At,
    maker: Maker,
}

/// What an endpoint listens on.
enum At {
    Address(String),
    /// Sockets that listen already.
    Sockets(Vec<OwnedFd>),
}

/// What each core makes its share of an address with.
#[derive(Clone)]
pub(crate) struct Maker {
    pub(crate) make: Arc<MakeHandler>,
    pub(crate) place: Place,
    pub(crate) heartbeat: Option<Arc<[u8]>>,
}

pub(crate) type MakeHandler = dyn Fn(&CoreInfo) -> Handler + Send + Sync;

/// The core that a handler is made for; see [`Server::listen_with`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CoreInfo {
    /// Which core of the server it is, from 0.
    pub index: usize,
    /// The CPU it was started for.
    pub cpu: u16,
    /// How many cores the server has.
    pub cores: usize,
}

impl Server {
    /// A server without addresses.
    pub fn new(config: Config) -> Server {
        Server {
            config,
            endpoints: Vec::new(),
            before_bind: None,
            signals: false,
            hooks: Vec::new(),
            states: Vec::new(),
            on_stall: None,
            udp: Vec::new(),
            part: None,
            #[cfg(feature = "admin")]
            admin: None,
            #[cfg(feature = "systemd")]
            on_notify_error: None,
        }
    }

    /// Serves an address with a handler that runs once for each connection, on the core that
    /// [`Balance`] has chosen. The address has a form of [`ListenAddr::parse`].
    #[track_caller]
    pub fn listen<H, F>(self, addr: impl Into<String>, handler: H) -> Server
    where
        H: Fn(Connection) -> F + Send + Sync + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        let handler = Arc::new(handler);
        self.endpoint(At::Address(addr.into()), move |_| {
            let handler = Arc::clone(&handler);
            conn::handler(move |conn| handler(conn))
        })
    }

    /// Serves an address with a handler that is made on each core, so that it can own state of
    /// that core which needs no lock.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::{cell::Cell, rc::Rc};
    /// use slipring::{Config, Connection, Server};
    ///
    /// # fn main() -> slipring::Result<()> {
    /// let server = Server::new(Config::default()).listen_with("127.0.0.1:7000", |_core| {
    ///     let served = Rc::new(Cell::new(0u64));
    ///     move |mut conn: Connection| {
    ///         let served = Rc::clone(&served);
    ///         async move {
    ///             served.set(served.get() + 1);
    ///             conn.send(format!("you are number {}\n", served.get())).await
    ///         }
    ///     }
    /// });
    /// # server.run().map(drop)
    /// # }
    /// ```
    #[track_caller]
    pub fn listen_with<M, H, F>(self, addr: impl Into<String>, make: M) -> Server
    where
        M: Fn(&CoreInfo) -> H + Send + Sync + 'static,
        H: Fn(Connection) -> F + 'static,
        F: Future<Output = Result<()>> + 'static,
    {
        self.endpoint(At::Address(addr.into()), move |core| conn::handler(make(core)))
    }

    /// Asks silent peers of the address listed last for a sign of life, with a frame that the
    /// protocol answers, such as its ping.
    ///
    /// It is sent when nothing was received for `SLIPRING_HEARTBEAT_MS` (0, the default, sends
    /// none) and the handler waits for input, never behind output that the peer has not taken and
    /// never before the first byte. Any byte received is a sign of life; a connection that gives
    /// none within `SLIPRING_HEARTBEAT_TIMEOUT_MS` is ended. When the process itself was paused,
    /// its peers get one more period. The handler sees the answers like all input.
    ///
    /// The frame may come between any two of the handler's writes, so a handler that writes a
    /// message in pieces while it reads, as one with both halves may, writes it in one call
    /// instead.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use slipring::{Config, Connection, Server};
    /// # async fn chat(conn: Connection) -> slipring::Result<()> { Ok(()) }
    /// # fn main() -> slipring::Result<()> {
    /// let config = Config::default().heartbeat_ms(15_000);
    /// Server::new(config).listen("127.0.0.1:7000", chat).heartbeat(b"PING\n").run().map(drop)
    /// # }
    /// ```
    pub fn heartbeat(mut self, frame: impl AsRef<[u8]>) -> Server {
        if let Some(endpoint) = self.endpoints.last_mut() {
            endpoint.maker.heartbeat = Some(Arc::from(frame.as_ref()));
        }
        self
    }

    /// Calls `hook` with each listening and UDP socket before it is bound, to set any option; what
    /// is set there is inherited by the accepted connections (except where socket(7) and tcp(7)
    /// say otherwise). `SO_REUSEADDR`, `SO_REUSEPORT` and what the configuration names are set
    /// before.
    pub fn before_bind<B>(mut self, hook: B) -> Server
    where
        B: Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync + 'static,
    {
        self.before_bind = Some(Arc::new(hook));
        self
    }

    /// Drains on the first SIGTERM or SIGINT, within `SLIPRING_DRAIN_MS`, and forces on the second.
    ///
    /// Signals belong to the whole process: without this call slipring touches none of them.
    pub fn drain_on_signals(mut self) -> Server {
        self.signals = true;
        self
    }

    /// Serves until it is drained, by a signal or a [`Handle`], and returns the account.
    ///
    /// # Errors
    /// As [`Server::start`] and [`Running::join`].
    pub fn run(self) -> Result<DrainReport> {
        self.start()?.join()
    }

    /// Starts to serve and returns at once. When it does, every core accepts.
    ///
    /// # Errors
    /// Nothing is left behind when it fails; the message says what stood in the way.
    /// * [`ErrorKind::Config`]: a value, an address, or a CPU that this process may not use.
    /// * [`ErrorKind::AddressInUse`]: somebody listens there.
    /// * [`ErrorKind::Unsupported`]: io_uring can't be had, or a privilege is missing.
    /// * [`ErrorKind::Resource`]: descriptors, locked memory or threads do not suffice.
    ///
    /// # Kernel
    /// Needs Linux 6.1.
    pub fn start(mut self) -> Result<Running> {
        let mut settings = self.config.settings()?;
        let cpus = self.choose_cpus()?;
        let cores = cpus.len();
        self.check_places(&settings, cores)?;
        let needed = descriptors_needed(&settings, cores, self.listeners() + self.udp.len());
        #[cfg(feature = "admin")]
        let needed = needed + self.admin.as_ref().map_or(0, Admin::descriptors);
        machine::ensure_nofile(needed)?;
        let facts = Facts::read();
        let quota = facts.quota_cpus;
        let pin = machine::pins(settings.pin, quota, cores);
        if settings.balance == Balance::Cpu && !pin {
            return Err(Error::new(ErrorKind::Config, "balance connections by CPU")
                .because(machine::NOT_PINNED));
        }
        let spin = SpinState::judge(&settings, &facts, cores);
        if spin.is_refused() {
            settings.spin_us = 0;
        }

        preflight::check()?;
        #[cfg(feature = "systemd")]
        let herald = crate::systemd::prepare(self.on_notify_error.take())?;

        let mut bound = self.bind_all(cores, &settings)?;
        let hook = self.before_bind.as_deref();
        let udp = DealtUdp::bind(&self.udp, cores, &settings, hook)?;

        let (control, bells) = seats(&cpus, spin)?;
        if self.part.is_some() {
            traced!(control.events.be_quiet());
        }
        let drain_within = Duration::from_millis(settings.drain_ms);
        let makers: Vec<Maker> = self.endpoints.iter().map(|e| e.maker.clone()).collect();
        let places =
            Arc::new(Places::new(settings.connections_max, cores, settings.connections_per_ip_max));
        let mut crew = Crew::default();
        for (index, bell) in bells.into_iter().enumerate() {
            let info = CoreInfo { index, cpu: cpus[index], cores };
            crew.hire(Seed {
                info,
                settings,
                pin,
                bell,
                control: Arc::clone(&control),
                places: Arc::clone(&places),
                makers: makers.clone(),
                drain_within,
                hooks: self.hooks.clone(),
                states: self.states.clone(),
                part: self.part,
                udp: self.udp.clone(),
            })?;
        }
        crew.all_ready()?;
        let signals = self.signals.then(|| Signals::install(&control, drain_within)).transpose()?;

        #[cfg(feature = "admin")]
        let (admin, farewell) = self
            .admin
            .map(|admin| admin.start(Handle::new(Arc::clone(&control), drain_within)))
            .transpose()?
            .unzip();

        for (_, bound) in &mut bound {
            bound.listen()?;
        }
        let addrs: Vec<_> = bound.iter().map(|(_, bound)| bound.addr.clone()).collect();
        let files = bound.iter_mut().filter_map(|(_, bound)| bound.file.take()).collect();
        let by_cpu = (settings.balance == Balance::Cpu).then_some(&cpus[..]);
        let shares = Shares::deal(bound, cores, by_cpu)?;
        control.set_listeners(shares.addrs, shares.kept);
        let hook = self.on_stall.filter(|_| settings.stall_ms > 0);
        let watchdog = hook.map(|hook| watchdog::start(&control, hook, settings.stall_ms));
        let beside = watchdog.transpose()?.into_iter().collect();
        control.keep(Belongings {
            signals,
            files,
            #[cfg(feature = "admin")]
            admin: farewell,
        });
        let threads = crew.go(shares.cores.into_iter().zip(udp.cores).collect());
        traced!(control.events.started(&self.config, &addrs, &cpus, pin, spin));
        let handle = Handle::new(control, drain_within);
        let running = Running {
            handle,
            threads,
            beside,
            addrs,
            udp_addrs: udp.addrs,
            #[cfg(feature = "admin")]
            admin,
        };
        #[cfg(feature = "systemd")]
        let running = crate::systemd::accompany(running, herald)?;
        Ok(running)
    }

    #[track_caller]
    pub(crate) fn endpoint_on<M>(self, sockets: Vec<OwnedFd>, make: M) -> Server
    where
        M: Fn(&CoreInfo) -> Handler + Send + Sync + 'static,
    {
        self.endpoint(At::Sockets(sockets), make)
    }

    #[track_caller]
    fn endpoint<M>(mut self, at: At, make: M) -> Server
    where
        M: Fn(&CoreInfo) -> Handler + Send + Sync + 'static,
    {
        let maker = Maker { make: Arc::new(make), place: Location::caller(), heartbeat: None };
        self.endpoints.push(Endpoint { at, maker });
        self
    }

    /// What each endpoint listens on, with its number: every address once, and all or nothing.
    fn bind_all(&mut self, cores: usize, settings: &Settings) -> Result<Vec<(usize, Bound)>> {
        let mut addrs = Vec::with_capacity(self.endpoints.len());
        for endpoint in &self.endpoints {
            let At::Address(text) = &endpoint.at else { continue };
            let addr = ListenAddr::parse(text)?;
            let any_port = matches!(addr, ListenAddr::Tcp(tcp) if tcp.port() == 0);
            if !any_port && addrs.contains(&addr) {
                return Err(Error::new(ErrorKind::AddressInUse, format!("bind {addr}"))
                    .because("the server was told to listen there twice"));
            }
            addrs.push(addr);
        }
        let (mut all, mut addrs) = (Vec::with_capacity(self.endpoints.len()), addrs.iter());
        for (index, endpoint) in self.endpoints.iter_mut().enumerate() {
            if let At::Sockets(fds) = &mut endpoint.at {
                let adopted = adopt(std::mem::take(fds), cores, settings)?;
                all.extend(adopted.into_iter().map(|bound| (index, bound)));
            } else if let Some(addr) = addrs.next() {
                all.push((index, bind(addr, cores, settings, self.before_bind.as_deref())?));
            }
        }
        Ok(all)
    }

    /// How many listeners each core has at most.
    fn listeners(&self) -> usize {
        let listeners = |endpoint: &Endpoint| match &endpoint.at {
            At::Address(_) => 1,
            At::Sockets(fds) => fds.len(),
        };
        self.endpoints.iter().map(listeners).sum()
    }

    /// A listener keeps a place for the connection that it waits for.
    fn check_places(&self, settings: &Settings, cores: usize) -> Result<()> {
        let (max, addresses) = (settings.connections_max, self.listeners());
        if cores * addresses <= max {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Config, format!("allow {max} connections")).because(format!(
            "each of {cores} cores waits for one at each of {addresses} addresses; raise \
             SLIPRING_CONNECTIONS_MAX or name fewer SLIPRING_CPUS"
        )))
    }

    fn choose_cpus(&self) -> Result<Vec<u16>> {
        let allowed =
            affinity::allowed().map_err(|error| Error::os("read the affinity mask", error))?;
        let Some(asked) = self.config.cpu_list()? else {
            return Ok(machine::default_cpus(&allowed, Facts::read().quota_cpus));
        };
        let pinned = self.config.settings()?.pin != Some(false);
        match asked.iter().find(|cpu| pinned && !allowed.contains(cpu)) {
            None => Ok(asked),
            Some(cpu) => {
                Err(Error::new(ErrorKind::Config, format!("use CPU {cpu}")).because(format!(
                    "this process may run on CPUs {} only; see SLIPRING_CPUS and taskset(1)",
                    machine::cpu_list(&allowed)
                )))
            }
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addrs = self.endpoints.iter().map(|endpoint| match &endpoint.at {
            At::Address(addr) => addr.clone(),
            At::Sockets(fds) => format!("{fds:?}"),
        });
        let addrs: Vec<String> = addrs.collect();
        f.debug_struct("Server").field("listen", &addrs).finish_non_exhaustive()
    }
}

fn seats(cpus: &[u16], spin: SpinState) -> Result<(Arc<Control>, Vec<Arc<EventFd>>)> {
    let mut bells = Vec::with_capacity(cpus.len());
    let mut seats = Vec::with_capacity(cpus.len());
    for &cpu in cpus {
        let bell = EventFd::new().map_err(|error| Error::os("create an eventfd", error))?;
        let bell = Arc::new(bell);
        let post = PostBox::new(CoreBell::EventFd(Arc::clone(&bell)));
        let counters = Arc::new(Counters::default());
        counters.spin.set(spin as u64);
        seats.push(Seat { cpu, post, counters });
        bells.push(bell);
    }
    Ok((Arc::new(Control::new(Epoch::now(), seats)), bells))
}

/// Each connection one; each core a ring, an eventfd, its listeners and those that it refuses; and
/// what is open already.
fn descriptors_needed(settings: &Settings, cores: usize, endpoints: usize) -> u64 {
    let open = limits::open_fds().unwrap_or(DESCRIPTORS_OPEN_GUESS);
    let each_core = endpoints + 2 + REFUSED_MAX;
    (settings.connections_max + cores * each_core + open + DESCRIPTORS_SPARE) as u64
}

const DESCRIPTORS_OPEN_GUESS: usize = 64;
/// For what the handlers open, such as a log file.
const DESCRIPTORS_SPARE: usize = 64;
