//! The example that is one server twice does the same on slipring and on tokio-uring.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::process::Command;

use crate::common::child::{Process, example};
use crate::common::connect;

#[test]
fn both_servers_answer_each_line_with_its_capitals() {
    for which in ["slipring", "tokio-uring"] {
        let mut command = Command::new(example("migrate"));
        command.arg(which).env("SLIPRING_LISTEN", "127.0.0.1:0");
        let mut server = Process::start(command.env("SLIPRING_CONNECTIONS_MAX", "200"));
        let addr = server.line_after("listening on ").parse().expect("an address");
        for pieces in [&["one\ntwo\n"][..], &["o", "ne\nt", "wo\n"], &["one\n", "two\n"]] {
            let mut client = connect(addr);
            for piece in pieces {
                client.write_all(piece.as_bytes()).expect("send");
            }
            let mut answer = [0; 8];
            client.read_exact(&mut answer).expect("an answer");
            assert_eq!(&answer, b"ONE\nTWO\n", "{which}: {pieces:?}");
            client.shutdown(Shutdown::Write).expect("the end");
            assert_eq!(client.read(&mut answer).expect("a FIN"), 0, "{which}: {pieces:?}");
        }
        let mut client = connect(addr);
        let long = [b'x'; 100_000];
        // One that is too long may be refused before all of it was sent.
        let _ = client.write_all(&long);
        let answered = client.read(&mut [0; 8]).unwrap_or(0);
        assert_eq!(answered, 0, "{which}: a line without an end");

        server.signal(libc::SIGTERM);
        let status = server.child.wait().expect("its end");
        // Only one of them makes an end of its own, and accounts for it.
        assert_eq!(status.success(), which == "slipring", "{which}: {status}");
        let said = server.rest().join("\n");
        assert_eq!(said.contains("4 accepted = 4 closed"), which == "slipring", "{which}: {said}");
    }
}
