//! How long does an echo of 64 bytes take a blocking client, against each server?
//!
//! ```text
//! cargo bench -p slipring-benches --bench echo
//! ```
//!
//! The server is one thread of this process on CPU 0, the client is blocking `std::net` on CPU 1:
//! over one connection it writes, then reads; over 16 it writes to all, then reads from all. An
//! element is one echo.
//!
//! Over one connection this is the latency of a wake-up, twice: on the loopback, and the more so in
//! a virtual machine, waking the other CPU takes several times longer than all of the server's
//! work, so servers hardly differ, and one that spins before it blocks wins. Over 16 connections
//! the wake-ups are shared. Neither says what an echo costs the server: that is what `pair`
//! measures.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::mpsc,
    thread,
    time::Duration,
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

#[expect(dead_code, reason = "what pair.rs uses besides")]
mod support {
    pub mod minimal;
    pub mod rig;
    pub mod ring;
    pub mod slipring;
    pub mod tokio_uring;
}

use support::rig::{self, Rig};

fn echo_64b(criterion: &mut Criterion) {
    println!("{}", Rig::here(None));
    rig::pin(1).expect("there is a CPU 1");
    let mut group = criterion.benchmark_group("echo_64b");
    for name in ["minimal", "tokio-uring", "slipring"] {
        let address = match start(name) {
            Ok(address) => address,
            Err(error) => {
                println!("{name} is not measured: {error}");
                continue;
            }
        };
        for connections in [1, 16] {
            let mut clients: Vec<TcpStream> =
                (0..connections).map(|_| connect(&address).expect("the server listens")).collect();
            group.throughput(Throughput::Elements((ROUNDS * connections) as u64));
            group.bench_function(BenchmarkId::new(name, connections), |bencher| {
                bencher.iter(|| (0..ROUNDS).try_for_each(|round| trip(&mut clients, round)));
            });
            trip(&mut clients, 0).expect("the server still echoes");
        }
    }
    group.finish();
}

/// Writes to all, then reads from all.
fn trip(clients: &mut [TcpStream], round: usize) -> io::Result<()> {
    let message = [round as u8; BYTES];
    for client in &mut *clients {
        client.write_all(&message)?;
    }
    for client in clients {
        let mut echoed = [0; BYTES];
        client.read_exact(&mut echoed)?;
        assert_eq!(message, echoed, "the echo differs");
    }
    Ok(())
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let client = TcpStream::connect(address)?;
    client.set_nodelay(true)?;
    // A server that hangs must not hang the bench.
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(client)
}

/// Starts a server on a thread of its own, where it stays until the process ends; its address.
fn start(name: &'static str) -> io::Result<String> {
    let (sender, ready) = mpsc::channel();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let failed = sender.clone();
        if let Err(error) = serve(name, sender) {
            // Nobody listens any more if it has been ready before.
            let _ = failed.send(Err(error));
        }
    })?;
    ready.recv_timeout(Duration::from_secs(5)).map_err(io::Error::other)?
}

fn serve(name: &str, ready: mpsc::Sender<io::Result<String>>) -> io::Result<()> {
    rig::pin(0)?;
    let ready = move |address| ready.send(Ok(address)).expect("the bench waits for it");
    if name == "slipring" {
        let forever = || loop {
            thread::park();
        };
        return support::slipring::serve(ready, forever).map(drop).map_err(io::Error::other);
    }
    let listener = rig::listen(None)?;
    ready(listener.local_addr()?.to_string());
    match name {
        "minimal" => support::minimal::serve(listener, || false).map(drop),
        _ => support::tokio_uring::serve(listener),
    }
}

fn config() -> Criterion {
    Criterion::default().sample_size(30).measurement_time(Duration::from_secs(3))
}

criterion_group! {
    name = benches;
    config = config();
    targets = echo_64b
}
criterion_main!(benches);

const BYTES: usize = 64;
const ROUNDS: usize = 16;
