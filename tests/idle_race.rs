//! Clients that write at the moment at which a drain closes their idle connection: what a handler
//! has begun is answered, what is not answered was not begun, and a minimum keep avoids the race.
//!
//! The tests take turns, since they measure time.

mod common;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Barrier, Mutex, MutexGuard};
use std::time::Duration;

use common::{config, connect, length, limit, start};
use slipring::{CloseReason, Config, Connection, DrainReport, Server};

/// Scenario 10: with a keep that is longer than the clients' pauses.
#[test]
fn with_a_minimum_keep_no_request_is_lost() {
    let _turn = turn();
    let mut trials = 0;
    for round in 0..10 * length() {
        let (answered, handled, report) = race(config().idle_min_keep_ms(500), round);
        assert_eq!((answered, handled), (2 * CLIENTS, 2 * CLIENTS), "round {round}: {report}");
        assert_eq!(report.total().idle_races, 0, "{report}");
        trials += CLIENTS;
    }
    eprintln!("{trials} trials with a minimum keep");
}

/// Scenarios 9 and 10: without a keep.
#[test]
fn a_request_that_comes_too_late_is_never_begun_and_one_that_is_begun_is_answered() {
    let _turn = turn();
    let (mut trials, mut lost, mut seen) = (0, 0, 0);
    for round in 0..25 * length() {
        let (answered, handled, report) = race(config(), round);
        assert_eq!(answered, handled, "round {round}: begun and not answered: {report}");
        let races = report.total().idle_races;
        assert!(races <= 2 * CLIENTS - answered, "round {round}: {report}");
        (trials, lost) = (trials + CLIENTS, lost + 2 * CLIENTS - answered);
        seen += races;
    }
    eprintln!("{trials} trials without a keep: {lost} too late, {seen} of them seen by the server");
    assert!(lost > 0 && lost < trials, "{lost} of {trials}: the race was not run");
}

/// Clients that ask, wait for some milliseconds and ask again, while the server begins to drain.
/// Returns how many requests were answered and how many were begun.
fn race(config: Config, round: u64) -> (u64, u64, DrainReport) {
    let handled = std::sync::Arc::new(AtomicU64::new(0));
    let count = std::sync::Arc::clone(&handled);
    let server = Server::new(config).listen("127.0.0.1:0", move |mut conn: Connection| {
        let count = std::sync::Arc::clone(&count);
        async move {
            while let Some(request) = conn.recv().await? {
                count.fetch_add(1, SeqCst);
                conn.send(request).await?;
            }
            Ok(())
        }
    });
    let (running, addr) = start(server);
    let (ready, answered) = (Barrier::new(CLIENTS as usize + 1), AtomicU64::new(0));
    let report = std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (ready, answered) = (&ready, &answered);
            scope.spawn(move || {
                let mut stream = connect(addr);
                stream.write_all(b"1").expect("send");
                stream.read_exact(&mut [0]).expect("an answer");
                answered.fetch_add(1, SeqCst);
                ready.wait();
                let pause_us = (client * 997 + round * 131) % 30_000;
                std::thread::sleep(Duration::from_micros(pause_us));
                // A FIN, or a reset of what was written after it, is how one is told.
                if stream.write_all(b"2").is_ok() && matches!(stream.read(&mut [0]), Ok(1)) {
                    answered.fetch_add(1, SeqCst);
                }
            });
        }
        ready.wait();
        std::thread::sleep(Duration::from_millis(8));
        running.handle().drain(limit(8_000)).expect("the report")
    });
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
    (answered.load(SeqCst), handled.load(SeqCst), report)
}

/// One at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poison| poison.into_inner())
}

const CLIENTS: u64 = 40;
