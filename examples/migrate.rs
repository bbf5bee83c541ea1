//! One server twice, on slipring and as it was on tokio-uring: `cargo run --release --example
//! migrate`, or `cargo run --release --example migrate -- tokio-uring`, then `nc 127.0.0.1 7000`.
//!
//! It answers each line with its capitals. Read both from top to bottom: what is left out on
//! slipring is the accept loop, the buffer of each connection, and putting lines together; what is
//! there besides is a limit on a line's length, deadlines, a thread for each core, a shutdown and
//! its account. `docs/from-tokio-uring.md` has the rest.

use std::process::ExitCode;

fn main() -> ExitCode {
    let tokio_uring = std::env::args().nth(1).is_some_and(|which| which == "tokio-uring");
    let served = if tokio_uring { before::serve() } else { after::serve() };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("migrate: {error}");
            ExitCode::from(2)
        }
    }
}

mod after {
    use slipring::{Config, Connection, Server};

    pub fn serve() -> std::io::Result<()> {
        let config = Config::from_env()?;
        let mut server = Server::new(config.clone()).drain_on_signals();
        for address in config.listen_addresses() {
            server = server.listen(address, answer);
        }
        // One thread for each core, each with its own ring and its own listener.
        let running = server.start()?;
        println!("listening on {}", running.local_addrs()[0]);
        let report = running.join()?;
        println!("{report}");
        Ok(())
    }

    async fn answer(mut conn: Connection) -> slipring::Result<()> {
        // The core has the buffer; a line is owned when it is whole, and not otherwise.
        while let Some(mut line) = conn.read_until(b'\n', super::LINE_BYTES_MAX).await? {
            line.make_ascii_uppercase();
            // Given away: freed when the kernel has sent it. Sends of one turn leave together.
            conn.send(line).await?;
        }
        // The end of the stream, or of an idle connection in a drain. Dropping it closes it.
        Ok(())
    }
}

mod before {
    use std::io;
    use std::rc::Rc;

    use tokio_uring::buf::BoundedBuf;
    use tokio_uring::net::{TcpListener, TcpStream};

    pub fn serve() -> io::Result<()> {
        let address = std::env::var("SLIPRING_LISTEN").unwrap_or("127.0.0.1:7000".to_owned());
        let address = address.parse().map_err(io::Error::other)?;
        // One thread; for more, a runtime in each, and SO_REUSEPORT by hand.
        tokio_uring::start(async {
            let listener = TcpListener::bind(address)?;
            println!("listening on {}", listener.local_addr()?);
            loop {
                // One error, such as too many open files, ends the server here.
                let (stream, _peer) = listener.accept().await?;
                tokio_uring::spawn(async move {
                    if let Err(error) = answer(Rc::new(stream)).await {
                        eprintln!("migrate: {error}");
                    }
                });
            }
        })
    }

    async fn answer(stream: Rc<TcpStream>) -> io::Result<()> {
        let mut buffer = vec![0; 4096];
        let mut rest = Vec::new();
        loop {
            // It waits for ever for a peer that says nothing, and holds its buffer meanwhile.
            let (read, back) = stream.read(buffer).await;
            buffer = back;
            let read = read?;
            if read == 0 {
                return Ok(());
            }
            rest.extend_from_slice(&buffer[..read]);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = rest.drain(..=end).collect();
                line.make_ascii_uppercase();
                let (written, _line) = stream.write_all(line.slice(..)).await;
                written?;
            }
            if rest.len() > super::LINE_BYTES_MAX {
                return Err(io::Error::other("a line that is too long"));
            }
        }
    }
}

const LINE_BYTES_MAX: usize = 64 * 1024;
