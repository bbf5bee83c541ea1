//! Ten thousand clients that connect and reset. The test counts the descriptors of the process:
//!
//! 1. Four threads connect, send a byte in every third connection, and reset (`SO_LINGER` 0).
//! 2. The server has accepted them all, has none of them left, and every descriptor is back.
//! 3. It still serves, and the books have each reset as what it was.

use std::io::{Read, Write};
use std::time::Duration;

use crate::common::{config, connect, echo_server, open_fds, settle, turn, wait_until};
use slipring::CloseReason;
use socket2::SockRef;

#[test]
fn ten_thousand_connects_that_reset_leave_nothing_behind() {
    let _turn = turn();
    let before_start = open_fds();
    let (running, addr) = echo_server(config());
    let handle = running.handle();
    let stats = || handle.stats().total();
    let baseline = open_fds();

    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let stats = &stats;
            scope.spawn(move || {
                for n in 0..CONNECTS / THREADS {
                    let mut stream = connect(addr);
                    if n % 3 == 0 {
                        stream.write_all(&[thread as u8]).expect("send a byte");
                    }
                    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set linger");
                    drop(stream);
                    // As fast as the accept queue takes it; beyond, the kernel drops handshakes.
                    if n % 100 == 0 {
                        let connected = n * THREADS;
                        let behind = || connected.saturating_sub(stats().accepted);
                        wait_until("the server catches up", || behind() < LEAD_MAX);
                    }
                }
            });
        }
    });

    wait_until("all are accepted and gone", || stats().accepted == CONNECTS && stats().live == 0);
    wait_until("their descriptors are closed", || open_fds() <= baseline);
    assert_eq!(stats().closed.get(CloseReason::PeerReset), CONNECTS, "{:?}", stats().closed);

    let mut stream = connect(addr);
    stream.write_all(b"still there?").expect("send");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"still there?");
    drop(stream);

    // It holds the bells of the cores.
    drop(handle);
    let total = settle(running, CONNECTS + 1);
    assert_eq!(total.closed.get(CloseReason::Finished), 1);
    assert_eq!((total.accept_errors, total.panics), (0, 0));
    assert_eq!(open_fds(), before_start);
}

const CONNECTS: u64 = 10_000;
const THREADS: u64 = 4;
/// A quarter of the usual backlog.
const LEAD_MAX: u64 = 1000;
