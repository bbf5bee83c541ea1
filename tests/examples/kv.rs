//! The kv example: Redis's own clients drive it, it answers word for word as redis-server does,
//! however its input is cut, on whichever core a key is, and its limits hold.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use crate::common::example::Example;
use crate::common::{connect, free_address, length, not_run, wait_until};

fn kv(cores: usize, mib: &str) -> Example {
    let cpus = (0..cores).map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",");
    Example::start("kv", &[mib], &[("SLIPRING_CPUS", &cpus), ("SLIPRING_PIN", "0")])
}

/// Ends it, and looks at its account.
fn end(kv: Example) {
    kv.terminate();
    let report = kv.end();
    assert!(report.contains("books balance"), "{report}");
}

fn is_installed(test: &str, program: &str) -> bool {
    let run = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    let installed = run.is_ok_and(|status| status.success());
    if !installed {
        not_run(test, format!("{program} is not installed"));
    }
    installed
}

/// Requests as arrays of strings.
fn requests(lines: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        bytes.extend(format!("*{}\r\n", words.len()).bytes());
        words
            .iter()
            .for_each(|word| bytes.extend(format!("${}\r\n{word}\r\n", word.len()).bytes()));
    }
    bytes
}

/// Sends requests and an ECHO behind them, and returns what comes before the ECHO's reply.
fn ask(stream: &mut TcpStream, bytes: &[u8]) -> String {
    const LAST: &str = "$9\r\nthat's it\r\n";
    stream.write_all(bytes).expect("send");
    stream.write_all(b"*2\r\n$4\r\nECHO\r\n$9\r\nthat's it\r\n").expect("send");
    let (mut text, mut block) = (Vec::new(), [0; 65_536]);
    while !text.ends_with(LAST.as_bytes()) {
        let bytes = stream.read(&mut block).expect("replies in time");
        assert!(bytes > 0, "it has ended after {:?}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&block[..bytes]);
    }
    text.truncate(text.len() - LAST.len());
    String::from_utf8(text).expect("it is UTF-8")
}

#[test]
fn redis_cli_gets_the_replies_of_redis() {
    if !is_installed("redis_cli_gets_the_replies_of_redis", "redis-cli") {
        return;
    }
    let kv = kv(2, "64");
    let cli = |words: &str| {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &kv.addr.port().to_string()]).args(words.split(' '));
        let output = command.output().expect("run redis-cli");
        String::from_utf8(output.stdout).expect("it is UTF-8").trim().to_owned()
    };
    for (words, reply) in [
        ("ping", "PONG"),
        ("set greeting hello", "OK"),
        ("get greeting", "hello"),
        ("get nothing", ""),
        ("incr visits", "1"),
        ("incr visits", "2"),
        ("incr greeting", "ERR value is not an integer or out of range"),
        ("lpush list a b c", "3"),
        ("lrange list 0 -1", "c\nb\na"),
        ("lpop list", "c"),
        ("get list", "WRONGTYPE Operation against a key holding the wrong kind of value"),
        ("get", "ERR wrong number of arguments for 'get' command"),
        ("mget greeting visits nothing", "hello\n2"),
        ("expire greeting 100", "1"),
        ("ttl greeting", "100"),
        ("del greeting visits nothing", "2"),
        ("select 0", "OK"),
        ("echo there", "there"),
    ] {
        assert_eq!(cli(words), reply, "{words}");
    }
    end(kv);
}

#[test]
fn redis_benchmark_drives_it_over_cores_pipelined_and_not() {
    if !is_installed("redis_benchmark_drives_it_over_cores_pipelined_and_not", "redis-benchmark") {
        return;
    }
    let kv = kv(3, "64");
    for pipeline in ["1", "16"] {
        let mut command = Command::new("redis-benchmark");
        command.args([
            "-p",
            &kv.addr.port().to_string(),
            "-P",
            pipeline,
            "-n",
            "3000",
            "-r",
            "500",
        ]);
        command.args(["-t", "ping,set,get,incr,lpush,lpop,lrange_100,lrange_600", "-q", "-e"]);
        let output = command.output().expect("run redis-benchmark");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success() && !text.contains("ERR"), "{text}");
        assert_eq!(text.matches("requests per second").count(), 10, "{text}");
    }
    end(kv);
}

/// A redis-server that ends with the test.
struct Redis(Child, SocketAddr);

