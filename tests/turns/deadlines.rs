//! Deadlines over real sockets: peers that are slow on purpose are cut off when they should be, and
//! nobody else notices.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::{self, Process, again};
use crate::common::{
    config, connect, fds_max, late, length, limit, not_run, settle, start, turn, wait_until,
};
use slipring::{CloseReason, Connection, Server};
use socket2::{Domain, SockRef, Socket, Type};

/// Answers each line with itself.
async fn lines(mut conn: Connection) -> slipring::Result<()> {
    while let Some(line) = conn.read_until(b'\n', 10_000).await? {
        conn.write(&line).await?;
    }
    Ok(())
}

/// Scenario 46. The same clients drip the same bytes, first at a listener of the kernel's alone, so
/// that what they take from the machine is not taken for the server's delay. They are processes of
/// their own, as one has not enough descriptors for both ends of ten thousand.
#[test]
fn slow_lorises_are_cut_off_at_their_absolute_deadline_and_the_good_do_not_notice() {
    if let Some(role) = child::role() {
        return be_slow(&role);
    }
    let _turn = turn();
    late::watch();
    let count = slow_clients();
    let config = config().message_ms(MESSAGE_MS).first_byte_ms(60_000).min_rate_bytes_per_s(0);
    let config = config.connections_max(count * 6 / 5 + 2 * GOOD);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", lines));
    let mut ratios = Vec::new();
    let others = late::Others::watch();
    for _ in 0..ROUNDS {
        let (calm, _) = with_sink(|sink| good_clients_beside(addr, sink, count, false));
        // Whoever comes while the table is full waits in the kernel's queue, and is cut off later.
        wait_until("those have left", || running.handle().stats().total().live == 0);
        let (beset, ends) = good_clients_beside(addr, addr, count, true);
        ratios.push(beset.as_secs_f64() / calm.as_secs_f64());
        println!("{count} clients: p99 of the good {calm:?} without drips, {beset:?} with them");
        let Ends { first, last, round, .. } = ends;
        println!("cut off after {first:?} to {last:?}, as looked at every {round:?}");
        assert_eq!(ends.count, count, "each was cut off");
        // A client says its first byte in the round after its connect, and looks once in each.
        let most = Duration::from_millis(MESSAGE_MS * 9 / 8 + 1) + 2 * round + late::allowance();
        assert!(first >= Duration::from_millis(MESSAGE_MS - 1), "{first:?}");
        assert!(last <= most, "{last:?} is more than {most:?}");
    }
    ratios.sort_by(f64::total_cmp);
    let seen = format!("the p99 of the good grew by {ratios:?}, others took {}", others.share());
    println!("{seen}");
    if others.share() < late::Others::MAX {
        assert!(ratios[ROUNDS / 2] <= 2.0, "{seen}");
    } else if ratios[ROUNDS / 2] > 2.0 {
        not_run("the p99 of the good beside slow lorises", seen);
    }
    let total = settle(running, (ROUNDS * (count + 2 * GOOD)) as u64);
    assert_eq!(total.closed.get(CloseReason::Message), (ROUNDS * count) as u64);
}

/// A thousand, ten thousand in a long run, or what the server's descriptors allow.
fn slow_clients() -> usize {
    let wanted = (1_000 * length() as usize).min(10_000);
    let allowed = (fds_max() - crate::common::open_fds()) / 6 * 5 - 1_000;
    if allowed < wanted {
        not_run(&format!("{wanted} slow clients"), format!("descriptors allow {allowed}"));
    }
    wanted.min(allowed) / SLOW_PROCESSES * SLOW_PROCESSES
}

/// Runs `load` with the address of a listener whose connections stay open and are never read.
fn with_sink<T>(load: impl FnOnce(SocketAddr) -> T) -> T {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    // With as much room for those that wait as the server has.
    socket.listen(4_096).expect("listen");
    let listener = TcpListener::from(socket);
    let addr = listener.local_addr().expect("its address");
    listener.set_nonblocking(true).expect("set non-blocking");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut held = Vec::new();
            while !stop.load(SeqCst) {
                held.extend(std::iter::from_fn(|| listener.accept().ok()));
                thread::sleep(Duration::from_micros(100));
            }
        });
        let got = load(addr);
        stop.store(true, SeqCst);
        got
    })
}

