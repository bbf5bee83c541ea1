//! The admin listener: metrics, probes and the inspector over HTTP, for whoever looks after the
//! server. Feature `admin`.
//!
//! It is a server of its own, with one core, sixteen connections and short deadlines, so that it
//! answers while the cores that it tells of are busy, stuck or draining. It ends when the last of
//! them has ended.

use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use hyper::service::service_fn;

use self::desk::Desk;
use crate::bind::ListenAddr;
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::http::Http;
use crate::report::DrainReport;
use crate::running::Running;
use crate::server::Server;

mod desk;
mod guard;
mod pages;

/// Where the admin listener is, and what it may do; see [`Server::admin`]. Feature `admin`.
///
/// # Examples
///
/// ```
/// use slipring::Admin;
///
/// let admin = Admin::at("0.0.0.0:9100").allow_remote().allow_host("slipring.internal");
/// let local = Admin::at("unix:/run/slipring-admin.sock").allow_drain();
/// ```
#[derive(Clone, Debug)]
#[must_use = "it does nothing until it is given to a server"]
pub struct Admin {
    addr: String,
    remote: bool,
    rights: Rights,
}

/// What requests may ask for, and by which name.
#[derive(Clone, Debug)]
struct Rights {
    drain: bool,
    hosts: Vec<String>,
    unhealthy_after: Duration,
}

impl Admin {
    /// At an address, which has a form of [`ListenAddr::parse`] and is a loopback or a Unix socket
    /// unless [`Admin::allow_remote`] says otherwise. The port 0 lets the kernel choose;
    /// [`Running::admin_addr`] says which it was.
    pub fn at(addr: impl Into<String>) -> Admin {
        let unhealthy_after = UNHEALTHY_AFTER;
        let rights = Rights { drain: false, hosts: Vec::new(), unhealthy_after };
        Admin { addr: addr.into(), remote: false, rights }
    }

    /// Lets it listen where other machines can reach it. Whoever can then sees the addresses of
    /// all peers, and drains the server if [`Admin::allow_drain`] is on: there is no password.
    pub fn allow_remote(mut self) -> Admin {
        self.remote = true;
        self
    }

    /// Lets requests call it by a name, such as that of a container, beside `localhost` and any IP
    /// address. Requests under other names are refused with 421, so that no web page can read it
    /// by having its own name resolve to this machine (DNS rebinding).
    pub fn allow_host(mut self, name: impl Into<String>) -> Admin {
        self.rights.hosts.push(name.into());
        self
    }

    /// Lets `POST /drain` drain the server. Without it the answer is 403. Requests that a browser
    /// sends for another site's page are refused in any case.
    pub fn allow_drain(mut self) -> Admin {
        self.rights.drain = true;
        self
    }

    /// For how long one task may keep its core until `/healthz` says 503, which has an orchestrator
    /// restart the process. 10 s unless set.
    pub fn unhealthy_after(mut self, time: Duration) -> Admin {
        self.rights.unhealthy_after = time;
        self
    }

    /// How many it takes of the process.
    pub(crate) fn descriptors(&self) -> u64 {
        DESCRIPTORS
    }

    /// Starts the listener of a server.
    ///
    /// # Errors
    /// As [`Server::start`], and [`ErrorKind::Config`] for an address that others can reach.
    pub(crate) fn start(self, handle: Handle) -> Result<(Box<Running>, Farewell)> {
        let addr = ListenAddr::parse(&self.addr)?;
        if let ListenAddr::Tcp(tcp) = &addr
            && !self.remote
            && !tcp.ip().to_canonical().is_loopback()
        {
            return Err(Error::new(ErrorKind::Config, format!("admin listener at {addr}")).because(
                "other machines may reach it, and there is no password; listen at 127.0.0.1, or \
                 say Admin::allow_remote",
            ));
        }
        let (rights, http) = (self.rights, Http::new().http1_only());
        let http = http.max_headers(HEADERS_MAX).max_head_bytes(HEAD_BYTES_MAX);
        let mut server = Server::new(config());
        server.part = Some("slipring-admin");
        // As it was resolved: a name might not be, a second time.
        let running = server
            .listen_with(addr.to_string(), move |_| {
                let desk = Rc::new(Desk::new(handle.clone(), rights.clone()));
                http.clone().handler(service_fn(move |request| {
                    let desk = Rc::clone(&desk);
                    async move { desk.answer(request).await }
                }))
            })
            .start()?;
        let farewell = Farewell(running.handle());
        Ok((Box::new(running), farewell))
    }
}

