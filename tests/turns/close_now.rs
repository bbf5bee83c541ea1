//! An order to close at once, with very many connections: promised within 100 ms whatever there
//! is to end, and everybody accounted for.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use crate::common::{config, connect, echo_server, late, limit, turn, wait_until};
use slipring::CloseReason;

#[test]
fn thousands_of_connections_are_closed_at_once_within_the_promised_time() {
    let _turn = turn();
    late::watch();
    // Each takes some ten microseconds, most of them for the FIN.
    let clients_max = 4_000;
    let (running, addr) = echo_server(config().connections_max(8_000));
    let mut clients: Vec<TcpStream> = (0..clients_max).map(|_| connect(addr)).collect();
    for client in clients.iter_mut().step_by(2) {
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("the echo");
    }
    let handle = running.handle();
    wait_until("all are there", || handle.stats().total().accepted == clients_max);
    let since = Instant::now();
    handle.close();
    let report = running.join().expect("the report");
    let took = since.elapsed();
    println!("{clients_max} connections closed at once: {took:?}");
    assert!(report.is_balanced(), "{report}");
    assert!(report.cores().iter().all(|core| core.stuck.is_none()), "{took:?}: {report}");
    assert!(took <= limit(100) + late::allowance(), "{took:?}: {report}");
    let closed = report.total().closed;
    assert_eq!(closed.get(CloseReason::Forced) + closed.get(CloseReason::Drained), clients_max);
    for client in &mut clients {
        assert_eq!(client.read(&mut [0]).expect("a FIN, no reset"), 0);
    }
}
