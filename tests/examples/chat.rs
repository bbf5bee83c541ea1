//! The chat example, with plain TCP clients on two cores: everybody gets everything in the order of
//! each who has said it, one who is slow is told what it has missed and keeps nobody up, and a
//! drain says goodbye to all.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;

use socket2::{Domain, Socket, Type};

use crate::common::example::Example;
use crate::common::{limit, wait_until};

fn chat() -> Example {
    // Whoever comes goes to the core that has fewer.
    let two = [("SLIPRING_CPUS", "0,1"), ("SLIPRING_PIN", "0"), ("SLIPRING_BALANCE", "least")];
    Example::start("chat", &[], &two)
}

/// A client that has given its name and has been let in.
fn come(stream: TcpStream, name: &str) -> BufReader<TcpStream> {
    let mut reader = BufReader::new(stream);
    assert_eq!(line(&mut reader), "* your name?");
    say(&reader, name);
    assert_eq!(line(&mut reader), format!("* {name} has come"));
    reader
}

fn say(client: &BufReader<TcpStream>, text: &str) {
    let mut stream = client.get_ref();
    stream.write_all(format!("{text}\n").as_bytes()).expect("send");
}

fn line(client: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    client.read_line(&mut line).expect("a line in time");
    line.trim_end().to_owned()
}

#[test]
fn everybody_gets_all_lines_in_the_order_of_each_sender() {
    const CLIENTS: usize = 12;
    const LINES: usize = 60;
    let chat = chat();
    let mut clients: Vec<_> =
        (0..CLIENTS).map(|client| come(chat.connect(), &format!("c{client}"))).collect();
    // Each has heard of those that came later.
    for (client, reader) in clients.iter_mut().enumerate() {
        for later in client + 1..CLIENTS {
            assert_eq!(line(reader), format!("* c{later} has come"));
        }
    }
    let listeners: Vec<_> = clients
        .into_iter()
        .enumerate()
        .map(|(client, mut reader)| {
            thread::spawn(move || {
                for number in 0..LINES {
                    say(&reader, &format!("line {number}"));
                }
                let mut next = [0; CLIENTS];
                for _ in 0..CLIENTS * LINES {
                    let heard = line(&mut reader);
                    let (sender, text) = heard.split_once(": ").expect("a line of somebody's");
                    let sender: usize = sender[1..].parse().expect("a client's number");
                    assert_eq!(text, format!("line {}", next[sender]), "{client} of {sender}");
                    next[sender] += 1;
                }
                assert_eq!(next, [LINES; CLIENTS]);
                reader
            })
        })
        .collect();
    let mut clients: Vec<_> =
        listeners.into_iter().map(|it| it.join().expect("it has heard all")).collect();
    chat.terminate();
    for reader in &mut clients {
        let mut rest = String::new();
        reader.read_to_string(&mut rest).expect("the end, and no reset");
        assert!(rest.ends_with("* goodbye\n"), "{rest:?}");
    }
    let report = chat.end();
    assert!(report.contains("books balance"), "{report}");
}

#[test]
fn a_slow_reader_is_told_what_it_has_missed_and_keeps_nobody_up() {
    const PIECES: usize = 160;
    const LINES: usize = 100;
    let chat = chat();
    // What the kernels keep for it is to be little.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(4096).expect("set SO_RCVBUF");
    socket.connect(&chat.addr.into()).expect("connect");
    socket.set_read_timeout(Some(limit(10_000))).expect("set a time limit");
    let mut slow = come(socket.into(), "slow");
    let mut talker = come(chat.connect(), "talker");
    let mut others: Vec<_> =
        (0..3).map(|other| come(chat.connect(), &format!("other{other}"))).collect();
    let text = "x".repeat(400);
    let mut said = 0;
    for _ in 0..PIECES {
        for _ in 0..LINES {
            say(&talker, &format!("{said} {text}"));
            said += 1;
        }
        // Nobody goes on before all but one have heard that.
        for reader in others.iter_mut().chain([&mut talker]) {
            let last = format!("talker: {} {text}", said - 1);
            let mut heard = String::new();
            while heard != last {
                heard = line(reader);
                assert!(!heard.starts_with("* you have missed"), "{heard}");
            }
        }
    }
    let (mut next, mut missed) = (0, 0);
    while next < said {
        let heard = line(&mut slow);
        if let Some(lines) = heard.strip_prefix("* you have missed ") {
            missed += lines.split(' ').next().expect("a number").parse::<usize>().expect("one");
        } else if let Some(heard) = heard.strip_prefix("talker: ") {
            let number: usize = heard.split(' ').next().expect("a number").parse().expect("one");
            assert!(number >= next, "{number} after {next}");
            next = number + 1;
        }
    }
    assert!(missed > LINES, "it missed {missed} of {said} lines");
    say(&talker, "still there");
    wait_until("it hears the rest", || line(&mut slow) == "talker: still there");
    chat.terminate();
    let report = chat.end();
    assert!(report.contains("books balance"), "{report}");
}

#[test]
fn a_line_that_is_too_long_ends_its_sender_with_a_word() {
    let chat = chat();
    let mut other = come(chat.connect(), "other");
    let mut long = come(chat.connect(), "long");
    assert_eq!(line(&mut other), "* long has come");
    say(&long, &"x".repeat(600));
    let mut rest = String::new();
    long.read_to_string(&mut rest).expect("the end, and no reset");
    assert!(rest.ends_with("* your line is too long\n"), "{rest:?}");
    assert_eq!(line(&mut other), "* long has left");
    drop(other);
    chat.terminate();
    chat.end();
}
