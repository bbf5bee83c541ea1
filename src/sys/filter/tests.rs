//! The filters over loopback.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::*;
use crate::sys::affinity;

/// Not by a macro, whose words are caught where tests pass.
fn not_run(why: &str) {
    let _ = io::stderr().write_all(format!("NOT RUN: filter: {why}\n").as_bytes());
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no sockets")]
fn a_filtered_listener_takes_no_new_handshake_and_leaves_the_old_ones_alone() {
    for addr in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(addr) else {
            not_run(&format!("nothing can be bound to {addr}"));
            continue;
        };
        let addr = listener.local_addr().unwrap();
        let mut before = TcpStream::connect(addr).unwrap();
        if let Err(error) = drop_syns(listener.as_fd()) {
            assert_eq!(error.raw_os_error(), Some(libc::EPERM));
            not_run(&format!("a filter on a listener: {error}"));
            return;
        }
        let refused = TcpStream::connect_timeout(&addr, Duration::from_millis(100));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (mut accepted, _) = listener.accept().unwrap();
        before.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();
        drop(accepted);
        assert_eq!(before.read(&mut [0]).unwrap(), 0);
    }
}

fn group(count: usize) -> (SocketAddr, Vec<Socket>) {
    let mut addr = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut sockets = Vec::new();
    for _ in 0..count {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&addr.into()).unwrap();
        addr = socket.local_addr().unwrap().as_socket().unwrap();
        sockets.push(socket);
    }
    sockets.iter().for_each(|socket| socket.listen(1024).unwrap());
    (addr, sockets)
}

fn queued(sockets: &[Socket]) -> Vec<usize> {
    let count = |socket: &Socket| std::iter::from_fn(|| socket.accept().ok()).count();
    sockets.iter().map(count).collect()
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no sockets")]
fn connections_go_where_they_are_steered_and_everywhere_afterwards() {
    let (addr, mut sockets) = group(4);
    let connect = || drop(TcpStream::connect(addr).unwrap());
    steer(sockets[3].as_fd(), &[], &[0, 2]).unwrap();
    (0..64).for_each(|_| connect());
    let counts = queued(&sockets);
    assert_eq!((counts[1], counts[3], counts.iter().sum::<usize>()), (0, 0, 64), "{counts:?}");
    assert!(counts[0] > 8 && counts[2] > 8, "evenly: {counts:?}");

    // The last takes the number of the one that is closed.
    drop(sockets.remove(1));
    steer(sockets[0].as_fd(), &[], &[1]).unwrap();
    (0..16).for_each(|_| connect());
    assert_eq!(queued(&sockets), [0, 0, 16]);

    stop_steering(sockets[0].as_fd()).unwrap();
    (0..128).for_each(|_| connect());
    let counts = queued(&sockets);
    assert!(counts.iter().all(|count| *count > 8), "{counts:?}");
}

/// On the loopback the sender's CPU handles the handshake.
#[test]
#[cfg_attr(miri, ignore = "Miri has no sockets")]
fn the_cpu_chooses_among_those_named_and_the_others_have_the_rest() {
    let (addr, sockets) = group(3);
    let cpus = affinity::allowed().unwrap();
    let connect_from = |cpu: u16| {
        let connect = move || {
            affinity::pin(cpu).unwrap();
            (0..32).for_each(|_| drop(TcpStream::connect(addr).unwrap()));
        };
        std::thread::spawn(connect).join().unwrap();
    };
    let by_cpu: Vec<_> = cpus.iter().take(2).copied().zip([2, 0]).collect();
    steer(sockets[0].as_fd(), &by_cpu, &[]).unwrap();
    for (cpu, index) in &by_cpu {
        connect_from(*cpu);
        let counts = queued(&sockets);
        assert_eq!(counts[*index as usize], 32, "from CPU {cpu}: {counts:?}");
    }
    // A CPU that is not named, as there is none of that number.
    let unknown = [(u16::MAX, 1)];
    steer(sockets[0].as_fd(), &unknown, &[0, 2]).unwrap();
    connect_from(cpus[0]);
    let counts = queued(&sockets);
    assert!(counts[1] == 0 && counts[0] > 4 && counts[2] > 4, "{counts:?}");
    steer(sockets[0].as_fd(), &unknown, &[]).unwrap();
    connect_from(cpus[0]);
    let counts = queued(&sockets);
    assert!(counts.iter().all(|count| *count > 1), "the kernel's choice: {counts:?}");
}
