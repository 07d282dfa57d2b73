//! Server-sent events out of bytes (pure).

/// Longest event: a part of a log, with every byte escaped, and room.
const MAX_EVENT_BYTES: usize = 1024 * 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Event {
    /// Its name.
    pub(crate) name: String,
    /// Where the stream goes on after it.
    pub(crate) id: Option<String>,
    /// Its text.
    pub(crate) data: String,
}

/// An event is too long to be one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong;

/// Takes bytes as they come and gives events as soon as they are whole.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    line: Vec<u8>,
    event: Event,
}

impl Parser {
    /// Takes bytes; events that they complete go to `events`.
    pub(crate) fn push(&mut self, bytes: &[u8], events: &mut Vec<Event>) -> Result<(), TooLong> {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() + self.event.data.len() > MAX_EVENT_BYTES {
                return Err(TooLong);
            }
            if self.line.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.take(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']), events);
            }
        }
        Ok(())
    }

    fn take(&mut self, line: &str, events: &mut Vec<Event>) {
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            // Without data it is a comment or a setting.
            if !event.data.is_empty() {
                events.push(event);
            }
            return;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "id" => self.event.id = Some(value.to_owned()),
            "data" if self.event.data.is_empty() => value.clone_into(&mut self.event.data),
            "data" => {
                self.event.data.push('\n');
                self.event.data.push_str(value);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "retry: 2000\n\nevent: log\nid: 1-5\ndata: {\"ä\":1}\n\n: alive\n\nevent: end\r\ndata: a\r\ndata:b\r\n\r\nevent: cut";

    #[test]
    fn events_are_the_same_wherever_the_bytes_are_cut() {
        let expected = [
            Event { name: "log".to_owned(), id: Some("1-5".to_owned()), data: "{\"ä\":1}".to_owned() },
            Event { name: "end".to_owned(), id: None, data: "a\nb".to_owned() },
        ];
        for size in 1..STREAM.len() {
            let (mut parser, mut events) = (Parser::default(), Vec::new());
            for part in STREAM.as_bytes().chunks(size) {
                parser.push(part, &mut events).unwrap();
            }
            assert_eq!(events, expected);
        }
    }

    #[test]
    fn what_never_ends_is_not_kept() {
        let (mut parser, mut events) = (Parser::default(), Vec::new());
        let endless = vec![b'x'; MAX_EVENT_BYTES + 1];
        assert_eq!(parser.push(&endless, &mut events), Err(TooLong));
        let mut parser = Parser::default();
        let line = format!("data: {}\n", "x".repeat(1000)).repeat(2000);
        assert_eq!(parser.push(line.as_bytes(), &mut events), Err(TooLong));
    }
}
