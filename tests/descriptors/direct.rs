//! Connections that send often have a direct descriptor in their core's ring, which would keep
//! their sockets open. The test looks at the process's tables of files:
//!
//! 1. Clients are answered often enough to have their connections there.
//! 2. Half of them ask to be aborted, and hear the reset at once, though the server sleeps then;
//!    the others leave. Nothing is left in the table, or open.
//! 3. Many rounds, so that slots and places are used again; the last connections are ended by a
//!    drain without time.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::common::{config, connect, limit, not_run, open_fds, settle, start, turn, wait_until};
use slipring::{CloseReason, Connection, Server};

#[test]
fn a_direct_descriptor_keeps_no_socket_open() {
    let _turn = turn();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", answer));
    let baseline = open_fds();
    for round in 0..ROUNDS {
        let mut clients: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(addr)).collect();
        clients.iter_mut().for_each(|client| talk(client, MESSAGES));
        if direct_sockets().is_none() {
            let handle = running.handle();
            drop(clients);
            wait_until("all are gone", || handle.stats().total().live == 0);
            drop(handle);
            settle(running, CLIENTS);
            return not_run("direct descriptors", "this kernel gives none, or does not list them");
        }
        wait_until("all have a place", || direct_sockets() == Some(CLIENTS as usize));
        for (n, mut client) in clients.into_iter().enumerate() {
            if n % 2 == 0 {
                client.write_all(b"!").expect("send");
                client.set_read_timeout(Some(limit(1_000))).expect("a timeout");
                let heard = client.read(&mut [0]).map_err(|error| error.kind());
                assert_eq!(heard, Err(ErrorKind::ConnectionReset), "round {round}");
            }
        }
        wait_until("all places are free", || direct_sockets() == Some(0));
        wait_until("all descriptors are closed", || open_fds() <= baseline);
    }

    let mut clients: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(addr)).collect();
    clients.iter_mut().for_each(|client| talk(client, MESSAGES));
    running.handle().drain(Duration::ZERO).expect("a report");
    for client in &mut clients {
        client.set_read_timeout(Some(limit(1_000))).expect("a timeout");
        let heard = client.read(&mut [0]).map_err(|error| error.kind());
        assert!(matches!(heard, Ok(0) | Err(ErrorKind::ConnectionReset)), "{heard:?}");
    }
    drop(clients);
    let total = settle(running, (ROUNDS + 1) * CLIENTS);
    assert_eq!(total.closed.get(CloseReason::Aborted), ROUNDS * CLIENTS / 2);
    assert_eq!((total.leaked_operations, total.unknown), (0, 0));
}

async fn answer(mut conn: Connection) -> slipring::Result<()> {
    while let Some(chunk) = conn.recv().await? {
        if chunk[..] == *b"!" {
            conn.abort();
            return Ok(());
        }
        conn.send(chunk).await?;
    }
    Ok(())
}

fn talk(client: &mut TcpStream, messages: usize) {
    for _ in 0..messages {
        client.write_all(b"?").expect("send");
        client.read_exact(&mut [0]).expect("an answer");
    }
}

/// The sockets in the tables of this process's rings, as `fdinfo` lists them (proc(5)). `None`
/// where no ring has a table.
fn direct_sockets() -> Option<usize> {
    let fds = fs::read_dir("/proc/self/fd").expect("the kernel lists them");
    let mut sockets = None;
    for fd in fds.filter_map(Result::ok) {
        let link = fs::read_link(fd.path()).unwrap_or_default();
        if link.to_str() != Some("anon_inode:[io_uring]") {
            continue;
        }
        let info = format!("/proc/self/fdinfo/{}", fd.file_name().display());
        let info = fs::read_to_string(info).unwrap_or_default();
        let mut lines = info.lines().skip_while(|line| !line.starts_with("UserFiles:"));
        let places = lines.next().and_then(|line| line["UserFiles:".len()..].trim().parse().ok());
        if places.unwrap_or(0) > 0 {
            let listed = lines.take_while(|line| !line.starts_with("UserBufs"));
            sockets = Some(sockets.unwrap_or(0) + listed.count());
        }
    }
    sockets
}

const CLIENTS: u64 = 16;
const ROUNDS: u64 = 20;
/// More than it takes.
const MESSAGES: usize = 40;