/// The p99 of clients that ask and get their answers while `count` others drip bytes at `target`;
/// and after how long those were cut off, if they are.
fn good_clients_beside(
    addr: SocketAddr,
    target: SocketAddr,
    count: usize,
    cut_off: bool,
) -> (Duration, Ends) {
    let stop = AtomicBool::new(false);
    let ends = thread::scope(|scope| {
        let good = scope.spawn(|| ask_until(addr, &stop));
        let role = format!("{target} {} {cut_off}", count / SLOW_PROCESSES);
        let start = |_| Process::start(again(SLOW, &role, &[]));
        let processes: Vec<_> = (0..SLOW_PROCESSES).map(start).collect();
        let ends = processes.into_iter().map(|mut it| Ends::read(&it.line_after("ends ")));
        let ends = ends.fold(Ends::NONE, Ends::and);
        stop.store(true, SeqCst);
        (good.join().expect("the good are served"), ends)
    });
    let (mut took, ends) = ends;
    took.sort();
    (took[took.len() * 99 / 100], ends)
}

fn ask_until(addr: SocketAddr, stop: &AtomicBool) -> Vec<Duration> {
    let mut clients: Vec<TcpStream> = (0..GOOD).map(|_| connect(addr)).collect();
    let mut took = Vec::new();
    while !stop.load(SeqCst) {
        for client in &mut clients {
            let since = Instant::now();
            client.write_all(b"good\n").expect("ask");
            client.read_exact(&mut [0; 5]).expect("an answer");
            took.push(since.elapsed());
            thread::sleep(Duration::from_millis(1));
        }
    }
    took
}

/// One of the processes of slow clients: `address, how many, whether they are cut off`.
fn be_slow(role: &str) {
    let words: Vec<_> = role.split(' ').collect();
    let [addr, count, cut_off] = words[..] else { panic!("no role: {role}") };
    let addr = addr.parse().expect("an address");
    let ends = pester(addr, count.parse().expect("a number"), cut_off == "true");
    let [first, last, round] = [ends.first, ends.last, ends.round].map(|it| it.as_micros());
    println!("\nends {} {first} {last} {round}", ends.count);
}

/// Connects so many clients, each of which says a byte ten times a second, or in a crowd of ten
/// times as many once, for somewhat longer than a message may take, or until each was cut off; and
/// reads what comes.
fn pester(addr: SocketAddr, count: usize, cut_off: bool) -> Ends {
    let mut clients: Vec<(TcpStream, Instant, u32)> = Vec::with_capacity(count);
    let mut ends = Ends::NONE;
    let begun = Instant::now();
    let whole = limit(MESSAGE_MS * 3 / 2);
    let mut opened = 0;
    let mut buf = [0; 4096];
    // What many drips take from the machine is to be what few take.
    let pause = TENTH * (count as u32 * SLOW_PROCESSES as u32 / 1_000).max(1);
    // Spread over the first part of the time, as a burst of connects is another test's matter.
    while begun.elapsed() < whole || (cut_off && !clients.is_empty()) {
        assert!(begun.elapsed() < limit(30_000), "{} are never cut off", clients.len());
        let round = Instant::now();
        for _ in 0..(count - opened).min((count / 20).min(50)) {
            let client = connect(addr);
            client.set_nonblocking(true).expect("set non-blocking");
            clients.push((client, Instant::now(), 0));
            opened += 1;
        }
        let looked = Instant::now();
        clients.retain_mut(|(client, since, said)| {
            if since.elapsed() >= pause * *said && client.write(b"x").is_ok() {
                *said += 1;
            }
            match client.read(&mut buf) {
                Ok(0) => {
                    let took = since.elapsed();
                    ends = ends.and(Ends { count: 1, first: took, last: took, ..Ends::NONE });
                    false
                }
                Ok(_) => true,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock, "a FIN, no reset");
                    true
                }
            }
        });
        thread::sleep(TENTH.saturating_sub(looked.elapsed()) / 10);
        ends.round = ends.round.max(round.elapsed());
    }
    ends
}

/// How many were cut off, after how long, and how long it took at worst to look at all of them.
#[derive(Clone, Copy)]
struct Ends {
    count: usize,
    first: Duration,
    last: Duration,
    round: Duration,
}

impl Ends {
    const NONE: Ends =
        Ends { count: 0, first: Duration::MAX, last: Duration::ZERO, round: Duration::ZERO };

    fn and(self, other: Ends) -> Ends {
        Ends {
            count: self.count + other.count,
            first: self.first.min(other.first),
            last: self.last.max(other.last),
            round: self.round.max(other.round),
        }
    }

