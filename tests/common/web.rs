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
    stream.read_to_end(&mut text)?;
    let text = String::from_utf8(text).expect("an answer in UTF-8");
    read(&text).ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, format!("{text:?}")))
}

/// `None` for what is no whole answer.
fn read(text: &str) -> Option<Reply> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    let headers: Vec<_> = lines
        .map(|line| line.split_once(':').expect("a header"))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let reply = Reply { status, headers, body: body.to_owned() };
    let length: usize = reply.header("content-length")?.parse().ok()?;
    (body.len() == length || body.is_empty()).then_some(reply)
}
