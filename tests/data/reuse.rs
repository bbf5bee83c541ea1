//! Slots and descriptors that are reused at once: whoever gets one never gets the bytes of its last
//! tenant, whatever was still on its way to that one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::common::{config, connect, limit};

/// Scenario 54.
#[test]
fn a_new_connection_never_gets_the_bytes_of_the_one_before() {
    // Few places on one core, so that a slot and a descriptor have a new tenant in the same turn.
    let config = config().cpus(&crate::common::first_cpus(1)).connections_max(8).evict_percent(0);
    let (running, addr) = crate::common::echo_server(config);
    let rounds = ROUNDS * crate::common::length();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || (0..rounds).for_each(|round| tenancy(addr, client, round)));
        }
    });
    let handle = running.handle();
    crate::common::wait_until("all have ended", || handle.stats().total().live == 0);
    let total = handle.stats().total();
    eprintln!("{} connections in {} places at most", total.accepted, total.live_max);
    assert_eq!(total.accepted, 2 * CLIENTS * rounds, "{}", handle.stats());
    assert!(total.live_max <= 8 && total.unknown == 0, "{}", handle.stats());
    let report = handle.drain(limit(5_000)).expect("a report");
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().leaked_operations, 0, "{report}");
}

/// One that breaks off with bytes under way, and at once another that compares every byte.
fn tenancy(addr: SocketAddr, client: u64, round: u64) {
    let mut first = connect(addr);
    let stale = vec![STALE; 1 + (round % 5_000) as usize];
    // A reset may come back in answer to what was sent before.
    let _ = first.write_all(&stale);
    if round.is_multiple_of(3) {
        let _ = first.read(&mut [0; 64]);
    }
    reset(first);

    let mut second = connect(addr);
    let bytes: Vec<u8> = (0..1 + round % 3_000).map(|n| mix(client, round, n)).collect();
    second.write_all(&bytes).expect("send");
    let mut answer = vec![0; bytes.len()];
    second.read_exact(&mut answer).expect("the echo");
    assert!(answer == bytes, "client {client}, round {round}: not what was sent");
    // Nothing may follow: the reset keeps the port out of TIME_WAIT, of which there are few.
    second.set_nonblocking(true).expect("set non-blocking");
    assert!(second.read(&mut [0; 64]).is_err(), "client {client}, round {round}: more came");
    reset(second);
}

fn reset(stream: TcpStream) {
    let linger = Some(Duration::ZERO);
    socket2::SockRef::from(&stream).set_linger(linger).expect("set SO_LINGER");
}

/// Any byte but that of the first one.
fn mix(client: u64, round: u64, n: u64) -> u8 {
    let word = (client << 40 | round << 16 | n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    match (word >> 56) as u8 {
        STALE => 0,
        byte => byte,
    }
}

const STALE: u8 = 0xEE;
const CLIENTS: u64 = 4;
/// `RING_TEST_LONG=100` makes it two million connections.
const ROUNDS: u64 = 2_500;