    /// What a process of slow clients has said.
    fn read(words: &str) -> Ends {
        let numbers = words.split(' ').map(|word| word.parse().unwrap_or(u64::MAX));
        let numbers: Vec<u64> = numbers.collect();
        let [first, last, round] = [1, 2, 3].map(|n| Duration::from_micros(numbers[n]));
        Ends { count: numbers[0] as usize, first, last, round }
    }
}

/// Scenario 47, a hundred times as fast: 240 bytes a second are asked for there.
#[test]
fn a_reader_below_the_least_rate_is_reset_and_one_above_gets_everything() {
    let _turn = turn();
    late::watch();
    for returns in [false, true] {
        let config = config().min_rate_bytes_per_s(24_000).min_rate_grace_ms(500);
        let config = config.linger_ms(if returns { 5_000 } else { 1_000 });
        let server = Server::new(config)
            .before_bind(|socket| SockRef::from(&socket).set_send_buffer_size(4 * 1024))
            .listen("127.0.0.1:0", move |mut conn| async move {
                conn.write(&[b'w'; RESPONSE]).await?;
                if !returns {
                    while conn.recv().await?.is_some() {}
                }
                Ok(())
            });
        let (running, addr) = start(server);
        let readers = [10_000, 30_000].map(|per_s| {
            thread::spawn(move || {
                let since = Instant::now();
                let (received, end) = read_slowly(addr, per_s);
                (received, end, since.elapsed())
            })
        });
        let [slow, good] = readers.map(|reader| reader.join().expect("no panic"));
        assert_eq!((good.0, good.1), (RESPONSE, Ok(())), "returns: {returns}");
        assert!(slow.0 < RESPONSE / 2, "{} bytes", slow.0);
        assert_eq!(slow.1, Err(ErrorKind::ConnectionReset), "after {:?}", slow.2);
        let total = settle(running, 2);
        assert_eq!(total.closed.get(CloseReason::MinRate), 1, "{:?}", total.closed);
        println!("returns: {returns}: reset after {:?} and {} bytes", slow.2, slow.0);
        let range = Duration::from_millis(500)..Duration::from_millis(5_000) + late::allowance();
        assert!(range.contains(&slow.2), "{:?}", slow.2);
    }
}

