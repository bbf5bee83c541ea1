//! The events of the feature `tracing`: which are told, when, at what level and with what in them,
//! and how few.
//!
//! The tests take turns, since a process has one subscriber.
#![cfg(feature = "tracing")]

mod common;

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};

use common::child::{self, again};
use common::filter::refuse_everywhere;
use common::{config, connect, echo, echo_or_loop, ignore_all, limit, settle, start, wait_until};
use slipring::{CloseReason, Config, Connection, Running, Server};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Metadata, Subscriber};

/// An event as it was told.
#[derive(Clone, Debug)]
struct Told {
    level: Level,
    message: String,
    fields: BTreeMap<String, String>,
    thread: String,
}

static TOLD: Mutex<Vec<Told>> = Mutex::new(Vec::new());
/// The subscriber panics at each event.
static THROWS: AtomicBool = AtomicBool::new(false);

struct Collector;

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "slipring"
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        panic!("slipring has no spans")
    }

    fn event(&self, event: &tracing::Event<'_>) {
        if THROWS.load(SeqCst) {
            panic!("a subscriber that panics");
        }
        let mut fields = Fields(BTreeMap::new());
        event.record(&mut fields);
        let told = Told {
            level: *event.metadata().level(),
            message: fields.0.remove("message").unwrap_or_default(),
            fields: fields.0,
            thread: std::thread::current().name().unwrap_or_default().to_owned(),
        };
        TOLD.lock().expect("no panic").push(told);
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

impl Told {
    fn get(&self, field: &str) -> &str {
        self.fields.get(field).unwrap_or_else(|| panic!("no {field} in {self}"))
    }

    fn number(&self, field: &str) -> u64 {
        self.get(field).parse().unwrap_or_else(|_| panic!("no number {field} in {self}"))
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}", self.level, self.message, self.fields)
    }
}

/// From now on events are collected, and only this test has them.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(|poison| poison.into_inner());
    collect();
    TOLD.lock().expect("no panic").clear();
    turn
}

fn collect() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Collector).expect("there is none"));
}

fn all() -> Vec<Told> {
    TOLD.lock().expect("no panic").clone()
}

/// Those with that message.
fn told(message: &str) -> Vec<Told> {
    all().into_iter().filter(|it| it.message == message).collect()
}

/// Waits for the first of those.
fn wait_for(message: &str) -> Told {
    wait_until(message, || !told(message).is_empty());
    told(message).remove(0)
}

fn end(running: Running) {
    running.handle().begin_drain(limit(5_000));
    running.join().expect("every core ends well");
}

/// On one core, so that what it tells is in order.
fn one_core() -> Config {
    config().cpus(&common::first_cpus(1))
}

#[test]
fn a_quiet_life_is_told_by_its_start_its_phases_and_its_end() {
    let _turn = turn();
    let settings = config().idle_ms(30_000).lameduck_ms(50);
    let (running, addr) = start(Server::new(settings).listen("127.0.0.1:0", echo));
    let begins = wait_for("server started");
    assert_eq!(begins.level, Level::INFO);
    assert_eq!(begins.get("addresses"), addr.to_string());
    assert_eq!(begins.number("cores"), running.handle().stats().cores().len() as u64);
    assert_eq!((begins.get("driver"), begins.get("spin")), ("io_uring", "off"));
    assert_eq!(begins.get("pinned"), "false");
    let settings = begins.get("settings");
    for part in ["SLIPRING_IDLE_MS=30000 (code)", "SLIPRING_LAMEDUCK_MS=50 (code)"] {
        assert!(settings.contains(part), "{part} in {settings}");
    }
    assert!(!settings.contains("SLIPRING_BUFFERS"), "what is the default is left out: {settings}");

    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("an echo");
    running.handle().begin_drain(limit(5_000));
    running.handle().begin_drain(limit(4_000));
    running.handle().begin_drain(limit(10_000));
    let report = running.join().expect("every core ends well");
    let messages = ["drain begins", "drain shortened", "drain phase", "server ended"];
    let told: Vec<Told> = all().into_iter().filter(|it| messages.contains(&&*it.message)).collect();
    let words: Vec<String> = told
        .iter()
        .map(|it| match it.fields.get("phase") {
            Some(phase) => format!("{} {phase}", it.level),
            None => format!("{} {}", it.level, it.message),
        })
        .collect();
    let phases = ["lame_duck", "stop_accept", "drain_connections", "down"];
    let phases: Vec<String> = phases.map(|phase| format!("INFO {phase}")).into();
    let expected = ["INFO drain begins", "INFO drain shortened"].map(str::to_owned).to_vec();
    let mut sorted = words.clone();
    // The cores may be in the first phase before the second order comes.
    sorted.sort_by_key(|word| (phases.contains(word), word == "INFO server ended"));
    let ended = vec!["INFO server ended".to_owned()];
    let in_parts: Vec<_> = sorted.iter().filter(|it| !phases.contains(it)).cloned().collect();
    assert_eq!(in_parts, [expected, ended].concat(), "{words:?}");
    let only_phases: Vec<_> = words.iter().filter(|it| phases.contains(it)).cloned().collect();
    assert_eq!(only_phases, phases, "in order");
    assert_eq!(words.last().map(String::as_str), Some("INFO server ended"));
    assert!((4_000..=5_000).contains(&(told[0].number("deadline_ms") / common::slowness())));
    let ended = told.last().expect("it is told");
    assert_eq!(ended.number("accepted"), report.total().accepted);
    assert_eq!((ended.number("forced"), ended.get("balanced")), (0, "true"));
    assert_eq!(all().iter().filter(|it| it.level <= Level::WARN).count(), 0, "{:?}", all());
}

