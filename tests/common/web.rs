//! The smallest HTTP/1.1 client: one request, one connection, the whole answer.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::limit;

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    /// With names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(other, _)| other == name);
        header.map(|(_, value)| value.as_str())
    }
}

/// Asks for a page, and calls the server by its address.
pub fn get(addr: SocketAddr, path: &str) -> io::Result<Reply> {
    ask(addr, &format!("GET {path} HTTP/1.1\r\nhost: {addr}\r\n"))
}

/// Sends a request of that line and those headers, and reads the answer.
pub fn ask(addr: SocketAddr, head: &str) -> io::Result<Reply> {
    let mut stream = TcpStream::connect_timeout(&addr, limit(10_000))?;
    stream.set_read_timeout(Some(limit(20_000)))?;
    ask_over(&mut stream, head, "")
}

/// As [`ask`], over a connection that is there already.
pub fn ask_over(stream: &mut (impl Read + Write), head: &str, body: &str) -> io::Result<Reply> {
    stream.write_all(format!("{head}connection: close\r\n\r\n{body}").as_bytes())?;
    let mut text = Vec::new();
    let mut piece = vec![0; 65_536];
    loop {
        let count = stream.read(&mut piece)?;
        text.extend_from_slice(&piece[..count]);
        // Some keep the connection open all the same.
        let whole = std::str::from_utf8(&text).ok().and_then(read);
        match whole.filter(|(_, is_whole)| *is_whole || count == 0) {
            Some((reply, _)) => return Ok(reply),
            None if count > 0 => {}
            None => {
                let text = String::from_utf8_lossy(&text);
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{text:?}")));
            }
        }
    }
}

/// An answer, and whether all of it is there; that to a HEAD has no body. `None` for less.
fn read(text: &str) -> Option<(Reply, bool)> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    let headers: Vec<_> = lines
        .map(|line| line.split_once(':').expect("a header"))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let reply = Reply { status, headers, body: body.to_owned() };
    let length: usize = reply.header("content-length")?.parse().ok()?;
    let is_whole = body.len() == length;
    (is_whole || body.is_empty()).then_some((reply, is_whole))
}
