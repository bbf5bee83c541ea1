//! The control plane: bind all or nothing, start a thread for each core, wait for their end.
//!
//! The order of a start: settings, descriptors' limit, sockets bound, rings made on their
//! threads, handlers made, and only when all of that has worked on every core: listen, accept.
//! The order of an end, on each core: stop accepting, empty the queues, close the listeners, let
//! connections finish, force the rest, see every operation's end, close the ring, report.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::Location;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::bind::{Hook, ListenAddr, bind};
use crate::caps::Places;
use crate::config::{Balance, Config, Settings};
use crate::conn::{self, Connection};
use crate::control::{Belongings, Control, Seat};
use crate::crew::{Crew, Seed, Shares};
use crate::error::{Error, ErrorKind, Result};
use crate::group::Group;
use crate::handle::Handle;
use crate::hooks::Hook as DrainHook;
use crate::listen::Handler;
use crate::machine::{self, Facts};
use crate::post::{CoreBell, PostBox};
use crate::preflight;
use crate::refuse::REFUSED_MAX;
use crate::report::DrainReport;
use crate::signals::Signals;
use crate::spin::SpinState;
use crate::stats::Counters;
use crate::stop::Membership;
use crate::sys::affinity;
use crate::sys::limits;
use crate::sys::place::Place;
use crate::sys::thread::join_until;
use crate::sys::wake::EventFd;
use crate::udp;
use crate::udp::serve::UdpEndpoint;
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
    pub(crate) on_stall: Option<Arc<StallHook>>,
    pub(crate) udp: Vec<UdpEndpoint>,
}