#[test]
fn nothing_is_told_for_a_connection_or_an_operation() {
    let _turn = turn();
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", echo));
    wait_for("server started");
    let before = all().len();
    for _ in 0..100 {
        let mut client = connect(addr);
        for _ in 0..3 {
            client.write_all(b"x").expect("send");
            client.read_exact(&mut [0]).expect("an echo");
        }
        // Some end with a reset.
        if client.local_addr().expect("an address").port().is_multiple_of(2) {
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("set");
        }
    }
    let handle = running.handle();
    wait_until("all have ended", || handle.stats().total().live == 0);
    let news: Vec<String> = all()[before..].iter().map(ToString::to_string).collect();
    // A machine that is very busy may stall a turn, which is told.
    assert!(news.iter().all(|it| it.starts_with("WARN stall")), "{news:?}");
    settle(running, 100);
}

async fn panic_at_once(mut conn: Connection) -> slipring::Result<()> {
    conn.recv().await?;
    panic!("as the test wants")
}

#[test]
fn panics_are_errors_with_their_place_and_few_of_them_are_told() {
    let _turn = turn();
    let (running, addr) = start(Server::new(one_core()).listen("127.0.0.1:0", panic_at_once));
    let handle = running.handle();
    let since = Instant::now();
    for n in 1..=100 {
        let mut client = connect(addr);
        client.write_all(b"x").expect("send");
        wait_until("it has panicked", || handle.stats().total().panics == n);
    }
    let seconds = since.elapsed().as_secs() as usize;
    let told = told("task panicked");
    assert!((1..=2 + seconds).contains(&told.len()), "{} in {seconds} s", told.len());
    assert_eq!(told[0].level, Level::ERROR);
    assert!(told[0].get("place").contains("events.rs:"), "{}", told[0]);
    assert_eq!((told[0].number("panics"), told[0].number("core")), (1, 0));
    assert!(told[0].thread.starts_with("slipring-"), "by the core itself: {:?}", told[0].thread);
    settle(running, 100);
}

#[test]
fn a_stall_is_a_warning_with_its_place_and_its_length() {
    let _turn = turn();
    let server =
        Server::new(one_core().stall_ms(50)).listen("127.0.0.1:0", |mut conn| async move {
            conn.recv().await?;
            let until = Instant::now() + Duration::from_millis(200);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            conn.write(b"x").await
        });
    let (running, addr) = start(server);
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("an answer");
    let ours = |it: &Told| it.fields.get("place").is_some_and(|at| at.contains("events.rs"));
    wait_until("it is told", || told("stall").iter().any(ours));
    let stall = told("stall").into_iter().find(ours).expect("it was there");
    assert_eq!(stall.level, Level::WARN);
    assert!(stall.number("lasted_ms") >= 180 && stall.number("stalls") >= 1, "{stall}");
    end(running);
}

#[test]
fn an_overload_is_told_when_it_begins_and_when_it_has_been_over_for_a_second() {
    let _turn = turn();
    let config = one_core().connections_max(4).evict_percent(0).check_ms(50);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", echo));
    let handle = running.handle();
    // Each that ends lets in another, at the limit all the time.
    let mut clients: Vec<_> = (0..8).map(|_| connect(addr)).collect();
    for n in 0..100 {
        wait_until("it is full", || handle.stats().total().accepted == 4 + n);
        drop(clients.remove(0));
        clients.push(connect(addr));
    }
    let begins = wait_for("overload begins");
    assert_eq!((begins.level, begins.number("core")), (Level::WARN, 0));
    assert!(handle.stats().total().accept_pauses >= 50, "it has come and gone all the time");
    assert_eq!((told("overload begins").len(), told("overload has ended").len()), (1, 0));
    clients.truncate(6);
    drop(clients.drain(..4));
    let ends = wait_for("overload has ended");
    assert_eq!(ends.level, Level::INFO);
    assert_eq!(ends.number("rejected"), 0);
    drop(clients);
    end(running);
    assert_eq!(told("overload begins").len(), 1);
}