fn read_slowly(addr: SocketAddr, per_s: usize) -> (usize, Result<(), ErrorKind>) {
    let mut stream = connect_with_little_room(addr);
    let (begun, mut received) = (Instant::now(), 0);
    let mut buf = [0; 1_000];
    loop {
        let due = (begun.elapsed().as_secs_f64() * per_s as f64) as usize;
        while received < due {
            let most = (due - received).min(buf.len());
            match stream.read(&mut buf[..most]) {
                Ok(0) => return (received, Ok(())),
                Ok(count) => received += count,
                Err(error) => return (received, Err(error.kind())),
            }
            if received == RESPONSE {
                stream.shutdown(Shutdown::Write).expect("half-close");
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn connect_with_little_room(addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    socket.connect_timeout(&addr.into(), limit(10_000)).expect("connect");
    socket.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    socket.into()
}

/// Scenario 50. By time, whatever the peer sends; and by bytes, whatever time is left.
#[test]
fn a_peer_that_never_ends_holds_a_lingering_connection_no_longer_than_its_bounds() {
    let _turn = turn();
    late::watch();
    for (linger_ms, linger_bytes) in [(500, 1 << 30), (10_000, 256 * 1024)] {
        let config = config().linger_ms(linger_ms).linger_bytes(linger_bytes);
        let (running, addr) =
            start(Server::new(config).listen("127.0.0.1:0", |mut conn| async move {
                conn.recv().await?;
                conn.write(b"answer").await
            }));
        let mut client = connect(addr);
        let since = Instant::now();
        client.write_all(&[7; 10_000]).expect("send");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("the answer and a FIN, no reset");
        assert_eq!(answer, b"answer");
        // It is thrown away, until the socket is gone.
        while client.write_all(&[7; 4096]).is_ok() {
            assert!(since.elapsed() < limit(8_000), "it lingers for ever");
            if linger_bytes > 1 << 20 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let took = since.elapsed();
        println!("linger of {linger_ms} ms and {linger_bytes} bytes: over after {took:?}");
        let total = settle(running, 1);
        assert_eq!(total.closed.get(CloseReason::Served), 1, "{:?}", total.closed);
        if linger_bytes > 1 << 20 {
            let most = Duration::from_millis(linger_ms * 9 / 8 + 150) + late::allowance();
            assert!(took >= Duration::from_millis(linger_ms - 1) && took <= most, "{took:?}");
        } else {
            assert!(took < Duration::from_millis(linger_ms / 2), "{took:?}");
        }
    }
}

/// Scenario 52. The timers are those of tasks, which share the wheel and the budget with those of
/// connections: so many connections have not enough descriptors.
#[test]
fn a_hundred_thousand_deadlines_at_once_hold_nobody_up() {
    let _turn = turn();
    late::watch();
    let config = config().cpus(&crate::common::first_cpus(1));
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", lines));
    let handle = running.handle();
    handle
        .spawn_on(0, || async {
            let at = Instant::now() + limit(4_000);
            for _ in 0..100_000 {
                let left = at.saturating_duration_since(Instant::now());
                slipring::task::spawn(slipring::time::sleep(left)).expect("room for tasks");
            }
        })
        .expect("the core serves");
    wait_until("all are asleep", || handle.stats().total().timers >= 100_000);
    let mut client = connect(addr);
    let mut took = Vec::new();
    wait_until("they begin to fire", || handle.stats().total().tasks < 100_000);
    while handle.stats().total().tasks > 1 {
        let since = Instant::now();
        client.write_all(b"good\n").expect("ask");
        client.read_exact(&mut [0; 5]).expect("an answer");
        took.push(since.elapsed());
    }
    took.sort();
    let (p99, worst) = (took[took.len() * 99 / 100], took[took.len() - 1]);
    println!("{} answers while 100 000 timers fired: p99 {p99:?}, worst {worst:?}", took.len());
    assert!(p99 < Duration::from_millis(5) + late::allowance(), "{p99:?}");
    drop(client);
    settle(running, 1);
}

#[test]
fn an_abort_is_seen_as_a_reset_whatever_is_on_its_way() {
    let _turn = turn();
    let (running, addr) =
        start(Server::new(config()).listen("127.0.0.1:0", |mut conn| async move {
            match conn.recv().await?.as_deref() {
                Some(b"idle") => {}
                Some(b"sent") => conn.write(&[7; 100]).await?,
                _ => {
                    while slipring::time::timeout(limit(200), conn.send(vec![7; 65_536]))
                        .await
                        .is_ok()
                    {}
                }
            }
            conn.abort();
            Ok(())
        }));
    for word in ["idle", "sent", "full"] {
        let mut client = connect(addr);
        client.write_all(word.as_bytes()).expect("send");
        thread::sleep(Duration::from_millis(500));
        let error = client.read_to_end(&mut Vec::new()).expect_err("no regular end");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{word}");
    }
    let total = settle(running, 3);
    assert_eq!(total.closed.get(CloseReason::Aborted), 3, "{:?}", total.closed);
}

/// Clients that ask without a pause lose no request when their connection's lifetime is over: it is
/// answered, or it is one that the server has not read.
#[test]
fn a_lifetime_ends_between_two_requests() {
    let _turn = turn();
    let config = config().lifetime_ms(300).linger_ms(1_000);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", lines));
    let connects = 40 * length();
    let (mut ages, mut raced) = (Vec::new(), 0);
    thread::scope(|scope| {
        let asks = (0..4).map(|_| {
            scope.spawn(|| {
                (0..connects / 4)
                    .map(|_| {
                        let (mut client, since) = (connect(addr), Instant::now());
                        loop {
                            if client.write_all(b"good\n").is_err() {
                                break (since.elapsed(), true);
                            }
                            match client.read_exact(&mut [0; 5]) {
                                Ok(()) => {}
                                Err(error) => {
                                    assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "no reset");
                                    break (since.elapsed(), true);
                                }
                            }
                        }
                    })
                    .collect::<Vec<_>>()
            })
        });
        for ask in asks.collect::<Vec<_>>() {
            for (age, eof) in ask.join().expect("no panic") {
                ages.push(age);
                raced += u64::from(eof);
            }
        }
    });
    assert_eq!(raced, connects);
    ages.sort();
    println!("ended after {:?} to {:?}", ages[0], ages[ages.len() - 1]);
    assert!(ages[0] >= Duration::from_millis(269), "{ages:?}");
    let total = settle(running, connects);
    assert_eq!(total.closed.get(CloseReason::Lifetime), connects, "{:?}", total.closed);
}

const SLOW: &str = "slow_lorises_are_cut_off_at_their_absolute_deadline_and_the_good_do_not_notice";
const SLOW_PROCESSES: usize = 2;
const MESSAGE_MS: u64 = 2_000;
const TENTH: Duration = Duration::from_millis(100);
const GOOD: usize = 100;
const ROUNDS: usize = 3;
const RESPONSE: usize = 100_000;
