//! The list of ten thousand connections: whole, in bounded time, and without a long turn.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::common::{config, connect, echo_server, fds_max, limit, not_run, turn, wait_until};

/// The list grows with the connections, but no turn does.
#[test]
fn ten_thousand_connections_are_listed_in_pieces() {
    let _turn = turn();
    let count = connections_possible();
    let hour = 3_600_000;
    let config = config().connections_max(count + count / 5).first_byte_ms(hour).idle_ms(hour);
    let (running, addr) = echo_server(config.check_ms(1_000));
    let handle = running.handle();
    let clients: Vec<TcpStream> = (0..count).map(|_| connect(addr)).collect();
    wait_until("all are accepted", || handle.stats().total().live == count as u64);
    let longest = || Duration::from_micros(handle.stats().total().turn_longest_us);
    let before = longest();
    let (mut worst, mut late) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..5 {
        let since = Instant::now();
        pause(1);
        late = late.max(since.elapsed() - Duration::from_millis(1));
        let since = Instant::now();
        let list = handle.connections().expect("a list");
        worst = worst.max(since.elapsed());
        assert_eq!((list.len(), list.silent_cores().len()), (count, 0));
        let mut ids: Vec<_> = list.iter().map(|info| info.id.to_string()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count, "each once");
    }
    eprintln!("{count} connections listed in {worst:?}; longest turn {before:?}, {:?}", longest());
    assert!(worst < limit(1_000) + 4 * late, "{count} were listed in {worst:?}");
    // The accepts before may have had a longer one.
    let most = before.max(limit(20) + 4 * late);
    assert!(longest() <= most, "a turn took {:?}, late {late:?}", longest());
    drop(clients);
    let report = handle.drain(limit(10_000)).expect("a report");
    assert!(report.is_balanced(), "{report}");
}

/// Ten thousand, or what the limit on descriptors allows with both ends in this process.
fn connections_possible() -> usize {
    let hard = fds_max();
    let possible = hard.saturating_sub(500) / 2;
    if possible < 10_000 {
        let why = format!("the limit on descriptors, {hard}, allows no more than {possible}");
        not_run("10000 connections", why);
    }
    possible.min(10_000)
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}
