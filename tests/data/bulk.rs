//! Bulk and small messages over the same connections: the receive buffers follow the size of what
//! comes, and the stream does not notice.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use crate::common::peer::{MB, Peer, Until, bytes, exchange};
use crate::common::{config, connect, echo_server, settle};

/// Bulk takes far fewer completions than it fills small buffers, also where all connections want
/// large ones and there are only two of them.
#[test]
fn bulk_is_received_in_large_buffers_and_keeps_its_order() {
    for large in [64, 2] {
        let (running, addr) = echo_server(config().large_buffers(large));
        let peer = |n| Peer::new(connect(addr), bytes(n, 2 * MB));
        exchange(&mut (0..16).map(peer).collect::<Vec<_>>(), Until::End);
        let total = settle(running, 16);
        assert_eq!(total.bytes_received, 32 * MB as u64);
        if large == 64 {
            // Each buffer costs a receive's completion; small ones alone would be 8192.
            assert!(total.completions < 8_192, "{} completions", total.completions);
        } else {
            assert!(total.large_buffers_missing > 0, "two were enough for 16");
        }
    }
}

/// Beside many whose sends fill the queue to the kernel, so that receives are submitted early.
#[test]
fn a_receive_finds_its_large_buffer_however_early_it_is_submitted() {
    let (running, addr) = echo_server(config().sq_entries(8));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..CHATTY / 32 {
            scope.spawn(|| {
                let mut clients: Vec<_> = (0..32).map(|_| connect(addr)).collect();
                while !done.load(SeqCst) {
                    clients.iter_mut().for_each(|client| client.write_all(b"?").expect("send"));
                    let hear = |client: &mut TcpStream| client.read_exact(&mut [0]);
                    clients.iter_mut().for_each(|client| hear(client).expect("an answer"));
                }
            });
        }
        let exchanged = std::panic::catch_unwind(|| {
            let peer = |n| Peer::new(connect(addr), bytes(n, 4 * MB));
            exchange(&mut (0..2).map(peer).collect::<Vec<_>>(), Until::End);
        });
        done.store(true, SeqCst);
        exchanged.expect("the bulk comes back");
    });
    let total = settle(running, 2 + CHATTY);
    assert_eq!(total.large_buffers_missing, 0);
}

const CHATTY: u64 = 128;

/// Two rounds of bulk with small messages in between: there and back again.
#[test]
fn a_connection_changes_between_small_and_large_buffers_without_losing_a_byte() {
    let (running, addr) = echo_server(config());
    let mut clients: Vec<_> = (0..8).map(|_| connect(addr)).collect();
    for round in 0..4 {
        for (len, piece, times) in [(MB, 64 * 1024, 1), (40_000, 100, 2)] {
            for _ in 0..times {
                let again = |client: &TcpStream| {
                    client.set_nonblocking(false).expect("blocking again");
                    client.try_clone().expect("another descriptor")
                };
                let peers = clients.iter().enumerate();
                let peers = peers.map(|(n, client)| {
                    Peer::new(again(client), bytes(round * 8 + n, len)).in_pieces_of(piece)
                });
                exchange(&mut peers.collect::<Vec<_>>(), Until::Echoed);
            }
        }
    }
    clients.clear();
    let total = settle(running, 8);
    assert_eq!(total.bytes_received, 4 * 8 * (MB as u64 + 80_000));
    assert_eq!(total.bytes_sent, total.bytes_received);
}
