//! One server of the comparison: `serve NAME ADDRESS CPU [--buffer-bytes 4096]
//! [--connections-max 10000]`.
//!
//! It runs on that CPU alone, prints `listening ADDRESS` once it does, and serves until SIGTERM,
//! which ends it in the default way, or until its parent is gone. Names: `serve list`. Each server
//! is written as its runtime's documentation says is fastest for one core, with buffers of
//! `--buffer-bytes` where the application has any, and the ring flags that the runtime lets one
//! set.

use std::{
    env,
    error::Error,
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    process::ExitCode,
};

use slipring_peers::{machine, rig};
use socket2::{Domain, Protocol, Socket, Type};

mod echo;
mod hello;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A server of this program, and how it is started.
type Entry = (&'static str, fn(&Order) -> Result<()>);

/// What the command line asks for.
pub struct Order {
    address: SocketAddr,
    /// Size of the buffers that the application reads into.
    buffer_bytes: usize,
    /// For those that size a table in advance.
    connections_max: usize,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.first().is_some_and(|name| name == "list") {
        servers().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("serve: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let [name, address, cpu, options @ ..] = arguments else {
        Err("usage: serve NAME ADDRESS CPU [--buffer-bytes N] [--connections-max N]")?
    };
    let address = address.parse()?;
    let mut order = Order { address, buffer_bytes: 4096, connections_max: 10_000 };
    for option in options.chunks(2) {
        match option {
            [name, value] if name == "--buffer-bytes" => order.buffer_bytes = value.parse()?,
            [name, value] if name == "--connections-max" => {
                order.connections_max = value.parse()?
            }
            _ => Err(format!("{}: not an option", option[0]))?,
        }
    }
    let (_, serve) = servers().find(|(known, _)| known == name).ok_or_else(|| {
        let names: Vec<&str> = servers().map(|(name, _)| name).collect();
        format!("{name}: no server of this build, which has {names:?}")
    })?;
    machine::end_with_parent();
    rig::pin(cpu.parse()?)?;
    machine::raise_nofile(order.connections_max as u64 + 1_000)?;
    serve(&order)
}

fn servers() -> impl Iterator<Item = Entry> {
    echo::SERVERS.iter().chain(hello::SERVERS).copied()
}

impl Order {
    /// A listener whose accepted sockets inherit `TCP_NODELAY`, announced on the way.
    fn listen(&self) -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.bind(&self.address.into())?;
        socket.listen(BACKLOG)?;
        let listener: TcpListener = socket.into();
        ready(listener.local_addr()?);
        Ok(listener)
    }

    /// An address for those that only bind by themselves: port 0 becomes one that is free now.
    #[cfg_attr(not(feature = "ringline"), expect(dead_code, reason = "ringline's"))]
    fn free_address(&self) -> io::Result<SocketAddr> {
        TcpListener::bind(self.address)?.local_addr()
    }
}

/// Tells the parent where the server listens.
fn ready(address: SocketAddr) {
    println!("listening {address}");
    // A parent that is gone ends this process anyway.
    let _ = io::stdout().flush();
}

const BACKLOG: i32 = 4096;
