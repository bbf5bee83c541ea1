//! `Handle::connections` against real sockets: every connection is listed, with what it is at.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::common::{config, connect, echo_or_loop, limit, start, wait_until};
use slipring::{
    CloseReason, Config, Connection, ConnectionInfo, ConnectionState as State, Connections,
    DeadlineKind, Handle, Result, Server,
};

/// Which handler a client wants, by its first byte.
async fn serve(mut conn: Connection) -> Result<()> {
    let Some(order) = conn.recv().await? else { return Ok(()) };
    match order.first() {
        Some(b'x') => {
            conn.send(order).await?;
            crate::common::echo(conn).await
        }
        // Waits for the rest of a message.
        Some(b'r') => {
            conn.write(b"x").await?;
            conn.read_exact(&mut vec![0; 1_000_000]).await
        }
        // Does something else than to wait for input.
        Some(b'b') => nap(3_600_000).await,
        // Sends more than the peer's and its own kernel hold.
        Some(b's') => {
            for _ in 0..64 {
                conn.send(vec![7; 1 << 20]).await?;
            }
            Ok(())
        }
        // Half-closes while the handler goes on.
        Some(b'h') => {
            while conn.recv().await?.is_some() {}
            nap(3_600_000).await
        }
        // Leaves with input unread, so that the rest is read out.
        Some(b'l') => {
            conn.write(b"x").await?;
            nap(300).await
        }
        // Does not look at the connection when it is ended.
        Some(b'e') => {
            conn.set_deadline(DeadlineKind::Handler, Duration::from_millis(50))?;
            nap(3_600_000).await
        }
        _ => Ok(()),
    }
}

/// Deadlines that end nothing before the test does.
fn patient() -> Config {
    let hours = 2 * 3_600_000;
    config()
        .first_byte_ms(3_600_000)
        .idle_ms(hours)
        .handler_ms(hours)
        .message_ms(hours)
        .half_close_ms(hours)
        .min_rate_bytes_per_s(0)
        .write_stall_ms(3_600_000)
        .force_grace_ms(10_000)
}

/// Scenario 66, in part.
#[test]
fn a_connection_in_each_state_is_listed_with_all_that_is_known_of_it() {
    let server = Server::new(patient().linger_ms(60_000)).listen("127.0.0.1:0", serve);
    let (running, addr) = start(server);
    let handle = running.handle();
    let since = Instant::now();
    for (state, order) in [
        (State::New, &b""[..]),
        (State::Idle, b"x"),
        (State::Receiving, b"r"),
        (State::Busy, b"b"),
        (State::Sending, b"s"),
        (State::HalfClosed, b"h"),
        (State::Lingering, b"l"),
        (State::Ended, b"e"),
        (State::Paused, b"b"),
    ] {
        let mut client = connect(addr);
        client.write_all(order).expect("send");
        let mut sent = order.len() as u64;
        match state {
            State::Idle => client.read_exact(&mut [0]).expect("the echo"),
            State::Receiving => sent += begin_message(&mut client),
            State::HalfClosed => client.shutdown(Shutdown::Write).expect("half-close"),
            // Input that the handler leaves behind is what it lingers for.
            State::Lingering => sent += begin_message(&mut client),
            State::Paused => sent += flood(&client),
            _ => {}
        }
        let info = listed(&handle, &client, state);
        assert!(info.age <= since.elapsed() && info.without_progress <= info.age, "{info:?}");
        assert_eq!(info.listener.as_ref(), running.local_addrs().first(), "{info:?}");
        assert!(info.bytes_in <= sent, "{info:?}");
        match state {
            State::New => {
                assert_eq!((info.bytes_in, info.bytes_out), (0, 0), "{info:?}");
                assert_eq!(info.deadline, Some(DeadlineKind::FirstByte), "{info:?}");
            }
            State::Idle => assert_eq!((info.bytes_in, info.bytes_out), (1, 1), "{info:?}"),
            State::Receiving => assert_eq!(info.bytes_in, 5, "{info:?}"),
            State::Sending => assert!(info.bytes_queued > 0, "{info:?}"),
            State::Paused => assert!(info.bytes_unread >= 65_536, "{info:?}"),
            State::Ended => assert_eq!(info.ended, Some(CloseReason::Handler), "{info:?}"),
            State::Lingering => assert_eq!(info.handler, None, "{info:?}"),
            _ => {}
        }
        assert!(info.ended.is_some() || info.deadline_in > Duration::ZERO, "{info:?}");
        if state != State::Lingering {
            let place = info.handler.expect("a handler").to_string();
            assert!(place.contains("tests/runtime/inspect.rs"), "{place}");
        }
        drop(client);
    }
    end(&handle);
}

