//! From the pipes of a build to its log: redact, frame, spool (shell: composes the parts, decides nothing).
//!
//! Redaction comes before framing, so that neither a chunk nor a line nor the cap on lines can cut a secret
//! in two. The spool gets whole lines, so that the two streams of a build do not mix within a line.

pub mod display;
pub mod frame;
pub mod redact;
pub mod spool;

use std::borrow::Cow;

use display::Colours;
use frame::{Framer, Part, Piece};
use redact::Redactor;
use spool::{Spool, SpoolReport};

/// More is taken in steps of this size, so that memory does not depend on the caller's buffers.
const CHUNK: usize = 64 << 10;

/// Who printed a line. Kiln's decisions rest on this field, never on what a line looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStream {
    /// Commands of the Dockerfile, and buildah's progress among them.
    Run,
    /// The build tool's own log.
    Tool,
}

/// A line of the log, or a part of a long one, without secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine<'a> {
    /// Who printed it.
    pub stream: LogStream,
    /// As it was printed, except that invalid UTF-8 is replaced. Not fit for a terminal; see
    /// [`LogLine::display`].
    pub text: Cow<'a, str>,
    /// Which part of the line it is.
    pub part: Part,
}

impl LogLine<'_> {
    /// The text as it may be shown.
    pub fn display(&self, colours: Colours) -> Cow<'_, str> {
        display::sanitize(&self.text, colours)
    }

    /// The line goes on after this part.
    pub const fn truncated(&self) -> bool {
        !self.part.ends_line()
    }
}

/// One stream on its way to the spool.
struct Lane {
    redactor: Redactor,
    framer: Framer,
}

/// The log of one build.
pub struct LogPipeline<F> {
    run: Lane,
    tool: Lane,
    /// Who wrote the last byte of the spool.
    last: LogStream,
    outlet: Outlet<F>,
    /// Bytes after redaction, kept for its memory.
    clean: Vec<u8>,
}

/// Where lines go.
struct Outlet<F> {
    spool: Spool,
    observer: F,
    /// What goes to the spool in one call.
    batch: Vec<u8>,
}

impl<F: FnMut(&LogLine<'_>)> LogPipeline<F> {
    /// A pipeline; `observer` sees every line as soon as it is complete, and must not block for long.
    pub fn new(redactor: &Redactor, spool: Spool, observer: F) -> Self {
        let lane = || Lane { redactor: redactor.fresh(), framer: Framer::default() };
        let outlet = Outlet { spool, observer, batch: Vec::with_capacity(CHUNK) };
        Self { run: lane(), tool: lane(), last: LogStream::Run, outlet, clean: Vec::with_capacity(CHUNK) }
    }

    /// Takes bytes from one of the pipes.
    pub fn push(&mut self, stream: LogStream, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK) {
            let lane = lane(&mut self.run, &mut self.tool, stream);
            self.clean.clear();
            lane.redactor.push(chunk, &mut self.clean);
            lane.framer.push(&self.clean, |piece| self.outlet.deliver(stream, piece));
            self.pass_on(stream);
        }
    }

    /// Whether an unfinished line waits; after a quiet time the caller shows it by [`LogPipeline::flush`].
    pub fn pending(&self) -> bool {
        self.run.framer.pending() + self.tool.framer.pending() > 0
    }

    /// Delivers unfinished lines. What may be the start of a secret stays back.
    pub fn flush(&mut self) {
        for stream in [LogStream::Run, LogStream::Tool] {
            let lane = lane(&mut self.run, &mut self.tool, stream);
            lane.framer.flush(|piece| self.outlet.deliver(stream, piece));
            self.pass_on(stream);
        }
    }

    /// The last lines for a failure message, safe to show.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        self.outlet.spool.last_lines(count)
    }

    /// Ends both streams and the log; the last lines, up to `count`, come with the report.
    pub fn finish(mut self, count: usize) -> (SpoolReport, Vec<String>) {
        for stream in [LogStream::Run, LogStream::Tool] {
            let empty = Lane { redactor: self.run.redactor.fresh(), framer: Framer::default() };
            let mut ended = std::mem::replace(lane(&mut self.run, &mut self.tool, stream), empty);
            self.clean.clear();
            ended.redactor.finish(&mut self.clean);
            ended.framer.push(&self.clean, |piece| self.outlet.deliver(stream, piece));
            ended.framer.finish(|piece| self.outlet.deliver(stream, piece));
            self.pass_on(stream);
        }
        let lines = self.last_lines(count);
        (self.outlet.spool.finish(), lines)
    }

    /// Writes the batch, on a line of its own if the other stream left one open.
    fn pass_on(&mut self, stream: LogStream) {
        let Outlet { spool, batch, .. } = &mut self.outlet;
        if batch.is_empty() {
            return;
        }
        if self.last != stream && spool.inside_line() {
            spool.write(b"\n");
        }
        self.last = stream;
        spool.write(batch);
        batch.clear();
    }
}

impl<F: FnMut(&LogLine<'_>)> Outlet<F> {
    fn deliver(&mut self, stream: LogStream, piece: Piece<'_>) {
        self.batch.extend_from_slice(piece.bytes);
        if piece.part.ends_line() {
            self.batch.push(b'\n');
        }
        let line = LogLine { stream, text: String::from_utf8_lossy(piece.bytes), part: piece.part };
        (self.observer)(&line);
    }
}

fn lane<'a>(run: &'a mut Lane, tool: &'a mut Lane, stream: LogStream) -> &'a mut Lane {
    match stream {
        LogStream::Run => run,
        LogStream::Tool => tool,
    }
}

#[cfg(test)]
mod tests;
