//! Clients that write at the moment at which a drain closes their idle connection: what a handler
//! has begun is answered, what is not answered was not begun, and a minimum keep avoids the race.
//!
//! The tests take turns, since they measure time.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use crate::common::load::{Outcome, Outcomes};
use crate::common::{config, connect, length, limit, start, turn};
use slipring::{CloseReason, Config, Connection, DrainReport, Server};

/// Scenario 10: with a keep that is longer than the clients' pauses.
#[test]
fn with_a_minimum_keep_no_request_is_lost() {
    let _turn = turn();
    let rounds = TRIALS * length() / CLIENTS;
    for round in 0..rounds {
        let race = race(config().idle_min_keep_ms(500), round);
        let Race { answered, begun, fins, resets, timed_out, ref report } = race;
        let all = (CLIENTS, 2 * CLIENTS, 0, 0, 0);
        assert_eq!((answered, begun, fins, resets, timed_out), all, "round {round}: {report}");
        assert_eq!(report.total().idle_races, 0, "{report}");
    }
    eprintln!("{} trials with a minimum keep, all answered", rounds * CLIENTS);
}

/// Scenarios 9 and 10: without a keep, a client whose request comes too late sees a FIN and no
/// reset, and its handler has not begun; nobody waits in vain.
#[test]
fn a_request_that_comes_too_late_is_never_begun_and_one_that_is_begun_is_answered() {
    let _turn = turn();
    let (rounds, mut late, mut resets, mut seen) = (TRIALS * length() / CLIENTS, 0, 0, 0);
    for round in 0..rounds {
        let race = race(config(), round);
        let (report, lost) = (&race.report, race.fins + race.resets);
        assert_eq!(CLIENTS + race.answered, race.begun, "round {round}: {report}");
        assert_eq!((race.answered + lost, race.timed_out), (CLIENTS, 0), "round {round}: {report}");
        let races = report.total().idle_races;
        assert!(races <= lost, "round {round}: {races} of {lost}: {report}");
        (late, resets, seen) = (late + lost, resets + race.resets, seen + races);
    }
    let trials = rounds * CLIENTS;
    eprintln!("{trials} trials without a keep: {late} too late, {seen} seen, {resets} reset");
    assert!(late > 0 && late < trials, "{late} of {trials}: the race was not run");
    assert_eq!(resets, 0, "what comes late is read and thrown away, so that the FIN arrives");
    // Four in a thousand meet the server between its FIN and its close.
    assert!(seen > 0 || length() < 10, "of {late} that were late the server saw none");
}

/// How the second requests of a round have ended.
struct Race {
    answered: u64,
    /// Those and the first ones, by the handlers.
    begun: u64,
    fins: u64,
    resets: u64,
    timed_out: u64,
    report: DrainReport,
}

/// Clients that ask, wait for some milliseconds and ask again, while the server begins to drain.
fn race(config: Config, round: u64) -> Race {
    let begun = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&begun);
    let server = Server::new(config).listen("127.0.0.1:0", move |mut conn: Connection| {
        let count = Arc::clone(&count);
        async move {
            while let Some(request) = conn.recv().await? {
                count.fetch_add(1, SeqCst);
                conn.send(request).await?;
            }
            Ok(())
        }
    });
    let (running, addr) = start(server);
    let (ready, outcomes) = (Barrier::new(CLIENTS as usize + 1), Outcomes::default());
    let report = std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (ready, outcomes) = (&ready, &outcomes);
            scope.spawn(move || {
                let mut stream = connect(addr);
                stream.write_all(b"1").expect("send");
                stream.read_exact(&mut [0]).expect("an answer");
                ready.wait();
                let pause_us = (client * 997 + round * 131) % 30_000;
                std::thread::sleep(Duration::from_micros(pause_us));
                outcomes.count(ask_again(&mut stream));
            });
        }
        ready.wait();
        std::thread::sleep(Duration::from_millis(8));
        running.handle().drain(limit(8_000)).expect("the report")
    });
    assert!(report.is_balanced(), "{report}");
    assert_eq!(report.total().closed.get(CloseReason::Forced), 0, "{report}");
    Race {
        answered: outcomes.get(Outcome::Ok),
        begun: begun.load(SeqCst),
        fins: outcomes.get(Outcome::Eof),
        resets: outcomes.get(Outcome::Reset),
        timed_out: outcomes.get(Outcome::TimedOut),
        report,
    }
}

fn ask_again(stream: &mut TcpStream) -> Outcome {
    if stream.write_all(b"2").is_err() {
        return Outcome::Reset;
    }
    match stream.read(&mut [0]) {
        Ok(0) => Outcome::Eof,
        Ok(_) => Outcome::Ok,
        Err(error) if error.kind() == ErrorKind::WouldBlock => Outcome::TimedOut,
        Err(_) => Outcome::Reset,
    }
}

const CLIENTS: u64 = 40;
/// Of each kind, in an ordinary run.
const TRIALS: u64 = 1_000;