impl From<&str> for Admin {
    fn from(addr: &str) -> Admin {
        Admin::at(addr)
    }
}

impl From<String> for Admin {
    fn from(addr: String) -> Admin {
        Admin::at(addr)
    }
}

impl Server {
    /// Serves metrics, probes and the inspector over HTTP, at an address of its own. Feature
    /// `admin`.
    ///
    /// | request | answer |
    /// |---|---|
    /// | `GET /metrics` | [`Stats::to_prometheus`](crate::Stats::to_prometheus) |
    /// | `GET /healthz` | 200; 503 while a task keeps a core ([`Admin::unhealthy_after`]) |
    /// | `GET /readyz` | 200 while [`Handle::is_ready`], else 503 |
    /// | `GET /connections` | [`Handle::connections`], as JSON, or as a page for a browser |
    /// | `POST /drain` | begins a drain, if [`Admin::allow_drain`] is on |
    /// | `GET /` | what there is |
    ///
    /// It has a thread of its own and answers while the cores are stuck and during a drain, until
    /// the last core has ended. It takes 16 connections, of which idle ones make room for others,
    /// and each request has to come, and its answer to leave, within some seconds; the settings of
    /// the server do not concern it. Stalls are not known where `SLIPRING_STALL_MS` is 0.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use slipring::{Config, Connection, Server};
    ///
    /// # async fn echo(_conn: Connection) -> slipring::Result<()> { Ok(()) }
    /// # fn main() -> slipring::Result<()> {
    /// Server::new(Config::from_env()?)
    ///     .listen("0.0.0.0:7000", echo)
    ///     .admin("127.0.0.1:9100")
    ///     .drain_on_signals()
    ///     .run()
    ///     .map(drop)
    /// # }
    /// ```
    pub fn admin(mut self, admin: impl Into<Admin>) -> Server {
        self.admin = Some(admin.into());
        self
    }
}

impl Running {
    /// Where the admin listener is, with the port that the kernel chose; `None` if there is none.
    /// Feature `admin`.
    #[must_use]
    pub fn admin_addr(&self) -> Option<ListenAddr> {
        self.admin.as_ref().and_then(|admin| admin.local_addrs().first().cloned())
    }
}

/// Waits for the end of the admin listener, which is at hand.
pub(crate) fn join(admin: Running, report: &DrainReport) -> Result<()> {
    drop(Farewell(admin.handle()));
    let failed = |error: Error| {
        Error::new(error.kind(), "serve the admin listener").because(format!("{error}\n{report}"))
    };
    admin.join().map(drop).map_err(failed)
}

/// Ends the admin listener when it is dropped, without waiting for it.
pub(crate) struct Farewell(Handle);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.begin_drain(FAREWELL);
    }
}

impl fmt::Debug for Farewell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Farewell")
    }
}

fn config() -> Config {
    Config::default()
        // One core, on any CPU.
        .cpus("0")
        .pin(Some(false))
        .connections_max(CONNECTIONS_MAX)
        .backlog(64)
        .sq_entries(64)
        .cq_entries(256)
        .buffers(16)
        .large_buffers(2)
        .large_buffer_bytes(4096)
        .memory_bytes_max(64 << 20)
        .first_byte_ms(5_000)
        .message_ms(5_000)
        .handler_ms(10_000)
        .write_stall_ms(10_000)
        .lifetime_ms(3_600_000)
        .force_grace_ms(1)
        // At its end there is no time to hold off who is just about to connect.
        .syn_quiesce_ms(0)
        .stall_ms(0)
}

const CONNECTIONS_MAX: usize = 16;
/// What it takes of a process: its connections, a listener, a ring and a bell.
const DESCRIPTORS: u64 = CONNECTIONS_MAX as u64 + 3;
/// A probe that failed for less would restart what is merely slow.
const UNHEALTHY_AFTER: Duration = Duration::from_secs(10);
const HEADERS_MAX: usize = 64;
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// What is being answered when the last core has ended gets so long. Together with what a core may
/// take after its deadline it is less than the 100 ms in which a drain returns.
const FAREWELL: Duration = Duration::from_millis(20);
