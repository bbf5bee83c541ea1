//! The questions of the comparison, each with its load and the servers that it is put to.

/// What the load does.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Echoes, each client asking again as soon as it is answered.
    Closed { connections: usize, bytes: usize, pipeline: usize, poll: bool },
    /// The same with HTTP requests.
    Http { connections: usize, pipeline: usize },
    /// Echoes at a fixed rate, whether or not replies have come.
    Open { connections: usize, bytes: usize, per_second: f64 },
    /// Connect, one echo, reset.
    Churn { under_way: usize, bytes: usize },
    /// Connections that have been answered once and then do nothing.
    Idle { connections: usize },
    /// One client that echoes beside so many idle ones.
    Crowd { connections: usize },
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// The server's CPU time per request.
    Cpu,
    /// The requests' latency, its median above all.
    Latency,
    /// The server's own memory per connection.
    Memory,
}

/// One question.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Names its picture, and asks for it on the command line.
    pub key: &'static str,
    title: &'static str,
    pub question: &'static str,
    pub work: Work,
    pub figure: Figure,
    pub servers: &'static [&'static str],
    /// Rounds are not worth their time beyond so many.
    pub rounds_max: usize,
}

impl Row {
    pub fn title(&self) -> String {
        match self.work {
            Work::Crowd { connections } => format!("{} {connections} idle ones", self.title),
            _ => self.title.to_owned(),
        }
    }

    /// The server that the ratios are to.
    pub fn baseline(&self) -> &'static str {
        self.servers[0]
    }

    /// The yardstick's buffers fit the messages; all others keep 4 KiB.
    pub fn buffer_bytes(&self, server: &str) -> usize {
        match self.work {
            Work::Closed { bytes, .. } if server == "minimal" && bytes > 4096 => 65_536,
            _ => 4096,
        }
    }

    /// What a server is told to have room for.
    pub fn connections_max(&self) -> usize {
        match self.work {
            Work::Idle { connections } | Work::Crowd { connections } => connections + 500,
            _ => 10_000,
        }
    }
}

/// Where what counts is how soon a server looks, or what looking costs: slipring also with
/// `SLIPRING_SPIN_US`. The yardstick comes first.
pub const ECHO_SPIN: &[&str] = &[
    "minimal",
    "slipring",
    "kimojio",
    "ringline",
    "monoio",
    "compio",
    "ntex",
    "tokio-uring",
    "tokio",
    "epoll",
    "glommio",
    "slipring-spin",
];
/// All but the last of these.
pub const ECHO: &[&str] = ECHO_SPIN.split_at(ECHO_SPIN.len() - 1).0;
/// slipring as another build has it, this build's, and the yardstick.
pub const BEFORE: &[&str] = &["before", "slipring", "minimal"];
/// No HTTP server is a yardstick; the most used one stands in.
pub const HTTP: &[&str] =
    &["hyper-tokio", "hyper-slipring", "hyper-monoio", "hyper-compio", "ntex-http", "actix-web"];
/// The same application on both.
pub const AXUM: &[&str] = &["axum-tokio", "axum-slipring"];

pub const ROWS: &[Row] = &[
    echo("c8-64b", "8 connections, 64 B", 8, 64, 1),
    echo("c64-64b", "64 connections, 64 B", 64, 64, 1),
    echo("c64-4k", "64 connections, 4 KiB", 64, 4096, 1),
    echo("c16-64k", "16 connections, 64 KiB", 16, 65_536, 1),
    echo("c64-p16", "64 connections, 16 pipelined", 64, 64, 16),
    Row {
        key: "churn",
        title: "connect, 1 request, reset",
        question: "What does a connection cost the server that asks once?",
        work: Work::Churn { under_way: 16, bytes: 64 },
        figure: Figure::Cpu,
        servers: ECHO,
        rounds_max: ROUNDS_MAX,
    },
    Row {
        key: "idle",
        title: "user memory per idle connection",
        question: "How much memory does a connection hold that does nothing?",
        work: Work::Idle { connections: 8_000 },
        figure: Figure::Memory,
        servers: ECHO,
        rounds_max: ROUNDS_MAX,
    },
    polled("polled-1", "1 connection, polling client", 1),
    polled("polled-8", "8 connections, polling client", 8),
    Row {
        key: "sparse",
        title: "1 connection, arrivals 200 us apart",
        question: "What does a request cost that comes alone?",
        work: Work::Open { connections: 1, bytes: 64, per_second: 5_000.0 },
        figure: Figure::Cpu,
        servers: ECHO_SPIN,
        rounds_max: ROUNDS_MAX,
    },
    open("open-20k", "64 connections, 20 000/s", 20_000.0),
    open("open-60k", "64 connections, 60 000/s", 60_000.0),
    http("http-c64", "HTTP, 64 connections", 1, HTTP),
    http("http-p16", "HTTP, 64 connections, 16 pipelined", 16, HTTP),
    http("axum-c64", "axum, 64 connections", 1, AXUM),
    http("axum-p16", "axum, 64 connections, 16 pipelined", 16, AXUM),
    Row {
        key: "crowd",
        title: "1 connection beside",
        question: "Does an idle crowd slow the one down that is active?",
        work: Work::Crowd { connections: 100_000 },
        figure: Figure::Latency,
        servers: ECHO,
        rounds_max: 2,
    },
];

const fn echo(
    key: &'static str,
    title: &'static str,
    connections: usize,
    bytes: usize,
    pipeline: usize,
) -> Row {
    Row {
        key,
        title,
        question: "What does an echo cost the server?",
        work: Work::Closed { connections, bytes, pipeline, poll: false },
        figure: Figure::Cpu,
        servers: ECHO,
        rounds_max: ROUNDS_MAX,
    }
}

const fn polled(key: &'static str, title: &'static str, connections: usize) -> Row {
    Row {
        key,
        title,
        question: "How long does an echo take a client that never sleeps?",
        work: Work::Closed { connections, bytes: 64, pipeline: 1, poll: true },
        figure: Figure::Latency,
        servers: ECHO_SPIN,
        rounds_max: ROUNDS_MAX,
    }
}

const fn open(key: &'static str, title: &'static str, per_second: f64) -> Row {
    Row {
        key,
        title,
        question: "How late are echoes that come by a schedule?",
        work: Work::Open { connections: 64, bytes: 64, per_second },
        figure: Figure::Latency,
        servers: ECHO_SPIN,
        rounds_max: ROUNDS_MAX,
    }
}

const fn http(
    key: &'static str,
    title: &'static str,
    pipeline: usize,
    servers: &'static [&'static str],
) -> Row {
    Row {
        key,
        title,
        question: "What does a small HTTP reply cost the server?",
        work: Work::Http { connections: 64, pipeline },
        figure: Figure::Cpu,
        servers,
        rounds_max: ROUNDS_MAX,
    }
}

pub const ROUNDS_MAX: usize = 100;
