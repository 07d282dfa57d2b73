//! A name server that knows one address and counts the questions (shell).

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::site::wait;

/// RFC 1035: identifier, flags, four counts.
const HEADER: usize = 12;
/// Type and class of a question.
const QUESTION_TAIL: usize = 4;
const TYPE_A: [u8; 2] = [0, 1];

/// Answers every question for an IPv4 address with the same one.
#[derive(Debug)]
pub struct Resolver {
    questions: Arc<Mutex<Vec<String>>>,
    stop: Option<std::io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Resolver {
    /// Listens there.
    pub fn start(listen: SocketAddr, answer: Ipv4Addr) -> Self {
        let socket = UdpSocket::bind(listen).unwrap_or_else(|e| panic!("listen on {listen}: {e}"));
        let (ended, stop) = std::io::pipe().unwrap();
        let questions = Arc::default();
        let theirs = Arc::clone(&questions);
        let body = move || serve(&socket, &ended, answer, &theirs);
        let thread = std::thread::Builder::new().name("resolver".to_owned()).spawn(body).unwrap();
        Self { questions, stop: Some(stop), thread: Some(thread) }
    }

    /// The names that were asked for.
    pub fn questions(&self) -> Vec<String> {
        self.questions.lock().unwrap().clone()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, ended: &std::io::PipeReader, answer: Ipv4Addr, asked: &Mutex<Vec<String>>) {
    let mut packet = [0; 512];
    while wait(socket.as_fd(), ended) {
        let Ok((length, client)) = socket.recv_from(&mut packet) else { continue };
        if let Some((name, reply)) = reply(&packet[..length], answer) {
            asked.lock().unwrap().push(name);
            let _ = socket.send_to(&reply, client);
        }
    }
}

/// The name of the question, and the whole answer.
fn reply(query: &[u8], answer: Ipv4Addr) -> Option<(String, Vec<u8>)> {
    let (name, end) = name(query)?;
    let question = query.get(HEADER..end + QUESTION_TAIL)?;
    let known = question[question.len() - QUESTION_TAIL..].starts_with(&TYPE_A);
    let mut reply = query[..2].to_vec();
    // A response, recursion available, no error; one question, and at most one answer.
    reply.extend([0x81, 0x80, 0, 1, 0, u8::from(known), 0, 0, 0, 0]);
    reply.extend(question);
    if known {
        // The name of the question, type A, class IN, one second, four bytes.
        reply.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        reply.extend(answer.octets());
    }
    Some((name, reply))
}

/// The first question's name and where it ends.
fn name(query: &[u8]) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).into_owned());
        at += length;
    }
}