/// Which ones are stuck, and why: one call.
#[test]
fn one_call_names_the_stuck_among_the_well() {
    let (running, addr) = start(Server::new(patient()).listen("127.0.0.1:0", serve));
    let handle = running.handle();
    let mut well: Vec<TcpStream> = (0..50).map(|_| connect(addr)).collect();
    let orders = [(&b"b"[..], State::Busy), (b"r", State::Receiving), (b"s", State::Sending)];
    let stuck = orders.map(|(order, state)| {
        let mut client = connect(addr);
        client.write_all(order).expect("send");
        if state == State::Receiving {
            begin_message(&mut client);
        }
        (client, state)
    });
    let (still, begun) = (Duration::from_millis(300), Instant::now());
    let found = loop {
        for client in &mut well {
            client.write_all(b"x").expect("send");
            client.read_exact(&mut [0]).expect("the echo");
        }
        let found = handle.connections().expect("a list").without_progress_for(still);
        let well = |info: &ConnectionInfo| info.state == State::Idle;
        if found.len() == 3 && !found.iter().any(well) {
            break found.by_progress();
        }
        assert!(begun.elapsed() < limit(10_000), "{found}");
    };
    for (client, state) in &stuck {
        let info = of(&found, client).unwrap_or_else(|| panic!("{state} in {found}"));
        assert_eq!(info.state, *state);
    }
    let text = found.to_string();
    for (_, state) in &stuck {
        assert!(text.contains(state.as_str()), "{text}");
    }
    assert!(text.contains("tests/runtime/inspect.rs") && text.ends_with("3 connections"), "{text}");
    assert!(handle.connections().expect("a list").len() >= 53);
    end(&handle);
}

#[test]
fn unix_connections_are_listed_with_their_address_and_without_a_peer() {
    let name = format!("slipring-inspect-{}", std::process::id());
    let server = Server::new(patient()).listen(format!("unix:@{name}"), serve);
    let running = server.start().expect("it starts");
    let handle = running.handle();
    let addr = UnixAddr::from_abstract_name(name.as_bytes());
    let mut client = UnixStream::connect_addr(&addr.expect("an address")).expect("connect");
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("the echo");
    let list = handle.connections().expect("a list");
    let [info] = list.as_slice() else { panic!("{list}") };
    assert_eq!((info.peer, info.state), (None, State::Idle));
    assert_eq!(info.listener.as_ref().map(ToString::to_string), Some(format!("unix:@{name}")));
    end(&handle);
}

/// A core in a loop cannot answer; the others do, and its connections are counted.
#[test]
fn a_core_that_does_not_answer_is_listed_as_silent() {
    static STOP: AtomicBool = AtomicBool::new(false);
    let server = Server::new(patient()).listen("127.0.0.1:0", |conn| echo_or_loop(conn, &STOP));
    let (running, addr) = start(server);
    let handle = running.handle();
    let mut clients: Vec<TcpStream> = (0..16).map(|_| connect(addr)).collect();
    for client in &mut clients {
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("the echo");
    }
    let cores: Vec<u64> = handle.stats().cores().iter().map(|core| core.live).collect();
    let stuck = of(&handle.connections().expect("a list"), &clients[0]).expect("listed").core;
    clients[0].write_all(b"loop").expect("send");
    let since = Instant::now();
    let list = loop {
        let list = handle.connections().expect("a list");
        if !list.silent_cores().is_empty() {
            break list;
        }
        assert!(since.elapsed() < limit(10_000), "{list}");
    };
    let [silent] = list.silent_cores() else { panic!("{list}") };
    assert_eq!((silent.core, silent.connections), (stuck, cores[stuck]));
    assert!(list.to_string().contains("tests/runtime/inspect.rs"), "{list}");
    assert_eq!(list.len() as u64, cores.iter().sum::<u64>() - cores[stuck], "{list}");
    STOP.store(true, SeqCst);
    end(&handle);
    assert!(handle.connections().expect("a list").is_empty(), "of a server that has ended");
}

