//! As much of HTTP as a loopback registry needs (shell).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Nothing on loopback takes this long.
const TIMEOUT: Duration = Duration::from_secs(20);

/// First line and headers of a request or response, as sent.
#[derive(Debug, Clone)]
pub struct Head {
    /// Lines without their ends; the first is the request or status line.
    pub lines: Vec<String>,
}

impl Head {
    /// Reads up to the empty line; `None` at the end of the stream.
    pub fn read(stream: &mut impl BufRead) -> Option<Self> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).ok()? == 0 {
                return None;
            }
            match line.trim_end() {
                "" => return Some(Self { lines }),
                text => lines.push(text.to_owned()),
            }
        }
    }

    /// The first line.
    pub fn first(&self) -> &str {
        self.lines.first().map_or("", String::as_str)
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let fields = self.lines.iter().skip(1).filter_map(|line| line.split_once(':'));
        fields.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Status line and headers.
    pub head: Head,
    /// Body.
    pub body: Vec<u8>,
}

/// One request on a connection of its own.
pub fn request(to: SocketAddr, method: &str, path: &str, kind: &str, body: &[u8]) -> Response {
    let stream = TcpStream::connect_timeout(&to, TIMEOUT).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    exchange(stream, &to.to_string(), (method, path), (kind, body))
}

/// The same over a socket in the file system.
pub fn request_unix(to: &Path, method: &str, path: &str, kind: &str, body: &[u8]) -> Response {
    let stream = UnixStream::connect(to).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    exchange(stream, "localhost", (method, path), (kind, body))
}

fn exchange(
    mut stream: impl Read + Write,
    host: &str,
    (method, path): (&str, &str),
    (kind, body): (&str, &[u8]),
) -> Response {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: {kind}\r\n\
         Accept: */*\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut reader = BufReader::new(stream);
    let head = Head::read(&mut reader).unwrap();
    let status = head.first().split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap();
    let mut body = Vec::new();
    reader.read_to_end(&mut body).unwrap();
    Response { status, head, body }
}