#[test]
fn an_eviction_is_told_at_both_its_ends_with_the_number_of_those_who_had_to_go() {
    let _turn = turn();
    let config = one_core().connections_max(20).evict_percent(50).check_ms(50);
    let (running, addr) = start(Server::new(config).listen("127.0.0.1:0", echo));
    let handle = running.handle();
    let mut clients: Vec<_> = (0..12).map(|_| connect(addr)).collect();
    for client in &mut clients {
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an echo");
    }
    let begins = wait_for("eviction begins");
    assert_eq!(begins.level, Level::WARN);
    let ends = wait_for("eviction has ended");
    let evicted = handle.stats().total().closed.get(CloseReason::Evicted);
    assert_eq!((ends.level, ends.number("evicted")), (Level::INFO, evicted));
    assert!(evicted > 0, "some had to go");
    drop(clients);
    end(running);
}

#[test]
fn a_drain_that_forces_says_so_with_what_is_left() {
    let _turn = turn();
    let (running, addr) = start(Server::new(one_core()).listen("127.0.0.1:0", ignore_all));
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    client.read_exact(&mut [0]).expect("an answer");
    running.handle().begin_drain(limit(200));
    running.join().expect("every core ends well");
    let forces = wait_for("drain forces");
    assert_eq!((forces.level, forces.number("connections")), (Level::WARN, 1));
    let phases: Vec<String> =
        told("core's drain phase").iter().map(|it| it.get("phase").to_owned()).collect();
    assert_eq!(phases, ["lame_duck", "stop_accept", "drain_connections", "force", "down"]);
    assert_eq!(wait_for("server ended").number("forced"), 1);
}

#[test]
fn a_core_that_does_not_answer_is_an_error_that_names_what_it_runs() {
    static STOP: AtomicBool = AtomicBool::new(false);
    let _turn = turn();
    let server = Server::new(one_core()).listen("127.0.0.1:0", |conn| echo_or_loop(conn, &STOP));
    let (running, addr) = start(server);
    let mut client = connect(addr);
    client.write_all(b"loop").expect("send");
    let handle = running.handle();
    wait_until("it loops", || handle.stats().total().bytes_received == 4);
    handle.begin_drain(Duration::from_millis(50));
    let report = running.join().expect("the report");
    STOP.store(true, SeqCst);
    let stuck = wait_for("core did not answer");
    assert_eq!((stuck.level, stuck.number("connections")), (Level::ERROR, 1));
    assert!(stuck.get("running").contains("events.rs:"), "{stuck}: {report}");
    // It is out of its loop now.
    wait_for("server ended");
}

#[test]
fn a_core_that_leaves_is_told_apart_from_a_server_that_ends() {
    let _turn = turn();
    // Unpinned, so that it is their number that counts.
    let (running, _) = start(Server::new(config().cpus("0,1")).listen("127.0.0.1:0", echo));
    let left = running.handle().retire(1, limit(5_000)).expect("one is left");
    let begins = wait_for("retire begins");
    assert_eq!((begins.level, begins.number("core")), (Level::INFO, 1));
    let retired = wait_for("core retired");
    assert_eq!((retired.level, retired.number("core")), (Level::INFO, 1));
    assert_eq!(retired.number("accepted"), left.stats.accepted);
    assert!(told("drain phase").is_empty() && told("server ended").is_empty());
    end(running);
    assert_eq!(told("drain phase").len(), 4);
    assert_eq!(told("core retired").len(), 1);
}

/// In a process of its own, whose system calls are refused.
#[test]
fn a_core_that_fails_is_an_error_that_says_why() {
    const TEST: &str = "a_core_that_fails_is_an_error_that_says_why";
    if child::role().is_none() {
        let (succeeded, words) = child::run(again(TEST, "server", &[]));
        assert!(succeeded, "{words}");
        return;
    }
    let _turn = turn();
    let (running, addr) = start(Server::new(one_core()).listen("127.0.0.1:0", echo));
    refuse_everywhere(libc::SYS_io_uring_enter, libc::EINVAL);
    drop(connect(addr));
    let error = running.join().expect_err("a core has failed");
    let failed = wait_for("core failed");
    assert_eq!((failed.level, failed.number("core")), (Level::ERROR, 0));
    assert!(failed.get("error").contains("io_uring_enter"), "{failed}: {error}");
    // Its accept was in flight, and nobody can hear of its end.
    let leaked = wait_for("operations leaked");
    assert!(leaked.level == Level::ERROR && leaked.number("count") > 0, "{leaked}");
}