/// Connections that leak, one after the other, are seen in the histogram long before a limit is
/// reached. Scenario 66, in part.
#[test]
fn a_slow_leak_shows_in_the_ages() {
    let (running, addr) = start(Server::new(patient().check_ms(50)).listen("127.0.0.1:0", serve));
    let handle = running.handle();
    let (mut leaked, since) = (Vec::new(), Instant::now());
    let old = || handle.stats().total().census.age.at_least(Duration::from_secs(1));
    let mut seen = Vec::new();
    while seen.len() < 5 {
        let mut leak = connect(addr);
        leak.write_all(b"b").expect("send");
        leaked.push(leak);
        // Those that come and go leave no trace.
        let mut brief = connect(addr);
        brief.write_all(b"x").expect("send");
        brief.read_exact(&mut [0]).expect("the echo");
        drop(brief);
        pause(20);
        let now = old();
        if seen.last().is_none_or(|last| now >= last + 10) {
            seen.push(now);
        }
        assert!(since.elapsed() < limit(30_000), "{}", handle.stats());
    }
    let census = handle.stats().total().census;
    assert!(census.age.total() as usize <= leaked.len() + 2, "{census:?}");
    assert!(census.state(State::Busy) >= *seen.last().expect("five"), "{census:?}");
    // Their byte came a little later than they did.
    let stuck = || handle.stats().total().census.without_progress.at_least(Duration::from_secs(1));
    wait_until("their standstill shows too", || stuck() >= seen[4]);
    assert!(Duration::from_millis(census.oldest_age_ms) <= since.elapsed(), "{census:?}");
    assert_eq!(handle.stats().total().mismatches, 0);
    end(&handle);
}

#[test]
fn the_census_is_empty_again_when_everyone_has_gone() {
    let (running, addr) = start(Server::new(patient().check_ms(20)).listen("127.0.0.1:0", serve));
    let handle = running.handle();
    let clients: Vec<TcpStream> = (0..20).map(|_| connect(addr)).collect();
    let census = || handle.stats().total().census;
    wait_until("all are counted", || census().state(State::New) == 20);
    drop(clients);
    wait_until("nobody is", || census().total() == 0);
    wait_until("no timer is left", || handle.stats().total().timers == 0);
    end(&handle);
}

/// Waits until a client's connection is in a state, and returns what is listed.
fn listed(handle: &Handle, client: &TcpStream, state: State) -> ConnectionInfo {
    let give_up = Instant::now() + limit(10_000);
    loop {
        let list = handle.connections().expect("a list");
        assert!(list.silent_cores().is_empty(), "{list}");
        // The socket of one that was ended is closed, so nothing tells its peer.
        let ended = list.iter().find(|info| info.state == state && state == State::Ended);
        let info = of(&list, client).filter(|info| info.state == state).or(ended);
        if let Some(info) = info {
            return info.clone();
        }
        assert!(Instant::now() < give_up, "waited in vain for {state}: {list}");
    }
}

fn of<'a>(list: &'a Connections, client: &TcpStream) -> Option<&'a ConnectionInfo> {
    let addr: SocketAddr = client.local_addr().expect("an address");
    list.iter().find(|info| info.peer == Some(addr))
}

/// Says a part of what the handler then waits for.
fn begin_message(client: &mut TcpStream) -> u64 {
    client.read_exact(&mut [0]).expect("it listens");
    more(client, 4)
}

fn more(client: &mut TcpStream, count: usize) -> u64 {
    client.write_all(&vec![b'y'; count]).expect("send");
    count as u64
}

/// Sends until nothing more is taken.
fn flood(mut client: &TcpStream) -> u64 {
    client.set_nonblocking(true).expect("set non-blocking");
    let (mut sent, mut last) = (0, Instant::now());
    while last.elapsed() < Duration::from_millis(200) {
        if let Ok(count) = client.write(&[b'z'; 65_536]) {
            (sent, last) = (sent + count as u64, Instant::now());
        }
    }
    sent
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

async fn nap(ms: u64) -> Result<()> {
    slipring::time::sleep(Duration::from_millis(ms)).await;
    Ok(())
}

/// Ends the server whatever its handlers do, and checks the books.
fn end(handle: &Handle) {
    let report = handle.drain(limit(300)).expect("a report");
    assert!(report.is_balanced(), "{report}");
}