impl Redis {
    fn start() -> Redis {
        let addr = free_address();
        let mut command = Command::new("redis-server");
        command.args(["--port", &addr.port().to_string(), "--save", "", "--bind", "127.0.0.1"]);
        command.args(["--appendonly", "no"]).stdout(Stdio::null());
        let redis = Redis(command.spawn().expect("start redis-server"), addr);
        wait_until("redis-server listens", || TcpStream::connect(addr).is_ok());
        redis
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn it_answers_word_for_word_as_redis_server_does() {
    if !is_installed("it_answers_word_for_word_as_redis_server_does", "redis-server") {
        return;
    }
    let (kv, redis) = (kv(3, "64"), Redis::start());
    let seed = std::env::var("RING_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut state = seed.unwrap_or(std::process::id() as u64);
    println!("RING_TEST_SEED={state}");
    let mut random = move |below: u64| {
        // Knuth's; the high bits are good enough.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut ours, mut theirs) = (connect(kv.addr), connect(redis.1));
    for _ in 0..200 * length() {
        let mut lines = Vec::new();
        for _ in 0..=random(40) {
            let mut key = || format!("k{}", random(12));
            let (a, b, c) = (key(), key(), key());
            let number = random(7) as i64 - 3;
            lines.push(match random(24) {
                0 | 1 => format!("set {a} {number}"),
                2 => format!("SET {a} text-{b}"),
                3 => format!("set {a} {number} EX 1000"),
                4..=6 => format!("get {a}"),
                7 | 8 => format!("incr {a}"),
                9 => format!("del {a} {b} {c}"),
                10 => format!("del {a}"),
                11 => format!("mget {a} {b} {c} {a}"),
                12 => format!("exists {a} {a} {b}"),
                13 | 14 => format!("lpush {a} {b} {c} {number}"),
                15 => format!("lpop {a}"),
                16 => format!("lpop {a} {number}"),
                17 | 18 => format!("lrange {a} {number} {}", number + random(6) as i64 - 3),
                19 => format!("expire {a} {}", number * 500),
                20 => format!("SeT {b} {number} px 1000000"),
                21 => ["get", "set a", "lrange a 0", "incr a b", "mget"][random(5) as usize].into(),
                22 => format!("lrange {a} x {b}"),
                _ => ["ping", "echo there", "select 0", "select 99"][random(4) as usize].into(),
            });
        }
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let bytes = requests(&lines);
        assert_eq!(ask(&mut ours, &bytes), ask(&mut theirs, &bytes), "{lines:?}");
    }
    for line in ["nonsense a b", "set a 9223372036854775807", "incr a", "set a 1 EX 0"] {
        let bytes = requests(&[line]);
        assert_eq!(ask(&mut ours, &bytes), ask(&mut theirs, &bytes), "{line}");
    }
    for number in ["0", "-1", "007", "-0", "-01", "+1", "\t1", "1\t", "-", "9223372036854775808"] {
        let (set, range) = (format!("set n {number}"), format!("lrange l {number} -1"));
        let bytes = requests(&[&set, "incr n", "get n", &range]);
        assert_eq!(ask(&mut ours, &bytes), ask(&mut theirs, &bytes), "{number:?}");
    }
    end(kv);
}

#[test]
fn input_may_be_cut_anywhere_and_lines_of_words_are_requests_too() {
    let kv = kv(2, "64");
    let whole = [
        &requests(&["set a 1", "set b 2", "mget a b c", "lpush l x y", "lrange l 0 -1"])[..],
        b"PING\r\n  get   a \r\n\r\nget b\n*0\r\n*-1\r\n",
        &requests(&["del a b l"]),
    ]
    .concat();
    let reply = [
        "+OK\r\n+OK\r\n*3\r\n$1\r\n1\r\n$1\r\n2\r\n$-1\r\n:2\r\n*2\r\n$1\r\ny\r\n$1\r\nx\r\n",
        "+PONG\r\n$1\r\n1\r\n$1\r\n2\r\n:3\r\n",
    ]
    .concat();
    let mut stream = connect(kv.addr);
    for cut in 0..whole.len() {
        stream.write_all(&whole[..cut]).expect("send");
        // Another connection's round trip later, the server has most probably read that.
        assert_eq!(ask(&mut connect(kv.addr), b"PING\r\n"), "+PONG\r\n");
        assert_eq!(ask(&mut stream, &whole[cut..]), reply, "cut at {cut}");
    }
    let large = "v".repeat(1024 * 1024);
    let set = requests(&[&format!("set large {large}"), "get large"]);
    let expected = format!("+OK\r\n$1048576\r\n{large}\r\n");
    assert!(ask(&mut stream, &set) == expected, "a megabyte is stored and comes back");
    end(kv);
}

#[test]
fn what_is_no_request_or_too_large_is_refused_and_ends_its_connection_alone() {
    let kv = kv(1, "64");
    for (input, error) in [
        (b"*1\r\n#3\r\nfoo\r\n".to_vec(), "expected '$'"),
        (b"*x\r\n".to_vec(), "invalid multibulk length"),
        (b"*100000\r\n".to_vec(), "invalid multibulk length"),
        (b"*1\r\n$-5\r\n".to_vec(), "invalid bulk length"),
        (b"*1\r\n$99999999\r\n".to_vec(), "invalid bulk length"),
        (b"*1\r\n$3\r\nfooXX".to_vec(), "expected CRLF"),
        (vec![b'x'; 70_000], "too big inline request"),
        (b"*2\r\n$3\r\nGET\r\n$123456789012345678901".to_vec(), "invalid bulk length"),
    ] {
        let mut stream = connect(kv.addr);
        stream.write_all(b"*1\r\n$4\r\nPING\r\n").expect("send");
        stream.write_all(&input).expect("send");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("the end, and no reset");
        assert!(text.starts_with("+PONG\r\n-ERR Protocol error: "), "{text}");
        assert!(text.contains(error) && text.ends_with("\r\n"), "{error}: {text}");
    }
    let mut stream = connect(kv.addr);
    stream.write_all(b"QUIT\r\nPING\r\n").expect("send");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("the end, and no reset");
    assert_eq!(text, "+OK\r\n");
    end(kv);
}

#[test]
fn values_are_bounded_and_those_that_expire_make_room_without_being_asked_for() {
    let kv = kv(2, "2");
    let mut stream = connect(kv.addr);
    let value = "v".repeat(10_000);
    let mut fill = |options: &str| {
        let set = |key| format!("set k{key} {value}{options}");
        let kept = (0..1_000).take_while(|key| {
            let reply = ask(&mut stream, &requests(&[&set(*key)]));
            assert!(reply == "+OK\r\n" || reply.starts_with("-OOM "), "{reply}");
            reply == "+OK\r\n"
        });
        kept.count()
    };
    // Of a core's half, until the first of either is full.
    let kept = fill("");
    assert!((100..=208).contains(&kept), "{kept} of 10 kB in 2 MiB");
    let mut other = connect(kv.addr);
    for key in 0..1_000 {
        ask(&mut other, &requests(&[&format!("del k{key}")]));
    }
    assert_eq!(fill(" PX 1"), 1_000, "they go as fast as they come");
    let kept = fill(" PX 3000");
    assert!((100..=208).contains(&kept), "{kept}");
    let set = requests(&[&format!("set k{kept} {value}")]);
    wait_until("keys have expired", || ask(&mut other, &set) == "+OK\r\n");
    assert_eq!(
        ask(&mut other, &requests(&["get k0", "ttl k0", "exists k0"])),
        "$-1\r\n:-2\r\n:0\r\n"
    );
    end(kv);
}

#[test]
fn counters_on_all_cores_are_exact_under_pipelines_and_through_a_drain() {
    const KEYS: usize = 50;
    let kv = kv(3, "64");
    let (sent, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let addr = kv.addr;
    let incr: Vec<String> = (0..KEYS).map(|key| format!("incr key{key}")).collect();
    let incr = requests(&incr.iter().map(String::as_str).collect::<Vec<_>>());
    let count = || {
        let mut stream = connect(addr);
        while !stop.load(SeqCst) {
            let replies = ask(&mut stream, &incr);
            assert_eq!(replies.matches(':').count(), KEYS, "{replies}");
            sent.fetch_add(1, SeqCst);
        }
    };
    thread::scope(|scope| {
        (0..4).for_each(|_| drop(scope.spawn(count)));
        wait_until("some rounds are done", || sent.load(SeqCst) > 400);
        stop.store(true, SeqCst);
    });
    let keys: Vec<String> = (0..KEYS).map(|key| format!("key{key}")).collect();
    let totals = ask(&mut connect(addr), &requests(&[&format!("mget {}", keys.join(" "))]));
    let total = sent.load(SeqCst).to_string();
    let expected =
        format!("*{KEYS}\r\n") + &format!("${}\r\n{total}\r\n", total.len()).repeat(KEYS);
    assert_eq!(totals, expected);

    // Then a drain in the midst: whoever has got a part of a batch's replies gets all of them.
    let (rounds, ended) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = || {
        let mut stream = connect(addr);
        let mut block = [0; 65_536];
        loop {
            if stream.write_all(&incr).is_err() {
                break;
            }
            let mut replies = Vec::new();
            while replies.iter().filter(|byte| **byte == b':').count() < KEYS
                || !replies.ends_with(b"\r\n")
            {
                match stream.read(&mut block) {
                    Ok(0) => break,
                    Ok(bytes) => replies.extend_from_slice(&block[..bytes]),
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                    Err(error) => panic!("{error}"),
                }
            }
            let whole = replies.iter().filter(|byte| **byte == b':').count();
            assert!(whole == 0 || whole == KEYS, "{whole} of {KEYS} replies");
            if whole == 0 {
                break;
            }
            rounds.fetch_add(1, SeqCst);
        }
        ended.fetch_add(1, SeqCst);
    };
    thread::scope(|scope| {
        (0..4).for_each(|_| drop(scope.spawn(count)));
        wait_until("some rounds are done", || rounds.load(SeqCst) > 200);
        kv.terminate();
    });
    assert_eq!(ended.load(SeqCst), 4);
    let report = kv.end();
    assert!(report.contains("books balance"), "{report}");
}
