//! Bulk and small messages over the same connections: the receive buffers follow the size of what
//! comes, and the stream does not notice.

mod common;

use common::peer::{MB, Peer, Until, bytes, exchange};
use common::{config, connect, echo_server, settle};

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

/// Two rounds of bulk with small messages in between: there and back again.
#[test]
fn a_connection_changes_between_small_and_large_buffers_without_losing_a_byte() {
    let (running, addr) = echo_server(config());
    let mut clients: Vec<_> = (0..8).map(|_| connect(addr)).collect();
    for round in 0..4 {
        for (len, piece, times) in [(MB, 64 * 1024, 1), (40_000, 100, 2)] {
            for _ in 0..times {
                let again = |client: &std::net::TcpStream| {
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