struct Endpoint {
    addr: String,
    maker: Maker,
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
            on_stall: None,
            udp: Vec::new(),
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
        self.endpoint(addr.into(), move |_| {
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
        self.endpoint(addr.into(), move |core| conn::handler(make(core)))
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

    /// Calls `hook` with each listening and UDP socket before it is bound, to set any socket
    /// option; what is set there is inherited by the accepted connections (except where socket(7)
    /// and tcp(7) say otherwise). `SO_REUSEADDR`, `SO_REUSEPORT` and what the configuration names
    /// are set before.
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
    pub fn start(self) -> Result<Running> {
        let mut settings = self.config.settings()?;
        let cpus = self.choose_cpus()?;
        let cores = cpus.len();
        self.check_places(&settings, cores)?;
        machine::ensure_nofile(descriptors_needed(
            &settings,
            cores,
            self.endpoints.len() + self.udp.len(),
        ))?;
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

        let mut bound = Vec::with_capacity(self.endpoints.len());
        for addr in self.addresses()? {
            bound.push(bind(&addr, cores, &settings, self.before_bind.as_deref())?);
        }

        let udp = |endpoint: &UdpEndpoint| {
            udp::bind::bind_all(&endpoint.addr, cores, &settings, self.before_bind.as_deref())
        };
        let udp = self.udp.iter().map(udp).collect::<Result<Vec<_>>>()?;
        let udp_addrs: Vec<SocketAddr> = udp.iter().map(|bound| bound.addr).collect();

        let (control, bells) = seats(&cpus, spin)?;
        let drain_within = Duration::from_millis(settings.drain_ms);
        let makers: Vec<Maker> = self.endpoints.iter().map(|e| e.maker.clone()).collect();
        let places =
            Arc::new(Places::new(settings.connections_max, cores, settings.connections_per_ip_max));
        let mut crew = Crew::default();
        for (index, bell) in bells.into_iter().enumerate() {
            let info = CoreInfo { index, cpu: cpus[index], cores };
            let (control, makers) = (Arc::clone(&control), makers.clone());
            let places = Arc::clone(&places);
            let (hooks, udp) = (self.hooks.clone(), self.udp.clone());
            crew.hire(Seed {
                info,
                settings,
                pin,
                bell,
                control,
                places,
                makers,
                drain_within,
                hooks,
                udp,
            })?;
        }
        crew.all_ready()?;
        let signals = self.signals.then(|| Signals::install(&control, drain_within)).transpose()?;

        for bound in &mut bound {
            bound.listen()?;
        }
        let addrs: Vec<_> = bound.iter().map(|bound| bound.addr.clone()).collect();
        control.set_addrs(addrs.clone());
        let files = bound.iter_mut().filter_map(|bound| bound.file.take()).collect();
        let mut shares: Vec<Shares> = (0..cores).map(|_| Shares::default()).collect();
        for bound in bound {
            let is_tcp = matches!(bound.addr, ListenAddr::Tcp(_));
            let by_cpu = (settings.balance == Balance::Cpu).then(|| cpus.clone());
            let group = is_tcp.then(|| Arc::new(Group::new(cores, by_cpu)));
            if let (Some(group), Some(socket)) = (&group, bound.sockets.first()) {
                group
                    .begin(socket.as_fd())
                    .map_err(|error| Error::os(format!("steer {} by CPU", bound.addr), error))?;
            }
            for (core, socket) in bound.sockets.into_iter().enumerate() {
                let group = group.clone();
                shares[core]
                    .listeners
                    .push((socket, group.map(|group| Membership { group, core })));
            }
        }
        for bound in udp {
            for (core, socket) in bound.sockets.into_iter().enumerate() {
                shares[core].udp.push((socket, bound.addr));
            }
        }
        let hook = self.on_stall.filter(|_| settings.stall_ms > 0);
        let watchdog = hook.map(|hook| watchdog::start(&control, hook, settings.stall_ms));
        let watchdog = watchdog.transpose()?;
        control.keep(Belongings { signals, files });
        let threads = crew.go(shares);
        let handle = Handle::new(control, drain_within);
        Ok(Running { handle, threads, watchdog, addrs, udp_addrs })
    }

    #[track_caller]
    fn endpoint<M>(mut self, addr: String, make: M) -> Server
    where
        M: Fn(&CoreInfo) -> Handler + Send + Sync + 'static,
    {
        let maker = Maker { make: Arc::new(make), place: Location::caller(), heartbeat: None };
        self.endpoints.push(Endpoint { addr, maker });
        self
    }

    /// The addresses, each once.
    fn addresses(&self) -> Result<Vec<ListenAddr>> {
        let mut addrs = Vec::with_capacity(self.endpoints.len());
        for endpoint in &self.endpoints {
            let addr = ListenAddr::parse(&endpoint.addr)?;
            let any_port = matches!(addr, ListenAddr::Tcp(tcp) if tcp.port() == 0);
            if !any_port && addrs.contains(&addr) {
                return Err(Error::new(ErrorKind::AddressInUse, format!("bind {addr}"))
                    .because("the server was told to listen there twice"));
            }
            addrs.push(addr);
        }
        Ok(addrs)
    }

    /// A listener keeps a place for the connection that it waits for.
    fn check_places(&self, settings: &Settings, cores: usize) -> Result<()> {
        let (max, addresses) = (settings.connections_max, self.endpoints.len());
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
        let addrs: Vec<&str> = self.endpoints.iter().map(|e| e.addr.as_str()).collect();
        f.debug_struct("Server").field("listen", &addrs).finish_non_exhaustive()
    }
}

/// A server that serves. Dropping it changes nothing for the server, which goes on until it is
/// drained.
#[derive(Debug)]
pub struct Running {
    handle: Handle,
    threads: Vec<JoinHandle<()>>,
    watchdog: Option<JoinHandle<()>>,
    addrs: Vec<ListenAddr>,
    udp_addrs: Vec<SocketAddr>,
}

impl Running {
    /// A handle that any thread may use.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Where it listens, in the order of the `listen` calls, with the ports that the kernel chose.
    #[must_use]
    pub fn local_addrs(&self) -> &[ListenAddr] {
        &self.addrs
    }

    /// Where it serves UDP, in the order of the `serve_udp` calls, with the ports that the kernel
    /// chose.
    #[must_use]
    pub fn udp_addrs(&self) -> &[SocketAddr] {
        &self.udp_addrs
    }

    /// Waits until the server has been drained, and returns the account. It returns at most 100 ms
    /// after the drain's deadline; its ports are free then, unless a core is stuck.
    ///
    /// # Errors
    /// [`ErrorKind::Panicked`] when a core has failed; the message has the report.
    /// [`ErrorKind::Misuse`] on a core of the server, which would wait for itself.
    pub fn join(self) -> Result<DrainReport> {
        self.handle.wait_allowed("join a server")?;
        let report = self.handle.control().wait();
        // Of a server with a core that is stuck, nobody else will.
        self.handle.control().let_go();
        for (thread, core) in self.threads.into_iter().zip(report.cores()) {
            // A thread's own destructors are anyone's code too: they get no more time.
            if core.stuck.is_none() {
                join_until(thread, || self.handle.control().is_over());
            }
        }
        if let Some(watchdog) = self.watchdog {
            // The hook is anyone's as well.
            join_until(watchdog, || self.handle.control().is_over());
        }
        match report.cores().iter().find_map(|core| core.failure.as_ref()) {
            None => Ok(report),
            Some(_) => Err(Error::new(ErrorKind::Panicked, "serve").because(report.to_string())),
        }
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
    Ok((Arc::new(Control::new(Instant::now(), seats)), bells))
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
