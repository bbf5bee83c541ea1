//! HTTP/2 by hand, frame by frame.

use std::net::SocketAddr;

use super::http::{Client, End};

/// A frame as RFC 9113 has it.
pub struct Raw {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// Frames by hand, and what is answered to them.
pub struct Frames {
    pub client: Client,
    pub confirms_pings: bool,
}

impl Frames {
    pub fn new(client: Client) -> Frames {
        Frames { client, confirms_pings: true }
    }

    pub fn greet(addr: SocketAddr) -> Frames {
        let mut client = Client::connect(addr);
        client.say(PREFACE);
        client.say(frame(SETTINGS, 0, 0, &[]));
        Frames::new(client)
    }

    /// The next frame; settings and pings are confirmed.
    pub fn next(&mut self) -> Result<Raw, End> {
        while self.client.rest.len() < 9 {
            self.client.more()?;
        }
        let head = self.client.take(9)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let payload = self.client.take(length as usize)?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if head[4] & ACK == 0 {
            match head[3] {
                SETTINGS => drop(self.client.say(frame(SETTINGS, ACK, 0, &[]))),
                PING if self.confirms_pings => drop(self.client.say(frame(PING, ACK, 0, &payload))),
                _ => {}
            }
        }
        Ok(Raw { kind: head[3], flags: head[4], stream, payload })
    }

    pub fn await_kind(&mut self, kind: u8) -> Raw {
        loop {
            match self.next() {
                Ok(frame) if frame.kind == kind => return frame,
                Ok(_) => {}
                Err(end) => panic!("{end:?} before a frame of kind {kind}"),
            }
        }
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A GET without a body: indexed `:method` and `:scheme`, literal `:path` (RFC 7541, appendix A).
pub fn request(stream: u32, path: &str) -> Vec<u8> {
    let mut fields = vec![0x82, 0x86, 0x04, path.len() as u8];
    fields.extend(path.as_bytes());
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &fields)
}

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;
