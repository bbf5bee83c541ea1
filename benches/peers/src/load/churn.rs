//! Connection churn: connect, one request, its reply, reset; some of them under way at a time.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{STALL_S_MAX, Sample, sample::record, silent};

/// Short connections, opened one by one, so that as many are always under way.
///
/// A reset leaves no `TIME_WAIT`, so that ports do not run out.
pub struct Churn {
    pub address: SocketAddr,
    pub under_way: usize,
    pub bytes: usize,
}

impl Churn {
    /// A latency counts from before `connect` to the reply, the waiting for the older ones
    /// included.
    ///
    /// # Errors
    ///
    /// A connection is refused, a byte differs, or a reply takes longer than [`STALL_S_MAX`].
    pub fn run(&self, time: Duration) -> io::Result<Sample> {
        let mut sample = Sample::new();
        let request: Vec<u8> = (0..self.bytes).map(|at| (at * 7) as u8).collect();
        let mut reply = vec![0; self.bytes];
        let mut open = VecDeque::with_capacity(self.under_way);
        let begin = Instant::now();
        while begin.elapsed() < time || !open.is_empty() {
            while open.len() < self.under_way && begin.elapsed() < time {
                let since = Instant::now();
                open.push_back((self.ask(&request)?, since));
            }
            let Some((mut stream, since)) = open.pop_front() else { break };
            stream.read_exact(&mut reply).map_err(silent)?;
            if reply != request {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the reply differs"));
            }
            drop(stream);
            record(&mut sample.latency, since.elapsed().as_nanos() as u64);
            sample.requests += 1;
        }
        sample.elapsed = begin.elapsed();
        Ok(sample)
    }

    /// A new connection that has asked; dropping it resets it.
    fn ask(&self, request: &[u8]) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect(self.address)?;
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.set_read_timeout(Some(Duration::from_secs(STALL_S_MAX)))?;
        stream.write_all(request)?;
        Ok(stream)
    }
}