/// In a process of its own, that has no descriptors left.
#[test]
fn an_accept_that_fails_is_told_once_with_its_error_until_it_works_again() {
    const TEST: &str = "an_accept_that_fails_is_told_once_with_its_error_until_it_works_again";
    if child::role().is_none() {
        let (succeeded, words) = child::run(again(TEST, "server", &[]));
        assert!(succeeded, "{words}");
        return;
    }
    let _turn = turn();
    let (running, addr) = start(Server::new(one_core().check_ms(50)).listen("127.0.0.1:0", echo));
    let mut clients: Vec<_> = (0..8).map(|_| connect(addr)).collect();
    let handle = running.handle();
    wait_until("they are accepted", || handle.stats().total().live == 8);
    let mut hogs = Vec::new();
    while let Ok(hog) = std::fs::File::open("/dev/null") {
        hogs.push(hog);
    }
    // What is needed to connect is what is not there to accept.
    let mut waiting = Vec::new();
    for _ in 0..8 {
        drop(hogs.pop());
        waiting.push(connect(addr));
    }
    let fails = wait_for("accept fails");
    assert_eq!((fails.level, fails.get("address")), (Level::WARN, &*addr.to_string()));
    assert!(fails.get("error").contains("os error 24"), "{fails}");
    wait_until("it is tried again", || handle.stats().total().accept_errors >= 5);
    assert_eq!((told("accept fails").len(), told("accept works again").len()), (1, 0));
    drop(hogs);
    let works = wait_for("accept works again");
    assert!(works.level == Level::INFO && works.number("errors") >= 5, "{works}");
    for client in clients.iter_mut().chain(&mut waiting) {
        client.write_all(b"x").expect("send");
        client.read_exact(&mut [0]).expect("an echo");
    }
    drop((clients, waiting));
    settle(running, 16);
}

/// It is a server inside of the server, and no other.
#[cfg(feature = "admin")]
#[test]
fn an_admin_listener_tells_nothing_of_itself() {
    let _turn = turn();
    let server = Server::new(one_core()).listen("127.0.0.1:0", echo).admin("127.0.0.1:0");
    let (running, addr) = start(server);
    let Some(slipring::ListenAddr::Tcp(admin)) = running.admin_addr() else { panic!("it is TCP") };
    // More than it has places for.
    let crowd: Vec<_> = (0..40).map(|_| connect(admin)).collect();
    let ready = common::web::get(admin, "/readyz").expect("an answer");
    assert_eq!(ready.status, 200);
    drop((crowd, connect(addr)));
    end(running);
    let messages: Vec<String> = all().into_iter().map(|it| it.message).collect();
    let count = |message: &str| messages.iter().filter(|it| *it == message).count();
    let counts = ["server started", "drain begins", "drain phase", "server ended"].map(count);
    assert_eq!(counts, [1, 1, 4, 1], "{messages:?}");
    assert_eq!((count("overload begins"), count("eviction begins")), (0, 0), "{messages:?}");
}

#[test]
fn what_a_subscriber_panics_with_is_its_own() {
    let _turn = turn();
    THROWS.store(true, SeqCst);
    let (running, addr) = start(Server::new(one_core()).listen("127.0.0.1:0", panic_at_once));
    let handle = running.handle();
    let mut client = connect(addr);
    client.write_all(b"x").expect("send");
    wait_until("it has panicked", || handle.stats().total().panics == 1);
    drop(client);
    settle(running, 1);
    THROWS.store(false, SeqCst);
    assert!(all().is_empty(), "it was there all the time");
}

/// What is documented is what there is, level by level.
#[test]
fn the_documented_events_are_those_of_the_source() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| std::fs::read_to_string(root.join(name)).expect(name);
    let mut in_source = Vec::new();
    for file in ["src/trace.rs", "src/trace/core.rs"] {
        for call in read(file).split("event!(").skip(1) {
            let level = call.trim_start().split(',').next().unwrap_or_default().trim().to_owned();
            let body = call.split(");").next().unwrap_or_default();
            let Some(message) = body.rsplit('"').nth(1) else { continue };
            if ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&&*level) {
                in_source.push((level, message.to_owned()));
            }
        }
    }
    let docs = read("docs/observability.md");
    let rows = docs.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        let (level, message) = (cells.next()?, cells.next()?);
        let message = message.strip_prefix('`')?.strip_suffix('`')?;
        let is_level = level.chars().all(|letter| letter.is_ascii_uppercase());
        is_level.then(|| (level.to_owned(), message.to_owned()))
    });
    let mut documented: Vec<_> = rows.collect();
    documented.sort();
    in_source.sort();
    assert!(in_source.len() > 15, "{in_source:?}");
    assert_eq!(documented, in_source);
}
