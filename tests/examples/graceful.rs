//! The example of a server inside a tokio service, which drains it.

use std::io::{BufRead, BufReader, Read, Write};

use crate::common::example::Example;

#[test]
fn graceful_answers_what_has_begun_while_its_owner_drains_it() {
    for round in 0..5 {
        let example = Example::start("graceful", &[], &[]);
        let mut peers: Vec<_> = (0..4).map(|_| BufReader::new(example.connect())).collect();
        let mut numbers = Vec::new();
        for n in 0..100 {
            for peer in &mut peers {
                peer.get_mut().write_all(format!("line {n}\n").as_bytes()).expect("send");
            }
            for peer in &mut peers {
                let mut line = String::new();
                peer.read_line(&mut line).expect("an answer");
                numbers.push(line.trim().parse::<u64>().expect("a number"));
            }
        }
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(1..=400), "each line has a number of its own");
        // One has begun a line when the drain comes, and ends it after that.
        peers[0].get_mut().write_all(b"a late ").expect("send");
        peers[1].get_mut().write_all(b"last\n").expect("send");
        let mut line = String::new();
        peers[1].read_line(&mut line).expect("an answer");
        assert_eq!(line, "401\n");
        example.terminate();
        assert_eq!(peers[1].read(&mut [0]).expect("a FIN, no reset"), 0, "round {round}");
        peers[0].get_mut().write_all(b"line\n").expect("send");
        let mut rest = String::new();
        peers[0].read_to_string(&mut rest).expect("a FIN, no reset");
        assert_eq!(rest, "402\n", "round {round}");
        let words = example.end();
        assert!(words.starts_with("402 lines\n") && words.contains("books balance"), "{words}");
    }
}
